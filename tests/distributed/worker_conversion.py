"""Converts, computes and saves on the layouts that it is told, and leaves the results for the test to judge.

Usage: ``worker_conversion ROOT LAYOUT...`` where ROOT/hf holds HF models and LAYOUT is like ``tp2-pp1-sp``; or
``worker_conversion ROOT faults`` or ``worker_conversion ROOT single``.
"""

import errno
import itertools
import json
import re
import resource
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_convert import export as export_module
from checkpoints_convert.export import export_hf
from checkpoints_convert.import_hf import import_hf
from checkpoints_convert.logits import packed_outputs, packing_of
from megatron_tgdpo.checkpoints import listing as checkpoint_directory
from megatron_tgdpo.checkpoints import save as checkpoint_save
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import ParallelLayout, destroy_model_parallel, init_model_parallel, make_layout
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.load import mapped_parameters
from megatron_tgdpo.models.hf_weights.mapping import Heads, join_shards, parameter_count
from megatron_tgdpo.models.language_model import LanguageModel, build_language_model
from megatron_tgdpo.storage.dtypes import dtype_name
from tests.checkpoints import load_weights, save

CPU = torch.device("cpu")
ROW, LENGTHS = 200, [90, 70, 30]
# Models that differ from others in their rope alone.
ROPES = ("linear-rope", "yarn", "gemma2-yarn")


def pack_tokens() -> Tensor:
    """The pack of every test: three sequences, then padding."""
    return torch.randint(0, 128, (ROW,), generator=torch.Generator().manual_seed(7))


def upstream_gradient(hidden_size: int) -> Tensor:
    """[S, H]: what the hidden states are multiplied with before they are summed; nothing for the padding."""
    gradient = torch.randn(ROW, hidden_size, generator=torch.Generator().manual_seed(8))
    gradient[sum(LENGTHS) :] = 0
    return gradient


def parse_layout(name: str, world_size: int) -> ParallelLayout:
    match = re.fullmatch(r"tp(\d+)-pp(\d+)(-sp)?", name)
    assert match, name
    return make_layout(int(match[1]), int(match[2]), 1, match[3] is not None, world_size)


def run_layout(root: Path, name: str) -> None:
    layout = parse_layout(name, dist.get_world_size())
    pg = init_model_parallel(layout, seed=1, timeout_minutes=15)
    for hf in sorted((root / "hf").iterdir()):
        hf_config = read_hf_config(hf)
        out = root / "out" / name / hf.name
        if dist.get_rank() == 0:
            out.mkdir(parents=True)
        dist.barrier()
        compute(hf, hf_config, layout, pg, out)
        if converts(name, hf.name):
            convert(root, hf, hf_config, layout, pg, out)
    destroy_model_parallel()


def converts(layout: str, model: str) -> bool:
    """Whether a model's weights are saved on a layout: neither how activations are split nor a rope changes them."""
    return not layout.endswith("-sp") and model not in ROPES


def compute(
    hf: Path, hf_config: PretrainedConfig, layout: ParallelLayout, pg: ProcessGroupCollection, out: Path
) -> None:
    """Logits, and for a single stage the gradients of all weights, in fp32."""
    model = build_language_model(hf_config, layout, pg, dtype=torch.float32, device=CPU)
    load_weights(model, hf, hf_config, pg)
    outputs = packed_outputs(model, pack_tokens(), LENGTHS, pg)
    if outputs is not None and pg.tp.rank() == 0 and pg.dp_cp.rank() == 0:
        save_file({"logits": outputs.logits.contiguous(), "logps": outputs.logps}, out / "logits.safetensors")
    marks = {
        mapped.name: mapped.kind != "copy"
        for mapped in mapped_parameters(model, hf_config)
        if getattr(mapped.parameter, "tensor_model_parallel", False) != (mapped.kind != "copy")
    }
    assert not marks, marks
    if layout.pipeline == 1:
        save_gradients(model, hf_config, pg, out)


def save_gradients(model: LanguageModel, hf_config: PretrainedConfig, pg: ProcessGroupCollection, out: Path) -> None:
    positions = torch.cat([torch.arange(n) for n in [*LENGTHS, ROW - sum(LENGTHS)]])
    hidden = model(pack_tokens()[None], positions[None], packing_of(LENGTHS))
    upstream = upstream_gradient(hf_config.hidden_size)[:, None]
    if model.config.sequence_parallel:
        upstream = upstream.chunk(pg.tp.size())[pg.tp.rank()]
    (hidden * upstream).sum().backward()
    gradients = {}
    for mapped in mapped_parameters(model, hf_config):
        if mapped.name == "output_layer.weight":
            assert mapped.parameter.grad is None
            continue
        gradient = mapped.parameter.grad
        assert gradient is not None, mapped.name
        # What every rank has a part of: of the sequence, or of the heads.
        if getattr(mapped.parameter, "sequence_parallel", False) or mapped.name.endswith(
            ("q_layernorm.weight", "k_layernorm.weight")
        ):
            dist.all_reduce(gradient, group=pg.tp)
        shards = [gradient] if mapped.kind == "copy" else gather_shards(gradient, pg.tp)
        if pg.tp.rank() == 0:
            joined = join_shards(mapped.kind, shards, Heads.of(hf_config), hf_config.vocab_size)
            gradients.update(zip(mapped.hf_names, [tensor.clone() for tensor in joined], strict=True))
    if pg.tp.rank() == 0 and pg.dp_cp.rank() == 0:
        save_file(gradients, out / "gradients.safetensors")


