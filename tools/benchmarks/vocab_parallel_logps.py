"""Peak memory and time of token log-probs, forward and backward, beside full float32 logits.

    python -m tools.benchmarks.vocab_parallel_logps [--vocabulary 128256] [--tokens 4096] [--hidden 256]
        [--device cpu|cuda]

Each variant runs in a fresh process; peak memory is what the computation adds to its inputs (allocator peak on a GPU,
resident set on a CPU). Prints both, and the ratio.
"""

import argparse
import multiprocessing
import resource
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_tgdpo.loss.vocab_parallel_logps import token_logps
from megatron_tgdpo.resilience.launch import end_with_parent


@dataclass(frozen=True)
class Problem:
    """Sizes of one measurement."""

    vocabulary: int
    tokens: int
    hidden: int
    device: str


@dataclass(frozen=True)
class Measurement:
    """``peak_bytes`` above the inputs, ``seconds`` of one forward and backward, and the sum of the log-probs."""

    peak_bytes: int
    seconds: float
    total: float


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What plain implementations do: [tokens, vocabulary] float32 logits and their log-softmax."""
    return (hidden @ weight.t()).float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    group = dist.group.WORLD
    assert group is not None
    return token_logps(hidden, weight, targets, vocab_size=weight.shape[0], tp_group=group)


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(variant: str, problem: Problem) -> Measurement:
    """Runs one variant in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    compute = {"full": full_logits, "chunked": chunked}[variant]
    hidden = torch.randn(problem.tokens, problem.hidden, device=problem.device).requires_grad_()
    weight = (torch.randn(problem.vocabulary, problem.hidden, device=problem.device) / 16).requires_grad_()
    targets = torch.randint(problem.vocabulary, (problem.tokens,), device=problem.device)
    compute(hidden[:8], weight[:512], targets[:8] % 512).sum().backward()  # warms up kernels and allocator
    hidden.grad = weight.grad = None
    before = _peak(problem.device)
    started = time.perf_counter()
    logps = compute(hidden, weight, targets)
    logps.sum().backward()
    total = float(logps.sum())  # waits for a GPU
    return Measurement(_peak(problem.device) - before, time.perf_counter() - started, total)


def main() -> None:
    """Runs both variants and prints them."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.vocab_parallel_logps")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    problem = Problem(**vars(parser.parse_args()))
    results = {}
    for variant in ("full", "chunked"):
        # A fresh process each: a resident set never shrinks.
        with multiprocessing.get_context("spawn").Pool(1, end_with_parent) as pool:
            results[variant] = pool.apply(measure, (variant, problem))
        result = results[variant]
        print(
            f"{variant:>8}: peak {result.peak_bytes / 2**20:8.0f} MiB  {result.seconds:6.2f} s  sum {result.total:.2f}"
        )
    full, ours = results["full"], results["chunked"]
    print(f"chunked / full: memory {ours.peak_bytes / full.peak_bytes:.3f}, time {ours.seconds / full.seconds:.2f}")


if __name__ == "__main__":
    main()
