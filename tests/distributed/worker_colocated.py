"""Two pipeline stages, whole and in two chunks: what frozen models must not cost. Prints JSON for the test to judge.

torchrun --nproc-per-node 2 -m tests.distributed.worker_colocated CONFIG.json
"""

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import destroy_model_parallel, init_model_parallel, make_layout
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.frozen.communicator import ColocatedCommunicator, P2PBuffer
from megatron_tgdpo.resilience.run_lock import RunLock
from megatron_tgdpo.setup.engine import build_engine, unwrapped
from megatron_tgdpo.setup.model_inputs import read_model_configs
from megatron_tgdpo.setup.models import load_model
from megatron_tgdpo.training.run_data import Prepared, open_data, prepare
from megatron_tgdpo.training.step import forward_backward


class CountingCommunicator(P2PCommunicator):
    """megatron-core's own communicator, counting; on a CPU not for chunks on two stages."""

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
    init_distributed(ranks, torch.device("cpu"), 5, store)
    for virtual in (1, 2):
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, measured(config, prepared, virtual))
        if ranks.rank == 0:
            print("FACTS " + json.dumps(gathered), flush=True)
        destroy_model_parallel()
    dist.destroy_process_group()


def measured(config: Config, prepared: Mapping[str, Prepared], virtual: int) -> dict[str, Any]:
    """What this stage holds and sends, in so many chunks."""
    device = torch.device("cpu")
    layout = make_layout(1, 2, 1, False, 2, virtual)
    pg = init_model_parallel(layout, 0, 5)
    model_configs = read_model_configs(config)
    engine = build_engine(config, model_configs, layout, pg, 10, device)
    dataset: PreferenceDataset = open_data(config, prepared, model_configs).train
    packs = [collate([dataset[i], dataset[i + 1]], engine.pack_format) for i in range(0, 8, 2)]
    for chunk in engine.chunks:
        chunk.zero_grad_buffer()
    forward_backward(engine, packs, len(packs), forward_only=False)
    models, communicator = [unwrapped(chunk) for chunk in engine.chunks], engine.communicator
    assert communicator is not None

    policy = load_model(config.model.policy, model_configs["policy"], layout, pg, config, device)
    options = DistributedDataParallelConfig(use_distributed_optimizer=True)
    alone = [DistributedDataParallel(chunk.config, options, chunk) for chunk in policy]
    plain: Any = (
        CountingCommunicator(pg.pp, policy[0].config)
        if virtual == 1
        else ColocatedCommunicator(pg.pp, policy[0].config, P2PBuffer(0, torch.float32), device)
    )
    get_forward_backward_func(pp_size=2, vp_size=None if virtual == 1 else virtual)(
        forward_step_func=policy_only_step,
        data_iterator=[iter(packs) for _ in alone] if virtual > 1 else iter(packs),
        model=alone,
        num_microbatches=len(packs),
        seq_length=config.seq_length,
        micro_batch_size=1,
        forward_only=False,
        pg_collection=pg,
        p2p_communicator=plain,
    )
    frozen = [p for model in models for p in model.frozen.parameters()]
    ours, theirs = ([buffer.grad_data for chunk in part for buffer in chunk.buffers] for part in (engine.chunks, alone))
    return {
        "stage": pg.pp.rank(),
        "backward_bytes": communicator.backward_bytes,
        "forward_bytes": communicator.forward_bytes,
        "policy_only_backward_bytes": plain.backward_bytes,
        "policy_only_forward_bytes": plain.forward_bytes,
        "waiting": int(communicator.p2p_buffer.incoming is not None),
        "frozen_widths": models[0].frozen.widths,
        "policy_width": models[0].policy.config.hidden_size,
        "frozen_gradients": sum(p.grad is not None or hasattr(p, "main_grad") for p in frozen),
        "frozen_trainable": sum(p.requires_grad for p in frozen),
        "policy_elements": sum(p.numel() for model in models for p in model.policy.parameters()),
        "policy_only_elements": sum(p.numel() for chunk in policy for p in chunk.parameters()),
        "frozen_elements": sum(p.numel() for p in frozen),
        "buffer_elements": sum(data.numel() for data in ours),
        "policy_only_buffer_elements": sum(data.numel() for data in theirs),
        "policy_gradient_norm": float(sum(data.norm() for data in ours)),
        "optimizer_elements": sum(p.numel() for g in engine.optimizer.param_groups for p in g["params"]),
    }


if __name__ == "__main__":
    main()
