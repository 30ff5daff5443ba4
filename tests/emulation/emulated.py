"""The real Transformer Engine Python, and megatron-core's real wrappers of it, on the CPU: kernels emulated.

:func:`install` goes before anything imports megatron-core, which looks for Transformer Engine on import. The machine
that it plays is one H100, or another GPU of the compute capability that EMULATED_CAPABILITY names (``10.0``).
"""

import contextlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from typing import Any

import torch

COMMAND = "bash tests/emulation/run.sh"
CAPABILITY = tuple(map(int, os.environ.get("EMULATED_CAPABILITY", "9.0").split(".")))


class _Device:
    """What Transformer Engine asks of the device."""

    name = "emulated"
    major, minor = CAPABILITY
    multi_processor_count = 132
    total_memory = 80 << 30


# What Transformer Engine asks of tensors and of torch before it works with them, and where it makes tensors; and what
# it must ask here.
_ASKED = {
    ".is_cuda": ".is_cpu", "assert torch.cuda.is_available()": "assert True",
    "if not torch.cuda.is_available()": "if False",
    "_mask, torch.cuda.current_device()": '_mask, "cpu"', "dtype=torch.bfloat16).cuda()": "dtype=torch.bfloat16)",
    'device="cuda"': 'device="cpu"', 'device = "cuda"': 'device = "cpu"', 'torch.device("cuda")': 'torch.device("cpu")',
}  # fmt: skip


class _AskingForCpu(SourceFileLoader):
    """Loads a module of Transformer Engine that takes tensors on the CPU for what it can work with."""

    def get_code(self, fullname: str) -> Any:
        source = self.get_source(fullname)
        if not any(question in source for question in _ASKED):
            return super().get_code(fullname)
        for question, instead in _ASKED.items():
            source = source.replace(question, instead)
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not fullname.startswith("transformer_engine."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _AskingForCpu(spec.loader.name, spec.loader.path)
        return spec


def missing() -> str | None:
    """Why nothing can be emulated here."""
    if torch.cuda.is_available():
        return f"emulates GPU kernels on a CPU, and there is a GPU: hide it (CUDA_VISIBLE_DEVICES=) and use {COMMAND}"
    wanted = ("transformer_engine", "einops", "onnxscript", "triton")
    if any(importlib.util.find_spec(name) is None for name in wanted):
        return f"needs the environment that {COMMAND} makes"
    return None


def install() -> None:
    """Replaces the compiled module, and what else needs a GPU, for the rest of the process; once."""
    if "transformer_engine_torch" in sys.modules:
        return
    # Only here: it asks which Transformer Engine is installed.
    from tests.emulation import kernels

    # The libraries are not loaded, and nothing is compiled by torch.
    os.environ.update(NVTE_PROJECT_BUILDING="1", NVTE_TORCH_COMPILE="0", TORCHDYNAMO_DISABLE="1")
    _replace_cuda()
    sys.modules["transformer_engine_torch"] = kernels
    sys.meta_path.insert(0, _Finder())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        # The package tries its PyTorch part at once, and says that the compiled module is missing.
        import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch
    from transformer_engine.pytorch import distributed
    from transformer_engine.pytorch.cpp_extensions import gemm

    workspace = torch.empty(1, dtype=torch.uint8)
    # Of a device, for user buffers, for grouped products: these have several. Versions before 2.10 have two functions.
    gemm.get_cublas_workspace = lambda *args: [workspace] if args[2:] == (True,) else workspace
    gemm.get_multi_stream_cublas_workspace = lambda: [workspace]
    distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _one_collective_at_a_time()
    _present_a_gpu()


def _replace_cuda() -> None:
    def device(*args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext()

    torch.version.cuda = "13.0"
    torch.cuda.get_device_capability = lambda *args: CAPABILITY
    torch.cuda.get_device_properties = lambda *args: _Device
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device = device
    torch.cuda.synchronize = lambda *args: None
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: None


def _one_collective_at_a_time() -> None:
    """gloo coalesces tensors of one dtype only, where NCCL takes FP8 and bf16 buckets together."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    class Finished:
        def wait(self) -> None:
            pass

    @contextlib.contextmanager
    def uncoalesced(*args: Any, **kwargs: Any) -> Iterator[Finished]:
        yield Finished()

    def at_once(collective: Any) -> Any:
        def run(*args: Any, async_op: bool = False, **kwargs: Any) -> None:
            del async_op
            collective(*args, **kwargs)

        return run

    buffers._coalescing_manager = torch.distributed._coalescing_manager = uncoalesced
    buffers.dist_all_gather_func = at_once(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = at_once(buffers.dist_reduce_scatter_func)


def _present_a_gpu() -> None:
    """What the project finds on an H100; models are still made and kept on the CPU."""
    import transformer_engine

    from megatron_tgdpo.gpu import options
    from megatron_tgdpo.gpu.capabilities import Capabilities, parse_version
    from megatron_tgdpo.setup import models
    from megatron_tgdpo.training import run

    found = Capabilities(
        device="cuda", compute_capability=CAPABILITY, cuda=(13, 0), cudnn=(9, 19, 0),
        transformer_engine=parse_version(transformer_engine.__version__),
        adam="transformer_engine", multi_tensor="transformer_engine",
    )  # fmt: skip
    chosen = options.model_options

    def model_options(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        overrides, spec = chosen(*args, **kwargs)
        # Else megatron-core takes weights for made on the CPU first, and Transformer Engine makes none in FP8.
        return {**overrides, "use_cpu_initialization": False}, spec

    attention = options.choose_attention

    def choose_attention(*args: Any) -> str:
        # FlexAttention has no backward on the CPU.
        return "blocks" if (name := attention(*args)) == "flex" else name

    options.choose_attention = choose_attention
    options.capabilities = run.capabilities = lambda device: found
    options.model_options = models.model_options = model_options
