"""What a rank does between two steps, at a large global batch on many ranks, as a share of a planned step.

    python -m tools.benchmarks.between_steps [--pairs 8192] [--gpus 1024] [--steps 8]

Measured, in CPU time, with the functions that training calls: planning the packs of all ranks and collating one rank's,
counting a step's work, its metrics, and the first rank's log. Simulated: the all-reduces of a step's numbers, each of
2 log2 N messages of ``--latency-us``, and the copies of packs to the GPU, at the planner's PCIe speed. The step is the
planner's, of TGDPO with an 8B Llama and a guide of its size, on the layout that it finds fastest.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from megatron_tgdpo.batching.collate import PreferenceBatch
from megatron_tgdpo.output.metrics import shortened
from megatron_tgdpo.output.metrics_log import MetricsLog
from megatron_tgdpo.planning.activations import Pack
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.layouts import Plan, all_plans
from megatron_tgdpo.training.performance import Performance, StepWork
from tools.benchmarks.ahead import FORMAT, Steps
from tools.benchmarks.metrics_file import random_steps, run_config
from tools.benchmarks.training_step.table import aligned

# Of numbers of ranks, and of metrics.
_ALL_REDUCES = 2


def llama_8b() -> LlamaConfig:
    """Of the published shape of Llama-3-8B."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip


def planned_step(pairs: int, cluster: Cluster, lengths: np.ndarray) -> Plan:
    """The fastest plan for pairs of these lengths."""
    hf_config = llama_8b()
    pair_tokens = int((2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]).mean())
    share = float(lengths[:, 1:].sum() / (2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]).sum())
    batch = Batch(pairs, pair_tokens, share, shared_prompts=True)
    pack = Pack(FORMAT.tokens, FORMAT.tokens // 2, 2, batch.gathered_keys, 2**30)
    return all_plans(Job(hf_config, (hf_config, hf_config), pack, batch), cluster, plain=True)[0]


def _cpu_ms(action: Callable[[int], object], times: int) -> float:
    """The median of several, each with a number of its own."""
    taken = []
    for number in range(times):
        began = time.thread_time()
        action(number)
        taken.append(1000 * (time.thread_time() - began))
    return median(taken)


def _bytes(batch: PreferenceBatch) -> int:
    found = (getattr(batch, field.name) for field in fields(batch))
    return sum(each.nbytes for each in found if isinstance(each, Tensor))


def main() -> None:
    """Prints a line for each thing that is done."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.between_steps")
    parser.add_argument("--pairs", type=int, default=8192, help="of a step, over all ranks")
    parser.add_argument("--gpus", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8, help="that are measured")
    parser.add_argument("--latency-us", type=float, default=10.0, help="of a message between nodes (assumed)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cluster = Cluster(nodes=max(1, options.gpus // 8), gpus_per_node=min(8, options.gpus))
    lengths = Steps(options.pairs, 1).lengths
    plan = planned_step(options.pairs, cluster, lengths)
    steps, shape = Steps(options.pairs, plan.layout.data), llama_8b()
    packs = steps.make(0)
    copied = sum(map(_bytes, packs))
    with tempfile.TemporaryDirectory() as name:
        config = run_config(Path(name))
        models = {role: shape for role in ("policy", "reference", "guide")}
        performance = Performance(config, models, FORMAT, options.gpus, torch.device("cpu"))
        used = [FORMAT.tokens] * plan.layout.data * plan.micro_batches
        values = [dict(step.values) for step in random_steps(config, options.steps)]
        log = MetricsLog(config, 0)
        work = StepWork(10**7, 10**7, options.pairs, 10**15)
        alone = {
            "packs planned (all ranks') and collated (one's)": _cpu_ms(steps.make, options.steps),
            "its work counted": _cpu_ms(lambda _: performance.work(lengths, lengths, used), options.steps),
        }
        waited = {
            "metrics made": _cpu_ms(
                lambda number: shortened(values[number] | performance.metrics(1.0, work, 0.0, 1.0)), options.steps
            ),
            "and logged, by the first rank": _cpu_ms(lambda n: log.write(n + 1, values[n], {}, []), options.steps),
        }
        log.close()
    rounds = 2 * math.ceil(math.log2(max(2, options.gpus)))
    waited["numbers reduced (simulated)"] = _ALL_REDUCES * rounds * options.latency_us / 1000
    # Copies are asynchronous, from page-locked memory; if they were not:
    waited["packs copied (simulated, not overlapped)"] = 1000 * copied / cluster.host_bandwidth
    step_ms = 1000 * plan.time.total
    late = max(0.0, sum(alone.values()) - step_ms)
    waited["waiting for packs"] = late
    print(f"planned step: {plan.time.total:.2f} s, {plan.layout}, {plan.micro_batches} packs a data rank")
    rows = [[name, f"{ms:.2f}", f"{ms / step_ms:.3%}"] for name, ms in waited.items()]
    total = sum(waited.values())
    print(aligned(["between steps", "ms", "of a step"], [*rows, ["all", f"{total:.2f}", f"{total / step_ms:.3%}"]]))
    print()
    rows = [[name, f"{ms:.2f}", f"{ms / step_ms:.3%}"] for name, ms in alone.items()]
    print(aligned(["in another thread, while a step computes", "ms", "of a step"], rows))


if __name__ == "__main__":
    main()
