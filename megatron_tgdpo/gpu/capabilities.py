"""What this machine and environment can do, found once at start-up: device generation, versions, fused parts."""

import importlib
import importlib.metadata
import importlib.util
import inspect
from dataclasses import dataclass

import torch
from packaging.version import Version as PackagingVersion

from megatron_tgdpo.errors import one_line

Version = tuple[int, ...]

# Transformer Engine: the oldest that megatron-core 0.16 asks for (0.19 names no version), and the newest that
# tests/emulation has run with. Later ones are used with a warning.
OLDEST_TE: Version = (2, 9)
NEWEST_TESTED_TE: Version = (2, 20)


@dataclass(frozen=True)
class Capabilities:
    """Facts that choices depend on.

    Attributes:
        device: ``cuda`` or ``cpu``.
        compute_capability: Of the GPU, e.g. (9, 0) for Hopper; None on the CPU.
        cuda: CUDA version that torch was built with.
        transformer_engine: Version of the importable Transformer Engine, None without one.
        transformer_engine_error: Why an installed Transformer Engine cannot be imported; empty if it can, or is absent.
        cudnn: Version that torch runs on.
        flash_attn: Whether the flash-attn package is importable, which Transformer Engine prefers to cuDNN.
        varlen: Whether torch has variable-length flash attention with windows and scale.
        adam: Package whose Adam megatron-core takes: ``transformer_engine``, ``apex`` or ``torch``.
        multi_tensor: Package whose kernels take norms and scale many tensors at once.
        wgrad_accumulation: Whether apex's kernel that adds weight gradients to the fp32 buffer is importable.
    """

    device: str
    compute_capability: Version | None = None
    cuda: Version | None = None
    transformer_engine: Version | None = None
    transformer_engine_error: str = ""
    cudnn: Version | None = None
    flash_attn: bool = False
    varlen: bool = False
    adam: str = "torch"
    multi_tensor: str = "torch"
    wgrad_accumulation: bool = False

    def describe(self) -> str:
        """One line for the log."""
        if self.compute_capability is None:
            return "CPU"  # which has no fused part
        where = f"GPU sm{''.join(map(str, self.compute_capability))}"
        return (
            f"{where}; Transformer Engine {dotted(self.transformer_engine)}; Adam from {self.adam}; multi-tensor norm "
            f"from {self.multi_tensor}; fused gradient accumulation: {_yes(self.wgrad_accumulation)}"
        )


def detect(device: torch.device) -> Capabilities:
    """Looks at the device and tries the imports; no collectives, nothing is left behind but imported packages.

    megatron-core decides the same way, on import, which Adam and which multi-tensor kernels it takes.
    """
    from megatron.core.optimizer import Adam, clip_grads

    cuda = device.type == "cuda"
    engine, engine_error = _transformer_engine() if cuda else (None, "")
    return Capabilities(
        device=device.type,
        compute_capability=torch.cuda.get_device_capability() if cuda else None,
        cuda=parse_version(torch.version.cuda) if cuda and torch.version.cuda else None,
        transformer_engine=engine,
        transformer_engine_error=engine_error,
        cudnn=_cudnn_version() if cuda else None,
        flash_attn=cuda and importlib.util.find_spec("flash_attn") is not None,
        varlen=cuda and _has_varlen(),
        adam=Adam.__module__.partition(".")[0],
        multi_tensor=_package(clip_grads.multi_tensor_applier),
        wgrad_accumulation=cuda and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )


def parse_version(text: str) -> Version:
    """``2.9.0a0+abc`` -> (2, 9, 0)."""
    return PackagingVersion(text).release


def dotted(version: Version | None) -> str:
    return "none" if version is None else ".".join(map(str, version))


def supported_engine(version: Version | None) -> bool:
    """Whether this Transformer Engine is one that can be used."""
    return version is not None and version[:2] >= OLDEST_TE


def untested_engine(version: Version | None) -> bool:
    """Whether this Transformer Engine is newer than any that was tested."""
    return version is not None and version[:2] > NEWEST_TESTED_TE


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _transformer_engine() -> tuple[Version | None, str]:
    """Its version, and why it cannot be imported although it is installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None, ""
    try:
        engine = importlib.import_module("transformer_engine")
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        # Beside ImportError whatever its loader meets: a library that does not fit this CUDA or torch (OSError), a part
        # that is not installed (FileNotFoundError, AssertionError).
        return None, one_line(error, named=True)
    return parse_version(str(engine.__version__)), ""


def _cudnn_version() -> Version | None:
    # Not torch.backends.cudnn.version(): it refuses a cuDNN older than torch's own, which Transformer Engine may have
    # loaded before and works with.
    if not torch.backends.cudnn.is_available():
        return None
    version: tuple[int, int, int] = torch._C._cudnn.getRuntimeVersion()  # type: ignore[attr-defined]
    return version


def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "scale"} <= inspect.signature(varlen_attn).parameters.keys()


def _package(function: object) -> str:
    package = str(getattr(function, "__module__", "")).partition(".")[0]
    return "torch" if package == "megatron" else package
