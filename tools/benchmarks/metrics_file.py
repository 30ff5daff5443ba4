"""Bytes and reading time of `metrics.jsonl`, as it is written and with all digits of every number.

    python -m tools.benchmarks.metrics_file [--steps 20000]

The metrics are those of a co-located TGDPO step, all names, with random values.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig

from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.output.json_lines import MetricsFile
from megatron_tgdpo.output.logger import LoggedStep
from megatron_tgdpo.output.metrics import metric_names, shortened
from megatron_tgdpo.output.metrics_file import METRICS_FILE, logged_steps
from megatron_tgdpo.training.performance import Performance, StepWork


def run_config(directory: Path) -> Config:
    """Of a co-located TGDPO run."""
    models = {"policy": "policy", "reference": "reference", "guide": "guide"}
    values = {"model": models, "data": {"train": "pairs.jsonl"}, "batch": {"global_pairs": 64}, "train": {"steps": 1}}
    return config_from_dict({**values, "optimizer": {"lr": 1e-6}, "output_dir": str(directory)})


def random_steps(config: Config, count: int) -> list[LoggedStep]:
    """Steps with all of its metrics."""
    rng = np.random.default_rng(0)
    performance = Performance(config, {"policy": LlamaConfig()}, PackFormat(4096), 8, torch.device("cpu"))
    names = [f"train/{name}" if name == "loss" else name for name in metric_names(())]
    steps = []
    for number in range(1, count + 1):
        values = {name: float(rng.lognormal()) for name in [*names, "train/grad_norm", "train/lr"]}
        seconds, waited, peak = rng.lognormal(size=3).tolist()
        values |= performance.metrics(seconds, StepWork(50_000, 60_000, 64, 10**15), waited, peak)
        steps.append(LoggedStep(number, values))
    return steps


def main() -> None:
    """Prints a line for each way to write."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.metrics_file")
    parser.add_argument("--steps", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for way in ("all digits", "as written"):
            directory = Path(name) / way
            directory.mkdir()
            config = run_config(directory)
            steps = random_steps(config, options.steps)
            began = time.perf_counter()
            if way == "all digits":
                lines = [json.dumps({"step": step.number, **step.values}) + "\n" for step in steps]
                (directory / METRICS_FILE).write_text("".join(lines), encoding="utf-8")
            else:
                file = MetricsFile(config, 0)
                for step in steps:
                    file.write(LoggedStep(step.number, shortened(step.values)))
                file.close()
            wrote = time.perf_counter() - began
            began = time.perf_counter()
            assert sum(1 for _ in logged_steps(directory)) == options.steps
            size = (directory / METRICS_FILE).stat().st_size
            print(
                f"{way}: {size / options.steps:.0f} bytes a step, {size / options.steps / 10:.1f} MB in 100,000 steps; "
                f"written in {1e6 * wrote / options.steps:.0f} us a step, read in "
                f"{1e6 * (time.perf_counter() - began) / options.steps:.0f} us"
            )


if __name__ == "__main__":
    main()
