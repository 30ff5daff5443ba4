"""Every rule on values that go together is broken by some config, and is the one that says so."""

from typing import Any

import pytest

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.rules import RULES
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.config.values import merged, typed_override
from megatron_tgdpo.errors import UserError
from tests.unit.config.test_loading import VALID

_GUIDE = ["guide.method=dpo"]
_CACHED = ["guidance.mode=cached", "guidance.cache=dir"]
# Overrides that break one rule, and what its message begins with.
BROKEN = [
    (["train.epochs=1"], "set exactly one of train.steps and train.epochs"),
    (["loss.method=sft", "model.guide=null", "loss.beta=1"], "loss.beta is set but loss.method sft"),
    (["loss.method=dpo", "model.guide=null", "loss.alpha=1"], "loss.alpha is set but loss.method dpo"),
    (["loss.method=orpo", "model.guide=null", "loss.form=ipo"], "loss.form is set but loss.method orpo"),
    (["loss.method=orpo", "model.guide=null", "loss.sft_weight=1"], "loss.sft_weight is set but loss.method orpo"),
    (["loss.method=orpo", "model.guide=null", "loss.label_smoothing=0"], "loss.label_smoothing is set but loss.method"),
    (["loss.method=sft", "model.guide=null", "loss.reference_free=true"], "loss.reference_free is set but loss.method"),
    (["loss.method=dpo", "model.guide=null", "loss.guide_beta=1"], "loss.guide_beta is set but loss.method dpo"),
    (["loss.form=ipo", "loss.gamma=1"], "loss.gamma is 1.0 but loss.form ipo"),
    (["loss.method=simpo", "model.guide=null", "loss.weights=confpo"], "loss.weights is set but loss.method simpo"),
    (["loss.select_share=0.2"], "loss.select_share is set but loss.method tgdpo"),
    (["loss.method=sft", "model.guide=null", "loss.gamma=1"], "loss.gamma is set but loss.method sft"),
    (["loss.method=dpo", "model.guide=null", "loss.weights=sepo"], "loss.weights sepo come from a guide"),
    (["loss.weights=confpo"], "loss.weights confpo need no guide: set loss.method=dpo"),
    (["loss.form=hinge", "loss.label_smoothing=0.1"], "loss.label_smoothing is 0.1 but loss.form hinge"),
    (["loss.form=exo_pair"], "loss.form exo_pair needs loss.label_smoothing above 0"),
    (
        ["loss.method=dpo", "model.guide=null", "loss.form=apo_zero", "loss.reference_free=true"],
        "loss.form apo_zero compares each response with the reference on its own: set loss.reference_free=false",
    ),
    (
        ["loss.form=apo_down"],
        "loss.form apo_down compares each response with the reference on its own, and token weights",
    ),
    (["model.guide=null"], "loss.method tgdpo needs model.guide"),
    (["loss.method=dpo", "model.guide=null", *_GUIDE], "loss.method dpo trains without a guide"),
    (["guide.beta=0.01"], "section guide has no method"),
    (_GUIDE, "model.guide is"),
    (["model.guide=null", "guide.method=orpo", "guide.gamma=1"], "guide.gamma is set but guide.method orpo"),
    (["model.guide=null", "guide.method=sft", "guide.beta=1"], "guide.beta is set but guide.method sft"),
    (["model.guide=null", *_GUIDE, "guide.steps=1", "guide.epochs=1"], "set at most one of guide.steps"),
    (
        ["model.guide=null", *_GUIDE, "guide.output_dir=${output_dir}"],
        "guide.output_dir is out, where output_dir's own files",
    ),
    (["loss.method=dpo"], "loss.method dpo uses no guide"),
    (["loss.method=simpo", "model.guide=null", "model.reference=ref"], "loss.method simpo uses no reference"),
    (["lora.alpha=8"], "section lora has neither rank nor adapter"),
    (["lora.adapter=dir", "lora.rank=4"], "lora.adapter dir has a rank, alpha and targets of its own"),
    (["lora.rank=4", "precision.fp8=delayed"], "section lora with precision.fp8 delayed and fp4 none: beside adapters"),
    (["lora.rank=4", "precision.frozen=fp8"], "section lora with precision.frozen fp8: the policy's weights"),
    (["lora.rank=4", "loss.method=dpo", "model.guide=null", "offload.frozen=true"], "offload.frozen with section lora"),
    (
        ["offload.activations=true", "train.recompute=selective", "train.recompute_modules=[layernorm]"],
        "offload.activations with layernorm in train.recompute_modules",
    ),
    (["offload.activations=true", "precision.fp8=tensorwise"], "offload.activations with precision.fp8 tensorwise"),
    (["offload.frozen_from=disk"], "offload.frozen_from says where"),
    (
        ["lora.rank=4", "parallel.tensor=2", "parallel.sequence_parallel=true", "overlap.tensor=true"],
        "overlap.tensor hides traffic within linears",
    ),
    (["loss.method=simpo", "model.guide=null", *_CACHED], "loss.method simpo has no frozen models"),
    (["guidance.mode=cached"], "guidance.mode cached needs guidance.cache"),
    (["guidance.unit=sentence"], "guidance.unit is sentence, which a guide's cache only can hold"),
    ([*_CACHED, "guidance.prefetch=true", "parallel.pipeline=2"], "guidance.prefetch is true but no frozen models"),
    (["guidance.prefetch=true"], "guidance.prefetch is true with one stage"),
    ([*_CACHED, "parallel.virtual_pipeline=2"], "parallel.virtual_pipeline is 2 with one stage"),
    (
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "guidance.prefetch=true"],
        "parallel.virtual_pipeline is 2 with guidance.prefetch, which fills the bubbles",
    ),
    (
        ["loss.method=dpo", "model.guide=null", "parallel.pipeline_layers.guide=[4]"],
        "parallel.pipeline_layers.guide is set but loss.method dpo runs no guide: set it to null",
    ),
    (
        ["loss.method=simpo", "model.guide=null", "parallel.pipeline_layers.reference=[4]"],
        "parallel.pipeline_layers.reference is set but loss.method simpo runs no reference",
    ),
    (
        ["train.recompute_modules=[mlp]"],
        "train.recompute_modules is ['mlp'] with train.recompute none: set train.recompute=sel",
    ),
    (
        ["train.recompute=selective", "train.recompute_modules=[shared_experts, moe]"],
        "train.recompute_modules has moe, which computes all experts again",
    ),
    (
        ["train.recompute=selective", "train.recompute_modules=[moe]", "moe.z_loss_coeff=0.1", "parallel.pipeline=2"],
        "train.recompute_modules has moe with several stages and a loss of routers",
    ),
    (
        ["train.recompute=selective", "train.recompute_modules=[layernorm]", "precision.fp8=delayed"],
        "train.recompute_modules has layernorm, which precision.fp8 delayed",
    ),
    (["parallel.pipeline_layers.policy=[3, 1]"], "parallel.pipeline_layers.policy is [3, 1]: it must have a number"),
    (
        ["parallel.pipeline=2", "parallel.pipeline_layers.guide=[4, 0]"],
        "parallel.pipeline_layers.guide is [4, 0]: it must have",
    ),
    (
        [*_CACHED, "parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.pipeline_layers.policy=[3, 1]"],
        "parallel.pipeline_layers.policy is [3, 1]: it must have",
    ),
    (["overlap.param_gather=true"], "overlap.param_gather needs overlap.grad_reduce"),
    (["parallel.tensor=2", "overlap.tensor=true"], "overlap.tensor needs parallel.sequence_parallel"),
    (
        ["parallel.context=2", "batch.tokens_per_micro_batch=4098"],
        "batch.tokens_per_micro_batch 4098 is not divisible by 2 x",
    ),
    (
        ["parallel.tensor=4", "parallel.sequence_parallel=true", "batch.tokens_per_micro_batch=4098"],
        "batch.tokens_per_micro_batch 4098 is not divisible by parallel.tensor x",
    ),
    (["data.max_prompt_length=2048"], "data.max_prompt_length must be smaller than data.max_length"),
    (["checkpoint.best_metric=eval/loss"], "checkpoint.best_metric is eval/loss but data.validation is not set"),
    (
        ["checkpoint.best_metric=eval/loss", "data.validation=pairs"],
        "checkpoint.best_metric is eval/loss but eval.every_steps is not set",
    ),
    (["checkpoint.best_mode=min"], "checkpoint.best_mode is min but checkpoint.best_metric is not set"),
    (["export.merge=true"], "export.merge is true without section lora"),
    (["export.hf=best"], "export.hf is best but checkpoint.best_metric is not set"),
    (["eval.generate.prompts=2"], "eval.generate.prompts is 2 but data.validation is not set"),
    (
        ["eval.generate.prompts=2", "data.validation=more.jsonl", "precision.fp8=delayed"],
        "eval.generate.prompts is 2 with precision.fp8 delayed",
    ),
]


