"""Bytes of tensors from and to files at given places, without mapping them: mapped pages would count as memory."""

import os
from pathlib import Path

import torch
from torch import Tensor

from megatron_tgdpo.errors import DamageError
from megatron_tgdpo.storage.files import read_error

_OPEN_FILES = 4


class FileReader:
    """Reads at given places of the files of one directory; for one thread at a time.

    Args:
        directory: Where the files are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: dict[str, int] = {}

    def read_into(self, tensor: Tensor, name: str, offset: int) -> None:
        """Fills a contiguous CPU tensor with the bytes that start at ``offset`` of a file.

        Raises:
            DamageError: The file ends too early.
            UserError: It is not there.
            StorageError: It cannot be read.
        """
        view = bytes_of(tensor)
        try:
            descriptor = self._open(name)
            while view:
                count = os.preadv(descriptor, [view], offset)
                if not count:
                    raise DamageError(f"{self._directory / name}: ends at byte {offset:,}: truncated")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise read_error(self._directory / name, error) from error

    def _open(self, name: str) -> int:
        if name not in self._descriptors:
            if len(self._descriptors) >= _OPEN_FILES:
                self.close()
            self._descriptors[name] = os.open(self._directory / name, os.O_RDONLY)
        return self._descriptors[name]

    def close(self) -> None:
        """Closes what is open; reading again opens it again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data
