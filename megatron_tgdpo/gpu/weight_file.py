"""Weights that stay in a file, mapped into memory, and whose pages are given back between uses."""

import mmap
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_tgdpo.errors import UserError


class MappedWeights:
    """Tensors that were written to a file and are read from it.

    Attributes:
        tensors: In the order in which they were given; nobody may write to them.
    """

    def __init__(self, tensors: Sequence[Tensor], mapped: mmap.mmap) -> None:
        self.tensors, self._mapped = tensors, mapped

    def expect(self) -> None:
        """Has the operating system read what is not in its cache, while something else is computed."""
        self._mapped.madvise(mmap.MADV_WILLNEED)

    def release(self) -> None:
        """Gives the pages back: they are read again, from the system's cache or the disk, when they are next used."""
        self._mapped.madvise(mmap.MADV_DONTNEED)


class WeightFile:
    """A file without a name: it goes when this process ends, however that is.

    Args:
        directory: Where its bytes are; made if it is not there.

    Raises:
        UserError: The system cannot give back the pages of a mapping, as outside Linux, or makes no file there.
    """

    def __init__(self, directory: Path) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            raise UserError(
                "offload.frozen_from=disk gives pages back to the system, which works on Linux only: use host"
            )
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - open as long as the process
        except OSError as error:
            raise self._refusal(error) from error

    def hold(self, tensors: Iterable[Tensor]) -> MappedWeights:
        """Writes tensors, and maps what was written.

        Raises:
            UserError: They cannot be written, as on a full disk.
        """
        given = [tensor.detach().contiguous().cpu() for tensor in tensors]
        start = -(-self._file.seek(0, os.SEEK_END) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        offsets, end = [], start
        try:
            for tensor in given:
                # What a cache line holds, and any dtype begins at.
                end = -(-end // 64) * 64
                offsets.append(end - start)
                self._file.seek(end)
                self._file.write(tensor.view(-1).view(torch.uint8).numpy().data)
                end += tensor.nbytes
            if end == start:
                # Nothing to hold, as on a stage of layers alone; no mapping is empty.
                end += 1
                self._file.truncate(end)
            self._file.flush()
            # Private and writable, as PyTorch wants its memory; what is never written to stays the file's.
            mapped = mmap.mmap(
                self._file.fileno(), end - start, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=start
            )
        except OSError as error:
            raise self._refusal(error) from error
        found = [
            torch.frombuffer(mapped, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
            for tensor, offset in zip(given, offsets, strict=True)
        ]
        return MappedWeights(found, mapped)

    def _refusal(self, error: OSError) -> UserError:
        return UserError(
            f"{self._directory}: the weights of frozen models cannot be written there ({error.strerror}): make room, "
            "or set offload.frozen_from=host"
        )
