"""The run's configuration: typed sections, one YAML file, ``section.key=value`` overrides, nothing unknown accepted.

A default lives here and nowhere else. Fields without a default are required. Every ``batch`` figure counts pairs
(1 chosen + 1 rejected) unless it says tokens.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from megatron_tgdpo.config.methods import METHODS, Method
from megatron_tgdpo.data.sources import Source, read_sets, read_sources
from megatron_tgdpo.storage.hub import local_path

# OmegaConf has no such union.
_SOURCES = str | dict[str, Any] | list[Any]


@dataclass(frozen=True)
class ModelConfig:
    # Each an HF or Megatron checkpoint directory, or a model of the Hub, OWNER/NAME or OWNER/NAME@REVISION.
    policy: str = MISSING  # what the policy starts from
    reference: str | None = None  # null: same as policy
    guide: str | None = None  # required by method tgdpo
    layer_spec: str = "auto"  # auto | local | transformer_engine; auto: Transformer Engine where usable on CUDA


@dataclass(frozen=True)
class DataConfig:
    # A file of pairs, a directory, a glob, a dataset of the Hub, or the prefix of a preprocessed dataset; {path, split,
    # subset, weight}; or a list of these, one after another (data/sources.py).
    train: Any = field(default=MISSING, metadata={"type": _SOURCES})
    # The same for evaluation, or several sets by name; null: no evaluation.
    validation: Any = field(default=None, metadata={"type": _SOURCES | None})
    shuffle: bool = True  # new order every epoch from train.seed; false: file order
    max_length: int = 2048  # tokens of prompt plus response, per sequence
    max_prompt_length: int | None = None  # tokens of the prompt; null: no limit of its own
    overlong_prompt: str = "truncate"  # a prompt past max_prompt_length: truncate | drop | error
    tokenizer: str | None = None  # HF directory, model of the Hub, or SentencePiece .model; null: the policy's
    chat_template: str | None = None  # Jinja file; null: the tokenizer's own
    template_kwargs: dict[str, Any] | None = None  # variables for the chat template, as enable_thinking: false
    columns: dict[str, str] | None = None  # by a layout's key, the records' own: {prompt: question}
    workers: int = 4  # processes that tokenise when train or validation is a raw file


@dataclass(frozen=True)
class LossConfig:
    """An option that the method does not use must be null; one that it uses has the default in config/methods.py."""

    method: str = "tgdpo"  # tgdpo | dpo | simpo | sft
    beta: float | None = None  # tgdpo, dpo: strength of the KL constraint, per nat; simpo: scale of the rewards
    alpha: float | None = None  # tgdpo: strength of the token-level guidance; 0 is DPO
    label_smoothing: float | None = None  # dpo: probability that a pair's label is wrong
    sft_weight: float | None = None  # dpo: weight of the mean NLL of chosen tokens (the reference code's pref_ftx)
    gamma: float | None = None  # simpo: margin by which chosen rewards should exceed rejected ones, in nats

    @property
    def options(self) -> dict[str, float]:
        """The options that the method uses."""
        return {name: getattr(self, name) for name in METHODS[self.method].options}


@dataclass(frozen=True)
class GuidanceConfig:
    mode: str = "colocated"  # colocated: reference and guide ride in the policy's pipeline | cached: read from cache
    cache: str | None = None  # directory that tgdpo.guidance writes and mode cached reads
    verify: bool = True  # compare the cache's checksums before training from it
    prefetch: bool = False  # experimental: run the next step's frozen forwards in the pipeline bubbles of this one


@dataclass(frozen=True)
class ParallelConfig:
    tensor: int = 1  # ranks that share each layer
    pipeline: int = 1  # stages of consecutive layers
    context: int = 1  # ranks that share each sequence
    virtual_pipeline: int | None = None  # chunks of layers per stage, for the interleaved schedule; null: no chunks
    sequence_parallel: bool = False  # split norms and residuals along the sequence over the tensor ranks
    device: str = "auto"  # auto | cuda | cpu; auto takes the CPU only on a machine without an NVIDIA device
    timeout_minutes: float = 30.0  # a collective that takes longer ends the run, as does a rank silent for 3/4 of it


@dataclass(frozen=True)
class BatchConfig:
    global_pairs: int = MISSING  # pairs per optimizer step, over all ranks
    tokens_per_micro_batch: int | None = None  # tokens of one pack; null: 2 x data.max_length, which holds any pair
    shared_prompts: bool | None = None  # compute a pair's prompt once for both responses; null: where that is possible


@dataclass(frozen=True)
class OptimizerSettings:
    lr: float = MISSING  # peak learning rate
    beta1: float = 0.9  # Adam first moment decay
    beta2: float = 0.999  # Adam second moment decay
    eps: float = 1e-8  # Adam denominator term
    weight_decay: float = 0.0  # decoupled; never on norms and biases
    clip_grad: float = 1.0  # maximum global gradient norm; 0: no clipping
    schedule: str = "cosine"  # constant | linear | cosine, to zero at the last step
    warmup_ratio: float = 0.1  # fraction of all steps that warm up linearly from 0
    warmup_steps: int | None = None  # how many steps do, whatever warmup_ratio says; null: that fraction


@dataclass(frozen=True)
class PrecisionConfig:
    dtype: str = "bf16"  # bf16 | fp32, of weights and activations; gradients and optimizer state are fp32
    fp8: str = "none"  # none | delayed | tensorwise | blockwise | mxfp8: how the layers' products are scaled to FP8
    fp8_format: str = "hybrid"  # hybrid (E4M3 forward, E5M2 backward) | e4m3
    fp8_amax_history: int = 1024  # products that delayed scaling looks back on
    fp8_amax_algorithm: str = "max"  # max | most_recent, over that history
    fp8_params: bool = False  # the policy's layer weights are held, and gathered over data ranks, in FP8
    first_last_layers_bf16: bool = False  # the first and the last layer of every model stay in bf16
    frozen: str = "same"  # same (as the policy) | bf16 | fp8, of reference and guide


@dataclass(frozen=True)
class OverlapConfig:
    grad_reduce: bool = False  # reduce gradients over data ranks while backward goes on
    param_gather: bool = False  # gather updated weights over data ranks while the next forward goes on
    tensor: bool = False  # tensor parallel traffic within the products it feeds (Transformer Engine user buffers)


@dataclass(frozen=True)
class OffloadConfig:
    optimizer: float = 0.0  # part of the optimizer's state, and of its update, that lives on the CPU
    frozen: bool = False  # layers of reference and guide stay in pinned host memory between uses


@dataclass(frozen=True)
class TrainConfig:
    steps: int | None = None  # optimizer steps; exactly one of steps and epochs is set
    epochs: float | None = None  # passes over data.train
    seed: int = 0  # of the data order and all random numbers
    exit_step: int | None = None  # stop after this step with a checkpoint; the schedule still spans the whole run
    resume: str = "same"  # same: a run goes on only as it was | changed: also with other values and inputs, logged
    branch_from: str | None = None  # training checkpoint with whose weights, optimizer and step a new run begins
    rehash: bool = False  # read models and data again to tell whether they changed; false: if size, times or inode did
    fused: str = "auto"  # auto (fused Adam, weight gradients and activations where importable) | off
    keep_logits_mib: int = 1024  # MiB for logits of the policy that backward need not compute again
    recompute: str = "none"  # none | selective | full: policy activations computed again in backward, to save memory
    check_start: bool = True  # stop unless the loss of a fresh run is ln 2 for every pair of the first step
    # (turn off for a policy that deliberately differs from the reference)


@dataclass(frozen=True)
class EvalConfig:
    every_steps: int | None = None  # evaluate on data.validation every so many steps and at the end; null: at the end


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int | None = None  # save every so many steps and at the end; null: 10 times, at least every 30 minutes
    keep: int = 2  # newest checkpoints to keep; 0: all
    background: bool = True  # training goes on while a checkpoint is written; false: it waits
    verify: bool = True  # compare a checkpoint's checksums before continuing from it or loading a model from it


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 1  # progress line every so many steps; metrics.jsonl and TensorBoard get every step
    wandb: bool = False  # log to Weights & Biases too


@dataclass(frozen=True)
class PreflightConfig:
    enabled: bool = True  # check machines, storage and network before the models are loaded
    slow_group_ratio: float = 0.5  # warn of process groups slower than this part of the median of their kind


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
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
        """What the tokens of a pack must be a multiple of: context ranks hold two chunks each, and under sequence
        parallelism the tensor ranks an equal part."""
        parallel = self.parallel
        chunks = 2 * parallel.context if parallel.context > 1 else 1
        return math.lcm(chunks, parallel.context * parallel.tensor if parallel.sequence_parallel else 1)

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
    def method(self) -> Method:
        return METHODS[self.loss.method]

    @property
    def model_paths(self) -> dict[str, str]:
        """Directories of the models that the method uses, by role, whether they run along or are read from a cache."""
        paths = {"policy": self.model.policy, "reference": self.model.reference or self.model.policy}
        paths |= {"guide": self.model.guide} if self.model.guide else {}
        return {role: str(local_path(path)) for role, path in paths.items() if role in ("policy", *self.method.frozen)}

    @property
    def shared_prompts(self) -> bool:
        """Whether a pair's prompt is computed once: not under context parallelism, nor for one response."""
        chosen = self.batch.shared_prompts
        return not self.method.chosen_only and (self.parallel.context == 1 if chosen is None else chosen)

    @property
    def reference_path(self) -> str:
        return str(local_path(self.model.reference or self.model.policy))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
