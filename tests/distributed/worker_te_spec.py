"""Builds every family on both layer specs, with look-alikes of Transformer Engine, and compares what they compute.

Usage: ``worker_te_spec ROOT`` where ROOT/hf holds HF models and ROOT/recomputed.json says what to compute again in some
of them; leaves ``ROOT/out/NAME.json`` for the test to judge.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_convert.logits import packing_of
from megatron_tgdpo.checkpoints.adapter_directory import LINEARS, Lora
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import ParallelLayout, destroy_model_parallel, init_model_parallel, make_layout
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.gpu.activation_offload import ActivationOffload
from megatron_tgdpo.gpu.kernel_choice import core_attention_spec
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.adapter_layout import peft_shapes
from megatron_tgdpo.models.hf_weights.adapters import fill_adapter
from megatron_tgdpo.models.hf_weights.load import without_expert
from megatron_tgdpo.models.hf_weights.mapping import local_name
from megatron_tgdpo.models.language_model import LanguageModel, build_language_model
from megatron_tgdpo.models.layer_spec_te import te_block_spec
from megatron_tgdpo.models.lora import adapters_of, add_adapter, freeze_all_but, is_of_adapter, set_active
from tests import fake_te
from tests.checkpoints import load_weights, save

CPU = torch.device("cpu")
ROW, LENGTHS = 128, [60, 40]


def build(
    spec: str, hf_config: PretrainedConfig, layout: ParallelLayout, pg: ProcessGroupCollection, **overrides: Any
) -> LanguageModel:
    """The model on a layer spec; caps and sinks are FlexAttention's on a GPU, whose backward the CPU lacks."""
    if spec == "local":
        return build_language_model(
            hf_config, layout, pg, dtype=torch.float32, device=CPU, transformer_overrides=overrides
        )
    flex = bool(getattr(hf_config, "attn_logit_softcapping", None)) or hf_config.model_type == "gpt_oss"
    attention = core_attention_spec("blocks" if flex else "transformer_engine")
    with fake_te.importable():
        block = partial(te_block_spec, core_attention=attention, parts=fake_te.PARTS)
        return build_language_model(
            hf_config, layout, pg, dtype=torch.float32, device=CPU, transformer_overrides=overrides, block_spec=block
        )


