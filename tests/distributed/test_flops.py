"""What a run reports of its operations is what torch counts in a step, and what the mask lets attention see."""

import json
from typing import Any

import pytest

from tests.distributed.common import make_problem, merged
from tests.processes import run_forked

# Words of each pair: prompt, chosen, rejected; with an end token for each response.
WORDS = [(4, 9, 6), (7, 3, 8), (5, 8, 5), (6, 2, 9)] * 4
MODES = ("colocated", "cached", "unshared", "sft")
LAYERS, QUERIES, POLICY_PASSES = 4, {"policy": 64, "guide": 32}, 3


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("flops")
    config = make_problem(root, vocab_size=128)
    keys = ("prompt", "chosen", "rejected")
    records = [{key: " ".join(["w7"] * n) for key, n in zip(keys, words, strict=True)} for words in WORDS]
    (root / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cases = {
        "colocated": {},
        "cached": {"guidance": {"mode": "cached", "cache": str(root / "cache")}},
        "unshared": {"batch": {"shared_prompts": False}},
        "sft": {"loss": {"method": "sft"}, "model": {"guide": None}},
    }
    assert tuple(cases) == MODES
    values = {
        name: merged(config, train={"check_start": False}, output_dir=str(root / name), **changes)
        for name, changes in cases.items()
    }
    # Packs without padding, whose products nobody needs.
    for name, tokens in {"colocated": 60, "cached": 60, "unshared": 77, "sft": 34}.items():
        values[name]["batch"]["tokens_per_micro_batch"] = tokens
    (root / "cases.json").write_text(json.dumps(values))
    done = run_forked("tests.distributed.worker_flops", [str(root / "cases.json")])
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    found: dict[str, Any] = json.loads(line.removeprefix("FACTS "))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_reported_operations_are_those_that_torch_counts(facts: dict[str, Any], mode: str) -> None:
    found = facts[mode]
    lengths = found["lengths"]
    assert found["computed"] == sum(map(sum, lengths)) + (sum(pair[0] for pair in lengths) if mode == "unshared" else 0)
    # torch has no formula for the CPU's attention kernel, so what it counts are all other products.
    assert found["counted"].keys() <= {"aten.mm", "aten.addmm_"}
    passes = {"policy": POLICY_PASSES}
    if mode in ("colocated", "unshared"):
        passes |= {"reference": 1, "guide": 1}
    visible = sum(visible_pairs(*pair, mode) for pair in lengths)
    # A score and a weighted value of all heads: a multiplication and an addition for each element of both.
    attention = sum(
        times * LAYERS * visible * 4 * QUERIES["guide" if role == "guide" else "policy"]
        for role, times in passes.items()
    )
    assert found["reported"] == sum(found["counted"].values()) + attention


def visible_pairs(prompt: int, chosen: int, rejected: int, mode: str) -> int:
    """Of queries and keys, counted one by one in the mask of a pair."""
    sides = ["p"] * prompt + ["c"] * chosen
    pairs = sum(key <= query for query in range(len(sides)) for key in range(len(sides)))
    if mode == "sft":
        return pairs
    whole = ["p"] * prompt + ["r"] * rejected
    queries = range(len(whole)) if mode == "unshared" else range(prompt, len(whole))
    return pairs + sum(key <= query for query in queries for key in range(len(whole)))
