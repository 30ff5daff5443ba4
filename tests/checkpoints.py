"""Checkpoints that are not as they should be."""

import json
from pathlib import Path


def without_manifest(checkpoint: Path) -> Path:
    """Makes it one of those that were written before there was a manifest."""
    file = checkpoint / "tgdpo.json"
    content = json.loads(file.read_text())
    del content["files"], content["sha256"]
    file.write_text(json.dumps(content))
    return checkpoint


def flip(file: Path, position: int) -> None:
    """Flips one bit of a byte."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
