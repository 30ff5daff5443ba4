"""Which layer spec and which core attention a model gets: pure functions of its config and the machine."""

from typing import Literal

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.gpu.capabilities import TE_VERSIONS, Capabilities, dotted, supported_engine
from megatron_tgdpo.models.attention.base import PackCache
from megatron_tgdpo.models.config import LanguageModelConfig
from megatron_tgdpo.models.layer_spec import local_block_spec

LayerSpec = Literal["local", "transformer_engine"]
# transformer_engine, varlen and flex: one kernel call a pack; blocks: models/attention/sdpa.py, which runs everywhere.
CoreAttention = Literal["transformer_engine", "varlen", "flex", "blocks"]


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
    low, high = TE_VERSIONS
    engine = found.transformer_engine
    supported = supported_engine(engine)
    if requested == "local" or (requested == "auto" and (not supported or dtype == "fp32")):
        return "local"
    if found.device != "cuda":
        raise UserError("model.layer_spec=transformer_engine needs a CUDA GPU: set it to auto or local")
    if not supported:
        raise UserError(
            f"model.layer_spec=transformer_engine needs Transformer Engine >={dotted(low)},<{dotted(high)} "
            f"(megatron-core 0.16), found {dotted(engine)}: install one of these, or set it to auto or local"
        )
    return "transformer_engine"


def choose_attention(config: LanguageModelConfig, spec: LayerSpec, found: Capabilities) -> CoreAttention:
    """The fastest core attention that computes what the model asks for, on this machine.

    Softcaps are for FlexAttention: neither Transformer Engine nor torch's flash attention has them. Flash attention
    and cuDNN want half precision and heads of a multiple of 8 up to 256.
    """
    if found.device != "cuda":
        return "blocks"
    if config.attn_logit_softcapping is not None:
        return "flex"
    if not config.bf16 or config.kv_channels % 8 or config.kv_channels > 256:
        return "flex" if config.window_size is not None else "blocks"
    if spec == "transformer_engine" and _engine_attends(config, found):
        return "transformer_engine"
    return "varlen" if found.varlen else "flex"


def _engine_attends(config: LanguageModelConfig, found: Capabilities) -> bool:
    """Whether Transformer Engine has a kernel for packed, bottom-right causal training.

    Source: TransformerEngine 2.9 ``fused_attn.cpp`` (cuDNN: Hopper or Blackwell, not sm120; cuDNN 9.6 but 9.10.0 and
    9.10.1; heads over 128 on Hopper only) and ``dot_product_attention/utils.py`` (flash-attn where it is installed).
    """
    assert found.compute_capability is not None
    if found.flash_attn:
        return True
    cudnn = found.cudnn or (0,)
    if not (9, 0) <= found.compute_capability < (12, 0) or cudnn < (9, 6) or (9, 10, 0) <= cudnn < (9, 10, 2):
        return False
    return config.kv_channels <= 128 or found.compute_capability[0] == 9


def build_block_spec(
    config: LanguageModelConfig, pg: ProcessGroupCollection, spec: LayerSpec, attention: CoreAttention
) -> TransformerBlockSubmodules:
    """This pipeline stage's layers, of the chosen spec with the chosen core attention."""
    if spec == "local":
        return local_block_spec(config, pg, core_attention_spec(attention))
    from megatron_tgdpo.models.layer_spec_te import load_parts, te_block_spec

    return te_block_spec(config, pg, core_attention_spec(attention), load_parts())


def core_attention_spec(attention: CoreAttention) -> ModuleSpec:
    """What a layer spec takes as core attention; the layers built from one spec share a cache of what packs need."""
    if attention == "blocks":
        from megatron_tgdpo.models.attention.sdpa import PackedCausalAttention as Module
    elif attention == "varlen":
        from megatron_tgdpo.models.attention.varlen import VarlenAttention as Module  # type: ignore[assignment]
    elif attention == "flex":
        from megatron_tgdpo.models.attention.flex import FlexPackedAttention as Module  # type: ignore[assignment]
    else:
        from megatron_tgdpo.models.attention.transformer_engine import TransformerEngineAttention as Module  # type: ignore[assignment]
    return ModuleSpec(module=Module, params={"cache": PackCache()})