def run(model: LanguageModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states [S_local, 1, H] of a pack, and the gradient of every parameter by its local name."""
    tokens = torch.randint(0, 128, (1, ROW), generator=torch.Generator().manual_seed(7))
    positions = torch.cat([torch.arange(n) for n in (*LENGTHS, ROW - sum(LENGTHS))])[None]
    hidden = model(tokens, positions, packing_of(LENGTHS))
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(8 + dist.get_rank()))
    model.zero_grad()
    (hidden * upstream).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        layer, dot, rest = name.partition("decoder.layers.")[2].partition(".")
        key, expert = without_expert(local_name(rest))
        key = f"{layer}.{key}.{expert}" if dot else name
        gradients[key] = torch.zeros(0) if parameter.grad is None else parameter.grad.clone()
    return hidden.detach(), gradients


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the largest, over all ranks."""
    values = torch.stack(((ours - theirs).abs().max(), theirs.abs().max())) if theirs.numel() else torch.zeros(2)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return (values[0] / values[1].clamp(min=1e-30)).item()


def offloaded(model: LanguageModel, expected: tuple[Tensor, dict[str, Tensor]]) -> bool:
    """Whether nothing changes, to the bit, where what the layers keep waits elsewhere; and anything does wait."""
    offload = ActivationOffload(model.decoder, CPU, least_bytes=4 * ROW)
    hidden, gradients = run(model)
    same = all(torch.equal(gradients[name], gradient) for name, gradient in expected[1].items())
    return torch.equal(hidden, expected[0]) and same and offload.host_bytes > 0


def description(model: LanguageModel) -> list[Any]:
    """What a checkpoint of the model would hold from this rank: keys, shapes, places and dtypes."""
    state = model.sharded_state_dict()
    apply_factories(state)
    return sorted(
        [entry.key, str(entry.global_shape), str(entry.global_offset), str(getattr(entry, "dtype", None))]
        for entry in nested_values(state)
    )


Build = Callable[..., LanguageModel]


def compare(
    hf: Path, root: Path, layout: ParallelLayout, pg: ProcessGroupCollection, build: Build = build
) -> dict[str, Any]:
    hf_config = read_hf_config(hf)
    models = {spec: build(spec, hf_config, layout, pg) for spec in ("local", "te")}
    for model in models.values():
        load_weights(model, hf, hf_config, pg)
    results = {spec: run(model) for spec, model in models.items()}
    (local, local_gradients), (te, te_gradients) = results["local"], results["te"]
    assert local_gradients.keys() == te_gradients.keys()
    found: dict[str, Any] = {
        "offloaded": [offloaded(models[spec], result) for spec, result in results.items()],
        "hidden": difference(te, local),
        "gradients": {name: difference(te_gradients[name], local_gradients[name]) for name in sorted(te_gradients)},
        "same_description": description(models["local"]) == description(models["te"]),
    }
    # What one spec saved, the other loads: from there on nothing of the model it held before is left.
    for writer, reader in (("local", "te"), ("te", "local")):
        path = root / "checkpoints" / f"{hf.name}-{writer}"
        state = {"model": models[writer].sharded_state_dict()}
        save(path, state, hf, {"dtype": "fp32", "parameters": 0})
        fresh = build(reader, hf_config, layout, pg)
        load_weights(fresh, path, hf_config, pg)
        found[f"{writer} to {reader}"] = bool(torch.equal(run(fresh)[0], results[reader][0]))
    return found


def recompute(
    hf: Path, modules: list[str], layout: ParallelLayout, pg: ProcessGroupCollection, *, adapters: bool
) -> dict[str, Any]:
    """What differs where parts of the layers are computed again, and what then runs twice, by layer spec."""
    hf_config = read_hf_config(hf)
    found: dict[str, Any] = {}
    for spec in ("local", "te"):
        results, twice = [], set[str]()
        for chosen in ([], modules):
            options = {"recompute_granularity": "selective", "recompute_modules": chosen} if chosen else {}
            model = build(spec, hf_config, layout, pg, adapters=adapters, **options)
            load_weights(model, hf, hf_config, pg)
            if adapters:
                lora = Lora(4, 6.0, LINEARS)
                torch.manual_seed(9)
                add_adapter(model, "policy", lora, hf_config)
                tensors = {name: 0.1 * torch.randn(shape) for name, shape in peft_shapes(lora, hf_config).items()}
                fill_adapter(model, "policy", tensors, hf_config)
                freeze_all_but(model, "policy")
                set_active(model, "policy")
            calls = Counter[str]()
            for name, module in model.decoder.layers[1].named_modules():
                module.register_forward_hook(lambda *_, name=name, calls=calls: calls.update([name]))
            results.append(run(model))
            if chosen:
                twice = {name for name, count in calls.items() if count == 2}
                # Not what is inside of these.
                twice = {name for name in twice if not any(name.startswith(f"{other}.") for other in twice)}
                assert offloaded(model, results[-1]), (hf.name, spec, adapters)
        (plain, gradients), (again, gradients_again) = results
        found[spec] = {
            "same_hidden": torch.equal(plain, again),
            "gradients": max(difference(gradients_again[name], each) for name, each in gradients.items()),
            "twice": sorted(twice),
        }
    return found


def compare_adapters(
    hf: Path, layout: ParallelLayout, pg: ProcessGroupCollection, build: Build = build
) -> dict[str, Any]:
    """The same with an adapter on; it alone trains."""
    hf_config = read_hf_config(hf)
    # Experts with biases take none.
    lora = Lora(4, 6.0, LINEARS[:4] if hf_config.model_type == "gpt_oss" else LINEARS)
    torch.manual_seed(9)
    tensors = {name: 0.1 * torch.randn(shape) for name, shape in peft_shapes(lora, hf_config).items()}
    results = []
    for spec in ("local", "te"):
        model = build(spec, hf_config, layout, pg, adapters=True)
        load_weights(model, hf, hf_config, pg)
        without = run(model)[0]
        add_adapter(model, "policy", lora, hf_config)
        fill_adapter(model, "policy", tensors, hf_config)
        freeze_all_but(model, "policy")
        set_active(model, "policy")
        hidden, _ = run(model)
        assert all(each.grad is None for name, each in model.named_parameters() if not is_of_adapter(name))
        gradients = {
            f"{layer}.{adapter.fused.name}.{adapter.expert}.{name}": each.new_zeros(())
            if each.grad is None
            else each.grad
            for layer, adapter in adapters_of(model, "policy")
            for name, each in adapter.named_parameters()
        }
        results.append((hidden, gradients))
    (local, local_gradients), (te, te_gradients) = results
    return {
        "hidden": difference(te, local),
        "gradients": {name: difference(te_gradients[name], each) for name, each in local_gradients.items()},
        "same_gradients": local_gradients.keys() == te_gradients.keys(),
        "effect": difference(te, without),
    }


def main() -> None:
    root = Path(sys.argv[1])
    recomputed = json.loads((root / "recomputed.json").read_text())
    enable_cpu_backend()
    ranks = read_rank_environment()
    init_distributed(ranks, CPU, 15, connect_store(ranks))
    if dist.get_rank() == 0:
        (root / "out").mkdir()
        (root / "checkpoints").mkdir()
    dist.barrier()
    # Experts with biases are not cut.
    for expert_tensor in (2, 1):
        layout = make_layout(2, 1, 1, True, dist.get_world_size(), expert_tensor=expert_tensor)
        pg = init_model_parallel(layout, seed=1, timeout_minutes=15)
        for hf in sorted((root / "hf").iterdir()):
            hf_config = read_hf_config(hf)
            if (hf_config.model_type == "gpt_oss") != (expert_tensor == 1):
                continue
            found = compare(hf, root, layout, pg)
            found["adapters"] = compare_adapters(hf, layout, pg)
            if hf.name in recomputed:
                modules = recomputed[hf.name]
                found["recomputed"] = [recompute(hf, modules, layout, pg, adapters=each) for each in (False, True)]
            if dist.get_rank() == 0:
                (root / "out" / f"{hf.name}.json").write_text(json.dumps(found))
        destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
