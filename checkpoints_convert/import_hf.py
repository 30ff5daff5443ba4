"""An HF directory into a Megatron checkpoint, a piece at a time: memory holds two pieces, however large the model."""

import io
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from tqdm import tqdm
from transformers import PretrainedConfig

from checkpoints_convert.pieces import (
    FiniteCheck,
    Piece,
    all_pieces,
    checkpoint_sizes,
    converted,
    extra_state_keys,
    share,
)
from checkpoints_convert.streaming import Summary, progress_bar, read_ahead
from megatron_tgdpo.checkpoints.dcp_io import Writer, serialise_common, system_errors, write_common, written
from megatron_tgdpo.checkpoints.listing import write_description
from megatron_tgdpo.checkpoints.model_directory import hf_files
from megatron_tgdpo.console import waiting
from megatron_tgdpo.models.hf_weights.check import open_hf
from megatron_tgdpo.models.hf_weights.mapping import Heads, global_parameters, parameter_count
from megatron_tgdpo.models.hf_weights.reader import HfCheckpoint
from megatron_tgdpo.storage.atomic_directory import AtomicDirectory
from megatron_tgdpo.storage.dtypes import dtype_name
from megatron_tgdpo.storage.files import start_writeback


def import_hf(hf: Path, out: Path, hf_config: PretrainedConfig, dtype: torch.dtype | None = None) -> Summary:
    """Writes the checkpoint that megatron-core would save from a model with these weights; all of it, or nothing.

    Collective over the default group (on the CPU); the pieces are divided among its ranks, which changes nothing but
    how they are distributed over the files.

    Args:
        hf: The HF directory.
        out: The checkpoint directory to make, on storage that all ranks share; it must not exist, or be empty.
        hf_config: The HF directory's config.
        dtype: Of the stored weights. None keeps that of the HF files, or takes fp32 if they have several.

    Raises:
        UserError: On every rank: the HF files are not what the config asks for, or cannot be read; ``out`` is not
            empty, or could not be written.
    """
    started = time.perf_counter()
    with AtomicDirectory(out) as directory:
        directory.run_on_all_ranks(lambda: hf_files(hf))  # before the weights take their time
        checkpoint = directory.run_on_all_ranks(lambda: open_hf(hf, hf_config))
        stored = dtype or _common_dtype(checkpoint, hf_config)
        pieces = all_pieces(hf_config, stored.itemsize)
        size = sum(piece.numel * piece.parameter.dtype(stored).itemsize for piece in pieces)
        directory.reserve(size)
        mine = share(pieces, [piece.numel for piece in pieces], dist.get_rank(), dist.get_world_size())
        directory.run_on_rank0(lambda: write_common(serialise_common({}), directory.temporary))
        total = sum(piece.numel * piece.parameter.dtype(stored).itemsize for piece in mine)
        with progress_bar("HF to Megatron", total) as bar:
            planner = _Planner(checkpoint, hf_config, stored, mine)
            writer = _StreamWriter(directory.temporary, bar)
            directory.run_on_all_ranks(lambda: dcp.save({}, storage_writer=writer, planner=planner))
        planner.finite.warn(hf)
        count = parameter_count(hf_config)
        metadata = {"dtype": dtype_name(stored), "step": None, "parameters": count}
        digests = directory.collect(writer.digests)
        directory.run_on_rank0(lambda: write_description(directory.temporary, hf, metadata, digests))
        with waiting(f"{out}: until all of it is on disk", shown=dist.get_rank() == 0):
            directory.commit()
    return Summary(out, count, dtype_name(stored), size, time.perf_counter() - started)


def _common_dtype(checkpoint: HfCheckpoint, hf_config: PretrainedConfig) -> torch.dtype:
    names = [name for one in global_parameters(hf_config) if not one.fp32 for name, _ in one.hf_tensors]
    dtypes = {checkpoint.tensors[name].torch_dtype for name in names}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


class _Planner(DefaultSavePlanner):
    """Lists this rank's pieces without having them, and reads each when it is asked for."""

    def __init__(
        self, checkpoint: HfCheckpoint, hf_config: PretrainedConfig, dtype: torch.dtype, pieces: list[Piece]
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._checkpoint, self._dtype, self._heads = checkpoint, dtype, Heads.of(hf_config)
        self._sizes = checkpoint_sizes(hf_config)
        self._pieces = {_index(piece): piece for piece in pieces}
        self.finite = FiniteCheck()
        self._empty = extra_state_keys(hf_config) if dist.get_rank() == 0 else []

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._empty]
        return SavePlan(items + [self._item(index, piece) for index, piece in self._pieces.items()])

    def _item(self, index: MetadataIndex, piece: Piece) -> WriteItem:
        assert index.offset is not None
        sizes = (*(1 for _ in piece.parameter.index), piece.end - piece.start, *piece.parameter.shape[1:])
        chunk = ChunkStorageMetadata(index.offset, torch.Size(sizes))
        properties = TensorProperties(dtype=piece.parameter.dtype(self._dtype))
        data = TensorWriteData(chunk, properties, torch.Size(self._sizes[index.fqn]))
        return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([None], buffer)  # a list: one entry for each object of the name on this rank
            return buffer
        assert write_item.tensor_data is not None
        piece = self._pieces[write_item.index]
        rows = piece.read_hf(self._checkpoint, self._heads)
        self.finite.look(piece.parameter.hf_tensors[piece.hf_index or 0][0], rows)
        return converted(rows, piece.parameter.dtype(self._dtype), write_item.index.fqn).view(
            write_item.tensor_data.chunk.sizes
        )


def _index(piece: Piece) -> MetadataIndex:
    parameter = piece.parameter
    return MetadataIndex(parameter.checkpoint_key, (*parameter.index, piece.start, *(0 for _ in parameter.shape[1:])))


class _StreamWriter(Writer):
    """Writes items as they are read; DCP's own writer keeps one tensor of every name until the end."""

    def __init__(self, directory: Path, bar: "tqdm[Any]") -> None:
        super().__init__(directory)
        self._bar = bar

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not plan.items:
            return written([])
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results = []
        with system_errors(), self.fs.create_stream(Path(self.path, name), "wb") as stream:
            for item, data in read_ahead(planner.resolve_data, plan.items):
                start = stream.tell()
                if isinstance(data, Tensor):
                    torch.save(data, stream)  # type: ignore[arg-type]  # it only writes
                    self._bar.update(data.nbytes)
                else:
                    stream.write(data.getbuffer())
                length = stream.tell() - start
                start_writeback(stream.fileno(), start, length)
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            os.fsync(stream.fileno())
        return written(results)
