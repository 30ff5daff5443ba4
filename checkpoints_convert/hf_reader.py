"""Reads slices of an HF checkpoint's safetensors files, after checking from their headers that all of it is there."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_tgdpo.errors import UserError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("BF16", "F16", "F32")
# A header longer than this is not a header (the format's own limit).
_MAX_HEADER_BYTES = 100_000_000
_OPEN_FILES = 4


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from a file's header."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class HfCheckpoint:
    """The weights of an HF directory, opened read-only; nothing but headers is read until a slice is asked for.

    Args:
        path: A directory with ``model.safetensors`` or ``model.safetensors.index.json``.

    Raises:
        UserError: No safetensors, a file that the index names is missing, a truncated or corrupt file, a tensor that
            the index names is not in its file, or a tensor's type is not bf16, fp16 or fp32.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = _read_headers(path)
        self._open: dict[str, Any] = {}

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
        return self._slice(name)[:]

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows [start, end), in the stored dtype."""
        return self._slice(name)[start:end]

    def columns(self, name: str, start: int, end: int) -> Tensor:
        """Columns [start, end) of a matrix, in the stored dtype."""
        return self._slice(name)[:, start:end]

    def _slice(self, name: str) -> Any:
        file = self.tensors[name].file
        if file not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.clear()  # drops the memory maps, and with them the resident pages
            try:
                self._open[file] = safe_open(self.path / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.path / file}: cannot be read: {error}") from error
        return self._open[file].get_slice(name)


def _some(names: list[str]) -> str:
    tail = f" and {len(names) - 1} other tensors" if len(names) > 1 else ""
    return f"tensor {names[0]}{tail}"


def _read_headers(path: Path) -> dict[str, TensorInfo]:
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
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise UserError(
            f"{path}: only pickled weights (.bin), which are not read: load them with transformers and "
            "save_pretrained(..., safe_serialization=True)"
        )
    raise UserError(f"{path}: neither {_SINGLE} nor {_INDEX} there")


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise UserError(f"{file}: truncated or not a safetensors file: download it again")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        infos = {name: TensorInfo(file.name, tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{file}: corrupt safetensors header: download it again") from error
    if size != 8 + length + end:
        raise UserError(f"{file}: {size} bytes, its header says {8 + length + end}: truncated, download it again")
    for name, info in infos.items():
        if info.dtype not in _DTYPES:
            raise UserError(f"{file}: {name} is stored as {info.dtype}, only {', '.join(_DTYPES)} are supported")
    return infos
