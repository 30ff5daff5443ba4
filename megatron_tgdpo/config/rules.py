"""Which values of a config contradict others, one rule each: its condition, and what to do about it.

In the order of the sections; a rule may count on those above it. What values are wrong on their own stands at the
fields (schema.py); what the machine, the models and the data must be like, where these are read.
"""

from dataclasses import fields
from pathlib import Path

from megatron_tgdpo.config.constraints import BESIDE_ADAPTERS, Rule
from megatron_tgdpo.config.schema import Config, GuideConfig, LoraConfig, LossConfig
from megatron_tgdpo.loss.choices import FORMS, WEIGHTS, Form
from megatron_tgdpo.loss.methods import METHODS

# What a run makes in its output directory; "best" is a name for one of its checkpoints.
_OWN = ("best", "checkpoints", "data", "hf", "logs", "tensorboard")


def _sequence_multiple(c: Config) -> int:
    """What each sequence is padded to a multiple of, see batching/packed_sequence.py."""
    return 2 * c.parallel.context if c.parallel.context > 1 else 1


def _interleaved(c: Config) -> bool:
    return c.parallel.virtual_pipeline not in (None, 1)


def _is_of_the_run(guide: Path, run: Path) -> bool:
    """Whether the guide's run would share a directory with the policy's, by whatever names."""
    guide, run = guide.resolve(), run.resolve()
    return (
        guide == run or guide in run.parents or (guide.is_relative_to(run) and guide.relative_to(run).parts[0] in _OWN)
    )


def _is_trained_here(c: Config) -> bool:
    """Whether ``model.guide`` is the guide's run, or a checkpoint of it, as a run's own ``config.yaml`` has it."""
    guide, run = Path(str(c.model.guide)), Path(c.guide_dir)
    return run in (guide, *guide.parents)


def _unused_option(option: str) -> Rule:
    weights = "{c.loss.with_weights}" if any(option in row.options for row in WEIGHTS.values()) else ""
    return Rule(
        lambda c: option not in c.method.options and getattr(c.loss, option) is not None,
        f"loss.{option} is set but loss.method {{c.loss.method}}{weights} does not use it: remove it, or set it to "
        "null",
    )


def _layers_given(role: str) -> Rule:
    def broken(c: Config) -> bool:
        given = getattr(c.parallel.pipeline_layers, role)
        least = c.parallel.virtual_pipeline or 1
        return given is not None and (len(given) != c.parallel.pipeline or min(given, default=0) < least)

    return Rule(
        broken,
        f"parallel.pipeline_layers.{role} is {{c.parallel.pipeline_layers.{role}}}: it must have a number for each of "
        "parallel.pipeline = {c.parallel.pipeline} stages, at least 1 (with virtual_pipeline, one for each chunk)",
    )


def _layers_of_nobody(role: str) -> Rule:
    return Rule(
        lambda c: getattr(c.parallel.pipeline_layers, role) is not None and role not in c.method.frozen,
        f"parallel.pipeline_layers.{role} is set but loss.method {{c.loss.method}} runs no {role}: set it to null",
    )


TRAIN = (
    Rule(
        lambda c: (c.train.steps is None) == (c.train.epochs is None),
        "set exactly one of train.steps and train.epochs",
    ),
    Rule(
        lambda c: c.train.recompute_modules is not None and c.train.recompute != "selective",
        "train.recompute_modules is {c.train.recompute_modules} with train.recompute {c.train.recompute}: set "
        "train.recompute=selective, or train.recompute_modules to null",
    ),
    Rule(
        lambda c: {"moe", "shared_experts"} <= set(c.train.recompute_modules or ()),
        "train.recompute_modules has moe, which computes all experts again, and shared_experts: remove shared_experts",
    ),
    # In backward a router runs by itself then, and has the sequences of the last pack that went forward.
    Rule(
        lambda c: (
            (c.moe.aux_loss_coeff or c.moe.z_loss_coeff)
            and "moe" in (c.train.recompute_modules or ())
            and c.parallel.pipeline > 1
        ),
        "train.recompute_modules has moe with several stages and a loss of routers, whose sequences are not known when "
        "they are computed again: set train.recompute=full, or moe.aux_loss_coeff and moe.z_loss_coeff to 0",
    ),
    Rule(
        lambda c: "layernorm" in (c.train.recompute_modules or ()) and c.precision.fp8 == "delayed",
        "train.recompute_modules has layernorm, which precision.fp8 delayed cannot compute again: choose another "
        "recipe, or remove it",
    ),
)


