"""Reads slices of an HF checkpoint's safetensors files, after checking from their headers that all of it is there."""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.files import FileReader, read_error
from megatron_tgdpo.json_text import parse_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# A header longer than this is not a header (the format's own limit).
_MAX_HEADER_BYTES = 100_000_000
_BLOCK_BYTES = 16 << 20
_PICKLED = ("*.bin", "*.pt", "*.pth")
_ADAPTER = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from a file's header; ``offset`` is its first byte in the file."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch's terms."""
        return _DTYPES[self.dtype]


class HfCheckpoint:
    """The weights of an HF directory; nothing but headers is read until a slice is asked for, and then only that.

    For one thread at a time.

    Args:
        path: A directory with ``model.safetensors`` or ``model.safetensors.index.json``.

    Attributes:
        path: As given.
        tensors: What is there, by name.

    Raises:
        UserError: No safetensors, a LoRA adapter, a file that the index names is missing, a truncated or corrupt file,
            a tensor that the index names is not in its file, or a tensor's type is not bf16, fp16 or fp32.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = _read_headers(path)
        self._files = FileReader(path)

    def check(self, expected: Mapping[str, Sequence[int]], ignored: tuple[str, ...] = ()) -> None:
        """Compares the tensors that are there with those that the config asks for.

        Args:
            expected: Shape by HF name.
            ignored: Endings of names that may be there as well.

        Raises:
            UserError: A tensor is missing, not expected, or of another shape.
        """
        missing = sorted(set(expected) - set(self.tensors))
        if missing:
            raise UserError(f"{self.path}: {_some(missing)} missing, config.json asks for it")
        extra = sorted(name for name in set(self.tensors) - set(expected) if not name.endswith(ignored))
        if extra:
            raise UserError(f"{self.path}: {_some(extra)} not expected, config.json describes another model")
        for name, shape in expected.items():
            if self.tensors[name].shape != tuple(shape):
                raise UserError(
                    f"{self.path}: {name} has shape {list(self.tensors[name].shape)} in {self.tensors[name].file}, "
                    f"config.json asks for {list(shape)}"
                )

    def whole(self, name: str) -> Tensor:
        """The whole tensor, in the stored dtype."""
        return self.rows(name, 0, self.tensors[name].shape[0])

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows [start, end) of a matrix, or elements of a vector, in the stored dtype."""
        info = self.tensors[name]
        rows = torch.empty((end - start, *info.shape[1:]), dtype=info.torch_dtype)
        row_bytes = math.prod(info.shape[1:]) * rows.element_size()
        self._files.read_into(rows, info.file, info.offset + start * row_bytes)
        return rows

    def columns(self, name: str, start: int, end: int) -> Tensor:
        """Columns [start, end) of a matrix, in the stored dtype."""
        info = self.tensors[name]
        count, width = info.shape
        columns = torch.empty((count, end - start), dtype=info.torch_dtype)
        step = max(1, _BLOCK_BYTES // (width * columns.element_size()))
        for first in range(0, count, step):
            last = min(first + step, count)
            columns[first:last] = self.rows(name, first, last)[:, start:end]
        return columns


def _some(names: list[str]) -> str:
    tail = f" and {len(names) - 1} other tensors" if len(names) > 1 else ""
    return f"tensor {names[0]}{tail}"


def refuse_adapter(path: Path, tensors: Iterable[str] = ()) -> None:
    """Stops at a LoRA adapter, which has no config and not all weights.

    Args:
        path: A directory.
        tensors: The names of its tensors, if known.

    Raises:
        UserError: It is one.
    """
    found = [name for name in _ADAPTER if (path / name).is_file() and not (path / "config.json").is_file()]
    found += [name for name in tensors if ".lora_" in name]
    if found:
        raise UserError(
            f"{path}: a LoRA adapter ({found[0]}), not a model: merge it into its base model first "
            "(peft's merge_and_unload) and give the directory where that was saved"
        )


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    refuse_adapter(path)
    tensors = _read_files(path)
    refuse_adapter(path, tensors)
    return tensors


def _read_files(path: Path) -> dict[str, TensorInfo]:
    index = path / _INDEX
    if index.is_file():
        weight_map = _read_index(index)
        tensors: dict[str, TensorInfo] = {}
        for file in sorted(set(weight_map.values())):
            if not (path / file).is_file():
                raise UserError(f"{path}: {file} is missing, {_INDEX} names it: download it again")
            tensors.update(_read_header(path / file))
        absent = sorted(name for name in weight_map if name not in tensors)
        if absent:
            raise UserError(f"{index}: {_some(absent)} not found in the files it names")
        return tensors
    if (path / _SINGLE).is_file():
        return _read_header(path / _SINGLE)
    if any(file for pattern in _PICKLED for file in path.glob(pattern)):
        raise UserError(
            f"{path}: only pickled weights (.bin), which are not read: load them with transformers and "
            "save_pretrained(..., safe_serialization=True)"
        )
    raise UserError(f"{path}: neither {_SINGLE} nor {_INDEX} there")


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except OSError as error:
        raise read_error(index, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a readable index: {error!r}") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: file name {file!r} leads out of the directory")
    return weight_map


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Reads a safetensors header (8 bytes of length, then JSON) and checks it against the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            raw = stream.read(length) if length <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        raise read_error(file, error) from error
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise UserError(f"{file}: truncated or not a safetensors file: download it again")
    try:
        header = parse_json(raw)
        header.pop("__metadata__", None)
        infos, end = _parse(file, header, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: corrupt safetensors header: download it again") from error
    if size != end:
        raise UserError(f"{file}: {size} bytes, its header says {end}: truncated, download it again")
    return infos


def _parse(file: Path, header: dict[str, Any], data: int) -> tuple[dict[str, TensorInfo], int]:
    """What a header says: the tensors, and the file's size; ``data`` is where the tensors' bytes begin."""
    infos, last = {}, data
    for name, entry in header.items():
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        start, end = entry["data_offsets"]
        if dtype not in _DTYPES:
            raise UserError(f"{file}: {name} is stored as {dtype}, only {', '.join(_DTYPES)} are supported")
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ValueError(name)
        if end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise UserError(f"{file}: {name} has {end - start} bytes, its shape {list(shape)} and {dtype} need others")
        infos[name] = TensorInfo(file.name, shape, dtype, data + start)
        last = max(last, data + end)
    return infos, last
