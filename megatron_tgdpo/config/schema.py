"""The run's configuration: typed sections, one YAML file, ``section.key=value`` overrides, nothing unknown accepted.

A default lives here and nowhere else, and with it what the value must be; rules.py has what values must be together.
Fields without a default are required. Every key of ``batch`` counts pairs (1 chosen and 1 rejected) unless it says
tokens.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

from megatron_tgdpo.config.constraints import (
    FP4_RECIPES,
    FP8_RECIPES,
    MOMENTS,
    RECOMPUTE_CHOICES,
    RECOMPUTE_MODULES,
    STATELESS_RECIPES,
    at_least,
    fraction,
    one_of,
    positive,
    share,
    some_of,
    token_multiple,
)
from megatron_tgdpo.data.sources import Source, read_sets, read_sources
from megatron_tgdpo.loss.choices import FORMS, WEIGHTS
from megatron_tgdpo.loss.methods import GUIDE_METHODS, METHODS, Method
from megatron_tgdpo.storage.hub import local_path

# A whole model that trained; of a LoRA run its adapter, or base and adapter in one.
ExportKind = Literal["model", "adapter", "merged"]
# OmegaConf has no such union.
_SOURCES = str | dict[str, Any] | list[Any]


@dataclass(frozen=True)
class ModelConfig:
    # Each an HF directory, a model of the Hub (OWNER/NAME or OWNER/NAME@REVISION), a Megatron checkpoint, or the output
    # directory of a run. Reference and guide may be LoRA adapters of the policy's model, too.
    policy: str = MISSING  # what the policy starts from
    reference: str | None = None  # null: same as policy
    guide: str | None = None  # required by method tgdpo; null: what section guide trains
    # auto: Transformer Engine where usable on CUDA
    layer_spec: str = one_of(("auto", "local", "transformer_engine"), "auto")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of the policy's linears train, its weights do not, where ``rank`` or ``adapter`` is set."""

    rank: int | None = positive(None, at_most=1 << 12)  # of every adapter; null: all weights train
    alpha: float | None = positive(None)  # what adapters add is scaled by alpha / rank; null: 2 x rank
    # linears that have adapters, in every layer: all-linear, or a list of q_proj, k_proj, v_proj, o_proj, gate_proj,
    # up_proj, down_proj
    targets: Any = field(default="all-linear", metadata={"type": str | list[Any]})
    rslora: bool = False  # alpha is divided by the root of the rank
    # to continue with: a PEFT directory, or a checkpoint or output directory of a run; its own rank, alpha and targets
    # hold
    adapter: str | None = None

    @property
    def trains(self) -> bool:
        """Whether an adapter trains, and not all weights."""
        return self.rank is not None or self.adapter is not None


@dataclass(frozen=True)
class DataConfig:
    # A file of pairs, a directory, a glob, a dataset of the Hub, or the prefix of a preprocessed dataset; {path, split,
    # subset, weight}; or a list of these, one after another (data/sources.py).
    train: Any = field(default=MISSING, metadata={"type": _SOURCES})
    # The same for evaluation, or several sets by name; null: no evaluation.
    validation: Any = field(default=None, metadata={"type": _SOURCES | None})
    # Pairs that tgdpo pipeline evaluates on, which training does not read; null: data.validation
    test: Any = field(default=None, metadata={"type": _SOURCES | None})
    shuffle: bool = True  # new order every epoch from train.seed; false: file order
    max_length: int = positive(2048, at_most=1 << 29)  # tokens of prompt plus response, per sequence (packs: int32)
    max_prompt_length: int | None = positive(None)  # tokens of the prompt; null: no limit of its own
    overlong_prompt: str = one_of(("truncate", "drop", "error"), "truncate")  # a prompt past max_prompt_length
    tokenizer: str | None = None  # HF directory, model of the Hub, or SentencePiece .model; null: the policy's
    chat_template: str | None = None  # Jinja file; null: the tokenizer's own
    template_kwargs: dict[str, Any] | None = None  # variables for the chat template, as enable_thinking: false
    columns: dict[str, str] | None = None  # by a layout's key, the records' own: {prompt: question}
    workers: int = positive(4, at_most=1 << 12)  # processes that tokenise when train or validation is a raw file