def merged_all(overrides: list[str]) -> dict[str, Any]:
    values = VALID
    for override in overrides:
        values = merged(values, typed_override(Config, override))
    return values


@pytest.mark.parametrize(("overrides", "message"), BROKEN)
def test_a_rule_refuses_what_breaks_it(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_dict(merged_all(overrides))
    assert str(error.value).startswith(f"config: {message}")


@pytest.mark.parametrize("name", ["${output_dir}/x/../best", "${output_dir}/hf/guide", "${output_dir}/..", "./out"])
def test_the_guides_run_has_a_directory_of_its_own(name: str) -> None:
    with pytest.raises(UserError, match=r"guide.output_dir is .*: name another directory"):
        config_from_dict(merged_all(["model.guide=null", *_GUIDE, f"guide.output_dir={name}"]))
    config_from_dict(merged_all(["model.guide=null", *_GUIDE, "guide.output_dir=${output_dir}/guides/dpo"]))


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (["precision.fp4=nvfp4"], "section lora with precision.fp8 none and fp4 nvfp4: beside adapters"),
        (["precision.fp8=mxfp8"], "section lora with precision.fp8 mxfp8 and fp4 none: beside adapters"),
        (["precision.fp8=tensorwise", "precision.frozen=bf16"], "section lora with precision.frozen bf16"),
        (["precision.fp8=tensorwise", "precision.fp8_params=true"], None),
        (["precision.frozen=bf16"], None),
    ],
)
def test_precisions_beside_adapters(precision: list[str], message: str | None) -> None:
    if message is None:
        assert config_from_dict(merged_all(["lora.rank=4", *precision])).lora.trains
        return
    with pytest.raises(UserError, match=message):
        config_from_dict(merged_all(["lora.rank=4", *precision]))


def test_no_rule_is_left_out() -> None:
    """A rule without a case would be one that nobody has seen refuse anything."""
    assert len({message for _, message in BROKEN}) == len(BROKEN) == len(RULES)