def gather_shards(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Collects equal shards on the group's first rank, in rank order; empty on the others. Collective."""
    if group.size() == 1:
        return [shard]
    # gloo sends wrong data for tensors that are not contiguous
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(shard, shards, dst=dist.get_global_rank(group, 0), group=group)
    return shards or []


def convert(
    root: Path,
    hf: Path,
    hf_config: PretrainedConfig,
    layout: ParallelLayout,
    pg: ProcessGroupCollection,
    out: Path,
) -> None:
    """HF -> this layout -> Megatron -> HF; Megatron made without a model -> this layout: what differs from the HF's."""
    dtype = hf_config.dtype
    model = build_language_model(hf_config, layout, pg, dtype=dtype, device=CPU)
    load_weights(model, hf, hf_config, pg)
    saved = out / "checkpoints" / "step_00000005"
    state = {"model": model.sharded_state_dict(), "optimizer": optimizer_state(model), "step": 5}
    metadata = {"dtype": dtype_name(dtype), "parameters": parameter_count(hf_config)}
    save(saved, state, hf, {**metadata, "step": 5})
    export(saved, out / "exported", dtype, max_shard_bytes=40_000)
    loaded = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_weights(model, root / "megatron" / hf.name, hf_config, pg)
    different = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, loaded[name])]
    (out / f"different-{dist.get_rank()}.json").write_text(json.dumps(different))


def export(checkpoint: Path, out: Path, dtype: torch.dtype, max_shard_bytes: int = 10**9) -> None:
    export_hf(checkpoint, out, template=checkpoint, stored=dtype, dtype=dtype, max_shard_bytes=max_shard_bytes)


def optimizer_state(model: LanguageModel) -> dict:
    """What a training checkpoint holds beside the model: sharded tensors and objects of other names, plain values."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        "moments": ShardedTensor.from_rank_offsets("optimizer.moments", torch.ones(1, 4) * rank, (0, rank, world)),
        "generator": ShardedObject("optimizer.generator", {"rank": rank}, (world,), (rank,)),
        "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}],
        "tied": model.share_embeddings_and_output_weights,
    }


def run_single(root: Path) -> None:
    """Makes from ROOT/hf: ROOT/megatron without a model, for other layouts to load, and ROOT/live from a model."""
    layout = make_layout(1, 1, 1, False, 1)
    pg = init_model_parallel(layout, seed=1, timeout_minutes=15)
    for hf in sorted((root / "hf").iterdir()):
        hf_config = read_hf_config(hf)
        import_hf(hf, root / "megatron" / hf.name, hf_config)
        model = build_language_model(hf_config, layout, pg, dtype=hf_config.dtype, device=CPU)
        load_weights(model, hf, hf_config, pg)
        metadata = {"dtype": dtype_name(hf_config.dtype), "parameters": parameter_count(hf_config)}
        save(root / "live" / hf.name, {"model": model.sharded_state_dict()}, hf, metadata)
    destroy_model_parallel()


def run_faults(root: Path) -> None:
    """A disk that is full on one rank; every rank must raise, and nothing may be left."""
    layout = make_layout(1, dist.get_world_size(), 1, False, dist.get_world_size())
    pg = init_model_parallel(layout, 1, 2)
    hf = root / "hf" / "untied"
    hf_config = read_hf_config(hf)
    model = build_language_model(hf_config, layout, pg, dtype=torch.float32, device=CPU)
    load_weights(model, hf, hf_config, pg)
    report = {}
    no_space = OSError(errno.ENOSPC, "No space left on device")
    actions = {
        "save": lambda path: save(path, {"model": model.sharded_state_dict()}, hf, {"dtype": "fp32"}),
        "import": lambda path: import_hf(hf, path, hf_config),
        "export": lambda path: export(root / "megatron" / "untied", path, torch.float32, max_shard_bytes=100_000),
    }
    for action, fault in itertools.product(actions, ("limit-rank0", "limit-rank1", "common", "space", "finish")):
        if (action, fault) in (("import", "common"), ("export", "common")):
            continue
        target = root / "faults" / f"{action}-{fault}"
        copied = {"export": export_module}.get(action, checkpoint_directory)
        patches = {
            "common": mock.patch.object(checkpoint_save, "write_common", side_effect=no_space),
            "space": mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1000)),
            "finish": mock.patch.object(copied, "copy_hf_files", side_effect=no_space),
        }
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if fault.endswith(f"rank{dist.get_rank()}"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with patches.get(fault, mock.MagicMock()):
                actions[action](target)
            report[target.name] = "no error"
        except UserError as error:
            report[target.name] = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        dist.barrier()
    for name, action in actions.items():
        action(root / "faults" / f"{name}-works-afterwards")
    (root / f"faults-{dist.get_rank()}.json").write_text(json.dumps(report))


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    enable_cpu_backend()
    ranks = read_rank_environment()
    init_distributed(ranks, CPU, 15, connect_store(ranks))
    for name in sys.argv[2:]:
        if name == "faults":
            run_faults(root)
        elif name == "single":
            run_single(root)
        else:
            run_layout(root, name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
