"""Every combination of precision keys either builds megatron-core's config or is refused with its reason."""

import contextlib
import itertools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_tgdpo.config.constraints import FP8_RECIPES
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.layout import ParallelLayout, make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.gpu.capabilities import Capabilities, Version, detect, parse_version, untested_engine
from megatron_tgdpo.gpu.fp8 import (
    check_fp8_sizes,
    frozen_params_fp8,
    frozen_precision,
    frozen_transformer_kwargs,
    policy_transformer_kwargs,
)
from megatron_tgdpo.gpu.fp8_checks import check_precision
from megatron_tgdpo.gpu.options import check_experts, check_gpu_options
from megatron_tgdpo.gpu.overlap import check_overlap, ddp_config, optimizer_kwargs
from megatron_tgdpo.models.config import LanguageModelConfig
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.setup.layout import pack_format
from megatron_tgdpo.training.run import dry_run
from tests.tiny_models import make_model
from tests.unit.config.test_loading import VALID

# Ampere, Ada, Hopper, Blackwell, and the Blackwell of workstations; the CUDA of most is new enough or too old.
GPUS: tuple[tuple[Version | None, Version | None], ...] = (
    (None, None), ((8, 0), (12, 9)), ((8, 9), (12, 0)), ((8, 9), (12, 1)), ((9, 0), (12, 8)), ((9, 0), (12, 9)),
    ((10, 0), (12, 6)), ((10, 0), (13, 0)), ((12, 0), (13, 0)),
)  # fmt: skip
ENGINES: tuple[Version | None, ...] = (None, (2, 8, 0), (2, 9, 0), (2, 20, 2), (3, 0, 0))
_DTYPES, _BOTH, _FROZEN = ("bf16", "fp32"), (False, True), ("same", "bf16", "fp8")
PRECISIONS = [
    *itertools.product(_DTYPES, FP8_RECIPES, ("hybrid", "e4m3"), _BOTH, _BOTH, _FROZEN, _BOTH, ("none",)),
    *itertools.product(_DTYPES, ("none", "tensorwise"), ("hybrid",), _BOTH, _BOTH, _FROZEN, _BOTH, ("nvfp4",)),
]

REASONS = (
    "need precision.dtype=bf16", "FP8 needs a CUDA GPU", "FP8 needs Transformer Engine", "the local layers have no FP8",
    "FP4 needs a CUDA GPU", "FP4 needs Transformer Engine", "the local layers have no FP4",
    "precision.fp4=nvfp4 needs compute capability 10.x", "precision.fp4=nvfp4 needs CUDA 12.8",
    "precision.fp8=mxfp8 needs compute capability 10.x", "for the same products",
    "compute capability 8.9", "on Ada needs CUDA 12.1", "compute capability 9.0",
    "all models have one dtype", "needs precision.fp8:", "without FP8 or FP4 means nothing", "with fp8=delayed, whose",
    "what it saw before", "in the gradient buffer between steps", "works with fp8=delayed only", "not ln 2",
)  # fmt: skip


def configured(base: Config, values: tuple, *, check_start: bool) -> Config:
    dtype, fp8, fp8_format, params, ends, frozen, offload, fp4 = values
    precision = replace(
        base.precision, dtype=dtype, fp8=fp8, fp8_format=fp8_format, fp8_params=params,
        first_last_layers_bf16=ends, frozen=frozen, fp4=fp4,
    )  # fmt: skip
    train = replace(base.train, check_start=check_start)
    return replace(base, precision=precision, train=train, offload=replace(base.offload, optimizer=float(offload)))


def build(config: Config, kwargs: dict[str, Any]) -> LanguageModelConfig:
    """megatron-core's own checks of a model's config."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision.dtype]
    return LanguageModelConfig(
        num_layers=4, hidden_size=128, num_attention_heads=4, ffn_hidden_size=256, gated_linear_unit=True,
        activation_func=F.silu, add_bias_linear=False, normalization="RMSNorm", params_dtype=dtype,
        bf16=dtype == torch.bfloat16, **kwargs,
    )  # fmt: skip


def engine_runs(recipe: str, capability: Version, cuda: Version) -> bool:
    """What Transformer Engine's own support functions say (2.9 and 2.20, ``quantization.py: check_*_support``)."""
    if recipe in ("delayed", "tensorwise"):
        return capability >= (9, 0) or (capability >= (8, 9) and cuda >= (12, 1))
    if recipe == "blockwise":
        return capability >= (9, 0) and cuda >= (12, 9)
    if recipe == "nvfp4" and cuda < (12, 8):
        return False
    return (10, 0) <= capability < (12, 0)


