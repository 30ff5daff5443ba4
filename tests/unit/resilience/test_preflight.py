"""Preflight's judgements on given facts, and its checks on one rank."""

import dataclasses
import pickle
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.resilience import preflight as checks
from megatron_tgdpo.resilience.preflight import (
    compare_facts,
    network_problems,
    placement_notes,
    slow_notes,
    storage_room,
)
from megatron_tgdpo.resilience.preflight_facts import (
    RankFacts,
    gather_facts,
    gpu_faults,
    model_fingerprint,
    occupied_notes,
    shared_memory_notes,
    xid_notes,
)
from megatron_tgdpo.resilience.preflight_network import (
    GroupResult,
    as_told,
    bandwidth_report,
    measure_groups,
    slow_groups,
    to_tell,
)
from tests.tiny_models import make_llama

CPU = torch.device("cpu")
HOSTS = ["a", "a", "b", "b", "c", "c"]


def facts(**changed: dict[str, Any]) -> list[RankFacts]:
    """Of six ranks on three machines, alike but for what is said of a machine."""
    usual = {"compared": {"torch": "2.13", "model.policy": "abc"}, "gpus": 2, "faults": [], "notes": []}
    return [RankFacts(rank, host, **{**usual, **changed.get(host, {})}) for rank, host in enumerate(HOSTS)]


def result(kind: str, ranks: tuple[int, ...], bandwidth: float = 1e9, correct: bool = True) -> GroupResult:
    return GroupResult(kind, ranks, correct, bandwidth)


def test_alike_machines_have_no_problems() -> None:
    assert compare_facts(facts()) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"compared": {"torch": "2.11", "model.policy": "abc"}}, "node b: torch is 2.11 there, 2.13 elsewhere"),
        ({"compared": {"torch": "2.13"}}, "node b: model.policy is missing there, abc elsewhere"),
        ({"gpus": 1}, "node b: number of GPUs is 1 there, 2 elsewhere"),
        ({"faults": ["GPU 1 has 3 uncorrected ECC errors"]}, "node b: GPU 1 has 3 uncorrected ECC errors"),
    ],
)
def test_the_odd_machine_is_named(changed: dict[str, Any], message: str) -> None:
    found = {str(problem) for problem in compare_facts(facts(b=changed))}
    assert found == {message}


def test_without_a_majority_all_are_named() -> None:
    two = [fact for fact in facts(b={"compared": {"torch": "2.11", "model.policy": "abc"}}) if fact.host in "ab"]
    (problem,) = compare_facts(two)
    assert problem.host is None
    assert problem.message == "torch differs: 2.13 on a, 2.11 on b"


def test_wrong_sums_name_a_machine_that_is_alone() -> None:
    inside, across = result("tp", (2, 3), correct=False), result("dp", (0, 2), correct=False)
    assert [problem.host for problem in network_problems([inside, inside, across], HOSTS)] == ["b", None]
    assert "dp group [0, 2]" in str(network_problems([across], HOSTS)[0])
    assert network_problems([result("tp", (0, 1))], HOSTS) == []


def test_what_ranks_tell_of_groups_is_short() -> None:
    """Of a thousand ranks, too: each gets what all tell, as long as the longest."""
    world, data = tuple(range(1024)), tuple(range(8, 1024, 16))
    groups = [result("world", world), result("dp", data), result("tp", (3, 4, 9)), result("pp", (7, 2))]
    assert to_tell(groups, 5) == []
    everything = [each for rank in (0, 3, 7, 8) for each in to_tell(groups, rank)]
    assert len(pickle.dumps(everything)) < 400
    assert sorted(as_told(everything), key=groups.index) == groups
    # A wrong sum is told by each rank that has it.
    wrong = [dataclasses.replace(groups[0], correct=False)]
    assert as_told(to_tell(wrong, 5)) == wrong


def test_slow_groups_are_compared_with_their_kind() -> None:
    groups = [result("tp", (0, 1)), result("tp", (2, 3), 0.4e9), result("tp", (4, 5)), result("pp", (0, 2), 0.1e9)]
    slow = slow_groups([*groups, *groups], 0.5)
    assert slow == [groups[1]]
    assert slow_notes(slow, HOSTS) == ["tp group of ranks [2, 3] on b is slow: 0.40 GB/s"]
    assert bandwidth_report(groups)[0] == "all-reduce tp: 3 groups, 0.40 / 1.00 / 1.00 GB/s"


