"""The local layer spec: megatron-core's own parallel linears with this project's attention and norms."""

import copy
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_tgdpo.mcore_compat import submodules_of
from megatron_tgdpo.models.attention.sdpa import PackedCausalAttention
from megatron_tgdpo.models.config import LanguageModelConfig
from megatron_tgdpo.models.norm import RMSNorm


class RowParallelLinearPostNorm(RowParallelLinear):
    """A row-parallel linear whose summed output is normalised, for families with norms after attention and MLP.

    The norm is the linear's own, named ``post_layernorm``: megatron-core's layer has no place for it. Its input is
    whole on every tensor rank, or under sequence parallelism that rank's part of the sequence.
    """

    def __init__(self, input_size: int, output_size: int, *, config: LanguageModelConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """[S, 1, local input] -> ([S_local, 1, output], no bias)."""
        output, bias = super().forward(input_)
        assert bias is None, "a bias would have to be added before the norm"
        return self.post_layernorm(output), None


def local_block_spec(
    config: LanguageModelConfig,
    pg: ProcessGroupCollection,
    core_attention: type | ModuleSpec = PackedCausalAttention,
) -> TransformerBlockSubmodules:
    """The layers and the final norm of one chunk of this pipeline stage."""
    layer = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm))
    members = layer.submodules
    members.input_layernorm = RMSNorm
    members.pre_mlp_layernorm = RMSNorm
    attention = members.self_attention.submodules
    attention.core_attention = core_attention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.post_norms:
        attention.linear_proj = RowParallelLinearPostNorm
        submodules_of(members.mlp).linear_fc2 = RowParallelLinearPostNorm
    chunks = pg.pp.size() * (config.virtual_pipeline_model_parallel_size or 1)
    return TransformerBlockSubmodules(layer_specs=[layer] * (config.num_layers // chunks), layer_norm=RMSNorm)
