"""Reading time of a checkpoint's `.metadata`, beside that of Python's own unpicklers, which refuse nothing.

    python -m tools.benchmarks.metadata_file [--layers 80] [--data-ranks 64]

The metadata are those of a Llama with so many layers whose weights, main weights and moments as many data ranks save,
each its part.
"""

import argparse
import io
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_tgdpo.checkpoints.dcp_io import SafeReader
from megatron_tgdpo.checkpoints.manifest import TENSORS_FILE

_ROWS, _COLUMNS = 4096, 1024
_STATES = ("model", "optimizer.fp32_param", "optimizer.exp_avg", "optimizer.exp_avg_sq")
_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
_ROUNDS = 3


def metadata(layers: int, data_ranks: int) -> Metadata:
    """Of a checkpoint of so many parts of each weight."""
    part, size = torch.Size([_ROWS // data_ranks, _COLUMNS]), torch.Size([_ROWS, _COLUMNS])
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, Any] = {}
    for state in _STATES:
        for layer in range(layers):
            for linear in _LINEARS:
                name = f"{state}.decoder.layers.{layer}.{linear}.weight"
                offsets = [torch.Size([rank * part[0], 0]) for rank in range(data_ranks)]
                chunks = [ChunkStorageMetadata(offset, part) for offset in offsets]
                tensors[name] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), size, chunks)
                for rank, offset in enumerate(offsets):
                    stored = _StorageInfo(f"__{rank}_0.distcp", len(places) * 1000, 4 * part.numel() + 1000)
                    places[MetadataIndex(name, offset, rank)] = stored
    return Metadata(tensors, storage_data=places)


def _cpu_seconds(action: Callable[[], object]) -> float:
    taken = []
    for _ in range(_ROUNDS):
        began = time.process_time()
        action()
        taken.append(time.process_time() - began)
    return min(taken)


def main() -> None:
    """Prints a line for each reader: seconds of CPU time, the fastest of three."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.metadata_file")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--data-ranks", type=int, default=64)
    options = parser.parse_args()
    content = pickle.dumps(metadata(options.layers, options.data_ranks))
    python: Any = pickle._Unpickler  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / TENSORS_FILE).write_bytes(content)
        seconds = {
            "Python's in C": _cpu_seconds(lambda: pickle.loads(content)),
            "Python's in Python": _cpu_seconds(lambda: python(io.BytesIO(content)).load()),
            "as checkpoints are read, checked": _cpu_seconds(lambda: SafeReader(Path(name)).read_metadata()),
        }
    print(f".metadata of {len(content) / 1e6:.1f} MB")
    slowest = seconds["Python's in Python"]
    for reader, taken in seconds.items():
        print(f"{reader:<33} {taken:6.2f} s, {taken / slowest:.2f} of Python's in Python")


if __name__ == "__main__":
    main()
