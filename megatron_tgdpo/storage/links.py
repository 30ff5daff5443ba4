"""Symbolic links in model directories: followed where huggingface_hub made them, refused elsewhere.

A directory from somewhere else may link to any file of whoever reads it, and what is copied into a checkpoint or an
export is passed on. Weights are read, not copied: they may be links to anywhere. Source of the layout:
huggingface_hub 2.4 ``file_download.py`` and ``utils/_shared_blobs.py``:

    CACHE/models--OWNER--NAME/snapshots/REVISION/FILE -> ../../blobs/ETAG
    CACHE/models--OWNER--NAME/blobs/ETAG              a file, or -> ../../blobs/XX/HASH
"""

import re
from pathlib import Path

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.files import read_error

_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")


def real_file(file: Path, directory: Path) -> Path:
    """The file whose content a model directory's file has: itself, or what the Hub's cache links to.

    Args:
        file: In ``directory``, or in a folder of it.
        directory: The model directory; it may be given by way of links.

    Raises:
        UserError: The file, or its folder, is any other link.
        StorageError: It cannot be read.
    """
    try:
        inside = directory.resolve(strict=True)
        real = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise read_error(file, error if isinstance(error, OSError) else OSError(str(error))) from error
    if real == inside / file.relative_to(directory) or _of_hub_cache(real, inside):
        return real
    raise UserError(
        f"{file}: a link to {real}, and links are followed only inside the cache of the Hugging Face Hub: put the file "
        "itself there"
    )


def _of_hub_cache(real: Path, inside: Path) -> bool:
    """Whether a file is a blob of the cached repository that a directory, both without links, is a snapshot of."""
    snapshots = next((parent for parent in inside.parents if parent.name == "snapshots"), None)
    if snapshots is None or not _REPOSITORY.fullmatch(snapshots.parent.name):
        return False
    repository = snapshots.parent
    return real.parent == repository / "blobs" or real.parent.parent == repository.parent / "blobs"
