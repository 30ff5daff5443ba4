"""Checks of machines, storage and network before the first step, so that a bad node costs a minute and not a night.

What stops the run names its nodes; their names also go into ``bad_nodes`` of the output directory, for the launcher to
leave them out next time.
"""

import contextlib
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.listing import saved_checkpoints
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.distributed.ranks import RankEnvironment, raise_on_all_ranks
from megatron_tgdpo.errors import AgreedError, BadNodeError
from megatron_tgdpo.mcore_compat import untested_version
from megatron_tgdpo.models.hf_weights.mapping import parameter_count
from megatron_tgdpo.resilience.preflight_facts import RankFacts, gather_facts
from megatron_tgdpo.resilience.preflight_network import (
    GroupResult,
    as_told,
    bandwidth_report,
    measure_groups,
    slow_groups,
    to_tell,
)
from megatron_tgdpo.storage.files import read_error, write_error

logger = logging.getLogger(__name__)

BAD_NODES_FILE = "bad_nodes"
_OPTIMIZER_BYTES = 12  # fp32 weight and two moments
_SPARE_INODES = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """Something that stops the run: on one machine, or (host None) on none in particular."""

    host: str | None
    message: str

    def __str__(self) -> str:
        return f"node {self.host}: {self.message}" if self.host else self.message


@dataclass(frozen=True)
class Findings:
    """What :func:`examine` found; the same on every rank.

    Attributes:
        problems: What stops the run.
        notes: What deserves a look but stops nothing.
        bandwidth: A line for each kind of group.
    """

    problems: list[Problem]
    notes: list[str]
    bandwidth: list[str]


def preflight(
    config: Config,
    policy: PretrainedConfig,
    ranks: RankEnvironment,
    layout: ParallelLayout,
    pg: ProcessGroupCollection,
    device: torch.device,
) -> None:
    """Runs all checks, logs what they find, and ends the run on a problem. As :func:`examine`.

    Raises:
        BadNodeError: On every rank: a check failed, on the node that the message names.
        AgreedError: On every rank: a check failed, on no node in particular; as AgreedStorageError, storage did.
    """
    found = examine(config, policy, ranks, layout, pg, device)
    problems = found.problems
    if ranks.rank == 0:
        for line in found.bandwidth:
            logger.info("preflight: %s", line)
        for note in [*found.notes, *map(str, problems)]:
            logger.warning("preflight: %s", note)
    if problems:
        _report_bad_nodes(Path(config.output_dir), problems)
        more = f" (and {len(problems) - 1} more problems, see the log)" if len(problems) > 1 else ""
        kind = BadNodeError if any(problem.host for problem in problems) else AgreedError
        raise kind(f"preflight: {problems[0]}{more}")


def examine(
    config: Config,
    policy: PretrainedConfig,
    ranks: RankEnvironment,
    layout: ParallelLayout,
    pg: ProcessGroupCollection,
    device: torch.device,
) -> Findings:
    """All checks of machines, storage and network. Collective over all ranks; nothing is loaded yet.

    Args:
        config: The run; its output directory exists.
        policy: The policy's HF config, for the size of a checkpoint.
        ranks: This process's place.
        layout: The parallel layout.
        pg: Its process groups.
        device: Of the collectives.

    Raises:
        AgreedError: On every rank: something could not be looked at; as AgreedStorageError, for storage that failed.
    """
    # Gloo's, on a GPU too: ranks must be able to tell of a machine on which NCCL does not work.
    group = dist.new_group(backend="gloo", timeout=timedelta(minutes=config.parallel.timeout_minutes))
    try:
        return _examine(config, policy, ranks, layout, pg, device, group)
    finally:
        dist.destroy_process_group(group)


