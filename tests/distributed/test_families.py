"""Families beyond the first: the same logits and gradients as transformers on two layouts, and weights to the bit.

All share one start of the worker. What layouts owe to any family is test_conversion.py's.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.common import assert_same_weights
from tests.distributed.test_conversion import GRADIENT_TOLERANCE, LOGIT_TOLERANCE, Reference
from tests.distributed.worker_conversion import LENGTHS
from tests.distributed.worker_families import LAYOUTS
from tests.processes import run_forked
from tests.tiny_models import MORE_FAMILY_OPTIONS, logits_divisor, make_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for number, family in enumerate(MORE_FAMILY_OPTIONS):
        make_model(root / "hf" / family, family, tied=number % 2 == 1, seed=6)
    run_forked("tests.distributed.worker_families", [str(root)], processes=2)
    return root


@pytest.fixture(scope="module")
def reference(root: Path) -> Reference:
    return Reference(root)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MORE_FAMILY_OPTIONS)
def test_logits_equal_transformers(root: Path, reference: Reference, family: str, layout: str) -> None:
    logits = load_file(root / "out" / layout / family / "logits.safetensors")["logits"][: sum(LENGTHS)]
    wanted = reference[family].logits
    assert logits.shape == wanted.shape
    differences = [
        float((ours - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(logits.split(LENGTHS), wanted.split(LENGTHS), strict=True)
    ]
    print(family, layout, f"{max(differences):.1e}")
    assert max(differences) < LOGIT_TOLERANCE


@pytest.mark.parametrize("family", MORE_FAMILY_OPTIONS)
def test_gradients_equal_transformers(root: Path, reference: Reference, family: str) -> None:
    gradients = load_file(root / "out" / LAYOUTS[0] / family / "gradients.safetensors")
    wanted = reference[family].gradients
    assert gradients.keys() == wanted.keys()
    # Ours end with what logits are made of, their factor included.
    scaling = logits_divisor(json.loads((root / "hf" / family / "config.json").read_text()))
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        assert (gradients[name] * scaling - gradient).norm() / gradient.norm() < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("family", MORE_FAMILY_OPTIONS)
def test_weights_come_back_to_the_bit(root: Path, family: str) -> None:
    assert_same_weights(root / "out" / LAYOUTS[0] / family / "exported", root / "hf" / family)