def refusal(config: Config, found: Capabilities, spec: str) -> str | None:
    try:
        check_precision(config, found, spec)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_combination_builds_or_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    # What megatron-core asks where Transformer Engine is installed (offload.optimizer is refused elsewhere).
    monkeypatch.setattr("megatron.core.optimizer.optimizer_config.is_te_min_version", lambda version: True)
    base, seen, accepted = config_from_dict(VALID), set(), 0
    for values, check_start in itertools.product(PRECISIONS, (False, True)):
        config = configured(base, values, check_start=check_start)
        recipes = {config.precision.policy_recipe, config.frozen_recipe} - {None}
        built = False
        for (capability, cuda), engine in itertools.product(GPUS, ENGINES):
            device = "cpu" if capability is None else "cuda"
            found = Capabilities(device, capability, cuda, engine if device == "cuda" else None)
            for spec in ("local", "transformer_engine"):
                reason = refusal(config, found, spec)
                if reason is not None:
                    assert "\n" not in reason
                    (which,) = [known for known in REASONS if known in reason]
                    seen.add(which)
                    continue
                accepted += 1
                if recipes:
                    # Nothing that the engine or the GPU rejects gets through.
                    assert capability is not None
                    assert cuda is not None
                    assert engine is not None
                    assert engine >= (2, 9)
                    assert spec == "transformer_engine"
                    assert all(engine_runs(str(recipe), capability, cuda) for recipe in recipes)
                if not built:
                    check_builds(config)
                    built = True
    assert seen == set(REASONS)
    assert accepted > 1000


def check_builds(config: Config) -> None:
    """megatron-core takes what we accept, and takes it as it was meant."""
    policy, frozen = (
        build(config, policy_transformer_kwargs(config.precision)),
        build(config, frozen_transformer_kwargs(config)),
    )
    for built, recipe in ((policy, config.precision.policy_recipe), (frozen, config.frozen_recipe)):
        fp8, fp4 = (None, "e2m1") if recipe == "nvfp4" else (recipe and config.precision.fp8_format, None)
        assert (built.fp8, built.fp4) == (fp8, fp4)
        assert recipe in (None, built.fp8_recipe if fp8 else built.fp4_recipe)
    assert (policy.fp8_param, frozen.fp8_param) == (config.precision.fp8_params, frozen_params_fp8(config))
    assert not policy.fp4_param
    assert not frozen.fp4_param
    assert isinstance(ddp_config(config.overlap, config.precision), DistributedDataParallelConfig)
    OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        bf16=policy.bf16,
        use_distributed_optimizer=True,
        **optimizer_kwargs(config.precision, config.overlap, config.offload),
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_megatron_core_rejects_is_refused() -> None:
    """The other way round: wherever megatron-core's dataclasses raise, so do we, on the most capable machines."""
    base, rejected = config_from_dict(VALID), 0
    for values in PRECISIONS:
        config = configured(base, values, check_start=False)
        try:
            # As they would be asked for, without our own rule that no recipe means no FP8 at all.
            ends = {"first_last_layers_bf16": config.precision.first_last_layers_bf16}
            build(
                config, {"fp8_param": config.precision.fp8_params} | policy_transformer_kwargs(config.precision) | ends
            )
            build(config, frozen_transformer_kwargs(config))
        except (ValueError, AssertionError):
            rejected += 1
            for capability in ((9, 0), (10, 0)):
                found = Capabilities("cuda", capability, (13, 0), (2, 20, 2))
                assert refusal(config, found, "transformer_engine") is not None, values
    assert rejected > 20


