"""Trains on the emulated GPU with every FP8 recipe: ``worker ROOT TENSOR PIPELINE``, on any number of ranks.

Leaves ``ROOT/LAYOUT/found.json`` for the tests to judge. One rank goes first: the others continue its runs too.
"""

from tests.emulation.emulated import install

install()

import json  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from checkpoints_convert.export import export_hf  # noqa: E402
from checkpoints_convert.export_adapter import peft_config  # noqa: E402
from megatron_tgdpo.checkpoints.adapter_directory import PREFIX, Lora  # noqa: E402
from megatron_tgdpo.checkpoints.model_directory import ADAPTER_CONFIG, ADAPTER_WEIGHTS  # noqa: E402
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend  # noqa: E402
from megatron_tgdpo.distributed.layout import init_model_parallel, make_layout  # noqa: E402
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment  # noqa: E402
from megatron_tgdpo.models.hf_config import read_hf_config  # noqa: E402
from megatron_tgdpo.models.hf_weights.adapter_layout import new_adapter, peft_tensors  # noqa: E402
from megatron_tgdpo.models.lora import adapters_of  # noqa: E402
from megatron_tgdpo.setup.engine import Engine, policy_chunks, unwrapped  # noqa: E402
from megatron_tgdpo.training.checkpoint_saver import checkpoint_path  # noqa: E402
from tests.emulation import kernels  # noqa: E402
from tests.emulation.cases import cases  # noqa: E402
from tests.emulation.runs import BEFORE, CPU, DATA, Runs, dirty_memory  # noqa: E402


def weights(engine: Engine) -> list[torch.Tensor]:
    """The policy's, as it computes with them."""
    found = [parameter for chunk in policy_chunks(engine) for parameter in chunk.parameters()]
    return [dequantize_fp8_tensor(w).detach() if is_float8tensor(w) else w.detach() for w in found]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.float(), b.float()) for a, b in zip(one, other, strict=True))


def exported(runs: Runs, out: Path) -> dict[str, Any]:
    """What a run with FP8 weights saved, read as a checkpoint and as the HF directory that is exported from it."""
    precision = {"fp8": "tensorwise", "fp8_params": True}
    config = runs.config(precision=precision)
    engine = runs.engine(config)
    runs.steps(engine, DATA[:BEFORE])
    trained = weights(engine)
    runs.save(engine, config, out).leave()
    checkpoint, hf = checkpoint_path(out, BEFORE), out / "hf"
    bf16 = torch.bfloat16
    export_hf(checkpoint, hf, template=checkpoint, stored=bf16, dtype=bf16, max_shard_bytes=10**9)
    found: dict[str, Any] = {}
    for name, path in (("checkpoint", checkpoint), ("export", hf)):
        found[f"{name} in bf16"] = equal(weights(runs.engine(runs.config(path))), trained)
        found[f"{name} in FP8"] = runs.steps(runs.engine(runs.config(path, precision=precision)), DATA[:1])
    return found


def uninitialised(runs: Runs) -> dict[str, Any]:
    """Delayed scaling with FP8 weights that were made from memory with nothing or something in it."""
    config = runs.config(precision={"fp8": "delayed", "fp8_params": True, "frozen": "bf16"})
    found = {}
    for value in (0.0, 1e4):
        with dirty_memory(value):
            engine = runs.engine(config)
        found[f"{value:g}"] = runs.steps(engine, DATA)
    return found


def frozen(runs: Runs) -> dict[str, Any]:
    """How often weights of the frozen models are quantised, in all steps together, and what the steps give."""
    found = {}
    ways: dict[str, dict[str, Any]] = {"held": {}, "streamed": {"offload": {"frozen": True}}}
    if runs.layout.pipeline > 1:
        ways["prefetched"] = {"guidance": {"prefetch": True}}
    for name, sections in ways.items():
        for recipe in ("tensorwise", "blockwise"):
            engine = runs.engine(runs.config(precision={"fp8": recipe}, **sections))
            models = engine.prefetcher.models if engine.prefetcher else unwrapped(engine.chunks[0]).frozen
            for weight in models.parameters():
                weight.counted_as = "frozen weight"
            kernels.calls.clear()
            steps = runs.steps(engine, DATA)
            kept = [m._fp8_workspaces for m in models.modules() if getattr(m, "_fp8_workspaces", None)]
            found[f"{recipe} {name}"] = {
                "steps": steps, "quantised": kernels.calls["quantize frozen weight"], "kept": len(kept),
            }  # fmt: skip
    return found


