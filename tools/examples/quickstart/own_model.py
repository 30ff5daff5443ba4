"""A config for a first run on someone's own model and pairs, of a size that this machine does in minutes.

    python -m tools.examples.quickstart.own_model --model DIR_OR_HUB_ID --pairs FILE --out DIR

Takes pairs that need not be cut, holds some of them out, and writes DIR/train.jsonl, DIR/validation.jsonl and
DIR/tgdpo.yaml. Prints, for launch/quickstart.sh, how many ranks to start.
"""

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.find_model import find_model
from megatron_tgdpo.checkpoints.model_directory import hf_directory
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.data.encode import decode_record, encode_example
from megatron_tgdpo.data.layouts import detect_layout, parse_record
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.records import detect_format, read_records, where
from megatron_tgdpo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tgdpo.data.truncation import DroppedPair
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.mapping import parameter_count
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.layouts import choose_layout
from megatron_tgdpo.storage.atomic_file import write_atomically
from tgdpo.command_line import run

# Records that are looked at, drawn at random from those of the file.
_MOST_RECORDS = 5000
# Of a parameter in fp32: the policy's weight, gradient, main weight and two moments; reference and guide.
_BYTES_ON_CPU = 4 * 5 + 4 * 2
# What a training may take without a GPU, if a core computes so much (measured: 70e9 on cores with AVX2).
_CPU_SECONDS, _CORE_FLOPS = 120, 60e9
# Of a token and parameter: the policy's forward and backward, and two frozen models' forward.
_FLOPS = 6 + 2 * 2


@dataclass(frozen=True)
class Size:
    """What is asked of pairs.

    Attributes:
        lengths: Most tokens of prompt plus one response; the first that leaves pairs enough.
        enough: So many pairs, or nearly all.
        held_out: At most so many, and a tenth.
    """

    lengths: tuple[int, ...]
    enough: int
    held_out: int


_ON_GPUS, _ON_CPU = Size((2048,), 3400, 200), Size((256, 512, 1024), 64, 8)


@dataclass(frozen=True)
class Pairs:
    """Records to train with and held out, the length that holds them, and their mean tokens, of both responses."""

    train: list[Any]
    validation: list[Any]
    length: int
    tokens: float


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
    model = find_model(given.model, "--model", weights=False)
    tokenizer = load_tokenizer(str(hf_directory(model)))
    pairs = split(given.pairs, tokenizer, _ON_GPUS if torch.cuda.device_count() else _ON_CPU)
    values, ranks = settings(read_hf_config(model), given.model, given.out.absolute(), pairs)
    given.out.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", pairs.train), ("validation", pairs.validation)):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(given.out / f"{name}.jsonl", "".join(lines))
    write_atomically(given.out / "tgdpo.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    print(ranks)


def split(file: Path, tokenizer: Tokenizer, size: Size) -> Pairs:
    """Pairs that no length cuts, drawn with a fixed seed; says on stderr how many there are.

    Raises:
        UserError: The file cannot be read, or fewer than two records can be used.
    """
    kind = detect_format(str(file))
    raw = list(read_records(str(file), kind))
    random.Random(0).shuffle(raw)
    options = PreprocessOptions(str(file), max_length=1 << 29)
    measured = []
    for one in raw[:_MOST_RECORDS]:
        place = where(str(file), kind, one.number)
        record = decode_record(one.payload, kind, place, options)
        try:
            pair = encode_example(parse_record(record, detect_layout(record, place), place), tokenizer, options, place)
        except DroppedPair:
            continue
        prompt, responses = len(pair.prompt), (len(pair.chosen), len(pair.rejected))
        measured.append((record, prompt + max(responses), prompt + sum(responses)))
    enough = min(size.enough, 0.9 * len(measured))
    whole = {length: [one for one in measured if one[1] <= length] for length in size.lengths}
    length = next((length for length, fit in whole.items() if len(fit) >= enough), size.lengths[-1])
    # Where none fits, training cuts them, and says so.
    kept = whole[length] if len(whole[length]) > 1 else measured
    if len(kept) < 2:
        raise UserError(f"{file}: {len(kept)} record to train with: two are needed, one of them to be held out")
    held_out = min(size.held_out, -(-len(kept) // 10))
    print(
        f"{len(kept)} of {len(raw)} pairs are used, those of at most {length} tokens: {held_out} held out"
        + (f"; looked at {_MOST_RECORDS}" if len(raw) > _MOST_RECORDS else ""),
        file=sys.stderr,
    )
    records = [record for record, *_ in kept]
    return Pairs(records[held_out:], records[:held_out], length, statistics.fmean(tokens for *_, tokens in kept))


def settings(hf_config: PretrainedConfig, model: str, out: Path, pairs: Pairs) -> tuple[dict[str, Any], int]:
    """The config's values for this machine, and the number of ranks.

    Raises:
        UserError: The model is too large for it.
    """
    gpus = torch.cuda.device_count()
    count = min(32 if gpus else 2, len(pairs.train))
    steps = max(1, min(100, len(pairs.train) // count)) if gpus else _cpu_steps(hf_config, pairs, count)
    values: dict[str, Any] = {
        "model": {"policy": model},
        "guide": {"method": "dpo", "beta": 0.01},
        "data": {
            "train": str(out / "train.jsonl"),
            "validation": str(out / "validation.jsonl"),
            "max_length": pairs.length,
        },
        "loss": {"method": "tgdpo", "beta": 0.1, "alpha": 0.5},
        "batch": {"global_pairs": count, "tokens_per_micro_batch": 2 * pairs.length},
        # The first step of a warm-up has a rate of 0, and of few steps none is to be lost.
        "optimizer": {"lr": 5.0e-6 if gpus else 1.0e-5, "schedule": "cosine", "warmup_ratio": 0.1 if gpus else 0.0},
        "precision": {"dtype": "bf16" if gpus else "fp32"},
        "train": {"steps": steps},
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
    values["parallel"] = plan.layout.keys
    values["train"]["recompute"] = plan.recompute
    return values, gpus


def _cpu_steps(hf_config: PretrainedConfig, pairs: Pairs, count: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    step = _FLOPS * parameter_count(hf_config) * count * pairs.tokens
    return max(4, min(50, len(pairs.train) // count, round(_CPU_SECONDS * cores * _CORE_FLOPS / step)))


if __name__ == "__main__":
    sys.exit(main())