def _examine(
    config: Config,
    policy: PretrainedConfig,
    ranks: RankEnvironment,
    layout: ParallelLayout,
    pg: ProcessGroupCollection,
    device: torch.device,
    group: dist.ProcessGroup,
) -> Findings:
    output_dir = Path(config.output_dir)
    facts = _all_gather(
        raise_on_all_ranks(lambda: gather_facts(config, ranks.rank, ranks.local_rank, device), group), group
    )
    hosts = [fact.host for fact in facts]
    problems = compare_facts(facts) + _shared_storage(output_dir, hosts, group)
    told = _all_gather(to_tell(measure_groups(pg, device), ranks.rank), group)
    results = as_told(each for several in told for each in several)
    problems += network_problems(results, hosts)
    size = parameter_count(policy) * (_OPTIMIZER_BYTES + config.precision.parameter_bytes)
    # Storage is asked by one rank only: what others use of it changes meanwhile.
    keep, first = config.checkpoint.keep, ranks.rank == 0
    room, notes = raise_on_all_ranks(
        lambda: storage_room(output_dir, size, keep, layout.world_size) if first else ([], []), group
    )
    problems += [Problem(None, message) for message in _from_first_rank(room, group)]
    notes = _from_first_rank(notes, group)
    notes += placement_notes(results, hosts) + [f"node {fact.host}: {note}" for fact in facts for note in fact.notes]
    notes += slow_notes(slow_groups(results, config.preflight.slow_group_ratio), hosts)
    notes += [note for note in (untested_version(),) if note is not None]
    return Findings(problems, notes, bandwidth_report(results))


def compare_facts(facts: Sequence[RankFacts]) -> list[Problem]:
    """Faults of single machines, and the machines whose versions, inputs or number of GPUs are not those of most."""
    problems = [Problem(fact.host, fault) for fact in facts for fault in fact.faults]
    names = sorted({name for fact in facts for name in fact.compared})
    values = {name: [fact.compared.get(name, "missing") for fact in facts] for name in names}
    values["number of GPUs"] = [str(fact.gpus) for fact in facts]
    for name, each in values.items():
        (usual, count), *others = Counter(each).most_common()
        if not others:
            continue
        if count == others[0][1]:
            problems.append(Problem(None, f"{name} differs: {_by_host(facts, each)}"))
            continue
        odd = {fact.host: value for fact, value in zip(facts, each, strict=True) if value != usual}
        problems += [Problem(host, f"{name} is {value} there, {usual} elsewhere") for host, value in odd.items()]
    return problems


def network_problems(results: Sequence[GroupResult], hosts: Sequence[str]) -> list[Problem]:
    """Groups whose sum was wrong; a machine is named if it is the only one of the group."""
    problems = []
    for result in {result.ranks: result for result in results if not result.correct}.values():
        where = sorted({hosts[rank] for rank in result.ranks})
        message = f"the all-reduce of {result.kind} group {list(result.ranks)} gave a wrong sum on {', '.join(where)}"
        problems.append(Problem(where[0] if len(where) == 1 else None, message))
    return problems


def placement_notes(results: Sequence[GroupResult], hosts: Sequence[str]) -> list[str]:
    """Tensor groups, and groups that exchange experts' tokens, that span machines: correct, but each layer then waits
    for the network."""
    notes = []
    for kind, name, key in (
        ("tp", "tensor", "tensor"),
        ("ep", "expert", "expert"),
        ("expt_tp", "expert tensor", "expert_tensor"),
    ):
        spanning = {r.ranks for r in results if r.kind == kind and len({hosts[rank] for rank in r.ranks}) > 1}
        if spanning:
            first = min(spanning)
            where = ", ".join(sorted({hosts[rank] for rank in first}))
            notes.append(
                f"{len(spanning)} {name} groups span nodes, first ranks {list(first)} on {where}: lower parallel.{key}"
            )
    return notes


def slow_notes(slow: Sequence[GroupResult], hosts: Sequence[str]) -> list[str]:
    """The groups of :func:`slow_groups`, with their machines."""
    return [
        f"{result.kind} group of ranks {list(result.ranks)} on {', '.join(sorted({hosts[r] for r in result.ranks}))} "
        f"is slow: {result.bandwidth / 1e9:.2f} GB/s"
        for result in slow
    ]


