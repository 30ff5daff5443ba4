"""FP8 training with the real Transformer Engine Python and megatron-core's real wrappers; kernels emulated on the CPU.

Needs the environment that ``tests/emulation/run.sh`` makes. The numbers of the kernels are for ``tests/gpu/prove.py``.
"""

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.emulation.cases import STATE, cases
from tests.emulation.emulated import missing
from tests.launch import run_module
from tests.tiny_models import make_model

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

# Tensor, pipeline and data ranks.
LAYOUTS = {"one rank": (1, 1, 1), "tensor 2": (2, 1, 1), "pipeline 2": (1, 2, 1), "data 2": (1, 1, 2)}
Found = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the worker left, by layout."""
    root = tmp_path_factory.mktemp("emulation")
    for seed, name in enumerate(("policy", "guide")):
        make_model(root / name, vocab_size=256, hidden_size=128, mlp_size=256, layers=2, seed=seed)

    @cache
    def by_layout(name: str) -> dict[str, Any]:
        tensor, pipeline, data = LAYOUTS[name]
        if tensor * pipeline * data > 1:
            by_layout("one rank")
        arguments = [str(root), str(tensor), str(pipeline)]
        run_module("tests.emulation.worker", arguments, processes=tensor * pipeline * data)
        path = root / f"tensor{tensor}-pipeline{pipeline}-data{data}" / "found.json"
        return json.loads(path.read_text())

    return by_layout


def every_case(*words: str) -> pytest.MarkDecorator:
    """Layouts with their cases, those of which the names hold any of the words."""
    pairs = [(name, case) for name, (_, pipeline, data) in LAYOUTS.items() for case in cases(data, pipeline)]
    return pytest.mark.parametrize(("layout", "case"), [pair for pair in pairs if any(w in pair[1] for w in words)])


@every_case("tensorwise", "blockwise", "delayed")
def test_a_run_that_continues_makes_the_same_steps(found: Found, layout: str, case: str) -> None:
    """The save goes on beside the steps after it."""
    run = found(layout)[case]
    assert run["again"] == run["after"]


@pytest.mark.parametrize("layout", ["one rank", "data 2"])
def test_the_optimizers_state_in_fewer_bytes(found: Found, layout: str) -> None:
    """A remainder changes how halves are rounded; moments in fewer bits a little more. A run continues to the bit."""
    runs = found(layout)
    for name in STATE:
        assert runs[name]["again"] == runs[name]["after"], name
    plain = runs["bf16"]
    for name, limit in (("remainder", 2e-3), ("bf16 moments, remainder", 2e-2), ("FP8 moments", 0.1)):
        losses, wanted = ([loss for loss, _ in run["before"] + run["after"]] for run in (runs[name], plain))
        assert losses == pytest.approx(wanted, rel=limit), name
        assert name == "remainder" or losses != wanted


def test_the_history_of_delayed_scaling_goes_to_another_layout(found: Found) -> None:
    """Stages compute what one rank does, so a scale that did not come along would show."""
    there, here = found("pipeline 2")["elsewhere"]["same"], found("one rank")["delayed, FP8 weights"]["after"]
    for ours, alone in zip(there, here, strict=True):
        assert ours == pytest.approx(alone, rel=2e-3)


def test_an_adapter_is_what_it_becomes_in_merged_weights(found: Found) -> None:
    """Transformer Engine's fused norm and linear hands out what the norm made, which an adapter takes. Merged weights
    are rounded to bf16, and with them a good part of what the adapter adds.
    """
    run = found("one rank")["adapters"]
    (adapter, _), (merged, _) = run["adapter"][0], run["merged"][0]
    assert run["steps"][0][0] == pytest.approx(math.log(2), rel=1e-4)
    assert abs(adapter - math.log(2)) > 1e-2, "nothing was learned"
    assert merged - math.log(2) == pytest.approx(adapter - math.log(2), rel=0.25)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_adapters_train_beside_a_base_in_fp8(found: Found, recipe: str) -> None:
    """The base that is held in FP8 computes what one does that is quantised each step, and is never quantised again."""
    plain, results = found("one rank")["adapters"]["steps"], found("one rank")["adapters in FP8"]
    computed, held = results[recipe], results[f"{recipe} held"]
    assert held["steps"] == computed["steps"]
    assert computed["quantised"] > held["quantised"] == 0
    assert held["copies"] == 0
    # The reference is the same linears without the adapter, so that nothing is rounded between them.
    assert held["steps"][0][0] == pytest.approx(math.log(2), rel=1e-6)
    assert held["steps"][1] == pytest.approx(plain[1], rel=0.1)
    assert held["steps"] != plain


def test_a_frozen_base_in_fp8_takes_an_adapter(found: Found) -> None:
    results = found("one rank")["adapters in FP8"]
    assert results["guide adds nothing"] == results["guide is the reference"]


@pytest.mark.parametrize("other", ["shorter history", "none before", "bf16"])
def test_a_run_continues_without_a_history_that_fits(found: Found, other: str) -> None:
    losses = [loss for loss, _ in found("one rank")["elsewhere"][other]]
    assert losses == pytest.approx([loss for loss, _ in found("one rank")["tensorwise"]["after"]], rel=0.1)


@pytest.mark.parametrize("layout", ["pipeline 2", "data 2"])
@pytest.mark.parametrize("case", ["tensorwise", "tensorwise, FP8 weights", "blockwise, FP8 weights"])
def test_training_is_what_it_is_on_one_rank(found: Found, layout: str, case: str) -> None:
    """Whatever the stages, and with a pack of padding on the data rank that has no pair."""
    for ours, alone in zip(found(layout)[case]["before"], found("one rank")[case]["before"], strict=True):
        assert ours == pytest.approx(alone, rel=1e-2)


def test_weights_held_in_fp8_are_those_that_plain_ones_become(found: Found) -> None:
    plain, held = (found("one rank")[f"tensorwise{held}"]["before"] for held in ("", ", FP8 weights"))
    for steps in zip(plain, held, strict=True):
        assert steps[0] == pytest.approx(steps[1], rel=1e-2)


@pytest.mark.parametrize("source", ["checkpoint", "export"])
def test_what_a_run_with_fp8_weights_leaves_is_what_it_computed_with(found: Found, source: str) -> None:
    result = found("one rank")["exported"]
    assert result[f"{source} in bf16"]
    # Policy and reference are the same, and quantised alike.
    ((loss, norm),) = result[f"{source} in FP8"]
    assert math.isclose(loss, math.log(2), rel_tol=1e-6)
    assert norm > 0


def test_memory_that_nobody_wrote_sets_no_scale(found: Found) -> None:
    runs = found("one rank")["uninitialised"]
    assert runs["0"] == runs["10000"]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_weights_are_quantised_once(found: Found, layout: str, recipe: str) -> None:
    """When they are loaded. Those that come from host memory are each time, to the same result, and none is kept."""
    results = found(layout)["frozen"]
    held, streamed = results[f"{recipe} held"], results[f"{recipe} streamed"]
    assert held["quantised"] == 0
    assert streamed["quantised"] > 0
    assert streamed["kept"] == 0
    assert held["steps"] == streamed["steps"]
    prefetched = results.get(f"{recipe} prefetched", held)
    assert prefetched["quantised"] == 0
    assert prefetched["steps"] == held["steps"]