def _form(c: Config) -> Form:
    return FORMS[c.loss.form or "sigmoid"]


_POINTWISE = "loss.form {c.loss.form} compares each response with the reference on its own"
LOSS = (
    *(_unused_option(field.name) for field in fields(LossConfig) if field.name != "method"),
    Rule(
        lambda c: bool(c.loss.label_smoothing) and not _form(c).smoothed,
        "loss.label_smoothing is {c.loss.label_smoothing} but loss.form {c.loss.form} does not use it: set it to 0",
    ),
    Rule(
        lambda c: c.loss.form == "exo_pair" and not c.loss.label_smoothing,
        "loss.form exo_pair needs loss.label_smoothing above 0, what its target leaves to the rejected response: 0.001 "
        "in the paper",
    ),
    Rule(
        lambda c: not _form(c).pairwise and bool(c.loss.reference_free),
        f"{_POINTWISE}: set loss.reference_free=false",
    ),
    # A guide's partition function cancels between two responses, and not in one.
    Rule(
        lambda c: not _form(c).pairwise and c.method.weighted,
        f"{_POINTWISE}, and token weights hold for differences of two only: set loss.method=dpo with loss.weights="
        "uniform, or another form",
    ),
    Rule(
        lambda c: bool(c.loss.gamma) and c.loss.form is not None and not _form(c).margin,
        "loss.gamma is {c.loss.gamma} but loss.form {c.loss.form} does not use it: set it to 0",
    ),
    Rule(
        lambda c: c.loss.weights is not None and WEIGHTS[c.loss.weights].guided and "guide" not in c.method.frozen,
        "loss.weights {c.loss.weights} come from a guide: set loss.method=tgdpo and model.guide",
    ),
    Rule(
        lambda c: c.loss.weights is not None and not WEIGHTS[c.loss.weights].guided and "guide" in c.method.frozen,
        "loss.weights {c.loss.weights} need no guide: set loss.method=dpo and remove model.guide",
    ),
)

MODELS = (
    Rule(
        lambda c: "guide" in c.method.frozen and c.model.guide is None,
        "loss.method {c.loss.method} needs model.guide (a model), or guide.method=dpo to have one trained; "
        "without a guide use loss.method=dpo",
    ),
    Rule(
        lambda c: "guide" not in c.method.frozen and c.guide.method is not None,
        "loss.method {c.loss.method} trains without a guide: set guide.method=null or loss.method=tgdpo",
    ),
    Rule(
        lambda c: c.guide.method is None and c.guide != GuideConfig(),
        "section guide has no method: set guide.method=dpo, or remove the section",
    ),
    Rule(
        lambda c: c.guide.method is not None and not _is_trained_here(c),
        "model.guide is {c.model.guide} and section guide has one trained in {c.guide_dir}: remove one of them",
    ),
    Rule(
        lambda c: c.guide.method and c.guide.gamma is not None and "gamma" not in METHODS[c.guide.method].options,
        "guide.gamma is set but guide.method {c.guide.method} does not use it: remove it",
    ),
    Rule(
        lambda c: c.guide.method and c.guide.beta is not None and "beta" not in METHODS[c.guide.method].options,
        "guide.beta is set but guide.method {c.guide.method} does not use it: remove it",
    ),
    Rule(
        lambda c: c.guide.steps is not None and c.guide.epochs is not None,
        "set at most one of guide.steps and guide.epochs",
    ),
    Rule(
        lambda c: c.guide.method is not None and _is_of_the_run(Path(c.guide_dir), Path(c.output_dir)),
        "guide.output_dir is {c.guide_dir}, where output_dir's own files are or lie above: name another directory",
    ),
    Rule(
        lambda c: "guide" not in c.method.frozen and c.model.guide is not None,
        "loss.method {c.loss.method} uses no guide: remove model.guide or set loss.method=tgdpo",
    ),
    Rule(
        lambda c: "reference" not in c.method.frozen and c.model.reference is not None,
        "loss.method {c.loss.method} uses no reference: remove model.reference",
    ),
)

