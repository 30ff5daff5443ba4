"""Reads slices of an HF checkpoint's safetensors files, after checking from their headers that all of it is there.

Which file is read, and which tensor is which, is decided as transformers 5.24 does: ``modeling_utils.py:
_get_resolved_checkpoint_files`` and ``_adjust_missing_and_unexpected_keys``, ``core_model_loading.py:
rename_source_key``.

Files are read, not mapped as the library does: mapped pages count as memory, and a mapped file that turns out shorter,
or a device that fails, ends the process without a word.
"""

import logging
import math
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tgdpo.checkpoints.model_directory import refuse_adapter
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.dtypes import SAFETENSORS_DTYPES
from megatron_tgdpo.storage.files import read_error
from megatron_tgdpo.storage.json_text import parse_json
from megatron_tgdpo.storage.tensor_files import FileReader

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# A header longer than this is not a header (the format's own limit).
_MAX_HEADER_BYTES = 100_000_000
_BLOCK_BYTES = 16 << 20
_PICKLED = ("*.bin", "*.pt", "*.pth")
# What other software, and transformers before 4.31, saved beside weights, and what follows from the config: rotary
# frequencies, causal masks, positions, Transformer Engine's empty state.
_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.(original_)?inv_freq|rotary_emb\.(cos|sin)_cached|masked_bias|attn\.bias|position_ids"
    r"|_extra_state)$"
)
# The model inside, saved without its head, has names without ``model.``; wrappers of it have one too many.
_PREFIX = "model."
_EXTRA_PREFIX, _NO_PREFIX = re.compile(r"model\.(model|lm_head)\."), re.compile(r"(layers|embed_tokens|norm)\.")


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
        return SAFETENSORS_DTYPES[self.dtype]


class HfCheckpoint:
    """The weights of an HF directory; nothing but headers is read until a slice is asked for, and then only that.

    For one thread at a time.

    Args:
        path: A directory with ``model.safetensors`` or ``model.safetensors.index.json``.

    Attributes:
        path: As given.
        tensors: What is there, by the name that transformers takes it for; buffers that carry no weights are left out.

    Raises:
        UserError: No safetensors, a LoRA adapter, a file that the index names is missing, a truncated or corrupt file,
            a tensor that the index names is not in its file, a tensor's type is not bf16, fp16 or fp32, or two tensors
            are taken for the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = _read_headers(path)
        self._files = FileReader(path)

    def take_for(self, name: str, other: str) -> None:
        """Lets a tensor that is not there be another one, if that is there."""
        if name not in self.tensors and other in self.tensors:
            self.tensors[name] = self.tensors[other]

    def check(self, expected: Mapping[str, Sequence[int]], allowed: Collection[str] = ()) -> None:
        """Compares the tensors that are there with those that the config asks for.

        Args:
            expected: Shape by HF name.
            allowed: Names that may be there as well.

        Raises:
            UserError: A tensor is missing, not expected, or of another shape.
        """
        missing = sorted(set(expected) - set(self.tensors))
        if missing:
            raise UserError(f"{self.path}: {_some(missing)} missing, config.json asks for it")
        extra = sorted(set(self.tensors) - set(expected) - set(allowed))
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


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    refuse_adapter(path)
    stored = _read_files(path)
    refuse_adapter(path, stored)
    tensors: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        taken_for = _canonical(name)
        if taken_for in tensors:
            raise UserError(f"{path}: {taken_for} is there twice, with and without the prefix {_PREFIX!r}")
        tensors[taken_for] = info
    return tensors


def _canonical(name: str) -> str:
    if _EXTRA_PREFIX.match(name):
        return name.removeprefix(_PREFIX)
    return _PREFIX + name if _NO_PREFIX.match(name) else name


def _read_files(path: Path) -> dict[str, TensorInfo]:
    index = path / _INDEX
    if (path / _SINGLE).is_file():
        if index.is_file():
            logger.warning("%s: %s is read, as transformers does; %s beside it is not", path, _SINGLE, _INDEX)
        return _read_header(path / _SINGLE)
    if index.is_file():
        weight_map = _read_index(index)
        tensors: dict[str, TensorInfo] = {}
        for file in sorted(set(weight_map.values())):
            if not (path / file).is_file():
                raise UserError(f"{path}: {file} is missing, {_INDEX} names it: download it again")
            tensors.update(_read_header(path / file))
        absent = sorted(name for name in weight_map if name not in tensors and not _BUFFER.search(name))
        if absent:
            raise UserError(f"{index}: {_some(absent)} not found in the files it names")
        return tensors
    raise UserError(f"{path}: {_why_unread(path)}")


def _why_unread(path: Path) -> str:
    """What a directory without the two files that are read has instead, and what to do."""
    if any(path.glob("consolidated*")):
        return (
            "only consolidated files, in the format of the model's authors: get the safetensors files of the Hugging "
            "Face format, or convert with the script of transformers' model folder (convert_..._weights_to_hf.py)"
        )
    if any(file for pattern in _PICKLED for file in path.glob(pattern)):
        return (
            "only pickled weights (.bin), which are not read: where you trust them, load them with transformers "
            '(AutoModelForCausalLM.from_pretrained(DIR, dtype="auto")) and save_pretrained to another directory, which '
            "writes safetensors"
        )
    others = sorted(file.name for file in path.glob("*.safetensors"))
    return f"neither {_SINGLE} nor {_INDEX} there" + (f", only {others[0]}: rename it if it is that" if others else "")


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
    result: dict[str, str] = weight_map
    return result


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
        if _BUFFER.search(name):
            if not all(type(number) is int and number >= 0 for number in (start, end)):
                raise ValueError(name)
            last = max(last, data + end)
            continue
        if dtype not in SAFETENSORS_DTYPES:
            raise UserError(f"{file}: {name} is stored as {dtype}, only {', '.join(SAFETENSORS_DTYPES)} are supported")
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ValueError(name)
        if end - start != math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize:
            raise UserError(f"{file}: {name} has {end - start} bytes, its shape {list(shape)} and {dtype} need others")
        infos[name] = TensorInfo(file.name, shape, dtype, data + start)
        last = max(last, data + end)
    return infos, last