def adapters(runs: Runs, out: Path) -> dict[str, Any]:
    """LoRA steps, and the loss of the next one; by the adapter, and by weights that it is merged into."""
    base, guide = runs.root / "policy", str(runs.root / "guide")
    config = runs.config(lora={"rank": 8, "alpha": 256})
    engine = runs.engine(config)
    steps = runs.steps(engine, DATA[:BEFORE])
    (policy,), hf_config, lora = policy_chunks(engine), read_hf_config(base), Lora(8, 256.0)
    shutil.copytree(base, out)
    weights = load_file(base / "model.safetensors")
    for layer, adapter in adapters_of(policy, "policy"):
        tensors = dict(peft_tensors(adapter.fused, layer, adapter.a, adapter.b, lora, hf_config))
        for name in (key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("A.weight")):
            product = tensors[f"{name}.lora_B.weight"].float() @ tensors[f"{name}.lora_A.weight"].float()
            weights[f"{name}.weight"] += lora.scale * product.detach()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    merged = runs.engine(runs.config(model={"policy": str(out), "reference": str(base), "guide": guide}))
    following = {"adapter": engine, "merged": merged}
    return {"steps": steps} | {name: runs.steps(each, DATA[BEFORE : BEFORE + 1]) for name, each in following.items()}


def adapters_in_fp8(runs: Runs, out: Path) -> dict[str, Any]:
    """Steps of LoRA on a base that computes in FP8, with how often its weights are quantised; and of a policy whose
    guide is an adapter that adds nothing, or the reference itself.
    """
    found: dict[str, Any] = {}
    for name in ("tensorwise", "blockwise"):
        for held in (False, True):
            precision = {"fp8": name, "fp8_params": held}
            engine = runs.engine(runs.config(precision=precision, lora={"rank": 8, "alpha": 256}))
            parameters = [p for chunk in policy_chunks(engine) for p in chunk.parameters() if not p.requires_grad]
            for parameter in parameters:
                parameter.counted_as = "frozen weight"
            kernels.calls.clear()
            found[f"{name}{' held' if held else ''}"] = {
                "steps": runs.steps(engine, DATA[:BEFORE]),
                "quantised": kernels.calls["quantize frozen weight"],
                "copies": sum(hasattr(p, "_high_precision_init_val") for p in parameters),
            }
    base, hf_config, lora = runs.root / "policy", read_hf_config(runs.root / "policy"), Lora(8, 16.0)
    out.mkdir(parents=True)
    save_file({f"{PREFIX}{name}": t for name, t in new_adapter(lora, hf_config, 1)}, out / ADAPTER_WEIGHTS)
    (out / ADAPTER_CONFIG).write_text(json.dumps(peft_config(lora, str(base), hf_config)))
    for name, guide in (("guide adds nothing", out), ("guide is the reference", base)):
        model = {"policy": str(base), "guide": str(guide)}
        found[name] = runs.steps(runs.engine(runs.config(model=model, precision={"fp8": "tensorwise"})), DATA[:BEFORE])
    return found


def elsewhere(runs: Runs, saved: Path, pipeline: int) -> dict[str, Any]:
    """Continues a run with delayed scaling, saved on one rank, on this layout; there also as another kind of run."""
    name = "delayed, FP8 weights"
    found = {"same": runs.continued(saved / name, **cases(1, pipeline)[name])}
    if runs.layout.world_size == 1:
        delayed = {"fp8": "delayed", "frozen": "bf16"}
        found["shorter history"] = runs.continued(saved / name, precision={**delayed, "fp8_amax_history": 16})
        found["none before"] = runs.continued(saved / "tensorwise", precision=delayed)
        found["bf16"] = runs.continued(saved / name)
    return found


def main() -> None:
    root, tensor, pipeline = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    enable_cpu_backend()
    ranks = read_rank_environment()
    init_distributed(ranks, CPU, 15, connect_store(ranks))
    layout = make_layout(tensor, pipeline, 1, tensor > 1, dist.get_world_size())
    runs = Runs(root, layout, init_model_parallel(layout, seed=1, timeout_minutes=15))
    out, one_rank = root / f"tensor{tensor}-pipeline{pipeline}-data{layout.data}", root / "tensor1-pipeline1-data1"
    found: dict[str, Any] = {
        name: runs.resumed(out / name, **sections) for name, sections in cases(layout.data, pipeline).items()
    }
    found["frozen"] = frozen(runs)
    found["elsewhere"] = elsewhere(runs, one_rank, pipeline)
    if layout.world_size == 1:
        found["adapters"] = adapters(runs, out / "merged")
        found["adapters in FP8"] = adapters_in_fp8(runs, out / "adapter")
        found |= {"exported": exported(runs, out / "exported"), "uninitialised": uninitialised(runs)}
    if dist.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
