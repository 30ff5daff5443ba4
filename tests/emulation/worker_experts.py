"""Models with experts on the emulated GPU: ``worker_experts ROOT TENSOR EXPERT``, on one rank or two.

Where tensor ranks have different experts, these are whole on each. Leaves ``ROOT/experts-LAYOUT/found.json``.
"""

from tests.emulation.emulated import install

install()

import json  # noqa: E402
import sys  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend  # noqa: E402
from megatron_tgdpo.distributed.layout import init_model_parallel, make_layout  # noqa: E402
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment  # noqa: E402
from megatron_tgdpo.gpu.kernel_choice import core_attention_spec  # noqa: E402
from megatron_tgdpo.models.language_model import LanguageModel, build_language_model  # noqa: E402
from megatron_tgdpo.models.layer_spec import local_block_spec  # noqa: E402
from megatron_tgdpo.models.layer_spec_te import load_parts, te_block_spec  # noqa: E402
from tests.distributed.worker_te_spec import compare, compare_adapters  # noqa: E402
from tests.emulation import kernels  # noqa: E402
from tests.emulation.cases import EXPERT_CASES, continues  # noqa: E402
from tests.emulation.grouped import beside_plain  # noqa: E402
from tests.emulation.runs import CPU, VOCABULARY, Runs  # noqa: E402
from tests.emulation.worker import exported, frozen  # noqa: E402
from tests.gpu.figures import random_pairs  # noqa: E402

# Steps of as many pairs each.
FP32_DATA = [random_pairs(4, 96, VOCABULARY, step) for step in range(4)]


def build(spec: str, hf_config: Any, layout: Any, pg: Any, **overrides: Any) -> LanguageModel:
    """In fp32, of either spec with megatron-core's own attention."""
    blocks = core_attention_spec("blocks")
    block = partial(local_block_spec, core_attention=blocks)
    if spec == "te":
        # Else Transformer Engine's modules wait for their weights to be moved.
        overrides["use_cpu_initialization"] = False
        block = partial(te_block_spec, core_attention=blocks, parts=load_parts())
    return build_language_model(
        hf_config, layout, pg, dtype=torch.float32, device=CPU, transformer_overrides=overrides, block_spec=block
    )


def trained(runs: Runs, out: Path) -> dict[str, Any]:
    """Every case's steps, with what is saved on the way and continued; and what its grouped products were made of."""
    found: dict[str, Any] = {}
    for name, sections in EXPERT_CASES.items():
        kernels.calls.clear()
        if name == "fp32":
            found[name] = {"before": runs.steps(runs.engine(runs.config(**sections)), FP32_DATA)}
        elif continues(name, runs.layout.world_size):
            found[name] = runs.resumed(out / name, **sections)
        else:
            continue
        found[name]["grouped"] = kernels.calls["grouped gemm"]
    return found


def main() -> None:
    root, tensor, expert = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    enable_cpu_backend()
    ranks = read_rank_environment()
    init_distributed(ranks, CPU, 15, connect_store(ranks))
    shards = 1 if expert > 1 else None
    layout = make_layout(tensor, 1, 1, tensor > 1, dist.get_world_size(), expert=expert, expert_tensor=shards)
    pg = init_model_parallel(layout, seed=1, timeout_minutes=15)
    runs = Runs(root, layout, pg)
    out = root / f"experts-tensor{tensor}-expert{expert}"
    if dist.get_rank() == 0:
        (out / "checkpoints").mkdir(parents=True)
    dist.barrier()
    found: dict[str, Any] = {"specs": {}, "adapters": {}}
    for hf in sorted((root / "hf").iterdir()):
        if "gpt_oss" in hf.name and layout.expert_shards > 1:
            continue
        found["specs"][hf.name] = compare(hf, out, layout, pg, build)
        found["adapters"][hf.name] = compare_adapters(hf, layout, pg, build)
    found["trained"] = trained(runs, out)
    found["pairs"] = [[side.tolist() for side in (p.prompt, p.chosen, p.rejected)] for step in FP32_DATA for p in step]
    if layout.world_size == 1:
        found |= {"frozen": frozen(runs), "exported": exported(runs, out / "exported"), "plain": beside_plain(runs)}
    if dist.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
