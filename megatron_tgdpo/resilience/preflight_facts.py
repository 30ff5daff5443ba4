"""What one rank can say about its machine and its inputs, without talking to any other."""

import hashlib
import os
import platform
import socket
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from megatron_tgdpo.checkpoints.model_directory import model_files
from megatron_tgdpo.config.loading import to_yaml
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.storage.hub import local_path

_PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "numpy", "transformer-engine", "apex")
_TIMEOUT_SECONDS = 20
_SHARED_MEMORY, _LEAST_SHARED_MEMORY = "/dev/shm", 1 << 30
_GPU_QUERY = "index,ecc.errors.uncorrected.volatile.total,remapped_rows.failure"


@dataclass(frozen=True)
class RankFacts:
    """Of one rank; the ``compared`` values must be the same on all ranks.

    Attributes:
        rank: Global rank.
        host: Name of its machine.
        compared: Versions and fingerprints, by what they are of.
        gpus: GPUs that the process sees, None on CPU.
        faults: What is wrong with the machine, in words; a reason not to use it.
        notes: What deserves a look but stops nothing.
    """

    rank: int
    host: str
    compared: dict[str, str]
    gpus: int | None
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def gather_facts(config: Config, rank: int, local_rank: int, device: torch.device) -> RankFacts:
    """Collects this rank's facts; the first rank of a machine also asks its GPUs for errors."""
    models = {"policy": config.model.policy, "reference": config.model.reference, "guide": config.model.guide}
    compared = package_versions()
    compared["config"] = _short(to_yaml(config))
    compared |= {
        f"model.{role}": model_fingerprint(local_path(path)) for role, path in models.items() if path is not None
    }
    faults: list[str] = []
    notes: list[str] = []
    on_gpu = device.type == "cuda"
    if on_gpu and local_rank == 0:
        faults += gpu_faults(_output(["nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits"]))
        notes += xid_notes(_output(["dmesg"]))
        notes += shared_memory_notes(os.statvfs(_SHARED_MEMORY) if Path(_SHARED_MEMORY).is_dir() else None)
    if on_gpu:
        notes += occupied_notes(local_rank, *torch.cuda.mem_get_info(device))
    # Slurm's name of the machine is the one that it can be told to leave out.
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return RankFacts(rank, host, compared, torch.cuda.device_count() if on_gpu else None, faults, notes)


def package_versions() -> dict[str, str]:
    """Versions of Python, CUDA and the packages that decide what is computed; packages that are not there are left
    out, so that one rank's having them shows."""
    versions = {"python": platform.python_version()}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def model_fingerprint(path: Path) -> str:
    """Of the config's content and the weight files' names and sizes: cheap, and different for another model's files."""
    config, *weights = model_files(path)
    sizes = [f"{file.name} {file.stat().st_size}" for file in weights]
    return _short("\n".join([config.read_text(encoding="utf-8"), *sizes]))


def gpu_faults(answer: str) -> list[str]:
    """Reads nvidia-smi's lines ``index, uncorrected ECC errors, failed row remaps``; ``[N/A]`` counts as none."""
    faults = []
    for line in answer.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 3:
            continue
        index, errors, remaps = cells
        if errors.isdigit() and int(errors):
            faults.append(f"GPU {index} has {errors} uncorrected ECC errors")
        if remaps.isdigit() and int(remaps):
            faults.append(f"GPU {index} failed to remap memory rows")
    return faults


def occupied_notes(index: int, free: int, total: int) -> list[str]:
    """A GPU of which other processes hold a tenth or more; before this one has put anything there."""
    if free >= 0.9 * total:
        return []
    return [f"GPU {index}: {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB are in use by another process"]


def shared_memory_notes(stats: os.statvfs_result | None) -> list[str]:
    """Shared memory that is too small for NCCL between the GPUs of a machine: a container's default is 64 MiB."""
    if stats is None or (size := stats.f_blocks * stats.f_frsize) >= _LEAST_SHARED_MEMORY:
        return []
    return [
        f"{_SHARED_MEMORY} has {size >> 20} MiB, NCCL wants {_LEAST_SHARED_MEMORY >> 20}: start the container with "
        "more (--shm-size, --ipc=host)"
    ]


def xid_notes(log: str) -> list[str]:
    """The last Xid line of a kernel log; since when, only the log knows, so it stops nothing."""
    lines = [line.strip() for line in log.splitlines() if "NVRM: Xid" in line]
    return [f"the kernel log has {len(lines)} Xid lines, last: {lines[-1]}"] if lines else []


def _output(command: list[str]) -> str:
    """A command's output; empty where it is not there, not allowed or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