@dataclass(frozen=True)
class LossConfig:
    """An option that the method does not use must be null; one that it uses has the default in loss/methods.py."""

    method: str = one_of(METHODS, "tgdpo")
    # tgdpo, dpo: strength of the KL constraint, per nat; simpo: scale of the rewards; orpo: weight of the odds ratio
    beta: float | None = positive(None)
    alpha: float | None = at_least(0, None)  # tgdpo: strength of the token-level guidance; 0 is DPO
    # tgdpo: scale of the guide's log-ratios, per nat; null: beta, as the authors have it
    guide_beta: float | None = positive(None)
    form: str | None = one_of(FORMS, None)  # tgdpo, dpo: what is made of a pair's scores, by TRL's names
    reference_free: bool | None = None  # tgdpo, dpo: log-probs of the policy in place of its ratios to the reference
    label_smoothing: float | None = fraction(None, below=0.5)  # tgdpo, dpo: probability that a pair's label is wrong
    # tgdpo, dpo: weight of the mean NLL of chosen tokens (the reference code's pref_ftx)
    sft_weight: float | None = at_least(0, None)
    # tgdpo, dpo, simpo: margin by which chosen scores should exceed rejected ones, in nats
    gamma: float | None = at_least(0, None)
    weights: str | None = one_of(WEIGHTS, None)  # what tokens count; tgdpo: tgdpo or sepo; dpo: uniform or confpo
    select_share: float | None = share(None)  # weights sepo: share of each response's tokens that count

    @property
    def options(self) -> dict[str, Any]:
        """The options that the method uses."""
        return {name: getattr(self, name) for name in self.row.options}

    @property
    def row(self) -> Method:
        """The method, with the options and frozen models that it has with these values."""
        return METHODS[self.method].given({"weights": self.weights, "reference_free": self.reference_free})

    @property
    def with_weights(self) -> str:
        """What messages add to the method's name where the kind of weights decides on its options."""
        usual = METHODS[self.method]
        return f" with loss.weights {self.weights or usual.options['weights']}" if usual.weighted else ""


@dataclass(frozen=True)
class MoeConfig:
    """Losses of the policy's routers, beside that of section ``loss``; see models/router_losses.py."""

    aux_loss_coeff: float = at_least(0, 0.0)  # of the loss that spreads each sequence's tokens evenly over experts
    z_loss_coeff: float = at_least(0, 0.0)  # of the loss that keeps the routers' logits small

    @property
    def has_losses(self) -> bool:
        return bool(self.aux_loss_coeff or self.z_loss_coeff)


@dataclass(frozen=True)
class GuideConfig:
    """How the guide is trained from this file, for method tgdpo; all that is not here is as for the policy."""

    method: str | None = one_of(GUIDE_METHODS, None)  # null: model.guide names a guide that is there
    beta: float | None = positive(None)  # the guide's loss.beta; null: the method's default
    gamma: float | None = at_least(0, None)  # the guide's loss.gamma (simpo, dpo); null: the method's default
    lr: float | None = at_least(0, None)  # the guide's optimizer.lr; null: the policy's
    steps: int | None = positive(None)  # the guide's train.steps; null with epochs null: as long as the policy
    epochs: float | None = positive(None)  # the guide's train.epochs
    output_dir: str | None = None  # of the guide's run; null: guide/ in output_dir


@dataclass(frozen=True)
class GuidanceConfig:
    # colocated: reference and guide run in the policy's pipeline | cached: they are read from cache
    mode: str = one_of(("colocated", "cached"), "colocated")
    cache: str | None = None  # directory that tgdpo guidance writes and mode cached reads
    verify: bool = True  # compare the cache's checksums before training from it
    # what has one reward: each token | all tokens of a sentence, the mean of theirs (mode cached)
    unit: str = one_of(("token", "sentence"), "token")
    prefetch: bool = False  # experimental: run the next step's frozen forwards in the pipeline bubbles of this one


@dataclass(frozen=True)
class PipelineLayersConfig:
    """Layers of each stage, as [8, 8, 7, 3]; null: as many for all if they divide by the stages, else by cost."""

    policy: list[int] | None = None
    reference: list[int] | None = None  # null also: those of the policy, if it has as many layers
    guide: list[int] | None = None  # null also: those of policy or reference, if one has as many layers


