"""Multi-head latent attention (MLA) in megatron-core's attention layer, for both layer specs.

megatron-core's own layer of this kind counts positions from each segment's start, so it cannot go on after a prompt
that responses share, and takes no angles. Here the layer is megatron-core's plain one, which rotates by the angles that
it is given, and only how queries, keys and values are made is different.

Legend: S tokens of the pack, S_local = S / tp under sequence parallelism (else S), H hidden, N local heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, cat

from megatron_tgdpo.models.config import LanguageModelConfig

# transformers builds these two norms with its default, whatever the config's rms_norm_eps.
_EPSILON = 1e-6
# Of LatentAttentionSubmodules those that may have adapters.
LATENT_LINEARS = ("column_linear", "replicated_linear", "linear_proj")


class ReplicatedLinear(torch.nn.Module):
    """A linear without bias that every tensor-parallel rank has whole, and that stays out of FP8.

    Under sequence parallelism each rank's gradient is of its tokens: megatron-core sums it over the tensor ranks.
    """

    def __init__(self, input_size: int, output_size: int, *, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[S_local, 1, input] -> ([S_local, 1, output], no bias)."""
        return torch.nn.functional.linear(x, self.weight), None


@dataclass
class LatentAttentionSubmodules:
    """What :class:`LatentSelfAttention` is built of, by its attributes' names."""

    column_linear: Any
    replicated_linear: Any
    linear_proj: Any
    core_attention: Any
    norm: Any


class LatentSelfAttention(Attention):
    """Self-attention whose keys and values come of one small vector for each token.

    Attributes:
        linear_q: Hidden states to queries, column-parallel; where queries have a rank, ``linear_q_down``,
            ``q_layernorm`` and ``linear_q_up`` instead.
        linear_kv_down: Hidden states to the small vector and the rotated part of keys, on every rank whole.
        kv_layernorm: Of the small vector.
        linear_kv_up: To keys and values, column-parallel.
    """

    config: LanguageModelConfig

    def __init__(
        self,
        config: LanguageModelConfig,
        submodules: LatentAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", **kwargs)
        assert config.latent is not None
        self.sizes = sizes = config.latent
        heads, hidden = config.num_attention_heads, config.hidden_size
        factors = config.rotary_factors
        self._factor = 1.0 if factors is None else factors[0]

        def column(inputs: int, outputs: int, name: str) -> Any:
            return build_module(
                submodules.column_linear,
                inputs,
                outputs,
                config=config,
                init_method=config.init_method,
                gather_output=False,
                bias=False,
                skip_bias_add=False,
                is_expert=False,
                tp_comm_buffer_name=name,
                tp_group=self.pg_collection.tp,
            )

        def norm(size: int) -> Any:
            return build_module(submodules.norm, config=config, hidden_size=size, eps=_EPSILON)

        # megatron-core's layer asks for both.
        self.q_layernorm: Any = None
        self.k_layernorm: Any = None
        if sizes.query_rank is None:
            self.linear_q = column(hidden, heads * sizes.query, "q")
        else:
            self.linear_q_down = build_module(submodules.replicated_linear, hidden, sizes.query_rank, config=config)
            self.q_layernorm = norm(sizes.query_rank)
            self.linear_q_up = column(sizes.query_rank, heads * sizes.query, "q_up")
        self.linear_kv_down = build_module(
            submodules.replicated_linear, hidden, sizes.rank + sizes.rotated, config=config
        )
        self.kv_layernorm = norm(sizes.rank)
        self.linear_kv_up = column(sizes.rank, heads * (sizes.plain + sizes.value), "kv_up")

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Query and key [S, 1, N, rotated + plain], value [S, 1, N, value], before anything is rotated.

        What is rotated comes first in each head, as megatron-core rotates; scores do not depend on the order.

        Args:
            hidden_states: [S_local, 1, H].
            args: Of attention over other tokens than one's own: none.
            kwargs: The same.

        Collectives over the tensor ranks: under sequence parallelism gathers each up-projection's input and the rotated
        part of keys, whose gradients are summed; else those sums alone.
        """
        del args, kwargs
        sizes, heads = self.sizes, self.num_attention_heads_per_partition
        if sizes.query_rank is None:
            query, _ = self.linear_q(hidden_states)
        else:
            small, _ = self.linear_q_down(hidden_states)
            query, _ = self.linear_q_up(self.q_layernorm(small))
        plain, rotated = query.unflatten(-1, (heads, sizes.query)).split((sizes.plain, sizes.rotated), dim=-1)
        if self._factor != 1.0:
            # Queries and keys have the factor each, and nothing but their products is used.
            rotated = rotated * self._factor**2
        query = cat((rotated, plain), dim=-1)

        joint, _ = self.linear_kv_down(hidden_states)
        small, rotated = joint.split((sizes.rank, sizes.rotated), dim=-1)
        both, _ = self.linear_kv_up(self.kv_layernorm(small))
        # Each rank's heads give a part of the gradient of what all heads share.
        if self.config.sequence_parallel:
            rotated = gather_from_sequence_parallel_region(rotated, group=self.pg_collection.tp)
        else:
            rotated = copy_to_tensor_model_parallel_region(rotated, group=self.pg_collection.tp)
        plain, value = both.unflatten(-1, (heads, sizes.plain + sizes.value)).split((sizes.plain, sizes.value), dim=-1)
        key = cat((rotated[:, :, None].expand(-1, -1, heads, -1), plain), dim=-1)
        return query, key, value
