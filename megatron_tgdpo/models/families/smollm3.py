"""SmolLM3: the dense decoder with rotary positions on three layers of four."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    # 1 for layers with rotary positions, whatever the name says.
    rotated, layers = hf_config.no_rope_layers, hf_config.num_hidden_layers
    if len(rotated) < layers:
        raise UserError(f"config.json: no_rope_layers has {len(rotated)} entries for {layers} layers")
    windows = dense.window_kwargs(hf_config) if hf_config.use_sliding_window else {}
    return {
        **dense.config_kwargs(hf_config),
        **windows,
        "no_rope_freq": [int(not kind) for kind in rotated[:layers]],
    }


FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    config_keys=dense.CONFIG_KEYS | dense.WINDOW_KEYS | {"no_rope_layers", "no_rope_layer_interval"},
    config_kwargs=_config_kwargs,
    weights=dense.WEIGHTS,
)