@pytest.mark.parametrize(
    ("fp8", "frozen", "params", "policy", "other", "held"),
    [
        ("none", "same", False, None, None, False),
        ("none", "fp8", False, None, "tensorwise", True),
        ("tensorwise", "same", True, "tensorwise", "tensorwise", True),
        ("tensorwise", "same", False, "tensorwise", "tensorwise", True),
        ("tensorwise", "bf16", True, "tensorwise", None, False),
        ("delayed", "fp8", False, "delayed", "tensorwise", True),
        ("blockwise", "fp8", False, "blockwise", "blockwise", True),
        ("nvfp4", "same", False, "nvfp4", "nvfp4", False),
        ("nvfp4", "bf16", False, "nvfp4", None, False),
        ("nvfp4", "fp8", False, "nvfp4", "tensorwise", True),
    ],
)
def test_recipes_of_policy_and_frozen_models(
    fp8: str, frozen: str, params: bool, policy: str | None, other: str | None, held: bool
) -> None:
    kind = "fp4" if fp8 == "nvfp4" else "fp8"
    precision = {kind: fp8, "frozen": frozen, "fp8_params": params}
    config = config_from_dict({**VALID, "precision": precision})
    assert (config.precision.policy_recipe, config.frozen_recipe, frozen_params_fp8(config)) == (policy, other, held)


SIZES = {
    "kv_channels": 128, "num_query_groups": 8, "num_attention_heads": 32, "hidden_size": 4096,
    "ffn_hidden_size": 14336, "num_layers": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "changes", "pack", "layout", "message"),
    [
        ("tensorwise", {}, 4096, (2, True), None),
        ("mxfp8", {}, 4096, (8, True), None),
        ("tensorwise", {}, 4090, (1, False), "tokens of a pack"),
        ("tensorwise", {}, 4096 + 16, (2, True), "tokens of a pack"),
        ("mxfp8", {}, 4096 + 16, (1, False), "tokens of a pack .* is 4112, it must be a multiple of 32"),
        ("nvfp4", {"hidden_size": 4096 + 16}, 4096, (1, False), "recipe nvfp4: the hidden size is 4112"),
        ("blockwise", {}, 4096 + 64, (2, True), "multiple of 128"),
        ("tensorwise", {"ffn_hidden_size": 14344}, 4096, (1, False), "MLP size"),
        ("tensorwise", {"hidden_size": 4104}, 4096, (1, False), "hidden size"),
        ("tensorwise", {"kv_channels": 12, "num_attention_heads": 4}, 4096, (4, True), "query size"),
    ],
)
def test_sizes_that_fp8_kernels_do_not_take(
    recipe: str, changes: dict, pack: int, layout: tuple[int, bool], message: str | None
) -> None:
    grid: ParallelLayout = make_layout(layout[0], 1, 1, layout[1], layout[0])
    if message is None:
        check_fp8_sizes({**SIZES, **changes}, recipe, pack, grid)
        return
    with pytest.raises(UserError, match=message):
        check_fp8_sizes({**SIZES, **changes}, recipe, pack, grid)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"moe_ffn_hidden_size": 1544}, r"expert size of a rank \(parallel.expert_tensor\) is 772"),
        ({"moe_layer_freq": [0, 1]}, "MLP size of a tensor rank is 500.5"),
        ({"moe_shared_expert_intermediate_size": 2064}, "shared expert's size of a tensor rank is 1032"),
    ],
)
def test_sizes_of_experts_that_fp8_kernels_do_not_take(changes: dict, message: str | None) -> None:
    """The MLP size counts where layers have no experts."""
    of_experts = {"num_moe_experts": 8, "moe_ffn_hidden_size": 1536, "ffn_hidden_size": 1001}
    grid = make_layout(2, 1, 1, True, 2)
    with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_fp8_sizes({**SIZES, **of_experts, **changes}, "tensorwise", 4096, grid)


