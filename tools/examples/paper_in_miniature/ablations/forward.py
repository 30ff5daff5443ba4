"""Token log-probs of pairs with half the work: no padding, and a prompt is run once for both of its responses.

The same as transformers' Llama on each response alone, which a test compares; here a step of 32 pairs has 1,100 tokens
in place of 2,200. Legend: P pairs, S columns of the grid, T tokens, R response tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from tools.examples.paper_in_miniature.ablations.pairs import Pairs


@dataclass(frozen=True)
class Grid:
    """Some pairs: a row has the prompt, the chosen response and the rejected one, without their last tokens.

    Attributes:
        tokens: [T] ids of what the model sees.
        positions: [T] their places in prompt and response.
        columns: [P * S] which token stands at each place; some token where none does.
        places: [T] where each stands.
        seen: [P, 1, S, S] bool, which columns a column attends to: responses do not see each other.
        predictors: [R] tokens after which a response token comes, chosen and rejected alternating.
        targets: [R] those response tokens.
    """

    tokens: Tensor
    positions: Tensor
    columns: Tensor
    places: Tensor
    seen: Tensor
    predictors: Tensor
    targets: Tensor

    @classmethod
    def of(cls, pairs: Pairs, rows: list[int]) -> Grid:
        """That of some pairs; a response may have length 0."""
        ids, lengths, start = pairs.ids[rows], pairs.lengths[rows], pairs.prompt_tokens
        shown = (lengths - 1).clamp(min=0)
        column = torch.arange(start + int(shown.sum(1).max()))[None]
        end = start + shown.cumsum(1)
        segment = (column >= start).int() + (column >= end[:, :1]) + (column >= end[:, 1:])
        position = column - (segment >= 2) * shown[:, :1]
        valid = segment < 3
        number = (valid.flatten().cumsum(0) - 1).clamp(min=0)
        pair = torch.arange(len(rows))[:, None].expand_as(valid)
        tokens = ids[pair[valid], (segment == 2)[valid].long(), position[valid]]
        same = (segment[:, None] == segment[:, :, None]) | (segment[:, None] == 0)
        # Response token t of a row follows the prompt's last token, or its own t - 1.
        term = torch.arange(int(lengths.max()))
        inside = term < lengths.flatten()[:, None]
        before = start - 1 + term[None, None] + torch.stack([shown[:, 0] * 0, shown[:, 0]], 1)[..., None] * (term > 0)
        spots = torch.arange(len(rows))[:, None, None] * column.shape[1] + before
        return cls(
            tokens,
            position[valid],
            number,
            valid.flatten().nonzero()[:, 0],
            (same & (column[:, None] <= column[:, :, None]))[:, None],
            number[spots.flatten(0, 1)[inside]],
            ids.flatten(0, 1)[:, start : start + len(term)][inside],
        )


def response_logps(model: LlamaForCausalLM, pairs: Pairs, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Token log-probs [R] of the responses of some pairs, chosen and rejected alternating, and their lengths [2P]."""
    grid = Grid.of(pairs, rows)
    hidden = _hidden(model, grid).index_select(0, grid.predictors)
    logits = F.linear(hidden, model.lm_head.weight)
    return logits.log_softmax(-1).gather(-1, grid.targets[:, None])[:, 0], pairs.lengths[rows].flatten()


def _hidden(model: LlamaForCausalLM, grid: Grid) -> Tensor:
    """[T, H], normalised."""
    config: Any = model.config
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // queries
    steps = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2).float() / size)
    angles = (grid.positions[:, None] * steps)[:, None]
    cos, sin = angles.cos(), angles.sin()
    x = F.embedding(grid.tokens, model.model.embed_tokens.weight)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        h = F.rms_norm(x, (config.hidden_size,), layer.input_layernorm.weight, config.rms_norm_eps)
        weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        rotated, value = F.linear(h, torch.cat(weights)).unflatten(1, (-1, size)).split([queries + keys, keys], 1)
        first, second = rotated.chunk(2, -1)
        heads = torch.cat([torch.cat([first * cos - second * sin, second * cos + first * sin], -1), value], 1)
        spread = heads.flatten(1).index_select(0, grid.columns).view(len(grid.seen), -1, queries + 2 * keys, size)
        q, k, v = spread.transpose(1, 2).split([queries, keys, keys], 1)
        mixed = F.scaled_dot_product_attention(q, k, v, grid.seen, enable_gqa=True)
        x = x + F.linear(mixed.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, grid.places),
                         attention.o_proj.weight)  # fmt: skip
        h = F.rms_norm(x, (config.hidden_size,), layer.post_attention_layernorm.weight, config.rms_norm_eps)
        gate, up = F.linear(h, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, mlp.down_proj.weight)
    return F.rms_norm(x, (config.hidden_size,), model.model.norm.weight, config.rms_norm_eps)
