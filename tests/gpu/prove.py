"""Proves the GPU path on one GPU, downloads nothing, and leaves a table and a JSON file.

    python -m tests.gpu.prove [--parts attention,bf16,...] [--out proof.json] [--minutes 30]

Needs PyTorch >= 2.6 with CUDA and this project's requirements; Transformer Engine (2.9 to 2.20) is optional, and what
needs it is listed as not taken without it. All versions are printed, and kept with the figures. Exit status 1 if a
figure misses its limit. ``--device cpu --tiny`` runs the same code on a CPU with toy sizes; its speeds mean nothing.

    attention  each core attention beside the block-wise one: packing, shared prompts, windows, softcaps
    bf16       training beside plain PyTorch in fp32 on the CPU, every family
    spec       the Transformer Engine layer spec beside the local one, every family
    experts    Transformer Engine's grouped products, in bf16 and FP8, beside one expert after another
    fp8        each recipe's loss curve beside bf16's
    frozen     what FP8 does to token rewards
    resume     save and load in every precision, FP8 weights too
    padding    a pack without pairs changes nothing
    repeat     the same run twice
    lengths    packs of many lengths through FlexAttention, all of them compiled
    variants   offloads, overlap and recomputation change no loss
    ranks      two processes on one GPU, where NCCL takes that
    speed      memory, MFU, pairs/s of a 1B and a 3B shape at 2,048 and 8,192-token rows, beside plain HF
"""

import argparse
import datetime
import importlib.metadata
import logging
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tgdpo.distributed.cpu_backend import resolve_device
from megatron_tgdpo.distributed.layout import destroy_model_parallel
from megatron_tgdpo.gpu.capabilities import dotted
from megatron_tgdpo.planning.peak import peak_tflops
from tests.gpu.bench import Bench
from tests.gpu.figures import Figure, line, skipped, table, write_json
from tests.gpu.parts import PARTS
from tests.gpu.runs import RUNS
from tests.gpu.speed import speed

NAMES = (*PARTS, *RUNS, "speed")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", default=",".join(NAMES), help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for trying the script itself")
    parser.add_argument("--minutes", type=float, default=30.0, help="parts that do not fit are skipped; default: 30")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak, for MFU of a GPU that is not known here")
    parser.add_argument("--out", type=Path, default=Path("proof.json"))
    options = parser.parse_args(arguments)
    chosen = options.parts.split(",")
    if unknown := set(chosen) - set(NAMES):
        parser.error(f"--parts: {', '.join(sorted(unknown))} unknown, choose of {', '.join(NAMES)}")
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    device = resolve_device(options.device)
    begin = time.monotonic()
    deadline = begin + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="prove-") as root:
        bench = Bench(device, Path(root))
        machine = describe(bench, options.peak_tflops)
        print("\n".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
        figures: list[Figure] = []
        for figure in run(bench, chosen, options.tiny, machine["peak_tflops"], deadline):
            # On disk at once: a run that is cut off keeps what it has measured.
            figures.append(figure)
            write_json(options.out, machine, figures)
            print(f"  {time.monotonic() - begin:5.0f} s  {line(figure)}", flush=True)
        destroy_model_parallel()
        dist.destroy_process_group()
    print(table(figures))
    print(f"written to {options.out}")
    return int(any(figure.passed is False for figure in figures))


def run(bench: Bench, chosen: Sequence[str], tiny: bool, peak: float | None, deadline: float) -> Iterator[Figure]:
    """The chosen parts in their order; one that fails is a failed figure, and the others still run."""
    for name in (name for name in NAMES if name in chosen):
        if deadline <= time.monotonic():
            reason = "no time left: raise --minutes or choose --parts"
            yield skipped(name, "the whole part", reason, judged=name == "speed" and not tiny)
            continue
        try:
            if name == "speed":
                part = speed(bench, tiny, peak, lambda: deadline - time.monotonic())
            else:
                part = (PARTS | RUNS)[name](bench, tiny)
            for figure in part:
                yield figure
                if deadline <= time.monotonic():
                    yield skipped(name, "the rest of the part", "no time left: raise --minutes or choose --parts")
                    break
        except Exception as error:
            traceback.print_exc()
            note = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            yield Figure(name, "the part stopped", None, passed=False, note=note)
        bench.forget()


def describe(bench: Bench, peak: float | None) -> dict[str, Any]:
    """What the figures were taken on."""
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    return {
        "device": device,
        "date": datetime.date.today().isoformat(),
        **versions(bench),
        "fused parts": bench.found.describe(),
        "peak_tflops": peak or peak_tflops(device),
        "command": " ".join(sys.argv),
    }


# Distributions whose versions matter for what is measured.
_PACKAGES = ("megatron-core", "transformer-engine", "apex", "flash-attn", "triton", "transformers")


def versions(bench: Bench) -> dict[str, str]:
    """Of all that the figures may depend on; ``none`` for what is not there."""
    on_gpu = bench.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "driver": _driver() if on_gpu else "none",
        "cudnn": dotted(bench.found.cudnn),
        "nccl": dotted(torch.cuda.nccl.version()) if on_gpu else "none",
        **{name: _installed(name) for name in _PACKAGES},
    }


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    """The NVIDIA driver's version, of the first GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown: no nvidia-smi"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else f"unknown: {done.stderr.strip()[:100]}"


if __name__ == "__main__":
    sys.exit(main())
