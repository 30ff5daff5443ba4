"""The parts of ``prove.py`` that compare results: trajectories, layer specs, core attentions, FP8, frozen FP8."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_tgdpo.batching.packed_sequence import Segment, pack_segments
from megatron_tgdpo.config.constraints import FP8_RECIPES
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.frozen.colocated import ColocatedModel
from megatron_tgdpo.gpu.kernel_choice import core_attention_spec
from megatron_tgdpo.models.config import LanguageModelConfig
from megatron_tgdpo.setup.models import load_frozen_models
from tests import reference
from tests.gpu.bench import Bench, packs_of
from tests.gpu.figures import (
    Figure,
    at_most,
    largest_relative_difference,
    random_pairs,
    relative_error,
    skipped,
    smoothed,
)
from tests.tiny_models import FAMILY_OPTIONS, make_model

# Sizes that FP8 kernels take; large enough for their rounding to show, small enough for seconds.
ROW, LONGEST, VOCABULARY = 1024, 128, 256


def models(bench: Bench, family: str, tiny: bool, **options: Any) -> tuple[Path, Path]:
    """Policy and guide of a family, written once."""
    sizes = {"hidden_size": 64, "layers": 2} if tiny else {"hidden_size": 256, "mlp_size": 512, "layers": 4}
    paths = bench.root / f"{family}-policy", bench.root / f"{family}-guide"
    for seed, path in enumerate(paths):
        if not path.exists():
            make_model(path, family, vocab_size=VOCABULARY, tied=family == "gemma2", seed=seed, **sizes, **options)
    return paths


def batches(steps: int, pairs: int = 4) -> list[list[PreferencePair]]:
    """Fresh random pairs for every step."""
    return [random_pairs(pairs, 96, VOCABULARY, seed) for seed in range(steps)]


def bf16(bench: Bench, tiny: bool) -> Iterator[Figure]:
    """Training on the device beside plain PyTorch in fp32 on the CPU (``tests/reference.py``)."""
    steps = 4 if tiny else 20
    for family in ("llama", "gemma2", "qwen2", "qwen3", "mistral")[: 1 if tiny else None]:
        policy, guide = models(bench, family, tiny)
        data = batches(steps)
        tokens = [
            reference.Tokens(pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist())
            for batch in data
            for pair in batch
        ]
        settings = reference.Settings(global_pairs=4, steps=steps, lr=1e-4)
        exact = reference.train(policy, policy, guide, tokens, settings).losses
        for dtype, limit in (("fp32", 1e-4), ("bf16", 2e-2)):
            config = bench.config(policy, guide, ROW, LONGEST, precision={"dtype": dtype})
            found = largest_relative_difference(bench.losses(config, data), exact)
            yield at_most("bf16", f"{family}: {dtype} losses beside fp32 on the CPU, {steps} steps", found, limit)


def spec(bench: Bench, tiny: bool) -> Iterator[Figure]:
    """Both layer specs from the same weights."""
    for family in list(FAMILY_OPTIONS)[: 1 if tiny else None]:
        policy, guide = models(bench, family, tiny)
        data, name = batches(4 if tiny else 10), f"{family}: losses of the Transformer Engine spec beside local"
        try:
            series = [
                bench.losses(bench.config(policy, guide, ROW, LONGEST, model={"layer_spec": which}), data)
                for which in ("local", "transformer_engine")
            ]
        except UserError as error:
            yield skipped("spec", name, str(error))
            continue
        yield at_most("spec", name, largest_relative_difference(series[1], series[0]), 2e-2)


def experts(bench: Bench, tiny: bool) -> Iterator[Figure]:
    """Models with experts: Transformer Engine's grouped products beside one expert after another, and in FP8."""
    for family in ("qwen3_moe", "qwen2_moe")[: 1 if tiny else None]:
        # Sizes that FP8 kernels take.
        policy, guide = models(bench, family, tiny, moe_intermediate_size=64, shared_expert_intermediate_size=64)
        data = batches(4 if tiny else 10)
        series: dict[str, list[float]] = {}
        runs: dict[str, dict[str, Any]] = {
            "local": {"model": {"layer_spec": "local"}},
            "grouped": {"model": {"layer_spec": "transformer_engine"}},
            "tensorwise with FP8 weights": {"precision": {"fp8": "tensorwise", "fp8_params": True}},
            "blockwise with FP8 weights": {"precision": {"fp8": "blockwise", "fp8_params": True}},
        }
        for run, sections in runs.items():
            name = f"{family}: losses of {run} products beside local"
            try:
                series[run] = bench.losses(bench.config(policy, guide, ROW, LONGEST, **sections), data)
            except UserError as error:
                yield skipped("experts", name, str(error))
                continue
            if run == "local":
                continue
            if run == "grouped":
                yield at_most("experts", name, largest_relative_difference(series[run], series["local"]), 2e-2)
            else:
                found = largest_relative_difference(smoothed(series[run]), smoothed(series["local"]))
                yield at_most("experts", name, found, 0.1)