@pytest.mark.parametrize("precision", [{"fp8": "delayed", "frozen": "bf16"}, {"fp8": "blockwise"}, {"fp4": "nvfp4"}])
@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (8, 1), (1, 4), (3, 2)])
def test_packs_of_default_size_are_what_fp8_kernels_take(precision: dict, tensor: int, context: int) -> None:
    """They are rounded up from twice the longest sequence, as pipeline stages take them whole."""
    parallel = {"tensor": tensor, "context": context, "sequence_parallel": tensor > 1}
    sections = {"parallel": parallel, "precision": precision, "data": {**VALID["data"], "max_length": 1001}}
    config = config_from_dict({**VALID, **sections, "train": {**VALID["train"], "check_start": False}})
    sizes = {name: 3 * size for name, size in SIZES.items()}
    recipe = next(recipe for key, recipe in precision.items() if key != "frozen")
    check_fp8_sizes(sizes, recipe, config.seq_length, make_layout(tensor, 1, context, tensor > 1, tensor * context))
    assert 2002 <= config.seq_length < 2008 + 128 * 8
    assert config_from_dict({**VALID, **sections, "precision": {}}).seq_length < 2020


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"])
@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (2, 1), (8, 1), (8, 4)])
def test_rows_are_cut_to_sizes_that_fp8_kernels_take(recipe: str, tensor: int, context: int) -> None:
    parallel = {"tensor": tensor, "context": context, "sequence_parallel": tensor > 1}
    precision = {"fp4" if recipe == "nvfp4" else "fp8": recipe, "frozen": "bf16"}
    batch = {"global_pairs": 1, "tokens_per_micro_batch": 65536}
    train = {**VALID["train"], "check_start": False}
    sections = {"parallel": parallel, "precision": precision, "batch": batch, "train": train}
    config = config_from_dict({**VALID, **sections})
    grid = make_layout(tensor, 1, context, tensor > 1, tensor * context)
    group = SimpleNamespace
    pg: Any = group(
        cp=group(rank=lambda: 0, size=lambda: context), tp=group(size=lambda: tensor), pp=group(size=lambda: 1)
    )
    pack = pack_format(config, pg)
    for used in range(1, 4096, 61):
        check_fp8_sizes(SIZES, recipe, pack.cut(used), grid)


