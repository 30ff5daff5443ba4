"""Builds training engines and counts the bytes that they hold, and that a step adds. One JSON line of all ranks' facts.

torchrun --nproc-per-node N -m tests.distributed.worker_plan CONFIGS.json [NAME ...]

The traffic of those that are named is counted, too.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.checkpoints.save import stage
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import destroy_model_parallel, init_model_parallel, make_layout
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.setup.engine import Engine, build_engine, unwrapped
from megatron_tgdpo.setup.model_inputs import read_model_configs
from megatron_tgdpo.training.checkpoint_saver import live_storages
from megatron_tgdpo.training.engine_state import training_state
from megatron_tgdpo.training.step import forward_backward
from tests.live_storages import LiveStorages
from tests.sent_bytes import SentBytes

CPU = torch.device("cpu")


def static_tensors(engine: Engine) -> dict[str, list[torch.Tensor]]:
    """All that an engine holds between steps, by kind."""
    model, optimizer = unwrapped(engine.chunks[0]), engine.optimizer
    return {
        "weights": list(model.policy.parameters()),
        "frozen": list(model.frozen.parameters()),
        "gradients": [buffer.grad_data for buffer in engine.chunks[0].buffers],
        "optimizer": [
            *(parameter for group in optimizer.param_groups for parameter in group["params"]),
            *(value for state in optimizer.optimizer.state.values() for value in state.values()),
        ],
    }


def storage_bytes(kinds: dict[str, list[torch.Tensor]]) -> dict[str, int]:
    """Bytes of each kind; a storage that two kinds share counts for the first (fp32 main weights are the weights)."""
    seen: set[int] = set()
    sizes = dict.fromkeys(kinds, 0)
    for kind, tensors in kinds.items():
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in seen:
                seen.add(tensor.untyped_storage()._cdata)
                sizes[kind] += tensor.untyped_storage().nbytes()
    return sizes


def full_row(config: Config) -> PreferenceBatch:
    """A pack without padding: pairs of longest sequences, all of them responses but one token."""
    length = config.data.max_length
    one, response = np.ones(1, dtype=np.int64), np.ones(length - 1, dtype=np.int64)
    pairs = [PreferencePair(one, response, response, index) for index in range(config.seq_length // (2 * length))]
    return collate(pairs, PackFormat(config.seq_length))


def kept_by_forward(engine: Engine, pack: PreferenceBatch, known: list[torch.Tensor]) -> int:
    """Bytes that the policy's forward leaves alive on this stage, its input and output included."""
    policy = unwrapped(engine.chunks[0]).policy
    tokens = engine.pack_format.tokens // (engine.pg.tp.size() if policy.config.sequence_parallel else 1)
    with LiveStorages(known) as live:
        if not policy.pre_process:
            shape = (tokens, 1, policy.config.hidden_size)
            policy.set_input_tensor(torch.zeros(shape, dtype=policy.config.params_dtype, requires_grad=True))
        output = policy(pack.tokens, pack.position_ids, pack.packing)
    # Gloo's threads may hold the tensors of their last collective until the next.
    dist.barrier()
    kept = live.bytes()
    del output
    return kept


def sent_in_a_step(engine: Engine, pack: PreferenceBatch, count: int) -> dict[str, float]:
    """Bytes that this rank sends: of bf16 in collectives (tensor ranks), of fp32 (data ranks), between stages."""
    before = engine.communicator.forward_bytes + engine.communicator.backward_bytes if engine.communicator else 0
    with SentBytes() as sent:
        forward_backward(engine, [pack] * count, count, forward_only=False)
    after = engine.communicator.forward_bytes + engine.communicator.backward_bytes if engine.communicator else 0
    names = {torch.bfloat16: "sent_bf16", torch.float32: "sent_fp32"}
    return {"sent_stages": after - before, **{name: sent.by_dtype.get(dtype, 0.0) for dtype, name in names.items()}}


def measure(config: Config, world_size: int, *, traffic: bool) -> dict[str, Any]:
    """This rank's facts for one config, with what it sends if ``traffic``."""
    parallel = config.parallel
    layout = make_layout(parallel.tensor, parallel.pipeline, 1, parallel.sequence_parallel, world_size)
    pg = init_model_parallel(layout, 0, 15)
    engine = build_engine(config, read_model_configs(config), layout, pg, 10, CPU)
    static = static_tensors(engine)
    facts: dict[str, Any] = {"stage": pg.pp.rank(), "tensor": pg.tp.rank(), **storage_bytes(static)}
    engine.chunks[0].train()
    engine.chunks[0].zero_grad_buffer()
    pack, known = full_row(config), [tensor for tensors in static.values() for tensor in tensors]
    known += unwrapped(engine.chunks[0]).policy.buffers()
    facts["kept"] = kept_by_forward(engine, pack, known)
    with LiveStorages(known) as step:
        forward_backward(engine, [pack] * (2 * layout.pipeline), 2 * layout.pipeline, forward_only=False)
    facts["step_peak"] = step.peak
    with LiveStorages(known) as storages:
        staged = stage(training_state(engine, is_loading=False), live_storages(engine))
    facts["save"], facts["save_peak"] = storages.bytes(), storages.peak
    del staged
    if traffic:
        facts |= sent_in_a_step(engine, pack, 2 * layout.pipeline)
    destroy_model_parallel()
    return facts


def main() -> None:
    warnings.filterwarnings("ignore")
    enable_cpu_backend()
    ranks = read_rank_environment()
    init_distributed(ranks, CPU, 15, connect_store(ranks))
    measured = {
        name: measure(config_from_dict(values), ranks.world_size, traffic=name in sys.argv[2:])
        for name, values in json.loads(Path(sys.argv[1]).read_text()).items()
    }
    gathered: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(gathered, measured)
    if ranks.rank == 0:
        print("FACTS " + json.dumps(gathered), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
