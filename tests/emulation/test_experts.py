"""Models with experts with the real Transformer Engine Python and megatron-core's real wrappers; kernels emulated.

Their grouped products, in fp32 and bf16 beside the local layer spec and plain PyTorch, in FP8 beside a plain
computation of one expert after another. Needs the environment that ``tests/emulation/run.sh`` makes.
"""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import reference
from tests.emulation.cases import EXPERT_CASES, continues
from tests.emulation.emulated import missing
from tests.launch import run_module
from tests.tiny_models import EXPERT_OPTIONS, make_model

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

# Tensor ranks, and ranks with different experts; the latter over data ranks and over tensor ranks.
LAYOUTS = {"one rank": (1, 1), "expert 2": (1, 2), "tensor 2, expert 2": (2, 2)}
SPLIT = [name for name in LAYOUTS if name != "one rank"]
Found = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    small: dict[str, Any] = {"vocab_size": 256, "hidden_size": 128, "layers": 2, "moe_intermediate_size": 64}
    make_model(path / "policy", "qwen3_moe", seed=0, **small)
    make_model(path / "guide", "qwen2_moe", seed=1, **small, shared_expert_intermediate_size=96)
    for family in EXPERT_OPTIONS:
        make_model(path / "hf" / family, family, layers=2)
    return path


@pytest.fixture(scope="module")
def found(root: Path) -> Found:
    """What the worker left, by layout."""

    @cache
    def by_layout(name: str) -> dict[str, Any]:
        tensor, expert = LAYOUTS[name]
        arguments = [str(root), str(tensor), str(expert)]
        run_module("tests.emulation.worker_experts", arguments, processes=max(tensor, expert))
        return json.loads((root / f"experts-tensor{tensor}-expert{expert}" / "found.json").read_text())

    return by_layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_specs_are_one_model(found: Found, layout: str) -> None:
    """Hidden states, gradients and checkpoints in fp32, of every family with experts."""
    families = found(layout)["specs"]
    assert families.keys() == EXPERT_OPTIONS.keys() - ({"gpt_oss"} if layout == "tensor 2" else set())
    for family, result in families.items():
        assert result["hidden"] < 2e-6, family
        assert max(result["gradients"].values()) < 2e-5, (family, result["gradients"])
        assert result["same_description"], family
        assert result["local to te"], family
        assert result["te to local"], family


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_are_the_same_on_both_specs(found: Found, layout: str) -> None:
    for family, result in found(layout)["adapters"].items():
        assert result["effect"] > 1e-2, family
        assert result["hidden"] < 2e-6, family
        assert result["same_gradients"], family
        assert max(result["gradients"].values()) < 2e-5, (family, result["gradients"])


@pytest.fixture(scope="module")
def expected(root: Path, found: Found) -> reference.Result:
    pairs = [reference.Tokens(*sides) for sides in found("one rank")["pairs"]]
    settings = reference.Settings(global_pairs=4, steps=len(pairs) // 4, lr=1e-3)
    return reference.train(root / "policy", root / "policy", root / "guide", pairs, settings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_in_fp32_equals_plain_pytorch(found: Found, expected: reference.Result, layout: str) -> None:
    run = found(layout)["trained"]["fp32"]
    losses, norms = zip(*run["before"], strict=True)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=1e-5)
    assert run["grouped"] > 0


def test_training_in_bf16_is_that_of_the_local_spec(found: Found) -> None:
    runs = found("one rank")["trained"]
    assert runs["bf16"]["grouped"] > runs["bf16, local"]["grouped"] == 0
    for ours, local in zip(
        *(runs[name]["before"] + runs[name]["after"] for name in ("bf16", "bf16, local")), strict=True
    ):
        assert ours == pytest.approx(local, rel=2e-2)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_experts_in_fp8_are_those_of_a_plain_computation(found: Found, recipe: str) -> None:
    """With tokens padded for the kernels, an expert without any, and gradients of tokens, their shares and weights."""
    result = found("one rank")["plain"][recipe]
    assert max(result["to plain"]) < 1e-4, result["to plain"]
    # An expert without tokens has gradients of zero.
    effect = [distance for distance in result["plain to bf16"] if distance]
    assert len(effect) == len(result["plain to bf16"]) - 2
    assert min(effect) > 0.03


@pytest.mark.parametrize(
    ("layout", "case"),
    [(layout, case) for layout in LAYOUTS for case in EXPERT_CASES if continues(case, max(LAYOUTS[layout]))],
)
def test_a_run_that_continues_makes_the_same_steps(found: Found, layout: str, case: str) -> None:
    run = found(layout)["trained"][case]
    assert run["again"] == run["after"]
    # Policy and reference are quantised alike.
    assert run["before"][0][0] == pytest.approx(math.log(2), rel=1e-6)
    assert run["after"][0][0] != pytest.approx(math.log(2), rel=1e-3)


def test_experts_that_run_again_make_the_same_steps(found: Found) -> None:
    once, again = (found("one rank")["trained"][name] for name in ("tensorwise", "tensorwise, again"))
    assert again["grouped"] > once["grouped"]
    assert again["before"] == once["before"]


@pytest.mark.parametrize("layout", SPLIT)
@pytest.mark.parametrize("case", ["tensorwise, FP8 weights", "blockwise, FP8 weights"])
def test_training_in_fp8_is_what_it_is_on_one_rank(found: Found, layout: str, case: str) -> None:
    """An expert has one scale for the tokens of all ranks; tensor ranks add in another order, which moves tokens."""
    runs = [found(each)["trained"][case]["before"] for each in (layout, "one rank")]
    for ours, alone in zip(*runs, strict=True):
        assert ours == pytest.approx(alone, rel=2e-2 if layout == "expert 2" else 5e-2)


def test_weights_held_in_fp8_are_those_that_plain_ones_become(found: Found) -> None:
    plain, held = (found("one rank")["trained"][f"tensorwise{held}"]["before"] for held in ("", ", FP8 weights"))
    for steps in zip(plain, held, strict=True):
        assert steps[0] == pytest.approx(steps[1], rel=1e-2)


@pytest.mark.parametrize("source", ["checkpoint", "export"])
def test_what_a_run_with_fp8_experts_leaves_is_what_it_computed_with(found: Found, source: str) -> None:
    result = found("one rank")["exported"]
    assert result[f"{source} in bf16"]
    ((loss, norm),) = result[f"{source} in FP8"]
    assert loss == pytest.approx(math.log(2), rel=1e-6)
    assert norm > 0


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_frozen_experts_are_quantised_once(found: Found, recipe: str) -> None:
    results = found("one rank")["frozen"]
    held, streamed = results[f"{recipe} held"], results[f"{recipe} streamed"]
    assert streamed["quantised"] > held["quantised"] == 0
    assert streamed["kept"] == 0
    assert held["steps"] == streamed["steps"]
