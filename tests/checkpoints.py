"""Checkpoints: written and read in one call, and such as are not as they should be."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.manifest import check_files
from megatron_tgdpo.checkpoints.model_directory import is_megatron_checkpoint
from megatron_tgdpo.checkpoints.save import stage, write
from megatron_tgdpo.errors import DamageError
from megatron_tgdpo.models.hf_weights.load import load_hf_weights, load_megatron_weights
from megatron_tgdpo.models.language_model import LanguageModel


def save(path: Path, sharded_state_dict: dict[str, Any], hf_dir: Path, metadata: Mapping[str, Any]) -> None:
    """Stages a state and writes it; collective over the default group."""
    write(path, stage(sharded_state_dict), hf_dir, metadata)


def load_weights(model: LanguageModel, path: Path, hf_config: PretrainedConfig, pg: ProcessGroupCollection) -> None:
    """Fills a rank's slice from an HF directory or a Megatron checkpoint; collective over all ranks for the latter."""
    if is_megatron_checkpoint(path):
        load_megatron_weights([model], path, hf_config)
    else:
        load_hf_weights(model, path, hf_config, pg)


def is_complete(path: Path) -> bool:
    """Whether a checkpoint's every file is there and has its size."""
    try:
        check_files(path)
    except DamageError:
        return False
    return True


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


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))
