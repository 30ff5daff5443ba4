"""Two pipeline stages: what frozen models must not cost. Prints one JSON line per rank for the test to judge.

torchrun --nproc-per-node 2 -m tests.distributed.worker_colocated CONFIG.json
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import init_model_parallel, make_layout
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.resilience.run_lock import RunLock
from megatron_tgdpo.setup.engine import build_engine, unwrapped
from megatron_tgdpo.setup.model_inputs import read_model_configs
from megatron_tgdpo.setup.models import load_model
from megatron_tgdpo.training.run_data import open_data, prepare
from megatron_tgdpo.training.step import forward_backward


class CountingCommunicator(P2PCommunicator):
    """megatron-core's own communicator, counting."""

    backward_bytes = 0
    forward_bytes = 0

    def _communicate(self, **kwargs: Any) -> Any:
        for key, name in (("tensor_send_prev", "backward_bytes"), ("tensor_send_next", "forward_bytes")):
            if kwargs[key] is not None:
                setattr(self, name, getattr(self, name) + kwargs[key].nbytes)
        return super()._communicate(**kwargs)


def policy_only_step(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch: PreferenceBatch = next(batches)
    hidden = model(batch.tokens, batch.position_ids, batch.packing)
    return hidden, lambda out: (out.square().sum(), torch.tensor(1, dtype=torch.int), {})


def main() -> None:
    warnings.filterwarnings("ignore")
    enable_cpu_backend()
    config = config_from_dict(json.loads(Path(sys.argv[1]).read_text()))
    ranks = read_rank_environment()
    store = connect_store(ranks)
    prepared = prepare(config, RunLock(Path(config.output_dir)), {}, ranks, store)
    device = torch.device("cpu")
    init_distributed(ranks, device, 5, store)
    layout = make_layout(1, 2, 1, False, ranks.world_size)
    pg = init_model_parallel(layout, 0, 5)
    model_configs = read_model_configs(config)
    engine = build_engine(config, model_configs, layout, pg, 10, device)
    dataset: PreferenceDataset = open_data(config, prepared, model_configs).train
    packs = [collate([dataset[i], dataset[i + 1]], engine.pack_format) for i in range(0, 6, 2)]
    engine.chunks[0].zero_grad_buffer()
    forward_backward(engine, packs, len(packs), forward_only=False)
    model, communicator = unwrapped(engine.chunks[0]), engine.communicator
    assert communicator is not None

    (policy,) = load_model(config.model.policy, model_configs["policy"], layout, pg, config, device)
    alone = DistributedDataParallel(
        policy.config, DistributedDataParallelConfig(use_distributed_optimizer=True), policy
    )
    plain = CountingCommunicator(pg.pp, policy.config)
    get_forward_backward_func(pp_size=2, vp_size=None)(
        forward_step_func=policy_only_step,
        data_iterator=iter(packs),
        model=[alone],
        num_microbatches=len(packs),
        seq_length=config.seq_length,
        micro_batch_size=1,
        forward_only=False,
        pg_collection=pg,
        p2p_communicator=plain,
    )
    facts = {
        "stage": pg.pp.rank(),
        "backward_bytes": communicator.backward_bytes,
        "forward_bytes": communicator.forward_bytes,
        "policy_only_backward_bytes": plain.backward_bytes,
        "policy_only_forward_bytes": plain.forward_bytes,
        "frozen_widths": model.frozen.widths,
        "policy_width": model.policy.config.hidden_size,
        "frozen_gradients": sum(p.grad is not None or hasattr(p, "main_grad") for p in model.frozen.parameters()),
        "frozen_trainable": sum(p.requires_grad for p in model.frozen.parameters()),
        "policy_elements": sum(p.numel() for p in model.policy.parameters()),
        "policy_only_elements": sum(p.numel() for p in policy.parameters()),
        "frozen_elements": sum(p.numel() for p in model.frozen.parameters()),
        "buffer_elements": sum(buffer.grad_data.numel() for buffer in engine.chunks[0].buffers),
        "policy_only_buffer_elements": sum(buffer.grad_data.numel() for buffer in alone.buffers),
        "policy_gradient_norm": float(sum(buffer.grad_data.norm() for buffer in engine.chunks[0].buffers)),
        "optimizer_elements": sum(p.numel() for g in engine.optimizer.param_groups for p in g["params"]),
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, facts)
    if ranks.rank == 0:
        print("FACTS " + json.dumps(gathered), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
