"""A config for a first run on someone's own model and pairs, of a size that this machine does in minutes.

    python -m tools.examples.quickstart.own_model --model DIR_OR_HUB_ID --pairs FILE --out DIR

Holds a tenth of the records out, at most 200, and writes DIR/train.jsonl, DIR/validation.jsonl and DIR/tgdpo.yaml.
Prints, for launch/quickstart.sh, how many ranks to start.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.find_model import find_model
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.data.records import detect_format, parse_line, read_records, where
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.mapping import parameter_count
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.layouts import choose_layout
from megatron_tgdpo.storage.atomic_file import write_atomically
from tgdpo.command_line import run

_MOST_HELD_OUT = 200
# Of a parameter in fp32: the policy's weight, gradient, main weight and two moments; reference and guide.
_BYTES_ON_CPU = 4 * 5 + 4 * 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="HF directory, or a model of the Hub")
    parser.add_argument(
        "--pairs", type=Path, required=True, help="JSON, JSONL, Parquet or Arrow file of preference pairs"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    given = parser.parse_args(arguments)
    return run(lambda: _write(given))


def _write(given: argparse.Namespace) -> None:
    train, validation = split(given.pairs)
    model = find_model(given.model, "--model", weights=False)
    values, ranks = settings(read_hf_config(model), given.model, given.out.absolute(), len(train))
    given.out.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("validation", validation)):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(given.out / f"{name}.jsonl", "".join(lines))
    write_atomically(given.out / "tgdpo.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    print(ranks)


def split(file: Path) -> tuple[list[Any], list[Any]]:
    """The records to train with, and those that are held out, drawn with a fixed seed.

    Raises:
        UserError: The file cannot be read, or holds fewer than two records.
    """
    kind = detect_format(str(file))
    records = [
        parse_line(raw.payload, where(str(file), kind, raw.number)) if kind == "jsonl" else raw.payload
        for raw in read_records(str(file), kind)
    ]
    if len(records) < 2:
        raise UserError(f"{file}: {len(records)} record: two are needed, one of them to be held out")
    random.Random(0).shuffle(records)
    held_out = min(_MOST_HELD_OUT, -(-len(records) // 10))
    return records[held_out:], records[:held_out]


def settings(hf_config: PretrainedConfig, model: str, out: Path, records: int) -> tuple[dict[str, Any], int]:
    """The config's values for this machine, and the number of ranks.

    Raises:
        UserError: The model is too large for it.
    """
    gpus = torch.cuda.device_count()
    pairs, length = (32, 2048) if gpus else (2, 256)
    values: dict[str, Any] = {
        "model": {"policy": model},
        "guide": {"method": "dpo", "beta": 0.01},
        "data": {
            "train": str(out / "train.jsonl"),
            "validation": str(out / "validation.jsonl"),
            "max_length": length,
            "max_prompt_length": length // 2,
        },
        "loss": {"method": "tgdpo", "beta": 0.1, "alpha": 0.5},
        "batch": {"global_pairs": min(pairs, records), "tokens_per_micro_batch": 2 * length},
        "optimizer": {"lr": 5.0e-6, "schedule": "cosine", "warmup_ratio": 0.1},
        "precision": {"dtype": "bf16" if gpus else "fp32"},
        "train": {"steps": max(1, min(100, records // pairs)) if gpus else 6},
        "output_dir": str(out / "run"),
    }
    if not gpus:
        need, have = (
            parameter_count(hf_config) * _BYTES_ON_CPU,
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        )
        if need > 0.8 * have:
            raise UserError(
                f"--model {model}: training it takes {need >> 30} GiB without a GPU, this machine has {have >> 30}: "
                "take a smaller model, or a machine with GPUs"
            )
        return values, 1
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(gpus))
    plan = choose_layout(config_from_dict(values), [hf_config] * 3, Cluster(1, gpus, memory / 2**30))
    layout = plan.layout
    values["parallel"] = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "sequence_parallel": layout.sequence_parallel and layout.tensor > 1,
        **layout.expert_keys,
    }
    values["train"]["recompute"] = plan.recompute
    return values, gpus


if __name__ == "__main__":
    sys.exit(main())
