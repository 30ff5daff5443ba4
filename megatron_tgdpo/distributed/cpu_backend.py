"""Lets unmodified megatron-core run on a machine without a GPU, by one explicit call at start-up.

megatron-core 0.16 allocates on ``"cuda"`` and asks ``torch.cuda`` for streams and RNG states in places that no option
reaches. :func:`enable_cpu_backend` maps those requests to the CPU for the rest of the process. It refuses to run where
a CUDA device is usable, so a GPU machine can never train on its CPU by accident.
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_tgdpo.errors import UserError

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


def resolve_device(requested: str) -> torch.device:
    """Chooses the device for this run.

    Args:
        requested: ``auto`` (CUDA if usable, CPU only on a machine that has no NVIDIA device), ``cuda`` or ``cpu``.

    Returns:
        ``torch.device("cuda")`` or ``torch.device("cpu")``.

    Raises:
        UserError: A GPU was asked for, or is in the machine, and CUDA is not usable.
    """
    usable = torch.cuda.is_available()
    if requested == "cpu":
        return CPU
    if usable:
        return torch.device("cuda")
    if requested == "cuda":
        raise UserError(
            "parallel.device (--device) is cuda but torch sees no CUDA device: check the driver and "
            "CUDA_VISIBLE_DEVICES"
        )
    if nvidia_hardware_present():
        raise UserError(
            "this machine has an NVIDIA device that torch cannot use: fix the driver, the torch build or "
            "CUDA_VISIBLE_DEVICES, or set parallel.device=cpu (--device cpu) to use the CPU on purpose"
        )
    return CPU


def nvidia_hardware_present() -> bool:
    """Whether the operating system shows an NVIDIA device, usable by torch or not."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia/version"))


def enable_cpu_backend() -> None:
    """Maps megatron-core's CUDA requests to the CPU for the rest of the process; a second call does nothing.

    Raises:
        UserError: A CUDA device is usable; hide it (``CUDA_VISIBLE_DEVICES=``) to train on the CPU on purpose.
    """
    if torch.cuda.is_available():
        raise UserError(
            "the CPU backend is refused while a CUDA device is usable: set CUDA_VISIBLE_DEVICES= to hide it"
        )
    if cpu_backend_enabled():
        return
    _replace_cuda_functions()
    _initialise_vector_maths()
    _CudaToCpu().__enter__()
    logger.info("no GPU is used: megatron-core runs on the CPU, with gloo")


def _initialise_vector_maths() -> None:
    """Makes the first call to MKL's vector functions, which ``torch.cos``, ``exp`` and others are, on one thread.

    Where several threads make it at once, one of them may get a kernel of half the digits: with torch 2.13 and two
    threads, half of the first ``torch.cos`` was off by 1.5e-4 in 59 of 1500 processes, and in none after this.
    """
    torch.cos(torch.ones(1))


def cpu_backend_enabled() -> bool:
    """Whether :func:`enable_cpu_backend` is in force in this thread."""
    return any(isinstance(mode, _CudaToCpu) for mode in torch.overrides._get_current_function_mode_stack())


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaToCpu(TorchFunctionMode):
    """Rewrites the device arguments of every torch call; CPU tensors report the type names that mcore expects."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        elif func is torch.Tensor.type and len(args) == 1:
            # mcore's optimizers sort parameters by names such as 'torch.cuda.BFloat16Tensor'.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and any(_is_cuda(arg) for arg in args[1:]):
            args = tuple(CPU if _is_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs) if kwargs else func(*args)


class _NoStream:
    """Stands in for a CUDA stream where everything is synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def wait_stream(self, stream: Any) -> None:
        del stream

    def wait_event(self, event: Any) -> None:
        del event

    def record_event(self, event: Any = None) -> None:
        del event

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _NoFp8:
    """Stands in for Transformer Engine's state of FP8."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _nothing(**options: Any) -> contextlib.AbstractContextManager[None]:
    del options
    return contextlib.nullcontext()


def _replace_cuda_functions() -> None:
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.tensor_parallel.random as mcore_random

    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        del args, kwargs
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        torch.set_rng_state(state)

    def do_nothing(*args: Any, **kwargs: Any) -> None:
        del args, kwargs

    replacements: dict[str, Any] = {
        "current_device": lambda: CPU,
        "set_device": do_nothing,
        "synchronize": do_nothing,
        "empty_cache": do_nothing,
        "Stream": _NoStream,
        "current_stream": _NoStream,
        "default_stream": _NoStream,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": torch.manual_seed,
        "is_initialized": lambda: False,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.random.get_rng_state = get_rng_state  # type: ignore[assignment]
    mcore_random._get_cuda_rng_state = get_rng_state
    mcore_random._set_cuda_rng_state = set_rng_state
    if not mcore_random.HAVE_TE:
        # Norms that are computed again ask these, whether there is FP8 or not.
        mcore_random.FP8GlobalStateManager = _NoFp8
        mcore_random.activation_recompute_forward = mcore_random.fp8_autocast = _nothing
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(buffers, name, _not_onto_itself(getattr(buffers, name)))


def _not_onto_itself(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A reduce-scatter or all-gather that does nothing where one rank would send a tensor to its own place.

    NCCL does so too. gloo makes a copy of all gradients, or of all weights, that nobody needs.
    """

    def run(output: torch.Tensor, sent: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if output.data_ptr() == sent.data_ptr() and output.numel() == sent.numel():
            return None
        return collective(output, sent, *args, **kwargs)

    return run
