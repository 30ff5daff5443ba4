"""tools.benchmarks.training_step from the command line, on a very small model."""

import json
from pathlib import Path

import pytest

from tests.launch import run_module

TINY = [
    "--size", "tiny", "--vocabulary", "600", "--global-pairs", "2", "--max-length", "96", "--threads", "1",
]  # fmt: skip


def test_compare(tmp_path: Path) -> None:
    """The benchmark itself fails where variants differ too much; that they differ at all shows that both ran."""
    out = tmp_path / "figures.json"
    variants = ["reference", "cached"]
    done = run_module(
        "tools.benchmarks.training_step",
        ["compare", *TINY, "--pairs", "4", "--rounds", "1", "--variants", *variants, "--json", str(out)],
    )
    metrics = json.loads(out.read_text())
    assert list(metrics["variants"]) == variants
    for variant, values in metrics["variants"].items():
        (measured,) = values["rounds"]
        assert len(measured["losses"]) == 3
        assert measured["losses"][0] == pytest.approx(0.693147, abs=1e-5)
        assert abs(measured["losses"][-1] - 0.693147) > 1e-4
        assert measured["peak_bytes"] > measured["imported_bytes"] + measured["weight_bytes"]
        assert any(line.startswith(f"{variant} ") for line in done.stdout.splitlines())
    weights = {variant: values["rounds"][0]["weight_bytes"] for variant, values in metrics["variants"].items()}
    # Of three models, and of the policy alone, whose vocabulary is padded to 640.
    assert weights["reference"] / 3 == pytest.approx(weights["cached"] - 4 * 2 * 40 * 128)
    assert metrics["cache_seconds"] > 0


def test_profile(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    done = run_module(
        "tools.benchmarks.training_step", ["profile", *TINY, "--variant", "colocated", "--trace", str(trace)]
    )
    lines = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines() if line.endswith("%")]
    end = next(number for number, line in enumerate(lines) if line[0] == "all")
    shares = {where.strip(): float(share[:-1]) for where, _, share in lines[:end]}
    assert {"matrix products of layers", "matrix products of log-probs", "attention"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(100, abs=0.1 * len(shares))
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"benchmark step", "tgdpo::update", "_TokenLogps"} <= names
