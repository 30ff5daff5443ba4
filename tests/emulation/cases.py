"""What is trained on the emulated GPU: precisions, and what else goes with them on a layout."""

from typing import Any

_FP8 = {
    "tensorwise": {"fp8": "tensorwise"},
    "tensorwise, FP8 weights": {"fp8": "tensorwise", "fp8_params": True},
    "blockwise, FP8 weights": {"fp8": "blockwise", "fp8_params": True},
    "delayed": {"fp8": "delayed", "frozen": "bf16"},
    "delayed, FP8 weights": {"fp8": "delayed", "fp8_params": True, "frozen": "bf16"},
}
_ADAM = {"lr": 1e-3, "schedule": "constant", "warmup_ratio": 0.0}
# What the optimizer keeps, in bf16 training.
STATE = {
    "bf16": {},
    "remainder": {"main_weights": "remainder"},
    "bf16 moments, remainder": {"moments": "bf16", "main_weights": "remainder"},
    "FP8 moments": {"moments": "fp8"},
}


def cases(data: int, pipeline: int) -> dict[str, dict[str, Any]]:
    """Sections of the config, by name."""
    found: dict[str, dict[str, Any]] = {name: {"precision": precision} for name, precision in _FP8.items()}
    found["tensorwise, FP8 weights, LoRA"] = {**found["tensorwise, FP8 weights"], "lora": {"rank": 8, "alpha": 256}}
    found |= {name: {"optimizer": {**_ADAM, **state}} for name, state in STATE.items()}
    if data > 1:
        overlap = {"grad_reduce": True, "param_gather": True}
        for name in ("tensorwise, FP8 weights", "delayed"):
            found[f"{name}, overlap"] = {**found[name], "overlap": overlap}
    if pipeline > 1:
        for name in ("tensorwise", "delayed"):
            found[f"{name}, prefetch"] = {**found[name], "guidance": {"prefetch": True}}
    return found


_TRAIN = {"steps": 1000, "check_start": False, "recompute": "selective"}
# What models with experts are trained with.
EXPERT_CASES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": {"dtype": "fp32"}, "model": {"layer_spec": "transformer_engine"}},
    "bf16": {},
    "bf16, local": {"model": {"layer_spec": "local"}},
    "tensorwise": {"precision": _FP8["tensorwise"]},
    "tensorwise, again": {"precision": _FP8["tensorwise"], "train": {**_TRAIN, "recompute_modules": ["moe"]}},
    "tensorwise, FP8 weights": {"precision": _FP8["tensorwise, FP8 weights"]},
    "blockwise, FP8 weights": {"precision": _FP8["blockwise, FP8 weights"]},
    "tensorwise, FP8 weights, LoRA": {"precision": _FP8["tensorwise, FP8 weights"], "lora": {"rank": 8, "alpha": 64}},
}


def continues(case: str, ranks: int) -> bool:
    """Whether a case is trained, saved and continued on so many ranks: on more than one some are."""
    return case != "fp32" and (ranks == 1 or "FP8 weights" in case)
