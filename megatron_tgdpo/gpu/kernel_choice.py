"""Which layer spec and which core attention a model gets: pure functions of its config and the machine."""

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.gpu.capabilities import OLDEST_TE, Capabilities, dotted, supported_engine
from megatron_tgdpo.models.attention.base import PackCache
from megatron_tgdpo.models.config import LanguageModelConfig
from megatron_tgdpo.models.layer_spec import local_block_spec

LayerSpec = Literal["local", "transformer_engine"]


def choose_layer_spec(requested: str, found: Capabilities, dtype: str = "bf16") -> LayerSpec:
    """Resolves ``model.layer_spec``: ``auto`` takes Transformer Engine where a supported version is importable on CUDA.

    Not for fp32: Transformer Engine multiplies fp32 in TF32, which keeps ten bits of each factor.

    Raises:
        UserError: Transformer Engine was asked for and is not usable here, or is installed and cannot be imported.
    """
    if requested != "local" and found.transformer_engine_error:
        raise UserError(
            f"Transformer Engine is installed but cannot be imported ({found.transformer_engine_error}): mend the "
            "installation, or set model.layer_spec=local"
        )
    engine = found.transformer_engine
    supported = supported_engine(engine)
    if requested == "local" or (requested == "auto" and (not supported or dtype == "fp32")):
        return "local"
    if found.device != "cuda":
        raise UserError("model.layer_spec=transformer_engine needs a CUDA GPU: set it to auto or local")
    if not supported:
        raise UserError(
            f"model.layer_spec=transformer_engine needs Transformer Engine >={dotted(OLDEST_TE)}, found "
            f"{dotted(engine)}: install one of these, or set it to auto or local"
        )
    return "transformer_engine"


@dataclass(frozen=True)
class AttentionBackend:
    """A core attention.

    Attributes:
        module: ``module:name`` of its :class:`~megatron_tgdpo.models.attention.base.PackedAttention`; a name, so that
            nothing is imported that is not used.
        serves: Whether it computes what the model asks for, on this machine, in layers of this spec.
    """

    module: str
    serves: Callable[[LanguageModelConfig, LayerSpec, Capabilities], bool]


def choose_attention(config: LanguageModelConfig, spec: LayerSpec, found: Capabilities) -> str:
    """The key in ATTENTION_BACKENDS of the fastest that computes what the model asks for, on this machine."""
    return next(name for name, backend in ATTENTION_BACKENDS.items() if backend.serves(config, spec, found))


def _transformer_engine_serves(config: LanguageModelConfig, spec: LayerSpec, found: Capabilities) -> bool:
    return spec == "transformer_engine" and _flash_takes(config, found) and _engine_attends(config, found)


def _varlen_serves(config: LanguageModelConfig, spec: LayerSpec, found: Capabilities) -> bool:
    return found.varlen and _flash_takes(config, found)


def _flex_serves(config: LanguageModelConfig, spec: LayerSpec, found: Capabilities) -> bool:
    """Where it is worth it: plain attention in fp32 is SDPA's."""
    special = config.attn_logit_softcapping is not None or config.window_size is not None or _has_sinks(config)
    return found.device == "cuda" and (special or _flash_takes(config, found))


def _flash_takes(config: LanguageModelConfig, found: Capabilities) -> bool:
    """Flash attention and cuDNN want half precision and heads of a multiple of 8 up to 256, cap no scores, and have no
    sinks in packed sequences, neither Transformer Engine's nor torch's."""
    sizes = config.bf16 and config.kv_channels % 8 == 0 and config.kv_channels <= 256
    return found.device == "cuda" and sizes and config.attn_logit_softcapping is None and not _has_sinks(config)


def _has_sinks(config: LanguageModelConfig) -> bool:
    return str(config.softmax_type) == "learnable"


def _engine_attends(config: LanguageModelConfig, found: Capabilities) -> bool:
    """Whether Transformer Engine has a kernel for packed, bottom-right causal training.

    Source: TransformerEngine 2.9 ``fused_attn.cpp`` (cuDNN: Hopper or Blackwell, not sm120; cuDNN 9.6 but 9.10.0 and
    9.10.1; heads over 128 on Hopper only), later ones (cuDNN 9.14.0 without windows) and
    ``dot_product_attention/utils.py`` (flash-attn where it is installed).
    """
    assert found.compute_capability is not None
    if found.flash_attn:
        return True
    cudnn = found.cudnn or (0,)
    if not (9, 0) <= found.compute_capability < (12, 0) or cudnn < (9, 6) or (9, 10, 0) <= cudnn < (9, 10, 2):
        return False
    if config.window_size is not None and cudnn[:3] == (9, 14, 0):
        return False
    return config.kv_channels <= 128 or found.compute_capability[0] == 9


def build_block_spec(
    config: LanguageModelConfig, layers: Sequence[int], spec: LayerSpec, attention: str
) -> TransformerBlockSubmodules:
    """A chunk's layers, counted from 0 through the model, of the chosen spec with the chosen core attention."""
    if spec == "local":
        return local_block_spec(config, layers, core_attention_spec(attention))
    from megatron_tgdpo.models.layer_spec_te import load_parts, te_block_spec

    return te_block_spec(config, layers, core_attention_spec(attention), load_parts())


def core_attention_spec(attention: str) -> ModuleSpec:
    """What a layer spec takes as core attention; the layers built from one spec share a cache of what packs need."""
    module = pkgutil.resolve_name(ATTENTION_BACKENDS[attention].module)
    return ModuleSpec(module=module, params={"cache": PackCache()})


# The fastest first. All but the last make one kernel call a pack; the last runs everywhere.
ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    "transformer_engine": AttentionBackend(
        "megatron_tgdpo.models.attention.transformer_engine:TransformerEngineAttention", _transformer_engine_serves
    ),
    "varlen": AttentionBackend("megatron_tgdpo.models.attention.varlen:VarlenAttention", _varlen_serves),
    "flex": AttentionBackend("megatron_tgdpo.models.attention.flex:FlexPackedAttention", _flex_serves),
    "blocks": AttentionBackend("megatron_tgdpo.models.attention.sdpa:PackedCausalAttention", lambda *_: True),
}
