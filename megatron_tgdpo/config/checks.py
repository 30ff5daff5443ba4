"""What values a configuration may have, and which of them go together."""

import unicodedata
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

from megatron_tgdpo.config.methods import METHODS
from megatron_tgdpo.errors import UserError

if TYPE_CHECKING:
    from megatron_tgdpo.config.schema import Config

RECOMPUTE_CHOICES = ("none", "selective", "full")  # in the order of their cost
FP8_RECIPES = ("none", "delayed", "tensorwise", "blockwise", "mxfp8")
_CHOICES = {
    "data.overlong_prompt": ("truncate", "drop", "error"),
    "loss.method": tuple(METHODS),
    "guidance.mode": ("colocated", "cached"),
    "parallel.device": ("auto", "cuda", "cpu"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "model.layer_spec": ("auto", "local", "transformer_engine"),
    "precision.dtype": ("bf16", "fp32"),
    "precision.fp8": FP8_RECIPES,
    "precision.fp8_format": ("hybrid", "e4m3"),
    "precision.fp8_amax_algorithm": ("max", "most_recent"),
    "precision.frozen": ("same", "bf16", "fp8"),
    "train.resume": ("same", "changed"),
    "train.fused": ("auto", "off"),
    "train.recompute": RECOMPUTE_CHOICES,
}
_POSITIVE = (
    "data.max_length", "data.max_prompt_length", "data.workers", "loss.beta", "parallel.tensor", "parallel.pipeline",
    "parallel.context", "parallel.virtual_pipeline", "parallel.timeout_minutes", "batch.global_pairs",
    "batch.tokens_per_micro_batch", "optimizer.eps", "train.steps", "train.epochs", "train.exit_step",
    "eval.every_steps", "checkpoint.every_steps", "log.every_steps", "precision.fp8_amax_history",
)  # fmt: skip
_NOT_NEGATIVE = (
    "loss.alpha",
    "loss.label_smoothing",
    "loss.sft_weight",
    "loss.gamma",
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "optimizer.warmup_steps",
    "checkpoint.keep",
    "train.seed",
    "train.keep_logits_mib",
)
# Above these a value is a slip, and would end in a library's error or never. Others: _LARGEST.
_AT_MOST = {
    "data.max_length": 1 << 29,  # packs are indexed by int32
    "data.workers": 1 << 12,
    "parallel.timeout_minutes": 525_600,  # a year
    "precision.fp8_amax_history": 1 << 20,
    "train.seed": (1 << 63) - (1 << 20),  # room for what is added for each rank
}
_LARGEST = {int: (1 << 31) - 1, float: 1e12}
_LEAST_EPS = 1.2e-38  # the least that fp32 holds
_FRACTIONS = ("optimizer.warmup_ratio", "optimizer.beta1", "optimizer.beta2", "preflight.slow_group_ratio")


def check(config: "Config", source: str) -> None:
    """Checks values and how they go together.

    Raises:
        UserError: Something is out of range or contradicts something else; the message names the keys and ``source``.
    """

    def value(dotted: str) -> Any:
        section, key = dotted.split(".")
        return getattr(getattr(config, section), key)

    def fail(message: str) -> None:
        raise UserError(f"{source}: {message}")

    for section, values in asdict(config).items():
        for key, one in values.items() if isinstance(values, dict) else [("", values)]:
            _check_one(f"{section}.{key}".removesuffix("."), one, fail)
    for name, choices in _CHOICES.items():
        if value(name) not in choices:
            fail(f"{name} is '{value(name)}': choose one of {', '.join(choices)}")
    for name in _POSITIVE:
        if value(name) is not None and not value(name) > 0:
            fail(f"{name} is {value(name)}: it must be positive")
    for name in _NOT_NEGATIVE:
        if value(name) is not None and not value(name) >= 0:
            fail(f"{name} is {value(name)}: it must not be negative")
    for name in _FRACTIONS:
        if not 0 <= value(name) < 1:
            fail(f"{name} is {value(name)}: it must be in [0, 1)")
    if config.optimizer.eps < _LEAST_EPS:
        fail(f"optimizer.eps is {config.optimizer.eps}, zero in fp32: it must be at least {_LEAST_EPS}")
    try:
        _ = config.datasets
    except UserError as error:
        fail(str(error))
    if (config.train.steps is None) == (config.train.epochs is None):
        fail("set exactly one of train.steps and train.epochs")
    _check_method(config, fail)
    if config.guidance.mode == "cached" and config.guidance.cache is None:
        fail("guidance.mode cached needs guidance.cache (a directory): fill it with tgdpo.guidance")
    if config.parallel.context > 1 and config.shared_prompts:
        fail(
            "batch.shared_prompts is true with parallel.context > 1: a prompt that two responses share cannot be split "
            "over context ranks yet, set one of them to its default"
        )
    if not 0 <= config.offload.optimizer <= 1:
        fail(f"offload.optimizer is {config.offload.optimizer}: it is a part of the state, in [0, 1]")
    if config.overlap.param_gather and not config.overlap.grad_reduce:
        fail("overlap.param_gather needs overlap.grad_reduce: megatron-core overlaps both or only the gradients")
    if config.overlap.tensor and not config.parallel.sequence_parallel:
        fail("overlap.tensor needs parallel.sequence_parallel=true: it hides the traffic of that")
    _check_pipeline(config, fail)
    _check_lengths(config, fail)


def _check_one(name: str, value: Any, fail: Any) -> None:
    """What holds of any value of its kind."""
    if isinstance(value, float) and not isfinite(value):
        fail(f"{name} is {value}: it must be a finite number")
    if isinstance(value, (int, float)) and abs(value) > (most := _AT_MOST.get(name, _LARGEST.get(type(value), value))):
        fail(f"{name} is {value:.6g}: it must be at most {most:,}")
    if isinstance(value, str):
        if not value.strip():
            fail(f"{name} is empty: leave it out, or give a value")
        if "${" in value:
            fail(f"{name} is '{value}': a value cannot contain ${{, which stands for another value")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
            fail(f"{name} is {value!r}: a value cannot contain control characters, nor bytes that are not UTF-8")


def _check_method(config: "Config", fail: Any) -> None:
    name, method = config.loss.method, config.method
    for option in ("beta", "alpha", "label_smoothing", "sft_weight", "gamma"):
        if option not in method.options and getattr(config.loss, option) is not None:
            fail(f"loss.{option} is set but loss.method {name} does not use it: remove it, or set it to null")
    if config.loss.label_smoothing is not None and config.loss.label_smoothing >= 0.5:
        fail(f"loss.label_smoothing is {config.loss.label_smoothing}: it must be in [0, 0.5)")
    if "guide" in method.frozen and config.model.guide is None:
        fail(f"loss.method {name} needs model.guide (a checkpoint directory); without a guide use loss.method=dpo")
    if "guide" not in method.frozen and config.model.guide is not None:
        fail(f"loss.method {name} uses no guide: remove model.guide or set loss.method=tgdpo")
    if "reference" not in method.frozen and config.model.reference is not None:
        fail(f"loss.method {name} uses no reference: remove model.reference")
    if not method.frozen and config.guidance.mode == "cached":
        fail(f"loss.method {name} has no frozen models whose log-probs a cache could hold: set guidance.mode=colocated")


def _check_pipeline(config: "Config", fail: Any) -> None:
    chunks, stages = config.parallel.virtual_pipeline, config.parallel.pipeline
    if config.guidance.prefetch:
        if config.guidance.mode == "cached" or not config.method.frozen:
            fail("guidance.prefetch is true but no frozen models run: set it to false")
        if stages == 1:
            fail("guidance.prefetch is true with one stage, where there are no bubbles: set it to false")
    if chunks is None or chunks == 1:
        return
    if stages == 1:
        fail(f"parallel.virtual_pipeline is {chunks} with one stage: there is nothing to interleave, set it to null")
    if config.guidance.mode == "colocated" and config.method.frozen:
        fail(
            f"parallel.virtual_pipeline is {chunks} with guidance.mode colocated: frozen models run once a stage, not "
            "once a chunk; use guidance.mode=cached, or set it to null"
        )


def _check_lengths(config: "Config", fail: Any) -> None:
    # Whether the longest pair fits a pack, the data says: pack_plan.check_pairs_fit.
    pack, parallel = config.seq_length, config.parallel
    multiple = 2 * parallel.context if parallel.context > 1 else 1  # of each sequence, see batching/packed_sequence.py
    if pack % multiple:
        fail(f"batch.tokens_per_micro_batch {pack} is not divisible by 2 x parallel.context = {multiple}")
    if parallel.sequence_parallel and pack // parallel.context % parallel.tensor:
        fail(
            f"batch.tokens_per_micro_batch {pack} is not divisible by parallel.tensor x parallel.context = "
            f"{parallel.tensor} x {parallel.context} (sequence parallelism)"
        )
    if config.data.max_prompt_length is not None and config.data.max_prompt_length >= config.data.max_length:
        fail("data.max_prompt_length must be smaller than data.max_length: the response needs room")