@dataclass(frozen=True)
class ParallelConfig:
    tensor: int = positive(1)  # ranks that share each layer
    pipeline: int = positive(1)  # stages of consecutive layers
    context: int = positive(1)  # ranks that share each sequence
    # chunks of layers per stage, for the interleaved schedule; null: no chunks
    virtual_pipeline: int | None = positive(None)
    expert: int = positive(1)  # ranks that divide a layer's experts among them; spans tensor, context and data ranks
    expert_tensor: int | None = positive(None)  # ranks that share each expert; null: as parallel.tensor
    pipeline_layers: PipelineLayersConfig = field(default_factory=PipelineLayersConfig)
    sequence_parallel: bool = False  # split norms and residuals along the sequence over the tensor ranks
    # auto takes the CPU only on a machine without an NVIDIA device
    device: str = one_of(("auto", "cuda", "cpu"), "auto")
    # a collective that takes longer ends the run, as does a rank silent for 3/4 of it
    timeout_minutes: float = positive(30.0, at_most=525_600)


@dataclass(frozen=True)
class BatchConfig:
    global_pairs: int = positive(MISSING)  # pairs per optimizer step, over all ranks
    # tokens of one pack; null: 2 x data.max_length, which holds any pair
    tokens_per_micro_batch: int | None = positive(None)
    shared_prompts: bool | None = None  # compute a pair's prompt once for both responses; null: true


@dataclass(frozen=True)
class OptimizerSettings:
    lr: float = at_least(0, MISSING)  # peak learning rate
    beta1: float = fraction(0.9)  # Adam first moment decay
    beta2: float = fraction(0.999)  # Adam second moment decay
    eps: float = at_least(1.2e-38, 1e-8)  # Adam denominator term; less is zero in fp32
    weight_decay: float = at_least(0, 0.0)  # decoupled; never on norms and biases
    clip_grad: float = at_least(0, 1.0)  # maximum global gradient norm; 0: no clipping
    # Adam's moments; fp8: the first, and the second in bf16
    moments: str = one_of(MOMENTS, "fp32")
    # of bf16 weights: an fp32 copy | the 16 bits of it that bf16 leaves out
    main_weights: str = one_of(("fp32", "remainder"), "fp32")
    schedule: str = one_of(("constant", "linear", "cosine"), "cosine")  # linear and cosine: to zero at the last step
    warmup_ratio: float = fraction(0.1)  # fraction of all steps that warm up linearly from 0
    warmup_steps: int | None = at_least(0, None)  # how many steps do, whatever warmup_ratio says; null: that fraction


@dataclass(frozen=True)
class PrecisionConfig:
    dtype: str = one_of(("bf16", "fp32"), "bf16")  # of weights and activations; gradients are fp32
    fp8: str = one_of(FP8_RECIPES, "none")  # how the layers' products are scaled to FP8
    fp8_format: str = one_of(("hybrid", "e4m3"), "hybrid")  # hybrid: E4M3 forward, E5M2 backward
    fp8_amax_history: int = positive(1024, at_most=1 << 20)  # products that delayed scaling looks back on
    fp8_amax_algorithm: str = one_of(("max", "most_recent"), "max")  # over that history
    fp8_params: bool = False  # the policy's layer weights are held, and gathered over data ranks, in FP8
    fp4: str = one_of(FP4_RECIPES, "none")  # in the place of fp8: the same products in FP4
    first_last_layers_bf16: bool = False  # the first and the last layer of every model stay in bf16
    frozen: str = one_of(("same", "bf16", "fp8"), "same")  # of reference and guide; same: as the policy

    @property
    def parameter_bytes(self) -> int:
        """Bytes of a weight or activation in ``dtype``."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def policy_recipe(self) -> str | None:
        """The policy's FP8 or FP4 recipe, None for bf16 or fp32."""
        if self.fp4 != "none":
            return self.fp4
        return None if self.fp8 == "none" else self.fp8


@dataclass(frozen=True)
class OverlapConfig:
    grad_reduce: bool = False  # reduce gradients over data ranks while backward goes on
    param_gather: bool = False  # gather updated weights over data ranks while the next forward goes on
    tensor: bool = False  # tensor parallel traffic within the products it feeds (Transformer Engine user buffers)


