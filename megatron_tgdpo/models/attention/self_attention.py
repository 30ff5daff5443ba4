"""megatron-core's self-attention with what some families have beyond it: tables of angles by layer, wider norms."""

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, cat

from megatron_tgdpo.models.config import LanguageModelConfig
from megatron_tgdpo.models.norm import ProjectionRMSNorm


def is_wanted(config: LanguageModelConfig) -> bool:
    """Whether a model needs more than megatron-core's own."""
    return config.qk_projection_norm or config.rotary_tables is not None or config.rotary_factors is not None


class FamilySelfAttention(SelfAttention):
    """Takes its layer's table of angles, has YaRN's factor on what is rotated, and norms over all heads.

    Legend: S tokens of the pack, N local query heads, G local key/value heads, D head size, R of it rotated.
    """

    config: LanguageModelConfig

    def __init__(self, config: LanguageModelConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        tables = config.rotary_tables
        self._table = 0 if tables is None else tables[self.layer_number - 1]
        self._tables = 1 if tables is None else max(tables) + 1
        factors, unrotated = config.rotary_factors, config.no_rope_freq
        rotated = not unrotated or not unrotated[self.layer_number - 1]
        self._factor = factors[self._table] if factors is not None and rotated else 1.0
        self._rotated_size = 0
        if config.qk_projection_norm:
            size, pg = self.hidden_size_per_attention_head, self.pg_collection
            self.query_norm = ProjectionRMSNorm(config, self.num_attention_heads_per_partition, size, pg)
            self.key_norm = ProjectionRMSNorm(config, self.num_query_groups_per_partition, size, pg)

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As megatron-core's; ``rotary_pos_emb`` [S, 1, 1, R] for each table, one after another."""
        angles = rotary_pos_emb.chunk(self._tables, dim=-1)[self._table]
        self._rotated_size = angles.shape[-1]
        result: tuple[Tensor, Tensor] = super().forward(*args, rotary_pos_emb=angles, **kwargs)
        return result

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Query [S, 1, N, D], key and value [S, 1, G, D], before they are rotated."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        if self.config.qk_projection_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self._factor != 1.0:
            # Queries and keys have the factor each, on what is rotated, and nothing but their products is used.
            size = self._rotated_size
            query = cat((query[..., :size] * self._factor**2, query[..., size:]), dim=-1)
        return query, key, value