LORA = (
    Rule(
        lambda c: c.lora != LoraConfig() and c.lora.rank is None and c.lora.adapter is None,
        "section lora has neither rank nor adapter: set lora.rank, or remove the section",
    ),
    Rule(
        lambda c: c.lora.adapter is not None and c.lora != LoraConfig(adapter=c.lora.adapter),
        "lora.adapter {c.lora.adapter} has a rank, alpha and targets of its own: remove the other keys of section lora",
    ),
    Rule(
        lambda c: c.lora.trains and c.precision.policy_recipe not in BESIDE_ADAPTERS,
        "section lora with precision.fp8 {c.precision.fp8} and fp4 {c.precision.fp4}: beside adapters fp8 may be "
        "tensorwise or blockwise; delayed scales would follow the reference's passes, the others have not been shown",
    ),
    Rule(
        lambda c: (
            c.lora.trains
            and (
                c.precision.frozen == "fp8" or (c.precision.frozen == "bf16" and c.precision.policy_recipe is not None)
            )
        ),
        "section lora with precision.frozen {c.precision.frozen}: the policy's weights are the reference's, and "
        "compute in one precision; set precision.frozen=same",
    ),
    Rule(
        lambda c: c.lora.trains and c.offload.frozen and c.model.reference is None and c.model.guide is None,
        "offload.frozen with section lora: the reference's weights are the policy's, which stay on the device: set it "
        "to false",
    ),
    Rule(
        lambda c: c.offload.activations and "layernorm" in (c.train.recompute_modules or ()),
        "offload.activations with layernorm in train.recompute_modules: what norms give would be computed again, and "
        "copied as well; remove layernorm",
    ),
    Rule(
        lambda c: c.offload.activations and c.precision.policy_recipe is not None,
        "offload.activations with precision.fp8 {c.precision.fp8} and fp4 {c.precision.fp4}: weights in FP8 and FP4 "
        "would travel with the activations; set it to false, or compute in bf16",
    ),
    Rule(
        lambda c: c.offload.frozen_from == "disk" and not c.offload.frozen,
        "offload.frozen_from says where the weights of offload.frozen wait, which is false: set that to true",
    ),
    Rule(
        lambda c: c.lora.trains and c.overlap.tensor,
        "overlap.tensor hides traffic within linears, and adapters have to look into them: set it to false",
    ),
    Rule(
        lambda c: c.export.merge and not c.lora.trains,
        "export.merge is true without section lora: whole models are exported as it is, set it to false",
    ),
)

GUIDANCE = (
    Rule(
        lambda c: c.guidance.mode == "cached" and not c.method.frozen,
        "loss.method {c.loss.method} has no frozen models whose log-probs a cache could hold: set "
        "guidance.mode=colocated",
    ),
    Rule(
        lambda c: c.guidance.mode == "cached" and c.guidance.cache is None,
        "guidance.mode cached needs guidance.cache (a directory): fill it with tgdpo guidance",
    ),
    Rule(
        lambda c: c.guidance.unit == "sentence" and (c.guidance.mode != "cached" or "guide" not in c.method.frozen),
        "guidance.unit is sentence, which a guide's cache only can hold: set guidance.mode=cached and "
        "loss.method=tgdpo, or guidance.unit=token",
    ),
    Rule(
        lambda c: c.guidance.prefetch and (c.guidance.mode == "cached" or not c.method.frozen),
        "guidance.prefetch is true but no frozen models run: set it to false",
    ),
    Rule(
        lambda c: c.guidance.prefetch and c.parallel.pipeline == 1,
        "guidance.prefetch is true with one stage, where there are no bubbles: set it to false",
    ),
)

