"""Recipes of Blackwell with the real Transformer Engine Python and megatron-core's real wrappers; kernels emulated.

Needs the environment that ``tests/emulation/run.sh`` makes. No GPU of this kind was used yet (docs/gpu.md).
"""

import importlib.metadata
import json
import math
from typing import Any

import pytest

from tests.emulation.emulated import missing
from tests.launch import run_module
from tests.tiny_models import make_model

if reason := missing():
    pytest.skip(reason, allow_module_level=True)
VERSION = tuple(map(int, importlib.metadata.version("transformer_engine").split(".")[:2]))
if (2, 16) <= VERSION < (2, 19):
    pytest.skip(
        "these versions make empty tensors in their compiled module and do not describe them", allow_module_level=True
    )

OPERANDS = {"bf16": "Tensor", "mxfp8": "MXFP8Tensor", "nvfp4": "NVFP4Tensor"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker left, by recipe."""
    root = tmp_path_factory.mktemp("blackwell")
    for seed, name in enumerate(("policy", "guide")):
        make_model(root / name, vocab_size=256, hidden_size=128, mlp_size=256, layers=2, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMULATED_CAPABILITY", "10.0")
        run_module("tests.emulation.worker_blackwell", [str(root)], processes=1)
    return json.loads((root / "blackwell.json").read_text())


@pytest.mark.parametrize("recipe", ["mxfp8", "nvfp4"])
def test_layers_compute_in_the_recipe_and_train_as_in_bf16(found: dict[str, Any], recipe: str) -> None:
    run, plain = found[recipe], found["bf16"]
    assert any(operand.startswith(OPERANDS[recipe]) for operand in run["operands"])
    assert not any(operand.startswith(("MXFP8", "NVFP4")) for operand in plain["operands"])
    (first, norm), (_, plain_norm) = run["before"][0], plain["before"][0]
    # Policy and reference are the same, and rounded alike.
    assert math.isclose(first, math.log(2), rel_tol=1e-6)
    assert norm == pytest.approx(plain_norm, rel=0.2)
    assert norm != plain_norm


@pytest.mark.parametrize("case", ["mxfp8", "nvfp4", "nvfp4, FP8 frozen", "nvfp4, plain ends"])
def test_a_run_that_continues_makes_the_same_steps(found: dict[str, Any], case: str) -> None:
    """Where gradients are rounded to the nearest, as here."""
    assert found[case]["again"] == found[case]["after"]


def test_frozen_models_give_the_same_wherever_they_are_held(found: dict[str, Any]) -> None:
    assert found["nvfp4, streamed"]["before"] == found["nvfp4"]["before"]


def test_plain_ends_are_plain(found: dict[str, Any]) -> None:
    """Both layers of these models are ends."""
    assert found["nvfp4, plain ends"]["before"] == found["bf16"]["before"]
