"""All combinations of how a run is laid out: which of them the config's rules refuse, and why.

python -m tests.grid        the counts, as docs/configuration.md has them
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from typing import Any

from megatron_tgdpo.config.checks import check
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError

# What a combination chooses. Of numbers, one and more than one: code asks for no more.
CHOICES: dict[str, tuple[Any, ...]] = {
    "method": ("tgdpo", "dpo", "simpo", "orpo", "sft"),
    "guidance": ("colocated", "prefetch", "cached"),
    "tensor": (1, 2),
    "sequence_parallel": (False, True),
    "pipeline": (1, 2),
    "virtual_pipeline": (None, 2),
    "context": (1, 2),
    "data": (1, 2),
    "shared_prompts": (True, False),
    "overlap": ("none", "grad_reduce", "both"),
    "recompute": ("none", "selective", "full"),
}
Combination = Mapping[str, Any]


def grid() -> Iterator[Combination]:
    """Every combination."""
    return (dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values()))


@cache
def _plain(method: str) -> Config:
    guide = {"guide": "guide"} if method == "tgdpo" else {}
    return config_from_dict(
        {
            "model": {"policy": "policy", **guide},
            "data": {"train": "pairs.jsonl"},
            "loss": {"method": method},
            "batch": {"global_pairs": 8},
            "optimizer": {"lr": 1e-6},
            "train": {"steps": 1},
            "output_dir": "run",
        }
    )


def refusal(chosen: Combination) -> str | None:
    """What a config of a combination is refused with; None if it is not."""
    plain = _plain(chosen["method"])
    names = ("tensor", "sequence_parallel", "pipeline", "virtual_pipeline", "context")
    mode = "cached" if chosen["guidance"] == "cached" else "colocated"
    config = replace(
        plain,
        parallel=replace(plain.parallel, **{name: chosen[name] for name in names}),
        guidance=replace(
            plain.guidance,
            mode=mode,
            cache="cache" if mode == "cached" else None,
            prefetch=chosen["guidance"] == "prefetch",
        ),
        batch=replace(plain.batch, shared_prompts=chosen["shared_prompts"]),
        overlap=replace(
            plain.overlap, grad_reduce=chosen["overlap"] != "none", param_gather=chosen["overlap"] == "both"
        ),
        train=replace(plain.train, recompute=chosen["recompute"]),
    )
    try:
        check(config, "grid")
    except UserError as error:
        return str(error).removeprefix("grid: ")
    return None


def pairs(chosen: Combination) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Every two choices of a combination."""
    return set(combinations(chosen.items(), 2))


def counts() -> tuple[int, Counter[str]]:
    """How many combinations are accepted, and how many are refused by each message."""
    accepted, refused = 0, Counter[str]()
    for chosen in grid():
        message = refusal(chosen)
        if message is None:
            accepted += 1
        else:
            refused[re.sub(r"loss.method \w+ has", "the method has", message)] += 1
    return accepted, refused


def table() -> str:
    """The counts as lines of Markdown."""
    accepted, refused = counts()
    lines = ["| combinations | |", "|---|---|", f"| {accepted:,} | accepted |"]
    lines += [f"| {count:,} | refused: {message} |" for message, count in refused.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