def test_tensor_groups_that_span_machines() -> None:
    groups = [result("tp", (0, 1)), result("tp", (1, 2)), result("dp", (3, 4))]
    assert placement_notes(groups, HOSTS) == [
        "1 tensor groups span nodes, first ranks [1, 2] on a, b: lower parallel.tensor"
    ]
    assert placement_notes(groups[:1], HOSTS) == []
    assert placement_notes([result("ep", (0, 2)), result("expt_tp", (0, 1))], HOSTS) == [
        "1 expert groups span nodes, first ranks [0, 2] on a, b: lower parallel.expert"
    ]


def test_gpu_errors_and_xids() -> None:
    assert gpu_faults("0, 0, 0\n1, 2, 0\n2, [N/A], [N/A]\n3, 0, 1\n") == [
        "GPU 1 has 2 uncorrected ECC errors",
        "GPU 3 failed to remap memory rows",
    ]
    assert gpu_faults("") == []
    log = "[1] boot\n[2] NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.\n"
    assert "1 Xid lines" in xid_notes(log)[0]
    assert xid_notes("[1] boot") == []


def test_what_deserves_a_look_on_a_gpu() -> None:
    assert occupied_notes(3, 79 << 30, 80 << 30) == []
    assert occupied_notes(3, 40 << 30, 80 << 30) == ["GPU 3: 40.0 of 80.0 GiB are in use by another process"]
    assert shared_memory_notes(None) == []
    stats: Any = SimpleNamespace(f_blocks=1 << 14, f_frsize=4096)
    assert "/dev/shm has 64 MiB, NCCL wants 1024" in shared_memory_notes(stats)[0]
    stats.f_blocks <<= 4
    assert shared_memory_notes(stats) == []


def test_storage_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = SimpleNamespace(f_bavail=1000, f_frsize=10, f_favail=10**6, f_files=10**7)
    monkeypatch.setattr(checks.os, "statvfs", lambda path: stats)
    assert storage_room(tmp_path, 3000, 2, 8) == ([], [])
    assert "room for 2 of 3 checkpoints of 5,000 bytes" in storage_room(tmp_path, 5000, 2, 8)[1][0]
    assert "needs 10,001 bytes, 10,000 are free" in storage_room(tmp_path, 10001, 2, 8)[0][0]
    stats.f_favail = 1000
    assert "need 1,008 inodes, 1,000 are free" in storage_room(tmp_path, 10, 2, 8)[0][0]
    stats.f_files = 0  # a file system that does not count them
    assert storage_room(tmp_path, 10, 2, 8) == ([], [])


def test_fingerprints_tell_models_apart(tmp_path: Path) -> None:
    one, other = make_llama(tmp_path / "one"), make_llama(tmp_path / "other", vocab_size=132)
    assert model_fingerprint(one) == model_fingerprint(one)
    assert model_fingerprint(one) != model_fingerprint(other)
    config = config_from_dict(
        {
            "model": {"policy": str(one), "guide": str(other)},
            "data": {"train": "pairs"},
            "batch": {"global_pairs": 1},
            "optimizer": {"lr": 1e-6},
            "train": {"steps": 1},
            "output_dir": str(tmp_path),
        }
    )
    mine = gather_facts(config, 0, 0, CPU)
    assert mine.compared["torch"] == version("torch")
    assert mine.compared["model.policy"] == model_fingerprint(one)
    assert mine.compared["model.guide"] == model_fingerprint(other)
    assert "model.reference" not in mine.compared
    changed = dataclasses.replace(config, output_dir="elsewhere")
    assert gather_facts(changed, 0, 0, CPU).compared["config"] != mine.compared["config"]


def test_one_rank_has_no_groups(single_rank_group: dist.ProcessGroup) -> None:
    pg: Any = SimpleNamespace(
        **dict.fromkeys(("tp", "cp", "pp", "dp", "dp_cp", "ep", "expt_tp", "expt_dp"), single_rank_group)
    )
    assert measure_groups(pg, CPU) == []