@dataclass(frozen=True)
class OffloadConfig:
    optimizer: float = share(0.0)  # part of the optimizer's state, and of its update, that lives on the CPU
    activations: bool = False  # what the policy's layers keep for backward waits in pinned host memory
    frozen: bool = False  # layers of reference and guide stay off the device between uses
    # where: pinned host memory | a file without a name in output_dir, of which a CPU maps the whole models
    frozen_from: str = one_of(("host", "disk"), "host")


@dataclass(frozen=True)
class TrainConfig:
    steps: int | None = positive(None)  # optimizer steps; exactly one of steps and epochs is set
    epochs: float | None = positive(None)  # passes over data.train
    # of the data order and all random numbers; there is room to add a rank
    seed: int = at_least(0, 0, at_most=(1 << 63) - (1 << 20))
    # stop after this step with a checkpoint; the schedule still spans the whole run
    exit_step: int | None = positive(None)
    # same: a run goes on only as it was | changed: also with other values and inputs, logged
    resume: str = one_of(("same", "changed"), "same")
    branch_from: str | None = None  # training checkpoint with whose weights, optimizer and step a new run begins
    rehash: bool = False  # read models and data again to tell whether they changed; false: if size, times or inode did
    # auto (fused Adam, weight gradients and activations where importable) | off
    fused: str = one_of(("auto", "off"), "auto")
    keep_logits_mib: int = at_least(0, 1024)  # MiB for logits of the policy that backward need not compute again
    recompute: str = one_of(RECOMPUTE_CHOICES, "none")  # policy activations computed again in backward, to save memory
    # parts of each layer, where recompute is selective; null: core_attn
    recompute_modules: list[str] | None = some_of(RECOMPUTE_MODULES, None)  # noqa: RUF009 - a field
    check_start: bool = True  # stop unless policy and reference agree at a fresh run's first step (a loss of ln 2)
    # (turn off for a policy that deliberately differs from the reference)

    @property
    def recomputation(self) -> str:
        """``recompute``, or the modules that it names, joined by commas."""
        if self.recompute != "selective" or self.recompute_modules is None:
            return self.recompute
        return ",".join(self.recompute_modules)


@dataclass(frozen=True)
class GenerateConfig:
    prompts: int = at_least(0, 0, at_most=1000)  # of each set of data.validation that the policy answers; 0: none
    max_tokens: int = positive(64)  # of an answer
    # answer them every so many steps and at the end; null: whenever the run evaluates
    every_steps: int | None = positive(None)


@dataclass(frozen=True)
class EvalConfig:
    # evaluate on data.validation every so many steps and at the end; null: at the end
    every_steps: int | None = positive(None)
    generate: GenerateConfig = field(default_factory=GenerateConfig)  # greedy answers of the policy, to be read


@dataclass(frozen=True)
class CheckpointConfig:
    # save every so many steps and at the end; null: 10 times, at least every 30 minutes
    every_steps: int | None = positive(None)
    keep: int = at_least(0, 2)  # newest checkpoints to keep; 0: all
    background: bool = True  # training goes on while a checkpoint is written; false: it waits
    verify: bool = True  # compare a checkpoint's checksums before continuing from it or loading a model from it
    # a metric of evaluations, as eval/rewards/accuracies: when it improves the run saves, and that checkpoint is kept
    best_metric: str | None = None  # null: no checkpoint is the best
    best_mode: str | None = one_of(("max", "min"), None)  # which values are better; null: min for a loss, else max


@dataclass(frozen=True)
class ExportConfig:
    # which checkpoints become HF directories in output_dir/hf: end, best: the last or the best one, when all steps are
    # made; every_save: each one when it is saved
    hf: str = one_of(("none", "end", "best", "every_save"), "none")
    merge: bool = False  # with section lora: these are whole models, base and adapter in one, not adapters


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = positive(1)  # progress line every so many steps; metrics.jsonl and TensorBoard get every step
    # watch every so many steps, by the profiler, how long they are in collectives and between stages; null: none
    timing_every_steps: int | None = positive(None)
    energy: bool = False  # the energy of each step, by the counters of the GPUs
    wandb: bool = False  # log to Weights & Biases too
    mlflow: bool = False  # log to MLflow too
    swanlab: bool = False  # log to SwanLab too


