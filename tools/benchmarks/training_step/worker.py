"""Runs one variant and writes what it recorded; its arguments are PROBLEM.json VARIANT OUT.json."""

import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.dtypes import DTYPES
from tools.benchmarks.training_step.problem import Problem
from tools.benchmarks.training_step.recorder import Recorder
from tools.benchmarks.training_step.variants import VARIANTS


def main(problem_path: str, variant: str, out: str) -> None:
    """Exit status 1 and one line for bad input; else the result is in ``out``."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    problem = Problem.read(Path(problem_path))
    torch.set_num_threads(problem.threads)
    try:
        run = VARIANTS[variant].load()
        recorder = Recorder(torch.device(problem.device))
        run(problem, recorder)
    except UserError as error:
        sys.exit(f"error: {error}")
    Path(out).write_text(json.dumps(asdict(recorder.result(DTYPES[problem.dtype]))), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
