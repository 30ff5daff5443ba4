"""Operations that a model's products need: of a layer on paper, and of a step by the real lengths of its pairs.

Model FLOP, as for model FLOP utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): what is computed again,
padding and what a causal mask hides do not count. Source of the layer's: Narayanan et al. 2021 (arXiv 2104.04473,
appendix), with grouped-query attention and a gated MLP.

Legend: P pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig

from megatron_tgdpo.models.families import family_of, settings_of
from megatron_tgdpo.models.hf_weights.mapping import Experts, Heads, dimension_sizes, kinds_of_layers


def linear_flops(hf_config: PretrainedConfig, layer: int = 0) -> int:
    """Of the linears of a layer, counted from 0, forwards, for a token: two for each weight, of experts those that a
    token goes to."""
    return 2 * attention_weights(hf_config) + mlp_flops(hf_config, layer)


def attention_weights(hf_config: PretrainedConfig) -> int:
    """Elements of the matrices of a layer's attention."""
    weights, sizes = family_of(hf_config.architectures).weights, dimension_sizes(hf_config)
    return sum(
        math.prod(sizes[dimension] for dimension in shape)
        for name, weight in weights.items()
        if name.startswith("self_attention.linear_") and weight.is_in(hf_config)
        for _, shape in weight.hf_tensors
        if len(shape) == 2
    )


def mlp_flops(hf_config: PretrainedConfig, layer: int = 0) -> int:
    """Those of the MLP, or of all experts and their router."""
    experts = Experts.of_layer(hf_config, layer)
    # The router has a row for each expert.
    mlp = 3 * hf_config.intermediate_size if experts is None else 3 * experts.top_k * experts.size + experts.count
    result: int = 2 * hf_config.hidden_size * mlp
    return result + shared_expert_flops(hf_config, layer)


def shared_expert_flops(hf_config: PretrainedConfig, layer: int = 0) -> int:
    """Those of the expert that all tokens go to, with its gate if it has one; 0 without."""
    experts = Experts.of_layer(hf_config, layer)
    rows = 0 if experts is None else 3 * experts.shared + experts.shared_gate
    result: int = 2 * hf_config.hidden_size * rows
    return result


def score_flops(hf_config: PretrainedConfig) -> int:
    """Of a layer's attention, forwards, for a query and a key that it sees: score and weighted value of all heads."""
    heads, latent = Heads.of(hf_config), settings_of(hf_config).get("latent")
    if latent is not None:
        return 2 * int(hf_config.num_attention_heads * (latent.query + latent.value))
    return 4 * heads.rows[0]


def seen(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs of a query and a key that it sees, of causal sequences of these lengths; [...] int64.

    Args:
        lengths: [...] tokens.
        window: The last keys that a query sees, its own among them; None for all.
    """
    near = lengths if window is None else np.minimum(lengths, window)
    result: np.ndarray = near * (near + 1) // 2 + (lengths - near) * near
    return result


@dataclass(frozen=True)
class StepModel:
    """A model in the steps of a run.

    Attributes:
        hf_config: Its config.
        passes: Through its layers and log-probs, forward passes being one and backward passes two: 3 of a policy that
            trains, 2 where its weights are frozen beside an adapter, 1 of a frozen model. What adapters compute is
            little, and left out.
    """

    hf_config: PretrainedConfig
    passes: int

    def windows(self) -> list[int | None]:
        """Of each layer's attention, in tokens."""
        settings = settings_of(self.hf_config)
        layers = self.hf_config.num_hidden_layers
        if settings.get("window_size") is None:
            return [None] * layers
        window = settings["window_size"][0] + 1
        return [window if there else None for there in settings["window_attn_skip_freq"]]


def step_models(
    policy: PretrainedConfig, frozen: Sequence[PretrainedConfig], *, adapter: bool
) -> tuple[StepModel, ...]:
    """The models of a run: the policy, which trains whole or by an adapter, and the frozen ones that run with it."""
    return StepModel(policy, 2 if adapter else 3), *(StepModel(config, 1) for config in frozen)


def step_flops(
    models: Sequence[StepModel], lengths: np.ndarray, responses: int, *, shared_prompts: bool, chosen_only: bool
) -> int:
    """Model FLOP of a step over all of its pairs.

    Args:
        models: From :func:`step_models`.
        lengths: [P, 3] int64: prompt, chosen and rejected tokens.
        responses: Response tokens that are trained on, of which log-probs are taken.
        shared_prompts: Whether a pair's prompt is computed once.
        chosen_only: Whether rejected responses are left out.
    """
    prompt, sides = lengths[:, :1], lengths[:, 1:2] if chosen_only else lengths[:, 1:]
    shared = shared_prompts and not chosen_only
    tokens = int((prompt + sides).sum()) - (int(prompt.sum()) if shared else 0)
    scores = {
        window: int(seen(prompt + sides, window).sum()) - (int(seen(prompt, window).sum()) if shared else 0)
        for model in models
        for window in set(model.windows())
    }
    total = 0
    for model in models:
        config = model.hf_config
        windows, score = model.windows(), score_flops(config)
        linear = sum(count * linear_flops(config, layer) for layer, count in kinds_of_layers(config).items())
        layers = tokens * linear + sum(scores[window] for window in windows) * score
        total += model.passes * (layers + 2 * responses * config.vocab_size * config.hidden_size)
    return total