@dataclass(frozen=True)
class PreflightConfig:
    enabled: bool = True  # check machines, storage and network before the models are loaded
    slow_group_ratio: float = fraction(0.5)  # warn of process groups slower than this part of the median of their kind


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    guide: GuideConfig = field(default_factory=GuideConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    log: LogConfig = field(default_factory=LogConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    output_dir: str = MISSING  # the only place the run writes to

    @property
    def seq_length(self) -> int:
        """Tokens of one pack, that is of one micro batch."""
        if self.batch.tokens_per_micro_batch is not None:
            return self.batch.tokens_per_micro_batch
        sequence = _round_up(self.data.max_length, 2 * self.parallel.context if self.parallel.context > 1 else 1)
        return _round_up(2 * sequence, self.seq_length_multiple)

    @property
    def seq_length_multiple(self) -> int:
        """What the tokens of a pack must be a multiple of: context ranks hold two chunks each, under sequence
        parallelism the tensor ranks an equal part, and FP8 and FP4 products take whole blocks."""
        parallel = self.parallel
        chunks = 2 * parallel.context if parallel.context > 1 else 1
        ranks = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
        recipes = {self.precision.policy_recipe, self.frozen_recipe} - {None}
        blocks = (token_multiple(str(recipe), parallel.sequence_parallel) for recipe in recipes)
        return math.lcm(chunks, *(ranks * tokens for tokens in (1, *blocks)))

    @property
    def frozen_recipe(self) -> str | None:
        """The FP8 or FP4 recipe of reference and guide, None for the plain dtype and for methods without them."""
        precision = self.precision
        if precision.frozen == "bf16" or not self.method.frozen:
            return None
        if precision.frozen == "same":
            return precision.policy_recipe
        # Delayed scaling's history is no part of a frozen model, and precision.frozen=fp8 needs a recipe without fp8
        # for the policy too.
        return precision.fp8 if precision.fp8 in STATELESS_RECIPES else "tensorwise"

    @property
    def longest_sequence(self) -> int:
        """The most tokens that a sequence in a pack may have."""
        return min(self.data.max_length, self.seq_length)

    @property
    def datasets(self) -> dict[str, tuple[Source, ...]]:
        """What the run's datasets are made of, by name: ``train`` and ``validation`` or ``validation/NAME``."""
        named = {f"validation/{name}" if name else "validation": found for name, found in self.validation_sets.items()}
        return {"train": read_sources(self.data.train, "data.train"), **named}

    @property
    def validation_sets(self) -> dict[str, tuple[Source, ...]]:
        """Validation sets by the names that they are given; a single one without a name has ``""``."""
        return read_sets(self.data.validation, "data.validation")

    @property
    def test_sets(self) -> dict[str, tuple[Source, ...]]:
        """What the finished model is compared on, by name: ``data.test``, or without it the validation sets."""
        return self.validation_sets if self.data.test is None else read_sets(self.data.test, "data.test")

    @property
    def method(self) -> Method:
        return self.loss.row

    @property
    def model_paths(self) -> dict[str, str]:
        """Directories of the models that the method uses, by role, whether they run along or are read from a cache."""
        paths = {"policy": self.model.policy, "reference": self.model.reference or self.model.policy}
        paths |= {"guide": self.model.guide} if self.model.guide else {}
        return {role: str(local_path(path)) for role, path in paths.items() if role in ("policy", *self.method.frozen)}

    @property
    def shared_prompts(self) -> bool:
        """Whether a pair's prompt is computed once: never where only chosen responses are trained on."""
        return not self.method.chosen_only and self.batch.shared_prompts is not False

    @property
    def guide_dir(self) -> str:
        """The output directory of the guide's run, where section ``guide`` has one trained."""
        return self.guide.output_dir or str(Path(self.output_dir) / "guide")

    @property
    def export_kind(self) -> ExportKind:
        """What an export of this run's checkpoints is."""
        if not self.lora.trains:
            return "model"
        return "merged" if self.export.merge else "adapter"

    @property
    def reference_path(self) -> str:
        return str(local_path(self.model.reference or self.model.policy))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
