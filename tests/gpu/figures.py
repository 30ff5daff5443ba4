"""What ``prove.py`` measures with: figures and their table, model shapes, pairs, FLOPs. No GPU, no process groups."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.planning.activations import Pack
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.step_time import pack_flops

# Sizes of Llama-3.2 1B and 3B.
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192},
    "3B": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "intermediate_size": 8192},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        part: Which part of the proof.
        name: What was measured.
        value: The figure; None where it could not be taken.
        unit: Of the value.
        wanted: The limit in words; empty for a figure without one.
        passed: Whether it keeps the limit; None without a limit or a value.
        note: Why there is no value, or what it was taken with.
    """

    part: str
    name: str
    value: float | None
    unit: str = ""
    wanted: str = ""
    passed: bool | None = None
    note: str = ""


def at_most(part: str, name: str, value: float, limit: float, unit: str = "", note: str = "") -> Figure:
    # A comparison with nan is false, as it should be.
    return Figure(part, name, value, unit, f"<= {limit:g}", bool(value <= limit), note)


def at_least(part: str, name: str, value: float, limit: float, unit: str = "", note: str = "") -> Figure:
    return Figure(part, name, value, unit, f">= {limit:g}", bool(value >= limit), note)


def skipped(part: str, name: str, reason: str, *, judged: bool = False) -> Figure:
    """A figure that was not taken; ``judged`` if the goals are about it: then the run fails."""
    return Figure(part, name, None, passed=False if judged else None, note=" ".join(reason.split()))


def line(figure: Figure) -> str:
    """One figure in one line."""
    value = "-" if figure.value is None else f"{figure.value:.4g} {figure.unit}".rstrip()
    verdict = {True: "ok", False: "FAILED", None: ""}[figure.passed]
    return "  ".join(
        part for part in (f"{figure.part}: {figure.name}", value, figure.wanted, verdict, figure.note) if part
    )


def table(figures: Sequence[Figure]) -> str:
    """Aligned columns, one line a figure."""
    header = ("part", "what", "figure", "wanted", "", "note")
    rows = [header] + [
        (
            figure.part,
            figure.name,
            "-" if figure.value is None else f"{figure.value:.4g} {figure.unit}".rstrip(),
            figure.wanted,
            {True: "ok", False: "FAILED", None: ""}[figure.passed],
            figure.note,
        )
        for figure in figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def write_json(path: Path, machine: dict[str, Any], figures: Sequence[Figure]) -> None:
    path.write_text(
        json.dumps({"machine": machine, "figures": [asdict(figure) for figure in figures]}, indent=1) + "\n"
    )


def largest_relative_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of two series of one length, step by step, relative to ``theirs``; nan or infinite if a value is."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def smoothed(series: Sequence[float], window: int = 5) -> list[float]:
    """Means over ``window`` neighbours; the curve that noise of single steps does not move."""
    return [float(np.mean(series[i : i + window])) for i in range(max(1, len(series) - window + 1))]


def write_shape(directory: Path, shape: str) -> PretrainedConfig:
    """Leaves the ``config.json`` of a Llama of that shape, without weights."""
    tiny = shape == "tiny"
    config = AutoConfig.for_model(
        "llama", **SHAPES[shape], num_key_value_heads=2 if tiny else 8, vocab_size=160 if tiny else 128256,
        tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    return config


def random_pairs(count: int, mean_tokens: int, vocab_size: int, seed: int) -> list[PreferencePair]:
    """Pairs of random tokens: prompts and responses have log-normal lengths, together ``mean_tokens`` on average."""
    rng = np.random.default_rng(seed)

    def tokens() -> np.ndarray:
        length = int(np.clip(rng.lognormal(0.0, 0.6) * mean_tokens / 3 / np.exp(0.18), 2, mean_tokens * 0.8))
        return rng.integers(3, vocab_size, length, dtype=np.int64)

    return [PreferencePair(tokens(), tokens(), tokens(), index) for index in range(count)]


def step_flops(
    policy: PretrainedConfig, frozen: tuple[PretrainedConfig, ...], lengths: np.ndarray, row: int, shared: bool
) -> float:
    """Model FLOP of one optimizer step over pairs, by the planner's formula (``planning/step_time.py``).

    Only tokens of pairs count, not padding. ``lengths`` is [P, 3] prompt, chosen, rejected tokens.
    """
    prompts, responses = lengths[:, 0], lengths[:, 1:].sum(axis=1)
    tokens = int(((1 if shared else 2) * prompts + responses).sum())
    batch = Batch(len(lengths), round(tokens / len(lengths)), float(responses.sum()) / tokens, shared_prompts=False)
    job = Job(policy, frozen, Pack(row, row, 2), batch)
    return sum(pack_flops(job, make_layout(1, 1, 1, False, 1), "none", stage=0)) * tokens / row


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOP utilisation, of a dense bf16 peak in TFLOP/s."""
    return flops / seconds / (peak * 1e12)


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference over that of ``exact``."""
    return ((ours.float() - exact.float()).norm() / exact.float().norm()).item()
