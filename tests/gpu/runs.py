"""The parts of ``prove.py`` about what surrounds a step: save and resume, padding, repeats, pack lengths, offloads."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.setup.engine import Engine
from megatron_tgdpo.training.checkpoint_saver import CheckpointSaver, checkpoint_path
from megatron_tgdpo.training.engine_state import load_checkpoint
from megatron_tgdpo.training.step import train_step
from tests.gpu.bench import Bench, packs_of
from tests.gpu.figures import Figure, at_most, largest_relative_difference, random_pairs, skipped
from tests.gpu.parts import LONGEST, ROW, VOCABULARY, batches, models
from tests.launch import ROOT

# Backward of fused attention adds in an order of its own, so two runs in bf16 need not be equal.
SAME_RUN = 5e-3
# What the part ``spec`` allows.
OTHER_KERNELS = 2e-2
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "tensorwise with FP8 weights": {"fp8": "tensorwise", "fp8_params": True},
    "blockwise with FP8 weights": {"fp8": "blockwise", "fp8_params": True},
    "delayed": {"fp8": "delayed", "frozen": "bf16"},
    "delayed with FP8 weights": {"fp8": "delayed", "fp8_params": True, "frozen": "bf16"},
}


def steps(engine: Engine, data: Sequence[Sequence[PreferencePair]]) -> list[float]:
    return [train_step(engine, packs_of(batch, engine.pack_format)).metrics.values["loss"] for batch in data]


def resume(bench: Bench, tiny: bool) -> Iterator[Figure]:
    """Saves after two steps and goes on; a new engine that loads what was saved makes the same steps."""
    policy, guide = models(bench, "llama", tiny)
    data = batches(6)
    for name, precision in PRECISIONS.items():
        what = f"{name}: losses after a save and load beside those of the run that went on"
        try:
            config = bench.config(policy, guide, ROW, LONGEST, precision=precision)
        except UserError as error:
            yield skipped("resume", what, str(error))
            continue
        bench.forget()
        engine = bench.engine(config)
        steps(engine, data[:2])
        out = bench.root / f"resume-{name.replace(' ', '-')}"
        saver = CheckpointSaver(engine, out, policy, config.checkpoint, 5)
        saver.save(2, {"dtype": "bf16", "data_fingerprint": "none", "consumed_pairs": 8, "config": {}}, last=True)
        went_on = steps(engine, data[2:])
        fresh = bench.engine(config)
        load_checkpoint(fresh, checkpoint_path(out, 2), 2)
        yield at_most("resume", what, largest_relative_difference(steps(fresh, data[2:]), went_on), SAME_RUN)


def padding(bench: Bench, tiny: bool) -> Iterator[Figure]:
    """A pack without pairs, which a data rank has where others have more packs, changes nothing."""
    policy, guide = models(bench, "llama", tiny)
    data = batches(4)
    for name, precision in PRECISIONS.items():
        what = f"{name}: losses with a pack of padding in every step beside those without"
        try:
            config = bench.config(policy, guide, ROW, LONGEST, precision=precision)
        except UserError as error:
            yield skipped("padding", what, str(error))
            continue
        plain = bench.losses(config, data)
        engine = bench.engine(config)
        nothing: PreferenceBatch = collate([], engine.pack_format, None)
        padded = [
            train_step(engine, [*packs_of(batch, engine.pack_format), nothing]).metrics.values["loss"] for batch in data
        ]
        yield at_most("padding", what, largest_relative_difference(padded, plain), SAME_RUN)


def repeat(bench: Bench, tiny: bool) -> Iterator[Figure]:
    """The same run twice: how far apart a machine's own order of additions leaves it."""
    policy, guide = models(bench, "llama", tiny)
    data = batches(4 if tiny else 20)
    for name, precision in ({"fp32": {"dtype": "fp32"}} | PRECISIONS).items():
        try:
            config = bench.config(policy, guide, ROW, LONGEST, precision=precision)
        except UserError as error:
            yield skipped("repeat", f"{name}: the same run twice", str(error))
            continue
        found = largest_relative_difference(bench.losses(config, data), bench.losses(config, data))
        yield at_most("repeat", f"{name}: the same {len(data)} steps twice", found, SAME_RUN)


