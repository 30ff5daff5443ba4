"""An all-reduce over every process group: is the sum right, and is any group slower than its like?"""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

_ELEMENTS = {"cuda": 2**24, "cpu": 2**18}  # float32: 64 MiB and 1 MiB
_REPEATS = 5
# By attribute of megatron-core's collection: ranks that make a layer, pass activations on, sum gradients (``dp_cp``, of
# experts ``expt_dp``), have different experts (``ep``), or share an expert (``expt_tp``).
_KINDS = ("tp", "cp", "pp", "dp", "dp_cp", "ep", "expt_tp", "expt_dp")
_NUMBERS = 1024  # values stay below 2^24, where float32 counts exactly, for up to 16,384 ranks


@dataclass(frozen=True)
class GroupResult:
    """One group's all-reduce as one of its ranks saw it.

    Attributes:
        kind: Of ``_KINDS``, or ``world``.
        ranks: Global ranks of the group.
        correct: Whether the sum was right on this rank.
        bandwidth: Bus bandwidth in bytes per second, 2 (n - 1) / n of the bytes over the median time.
    """

    kind: str
    ranks: tuple[int, ...]
    correct: bool
    bandwidth: float


def measure_groups(pg: ProcessGroupCollection, device: torch.device) -> list[GroupResult]:
    """Runs an all-reduce over each of this rank's groups of more than one rank, as a rule once over the same ranks.

    Collective over all ranks: groups of one kind have no rank in common, so that their order is the same for all.
    """
    groups = {kind: getattr(pg, kind) for kind in _KINDS} | {"world": dist.group.WORLD}
    results: list[GroupResult] = []
    for kind, group in groups.items():
        if group is None or group.size() == 1:
            continue
        # As expt_tp is tp where experts are cut as all MLPs are. Tokens cross ep in every layer: it is always told of.
        known = {result.ranks for result in results}
        if kind in ("ep", "world") or tuple(dist.get_process_group_ranks(group)) not in known:
            results.append(_measure(kind, group, device))
    return results


def to_tell(results: Sequence[GroupResult], rank: int) -> list[tuple[str, range | tuple[int, ...], bool, float]]:
    """What a rank tells others of its groups: of one whose sum was right only its first rank does, and ranks that lie
    evenly are three numbers. Else all ranks would get as many numbers as ranks squared."""
    told = []
    for result in results:
        if not result.correct or rank == result.ranks[0]:
            first, second, *_ = result.ranks
            even = range(first, result.ranks[-1] + 1, second - first) if second > first else range(0)
            ranks = even if tuple(even) == result.ranks else result.ranks
            told.append((result.kind, ranks, result.correct, result.bandwidth))
    return told


def as_told(told: Iterable[tuple[str, range | tuple[int, ...], bool, float]]) -> list[GroupResult]:
    """The results that :func:`to_tell` made short."""
    return [GroupResult(kind, tuple(ranks), correct, bandwidth) for kind, ranks, correct, bandwidth in told]


def slow_groups(results: Sequence[GroupResult], ratio: float) -> list[GroupResult]:
    """The groups whose bandwidth is below ``ratio`` of the median of their kind, where there are three or more."""
    slow = []
    for kind in {result.kind for result in results}:
        alike = {result.ranks: result for result in results if result.kind == kind}
        if len(alike) >= 3:
            usual = statistics.median(result.bandwidth for result in alike.values())
            slow += [result for result in alike.values() if result.bandwidth < ratio * usual]
    return sorted(slow, key=lambda result: (result.kind, result.ranks))


def bandwidth_report(results: Sequence[GroupResult]) -> list[str]:
    """A line for each kind of group: how many there are, and the slowest, median and fastest bandwidth in GB/s."""
    lines = []
    for kind in (*_KINDS, "world"):
        alike = {result.ranks: result.bandwidth / 1e9 for result in results if result.kind == kind}
        if alike:
            low, middle, high = min(alike.values()), statistics.median(alike.values()), max(alike.values())
            lines.append(f"all-reduce {kind}: {len(alike)} groups, {low:.2f} / {middle:.2f} / {high:.2f} GB/s")
    return lines


def _measure(kind: str, group: dist.ProcessGroup, device: torch.device) -> GroupResult:
    size, rank = group.size(), group.rank()
    pattern = torch.arange(_ELEMENTS[device.type], device=device) % _NUMBERS
    expected = (pattern * size + size * (size - 1) // 2).float()
    seconds, correct = [], True
    for _ in range(1 + _REPEATS):
        tensor = (pattern + rank).float()
        _wait(device)
        begin = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _wait(device)
        seconds.append(time.perf_counter() - begin)
        correct &= bool(torch.equal(tensor, expected))
    moved = 2 * (size - 1) / size * expected.nbytes
    ranks = tuple(dist.get_process_group_ranks(group))
    return GroupResult(kind, ranks, correct, moved / statistics.median(seconds[1:]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
