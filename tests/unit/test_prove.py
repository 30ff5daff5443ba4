"""The script that proves the GPU path, on a CPU: its control flow, its table, its formulas."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_tgdpo.models.hf_weights.mapping import parameter_count
from megatron_tgdpo.planning.peak import peak_tflops
from tests.gpu.figures import (
    Figure,
    at_least,
    at_most,
    largest_relative_difference,
    mfu,
    random_pairs,
    skipped,
    smoothed,
    step_flops,
    table,
    write_shape,
)
from tests.gpu.prove import NAMES
from tests.launch import run_module


def test_the_whole_script_runs_on_a_cpu(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "proof.json"), "--peak-tflops", "0.1"]
    done = run_module("tests.gpu.prove", arguments, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    proof = json.loads((tmp_path / "proof.json").read_text())
    machine = proof["machine"]
    assert machine["device"] == "CPU"
    # Its own word says which CUDA it was built for, the metadata need not.
    assert machine["torch"] == torch.__version__
    found = {name: machine[name] for name in ("megatron-core", "transformers")}
    assert found == {name: version(name) for name in found}
    assert machine["python"] == platform.python_version()
    assert machine["transformer-engine"] == "none"
    assert {"cuda", "driver", "cudnn", "nccl", "apex", "flash-attn", "triton"} <= machine.keys()
    # As they are written, so they are printed.
    assert f"megatron-core: {machine['megatron-core']}\n" in done.stdout
    figures = {figure["name"]: figure for figure in proof["figures"]}
    assert {figure["part"] for figure in figures.values()} == set(NAMES)
    # What a CPU can take is taken, and keeps its limits.
    for name in ("bf16: losses after a save and load beside those of the run that went on", "overlap: losses"):
        assert figures[name]["passed"] is True
    for name in ("blocks window beside blocks in fp32", "llama: bf16 losses beside fp32 on the CPU, 4 steps"):
        assert figures[name]["passed"] is True
        assert figures[name]["value"] > 0
    for name in ("tiny, packs of 256, bf16, cached: pairs", "tiny, packs of 256: pairs/s over plain HF"):
        assert figures[name]["value"] > 0
    # What it cannot is said, with the reason that the configuration gives.
    assert "needs a CUDA GPU" in figures["llama: losses of the Transformer Engine spec beside local"]["note"]
    assert "FP8 needs a CUDA GPU" in figures["tensorwise: 6 steps beside bf16"]["note"]
    assert "tensorwise: 6 steps beside bf16" in done.stdout


def test_a_part_that_is_not_there_is_refused() -> None:
    done = run_module("tests.gpu.prove", ["--parts", "speeed"], check=False)
    assert done.returncode == 2
    assert "speeed unknown" in done.stderr


def test_flops_of_a_3b_step_are_about_eight_for_every_parameter_and_token(tmp_path: Path) -> None:
    config = write_shape(tmp_path, "3B")
    assert parameter_count(config) == pytest.approx(3.21e9, rel=0.01)
    lengths = np.array([[1, 1000, 1000]] * 4)
    policy = step_flops(config, (), lengths, 8192, shared=False)
    # Forward and backward are 6 for every parameter and token, the logits in backward again 2 more for those of the
    # output weight, and attention to half of 1,000 tokens a little.
    layers, output = 3.21e9 - 128256 * 3072, 128256 * 3072
    assert policy == pytest.approx(8008 * (6 * layers + 8 * output), rel=0.06)
    both = step_flops(config, (config, config), lengths, 8192, shared=False)
    assert both - policy == pytest.approx(2 * 8008 * 2 * 3.21e9, rel=0.06)
    # A shared prompt is computed once.
    long_prompts = np.array([[1000, 500, 500]] * 4)
    shared, whole = (step_flops(config, (), long_prompts, 8192, shared=value) for value in (True, False))
    assert shared < 0.75 * whole


def test_mfu_and_peaks() -> None:
    assert mfu(989e12 * 3, 6.0, 989.0) == pytest.approx(0.5)
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("CPU") is None


def test_series_are_compared_step_by_step() -> None:
    assert largest_relative_difference([1.0, 2.2, 3.0], [1.0, 2.0, 3.0]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="zip"):
        largest_relative_difference([1.0], [1.0, 2.0])
    assert smoothed([1.0, 2.0, 3.0], window=2) == [1.5, 2.5]
    assert smoothed([1.0, 3.0], window=5) == [2.0]


def test_a_figure_that_is_not_a_number_fails() -> None:
    assert at_most("p", "n", float("nan"), 1.0).passed is False
    assert at_least("p", "n", float("nan"), 1.0).passed is False
    assert at_most("p", "n", 1.0, 1.0).passed is True


def test_the_table_names_what_failed_and_what_was_not_taken() -> None:
    figures = [
        at_most("fp8", "curve", 0.5, 0.01),
        Figure("speed", "memory", 12.345, "GiB"),
        skipped("spec", "both", "no\nengine"),
    ]
    lines = table(figures).splitlines()
    assert lines[0].split() == ["part", "what", "figure", "wanted", "note"]
    assert lines[1].split() == ["fp8", "curve", "0.5", "<=", "0.01", "FAILED"]
    assert "12.35 GiB" in lines[2]
    assert lines[3].endswith("no engine")


def test_pairs_have_the_asked_mean_length() -> None:
    pairs = random_pairs(2000, 300, 1000, seed=0)
    total = np.mean([len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs])
    assert total == pytest.approx(300, rel=0.05)