def lengths(bench: Bench, tiny: bool) -> Iterator[Figure]:
    """Packs of many lengths through FlexAttention: all are fused, with the losses of the block-wise attention."""
    policy, guide = models(bench, "gemma2", tiny)
    what = "gemma2: versions that torch compiled for packs of 24 lengths"
    if bench.device.type != "cuda":
        yield skipped("lengths", what, "FlexAttention is compiled on a GPU only")
        return
    config = bench.config(policy, guide, ROW, LONGEST)
    data = [random_pairs(1 + seed % 6, 20 + 3 * seed, VOCABULARY, seed) for seed in range(24)]
    bench.forget()
    torch._dynamo.utils.counters.clear()
    # Without this torch goes on unfused, silently but for a warning.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        losses = bench.losses(config, data)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # Four lengths, keys as long or longer, with gradients and without, and the masks.
    yield at_most("lengths", what, compiled, 4 * 2 * 2 + 4 * 2, note=f"last loss {losses[-1]:.4f}")


def variants(bench: Bench, tiny: bool) -> Iterator[Figure]:
    """Offloads, overlap and recomputation change no loss; with their peak memory."""
    policy, guide = models(bench, "llama", tiny)
    data = batches(4 if tiny else 10)
    changes: dict[str, dict[str, Any]] = {
        "offload.frozen": {"offload": {"frozen": True}},
        "offload.activations": {"offload": {"activations": True}},
        "offload.optimizer": {"offload": {"optimizer": 1.0}},
        "overlap": {"overlap": {"grad_reduce": True, "param_gather": True}},
        "recompute full": {"train": {"steps": 1000, "check_start": False, "recompute": "full"}},
        "recompute selective": {"train": {"steps": 1000, "check_start": False, "recompute": "selective"}},
        "train.fused=off": {"train": {"steps": 1000, "check_start": False, "fused": "off"}},
    }
    # Other kernels round otherwise; the others compute the same.
    limits = {"train.fused=off": OTHER_KERNELS}

    def measured(config: Config) -> tuple[list[float], float]:
        losses = bench.losses(config, data)
        return losses, torch.cuda.max_memory_allocated() / 2**20 if bench.device.type == "cuda" else 0.0

    plain, memory = measured(bench.config(policy, guide, ROW, LONGEST))
    for name, sections in changes.items():
        try:
            losses, peak = measured(bench.config(policy, guide, ROW, LONGEST, **sections))
        except UserError as error:
            yield skipped("variants", name, str(error))
            continue
        note = f"peak {peak:.0f} MiB, without it {memory:.0f}"
        found, limit = largest_relative_difference(losses, plain), limits.get(name, SAME_RUN)
        yield at_most("variants", f"{name}: losses", found, limit, note=note)


def ranks(bench: Bench, tiny: bool) -> Iterator[Figure]:
    """Two processes on one GPU, where NCCL takes that."""
    what = "two ranks on one GPU: sum of an all-reduce"
    if bench.device.type != "cuda":
        yield skipped("ranks", what, "needs a GPU")
        return
    program = (
        "import torch, torch.distributed as dist; torch.cuda.set_device(0); dist.init_process_group('nccl');"
        "x = torch.ones(1, device='cuda'); dist.all_reduce(x); print('sum', x.item()); dist.destroy_process_group()"
    )
    worker = bench.root / "two_ranks.py"
    worker.write_text(program)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    try:
        done = subprocess.run(launcher, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        yield skipped("ranks", what, "no answer within a minute")
        return
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "Duplicate GPU" in line), done.stderr[-200:])
        yield skipped("ranks", what, reason)
        return
    yield at_most("ranks", what, abs(float(done.stdout.split()[-1]) - 2), 0)


RUNS: dict[str, Callable[[Bench, bool], Iterator[Figure]]] = {
    "resume": resume, "padding": padding, "repeat": repeat, "lengths": lengths, "variants": variants, "ranks": ranks,
}  # fmt: skip