@pytest.mark.parametrize(
    ("sections", "spec", "message"),
    [
        (
            {"overlap": {"tensor": True}, "parallel": {"tensor": 2, "sequence_parallel": True}},
            "local",
            "Engine's layers",
        ),
        (
            {
                "overlap": {"tensor": True},
                "parallel": {"tensor": 2, "sequence_parallel": True},
                "precision": {"fp4": "nvfp4"},
            },
            "transformer_engine",
            "not go with precision.fp4=nvfp4",
        ),
        ({"offload": {"optimizer": 0.5}}, "local", "moves state from a GPU"),
        ({"offload": {"activations": True}}, "local", "moves tensors from a GPU"),
        ({"overlap": {"grad_reduce": True, "param_gather": True}, "offload": {"frozen": True}}, "local", None),
    ],
)
def test_overlap_and_offload_on_the_cpu(sections: dict, spec: str, message: str | None) -> None:
    config, found = config_from_dict({**VALID, **sections}), detect(torch.device("cpu"))
    layout = make_layout(config.parallel.tensor, 1, 1, config.parallel.sequence_parallel, 2)
    if message is None:
        check_overlap(config, layout, found, spec)
        return
    with pytest.raises(UserError, match=message):
        check_overlap(config, layout, found, spec)
    if spec == "local":
        with pytest.raises(UserError, match=message):
            check_gpu_options(config, {}, layout, found)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"overlap": {"param_gather": True}}, "needs overlap.grad_reduce"),
        ({"overlap": {"tensor": True}}, "needs parallel.sequence_parallel"),
        ({"offload": {"optimizer": 1.5}}, r"in \[0, 1\]"),
        ({"precision": {"fp8": "fp4"}}, "choose one of none, delayed"),
        ({"precision": {"fp4": "mxfp4"}}, "choose one of none, nvfp4"),
    ],
)
def test_contradictions_are_refused_by_the_config(sections: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_dict({**VALID, **sections})


def test_optimizer_offload_needs_transformer_engine() -> None:
    config, layout = config_from_dict({**VALID, "offload": {"optimizer": 0.5}}), make_layout(1, 1, 1, False, 1)
    found = Capabilities("cuda", (9, 0), (12, 9))
    with pytest.raises(UserError, match="needs Transformer Engine"):
        check_overlap(config, layout, found, "local")
    check_overlap(config, layout, replace(found, transformer_engine=(2, 9, 0)), "local")


@pytest.mark.parametrize(
    ("precision", "capability", "cuda", "engine", "wanted"),
    [
        ({"fp4": "nvfp4"}, (9, 0), (13, 0), (2, 20, 2), "precision.fp4=nvfp4 needs compute capability 10.x .*has 9.0"),
        ({"fp4": "nvfp4"}, (12, 0), (13, 0), (2, 20, 2), "precision.fp4=nvfp4 needs .* has 12.0: set it to none"),
        ({"fp4": "nvfp4"}, (10, 0), (12, 6), (2, 20, 2), "precision.fp4=nvfp4 needs CUDA 12.8, .* with 12.6"),
        ({"fp4": "nvfp4"}, (10, 0), (13, 0), (2, 8, 0), "Transformer Engine >=2.9, found 2.8.0"),
        ({"fp8": "mxfp8"}, (9, 0), (13, 0), (2, 20, 2), "precision.fp8=mxfp8 needs compute capability 10.x .*has 9.0"),
        ({"frozen": "fp8"}, (8, 0), (13, 0), (2, 20, 2), r"precision.frozen=fp8 \(recipe tensorwise\) needs .*8.9"),
        ({"fp4": "nvfp4"}, (10, 3), (13, 0), (2, 9, 0), None),
        ({"fp8": "mxfp8"}, (10, 0), (12, 8), (2, 9, 0), None),
    ],
)
def test_a_recipe_is_refused_by_its_key_where_nothing_runs_it(
    precision: dict, capability: Version, cuda: Version, engine: Version, wanted: str | None
) -> None:
    train = {**VALID["train"], "check_start": False}
    config = config_from_dict({**VALID, "precision": precision, "train": train})
    reason = refusal(config, Capabilities("cuda", capability, cuda, engine), "transformer_engine")
    assert reason is None if wanted is None else re.search(wanted, str(reason)), reason


def test_what_fp4_computed_is_kept_apart() -> None:
    config = config_from_dict({**VALID, "precision": {"fp4": "nvfp4", "first_last_layers_bf16": True}})
    assert frozen_precision(config) == "bf16-fp4-nvfp4-ends-bf16"


def test_versions() -> None:
    assert parse_version("2.9.0a0+5fdd7bb") == (2, 9, 0)
    assert parse_version("13.0") == (13, 0)
    assert untested_engine((2, 21, 0))
    assert not any(untested_engine(version) for version in (None, (2, 9, 0), (2, 20, 2)))
    assert detect(torch.device("cpu")).describe() == "CPU"


def test_losses_of_routers_need_experts(tmp_path: Path) -> None:
    dense = read_hf_config(make_model(tmp_path / "dense", "llama", layers=1, weights=False))
    experts = read_hf_config(make_model(tmp_path / "experts", "mixtral", layers=1, weights=False))
    config = config_from_dict({**VALID, "moe": {"z_loss_coeff": 0.1}})
    check_experts(config, {"policy": experts, "guide": dense})
    with pytest.raises(UserError, match=r"section moe .* model\.policy has no experts"):
        check_experts(config, {"policy": dense, "guide": experts})


@pytest.mark.parametrize(
    ("family", "sections", "message"),
    [
        ("youtu", {"precision": {"fp8": "blockwise"}}, "latent attention .* set precision.fp8=none"),
        (
            "youtu",
            {"parallel": {"tensor": 2, "sequence_parallel": True}, "overlap": {"tensor": True}},
            "latent attention .* set overlap.tensor=false",
        ),
        (
            "mixtral",
            {"precision": {"fp8": "delayed", "frozen": "bf16"}, "train": {"steps": 10, "check_start": False}},
            "model.policy has experts, whose scales with precision.fp8=delayed",
        ),
        ("mixtral", {"precision": {"fp8": "mxfp8"}}, "not with precision.fp8=mxfp8: set precision.fp8 to one of these"),
        ("qwen3_moe", {"precision": {"fp4": "nvfp4"}}, "not with precision.fp4=nvfp4"),
        ("gpt_oss", {"precision": {"fp8": "tensorwise"}}, "model.policy has experts with biases"),
        (
            "mixtral",
            {"parallel": {"tensor": 2, "sequence_parallel": True}, "overlap": {"tensor": True}},
            "overlap.tensor has no buffers for the products of experts, which model.policy has",
        ),
    ],
)
def test_what_experts_and_latent_attention_do_not_go_with(
    family: str, sections: dict, message: str, tmp_path: Path
) -> None:
    experts = make_model(tmp_path / "model", family, layers=1, weights=False)
    data = {"train": str(tmp_path / "pairs.jsonl"), "max_length": 64, "max_prompt_length": 32}
    model = {**VALID["model"], "policy": str(experts), "guide": str(experts)}
    config = config_from_dict({**VALID, "data": data, "model": model, **sections})
    with pytest.raises(UserError, match=message) as error:
        check_experts(config, {"policy": read_hf_config(experts)})
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        dry_run(config, 2)
