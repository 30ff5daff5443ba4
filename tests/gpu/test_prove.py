"""The whole proof, where there is a GPU: ``python -m pytest tests/gpu -rP``."""

from pathlib import Path

import pytest
import torch

from tests.launch import run_module

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the proof of the GPU path needs a GPU")


def test_every_figure_keeps_its_limit(tmp_path: Path) -> None:
    done = run_module("tests.gpu.prove", ["--out", str(tmp_path / "proof.json")], timeout=900, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