def attention(bench: Bench, tiny: bool) -> Iterator[Figure]:
    """Each core attention in bf16 beside the block-wise one in fp32: shared prompts, windows, softcaps."""
    size, heads, groups = 64, 4, 2
    a, b, c = (40, 70, 96) if tiny else (400, 900, 1200)
    packing = pack_segments([Segment(0, b), Segment(b, c, 0, a), Segment(c, c + a)])
    pack = c + a + 20
    features: tuple[dict[str, Any], ...] = ({}, {"window_size": (30, 0)}, {"attn_logit_softcapping": 5.0})
    available = {
        "blocks": True,
        "transformer_engine": bench.found.transformer_engine,
        "varlen": bench.found.varlen,
        "flex": bench.device.type == "cuda",
    }
    for kind, options in ((kind, options) for kind in available for options in features):
        capped = "attn_logit_softcapping" in options
        name = f"{kind} {'softcap' if capped else 'window' if options else 'causal'} beside blocks in fp32"
        if not available[kind] or (capped and kind not in ("flex", "blocks")):
            yield skipped(
                "attention", name, "it has no softcap" if available[kind] else f"{kind} is not to be had here"
            )
            continue
        results = []
        for which, dtype in (("blocks", torch.float32), (kind, torch.bfloat16)):
            config = LanguageModelConfig(
                num_layers=1, hidden_size=heads * size, num_attention_heads=heads, num_query_groups=groups,
                attention_dropout=0.0, **options,
            )  # fmt: skip
            made: Any = core_attention_spec(which)  # type: ignore[arg-type]
            module = made(config=config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
            random = torch.Generator().manual_seed(0)
            inputs = [
                torch.randn(pack, 1, n, size, generator=random).to(bench.device, dtype) for n in (heads, groups, groups)
            ]
            for tensor in inputs:
                tensor.requires_grad_()
            index = packing.kv_index
            assert index is not None
            packing.kv_index = index.to(bench.device)
            out = module(*inputs, packed_seq_params=packing)
            out.backward(torch.randn(out.shape, generator=random).to(out))
            results.append([out.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)])
        worst = max(relative_error(ours, exact) for exact, ours in zip(*results, strict=True))
        yield at_most("attention", name, worst, 2e-2)


def fp8(bench: Bench, tiny: bool) -> Iterator[Figure]:
    """Each recipe's loss curve beside bf16's."""
    policy, guide = models(bench, "llama", tiny)
    data = batches(6 if tiny else 50)
    plain = smoothed(bench.losses(bench.config(policy, guide, ROW, LONGEST), data))
    for recipe in FP8_RECIPES[1:]:
        for params in (False, True):
            name = f"{recipe}{' with FP8 weights' if params else ''}: {len(data)} steps beside bf16"
            frozen = "bf16" if recipe == "delayed" else "same"
            precision = {"fp8": recipe, "fp8_params": params, "frozen": frozen}
            try:
                config = bench.config(policy, guide, ROW, LONGEST, precision=precision)
            except UserError as error:
                yield skipped("fp8", name, str(error))
                continue
            curve = smoothed(bench.losses(config, data))
            yield at_most("fp8", name, largest_relative_difference(curve, plain), 1e-2)


@torch.no_grad()
def token_rewards(bench: Bench, config: Config, data: list[PreferencePair]) -> torch.Tensor:
    """beta * (log pi_g - log pi_ref) of every response token, fp32 on the CPU."""
    from megatron_tgdpo.setup.layout import pack_format
    from megatron_tgdpo.setup.model_inputs import read_model_configs

    (found,) = load_frozen_models(config, read_model_configs(config), bench.layout, bench.pg, bench.device)
    model = ColocatedModel(found[0].model, found[1:])
    packs = packs_of(data, pack_format(config, bench.pg))
    logps = [model(pack.to(bench.device)) for pack in packs]
    return 0.1 * torch.cat([found.frozen[0] - found.policy for found in logps]).cpu()


def frozen(bench: Bench, tiny: bool) -> Iterator[Figure]:
    """How far token rewards move when reference and guide are held in bf16 and in FP8."""
    policy, guide = models(bench, "llama", tiny)
    data = random_pairs(8 if tiny else 64, 96, VOCABULARY, 99)
    make = partial(bench.config, policy, guide, ROW, LONGEST)
    exact = token_rewards(bench, make(precision={"dtype": "fp32"}), data)
    yield Figure("frozen", "standard deviation of token rewards in fp32", exact.std().item(), "nats")
    variants: dict[str, dict[str, Any]] = {"bf16": {}, "FP8": {"frozen": "fp8"}}
    for name, precision in variants.items():
        what = f"{name} beside fp32: error over standard deviation"
        try:
            rewards = token_rewards(bench, make(precision=precision), data)
        except UserError as error:
            yield skipped("frozen", what, str(error))
            continue
        yield Figure("frozen", what, ((rewards - exact).pow(2).mean().sqrt() / exact.std()).item())


PARTS: dict[str, Callable[[Bench, bool], Iterator[Figure]]] = {
    "attention": attention, "bf16": bf16, "spec": spec, "experts": experts, "fp8": fp8, "frozen": frozen,
}  # fmt: skip