PARALLEL = (
    *(_layers_of_nobody(role) for role in ("reference", "guide")),
    *(_layers_given(role) for role in ("policy", "reference", "guide")),
    Rule(
        lambda c: _interleaved(c) and c.parallel.pipeline == 1,
        "parallel.virtual_pipeline is {c.parallel.virtual_pipeline} with one stage: there is nothing to interleave, "
        "set it to null",
    ),
    # Prefetch fills the bubbles of 1F1B, of which chunks leave a part too short for a whole pass of a stage.
    Rule(
        lambda c: _interleaved(c) and c.guidance.prefetch,
        "parallel.virtual_pipeline is {c.parallel.virtual_pipeline} with guidance.prefetch, which fills the bubbles of "
        "stages without chunks: set guidance.prefetch=false, or virtual_pipeline to null",
    ),
)

OVERLAP = (
    Rule(
        lambda c: c.overlap.param_gather and not c.overlap.grad_reduce,
        "overlap.param_gather needs overlap.grad_reduce: megatron-core overlaps both or only the gradients",
    ),
    Rule(
        lambda c: c.overlap.tensor and not c.parallel.sequence_parallel,
        "overlap.tensor needs parallel.sequence_parallel=true: it hides the traffic of that",
    ),
)

# Whether the longest pair fits a pack, the data says: batching/packer.py.
LENGTHS = (
    Rule(
        lambda c: c.seq_length % _sequence_multiple(c) != 0,
        "batch.tokens_per_micro_batch {c.seq_length} is not divisible by 2 x parallel.context = "
        "2 x {c.parallel.context}",
    ),
    Rule(
        lambda c: c.parallel.sequence_parallel and c.seq_length // c.parallel.context % c.parallel.tensor != 0,
        "batch.tokens_per_micro_batch {c.seq_length} is not divisible by parallel.tensor x parallel.context = "
        "{c.parallel.tensor} x {c.parallel.context} (sequence parallelism)",
    ),
    Rule(
        lambda c: c.data.max_prompt_length is not None and c.data.max_prompt_length >= c.data.max_length,
        "data.max_prompt_length must be smaller than data.max_length: the response needs room",
    ),
)

BEST = (
    Rule(
        lambda c: c.checkpoint.best_metric is not None and not c.validation_sets,
        "checkpoint.best_metric is {c.checkpoint.best_metric} but data.validation is not set: without it nothing is "
        "evaluated",
    ),
    Rule(
        lambda c: c.checkpoint.best_metric is not None and c.eval.every_steps is None,
        "checkpoint.best_metric is {c.checkpoint.best_metric} but eval.every_steps is not set: the only evaluation "
        "would be the one at the end",
    ),
    Rule(
        lambda c: c.checkpoint.best_metric is None and c.checkpoint.best_mode is not None,
        "checkpoint.best_mode is {c.checkpoint.best_mode} but checkpoint.best_metric is not set: name the metric",
    ),
    Rule(
        lambda c: c.checkpoint.best_metric is None and c.export.hf == "best",
        "export.hf is best but checkpoint.best_metric is not set: name the metric, as eval/rewards/accuracies",
    ),
)

GENERATE = (
    Rule(
        lambda c: c.eval.generate.prompts > 0 and not c.validation_sets,
        "eval.generate.prompts is {c.eval.generate.prompts} but data.validation is not set: its prompts are answered",
    ),
    Rule(
        lambda c: c.eval.generate.prompts > 0 and c.precision.fp8 == "delayed",
        "eval.generate.prompts is {c.eval.generate.prompts} with precision.fp8 delayed, whose scales would keep the "
        "answers: choose another recipe, or set it to 0",
    ),
)

RULES: tuple[Rule, ...] = (*TRAIN, *LOSS, *MODELS, *LORA, *GUIDANCE, *PARALLEL, *OVERLAP, *LENGTHS, *BEST, *GENERATE)
