"""The configs and tokenizers of a run's models, checked against each other before anything is built."""

from collections.abc import Mapping
from pathlib import Path

from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.adapter_directory import read_lora
from megatron_tgdpo.checkpoints.find_model import naming
from megatron_tgdpo.checkpoints.model_directory import check_hf_files, hf_directory, is_peft_adapter
from megatron_tgdpo.config.constraints import BESIDE_ADAPTERS, Rule, first_broken
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.tokenizer_compatibility import LackingTokens, compare_tokenizers
from megatron_tgdpo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.adapter_layout import adapted_linears, check_adapter
from megatron_tgdpo.models.rotary import longest_exact
from megatron_tgdpo.setup.model_sources import model_sources, trained_lora
from megatron_tgdpo.storage.hub import local_path

# What a frozen model with an adapter on it does not go with; config/rules.py has the same of the policy.
_BESIDE_ADAPTERS = (
    Rule(lambda c: c.offload.frozen, "offload.frozen moves whole models only: set it to false"),
    Rule(lambda c: c.overlap.tensor, "overlap.tensor hides traffic within linears: set it to false"),
    Rule(
        lambda c: c.frozen_recipe not in BESIDE_ADAPTERS,
        "linears beside it may compute in FP8 with tensorwise or blockwise scaling only: set precision.frozen=bf16, or "
        "another recipe",
    ),
)


def read_model_configs(config: Config) -> dict[str, PretrainedConfig]:
    """HF configs of the policy and of the frozen models that the method uses.

    Raises:
        UserError: A directory holds no supported model, or no supported adapter of the policy's, or one that sequences
            of this length are too long for, or vocabulary sizes differ without tokenizers to compare.
    """
    sources = model_sources(config)
    for role, source in sources.items():
        if source.adapter is not None and role != "policy" and (broken := first_broken(_BESIDE_ADAPTERS, config)):
            raise UserError(f"model.{role} is an adapter, and {broken}")
    paths = {role: str(source.base) for role, source in sources.items()}
    configs = {role: read_hf_config(Path(path)) for role, path in paths.items()}
    for role, source in sources.items():
        if source.adapter is not None and is_peft_adapter(source.adapter):
            with naming("lora.adapter" if role == "policy" else f"model.{role}"):
                check_adapter(source.adapter, read_lora(source.adapter), configs[role])
    lora = trained_lora(config)
    if lora is not None:
        with naming("lora.targets"):
            adapted_linears(lora, configs["policy"])
    for role in configs:
        # An embedding may have rows that no token has; without a tokenizer next to it nobody can tell.
        told = _has_tokenizer(paths[role]) and _has_tokenizer(paths["policy"])
        if configs[role].vocab_size != configs["policy"].vocab_size and not told:
            raise UserError(
                f"model.{role} {paths[role]} has a vocabulary of {configs[role].vocab_size}, the policy "
                f"{configs['policy'].vocab_size}, and both tokenizers are needed to see that the ids are the same: put "
                "them into the directories"
            )
        longest = longest_exact(configs[role])
        if longest is not None and config.longest_sequence > longest:
            raise UserError(
                f"model.{role} {paths[role]}: the rope scaling of config.json is one for all sequences only up to "
                f"{longest} tokens: set data.max_length to at most {longest}"
            )
    return configs


def models_that_run(config: Config, configs: Mapping[str, PretrainedConfig]) -> dict[str, PretrainedConfig]:
    """Those of :func:`read_model_configs` that are loaded: the frozen ones are not where a cache stands for them."""
    cached = config.guidance.mode == "cached"
    return {role: hf_config for role, hf_config in configs.items() if role == "policy" or not cached}


def check_tokenizers(config: Config) -> list[LackingTokens]:
    """Checks that policy, reference and guide, where they carry a tokenizer, map text to ids as the data's does.

    Returns:
        What data must not hold, see ``setup/datasets.py: prepare_data``.

    Raises:
        UserError: One does not.
    """
    models = {"policy": config.model.policy, "reference": config.model.reference, "guide": config.model.guide}
    return compare_with_data(config, {role: path for role, path in models.items() if path is not None})


def compare_with_data(config: Config, models: Mapping[str, str]) -> list[LackingTokens]:
    """As :func:`check_tokenizers`, for other models of a run's data: directories by role."""
    path = config.data.tokenizer or config.model.policy
    if not (config.data.tokenizer or _has_tokenizer(path)):
        return []
    others = {role: model for role, model in models.items() if model != path and _has_tokenizer(model)}
    data = f"data.tokenizer {path}" if config.data.tokenizer else f"the policy {path}"
    if not others:
        return []
    ours = _tokenizer(path, config.data.chat_template)
    return [
        compare_tokenizers(f"model.{role} {model}", _tokenizer(model), data, ours) for role, model in others.items()
    ]


def _tokenizer(path: str, chat_template: str | None = None) -> Tokenizer:
    """That of a model directory, HF or Megatron, or of a path of its own."""
    directory = local_path(path)
    if directory.is_dir():
        check_hf_files(directory)
        return load_tokenizer(str(hf_directory(directory)), chat_template)
    return load_tokenizer(path, chat_template)


def _has_tokenizer(path: str) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return any((hf_directory(local_path(path)) / name).exists() for name in names)