def storage_room(output_dir: Path, size: int, keep: int, world_size: int) -> tuple[list[str], list[str]]:
    """Whether checkpoints fit.

    Args:
        output_dir: Of the run.
        size: Bytes of a checkpoint.
        keep: Checkpoints to keep, 0 for all.
        world_size: Ranks, each of which writes a file.

    Returns:
        What stops the run (not even one fits), and what deserves a warning.

    Raises:
        StorageError: The directory cannot be read.
    """
    try:
        stats = os.statvfs(output_dir)
    except OSError as error:
        raise read_error(output_dir, error) from error
    free, inodes = stats.f_bavail * stats.f_frsize, stats.f_favail
    if free < size:
        return [f"{output_dir}: a checkpoint needs {size:,} bytes, {free:,} are free"], []
    if stats.f_files and inodes < world_size + _SPARE_INODES:
        return [f"{output_dir}: checkpoints need {world_size + _SPARE_INODES:,} inodes, {inodes:,} are free"], []
    # One more than are kept: the old one goes when the new one is complete.
    wanted = max(1, (keep or 1) + 1 - len(saved_checkpoints(output_dir)))
    if free < wanted * size:
        return [], [f"{output_dir}: room for {free // size} of {wanted} checkpoints of {size:,} bytes"]
    return [], []


def _shared_storage(output_dir: Path, hosts: Sequence[str], group: dist.ProcessGroup) -> list[Problem]:
    """Whether every rank sees at once what the first one writes, and the first one what every rank writes."""
    rank, token = dist.get_rank(), _from_first_rank(uuid.uuid4().hex, group)
    directory = output_dir / f".canary-{token[:8]}"
    try:
        raise_on_all_ranks(lambda: _write(directory / "first", token) if rank == 0 else None, group)
        seen = _reads(directory / "first", token)
        raise_on_all_ranks(lambda: _write(directory / f"rank-{rank}", token) if seen else None, group)
        blind = [number for number, sees in enumerate(_all_gather(seen, group)) if not sees]
        lost = []
        if rank == 0:
            others = set(range(dist.get_world_size())) - set(blind)
            lost = [number for number in sorted(others) if not _reads(directory / f"rank-{number}", token)]
        lost = _from_first_rank(lost, group)
    finally:
        dist.barrier(group)
        if rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
    problems = [Problem(hosts[n], f"does not see what node {hosts[0]} writes to {output_dir}") for n in blind]
    problems += [Problem(hosts[n], f"what it writes to {output_dir} is not seen by node {hosts[0]}") for n in lost]
    return list(dict.fromkeys(problems))


def _write(file: Path, content: str) -> None:
    """Writes a file, and its directory where that is not there."""
    try:
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    except OSError as error:
        raise write_error(file, error) from error


def _reads(file: Path, content: str) -> bool:
    try:
        return file.read_text() == content
    except OSError:
        return False


def _report_bad_nodes(output_dir: Path, problems: Sequence[Problem]) -> None:
    bad = {problem.host: problem.message for problem in problems if problem.host}
    if dist.get_rank() == 0 and bad:
        # Without it the same nodes may be tried again; the error names them all the same.
        with contextlib.suppress(OSError), (output_dir / BAD_NODES_FILE).open("a", encoding="utf-8") as file:
            file.write("".join(f"{host}\t{message}\n" for host, message in bad.items()))


def _by_host(facts: Sequence[RankFacts], values: Sequence[str]) -> str:
    pairs = dict.fromkeys((fact.host, value) for fact, value in zip(facts, values, strict=True))
    return ", ".join(f"{value} on {host}" for host, value in pairs)


def _all_gather(value: T, group: dist.ProcessGroup) -> list[T]:
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _from_first_rank(value: T, group: dist.ProcessGroup) -> T:
    holder = [value]
    dist.broadcast_object_list(holder, src=0, group=group)
    return holder[0]
