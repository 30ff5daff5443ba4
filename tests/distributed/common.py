"""A tiny TGDPO problem that the multi-process tests share."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.tiny_models import make_llama


def write_pairs(path: Path, count: int, vocabulary: int = 131, longest: int = 40) -> None:
    """Random plain prompt/chosen/rejected pairs in words of the tiny tokenizer."""
    rng = random.Random(5)

    def words(high: int) -> str:
        return " ".join(f"w{rng.randrange(3, vocabulary)}" for _ in range(rng.randint(1, high)))

    records = [{"prompt": words(20), "chosen": words(longest), "rejected": words(longest)} for _ in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_problem(root: Path, **model_options: Any) -> dict[str, Any]:
    """Policy, a narrower guide and 32 pairs under ``root``, and a config that trains on them in fp32."""
    make_llama(root / "policy", seed=1, **model_options)
    make_llama(root / "guide", seed=2, hidden_size=32, **model_options)
    write_pairs(root / "pairs.jsonl", 32)
    return {
        "model": {"policy": str(root / "policy"), "guide": str(root / "guide")},
        "data": {"train": str(root / "pairs.jsonl"), "max_length": 64, "workers": 1},
        "parallel": {"timeout_minutes": 15},
        "batch": {"global_pairs": 6, "tokens_per_micro_batch": 256},
        "optimizer": {"lr": 1e-3},
        "precision": {"dtype": "fp32"},
        "train": {"steps": 6, "seed": 7},
        "output_dir": str(root / "run"),
    }


def merged(config: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A copy with the given keys of the given sections replaced."""
    changed = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    for name, value in sections.items():
        changed[name] = {**changed.get(name, {}), **value} if isinstance(value, dict) else value
    return changed


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of an HF directory, as stored."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def assert_same_weights(one: Path, other: Path) -> None:
    """Two HF directories hold the same tensors, to the bit."""
    ours, theirs = read_weights(one), read_weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
