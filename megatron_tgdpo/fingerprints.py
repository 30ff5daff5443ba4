"""What a model directory's weights are, as one hash of all their bytes."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_tgdpo.checkpoint_directory import hf_folder
from megatron_tgdpo.data.manifest import digest_file
from megatron_tgdpo.errors import UserError

_WEIGHT_ENDINGS = (".safetensors", ".distcp")
_THREADS = 8


def weights_fingerprint(path: Path) -> str:
    """sha256 (hex) over ``config.json`` and the content of every weight file; reads all of them.

    Args:
        path: An HF or Megatron directory.

    Raises:
        UserError: A file cannot be read, or there are no weight files.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in _WEIGHT_ENDINGS)
    if not files:
        raise UserError(f"{path}: no weight files ({', '.join(_WEIGHT_ENDINGS)}) there")
    # Hashing releases the interpreter's lock, so threads read several files at once.
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda file: digest_file(str(file)).sha256, [hf_folder(path) / "config.json", *files]))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
