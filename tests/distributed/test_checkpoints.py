"""What is saved is the state at its step, however long writing takes; damage costs no more than the last save."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tgdpo.checkpoints.reader import CheckpointReader
from tests.distributed.common import make_problem, merged, read_metrics
from tests.processes import run_forked

SERIES = ("train/loss", "train/grad_norm", "rewards/margins")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    config = merged(
        make_problem(root, tied=True),
        parallel={"tensor": 2},
        checkpoint={"every_steps": 3, "keep": 0},
        train={"steps": 6},
        log={"every_steps": 1},
    )
    file = root / "config.json"
    file.write_text(json.dumps(config))
    run_forked("tests.distributed.worker_checkpoints", [str(file)], processes=2)
    return Path(config["output_dir"])


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(checkpoint)
    return {name: reader.rows(name, None, 0, info.size[0]) for name, info in reader.tensors.items() if info.size}


def runs(base: Path, kind: str) -> list[dict[str, Any]]:
    return read_metrics(base.with_name(f"{base.name}-{kind}"))


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(base: Path) -> None:
    for step in (3, 6):
        name = f"checkpoints/step_{step:08d}"
        ours = tensors(base.with_name(f"{base.name}-background") / name)
        wanted = tensors(base.with_name(f"{base.name}-foreground") / name)
        assert ours.keys() == wanted.keys()
        assert any("optimizer" in key for key in ours)
        assert any("linear_qkv" in key for key in ours)
        for key, tensor in wanted.items():
            assert torch.equal(ours[key], tensor), key
    last = tensors(base.with_name(f"{base.name}-foreground") / "checkpoints/step_00000006")
    first = tensors(base.with_name(f"{base.name}-foreground") / "checkpoints/step_00000003")
    assert not torch.equal(first["decoder.final_layernorm.weight"], last["decoder.final_layernorm.weight"])


def test_the_time_of_a_save_is_in_the_metrics(base: Path) -> None:
    figures = [step for step in runs(base, "foreground") if "perf/checkpoint_wait_seconds" in step]
    assert [step["step"] for step in figures] == [4]
    assert 0 < figures[0]["perf/checkpoint_seconds"] <= figures[0]["perf/checkpoint_wait_seconds"]
    waits = [step for step in runs(base, "background") if "perf/checkpoint_wait_seconds" in step]
    assert [step["step"] for step in waits] == [4]
    assert "perf/checkpoint_seconds" not in waits[0]  # step 4 is over before it is written


def test_the_checkpoint_before_a_damaged_one_is_used(base: Path) -> None:
    damaged, whole = runs(base, "damaged"), runs(base, "foreground")
    assert [step["step"] for step in damaged] == list(range(1, 7))
    assert [[step[key] for key in SERIES] for step in damaged] == [[step[key] for key in SERIES] for step in whole]


def errors(base: Path, kind: str) -> set[str]:
    """What the ranks raised."""
    return {base.with_name(f"{base.name}-{kind}-{rank}").read_text() for rank in range(2)}


def test_a_rank_that_cannot_read_stops_all_of_them_and_nothing_is_renamed(base: Path) -> None:
    directory = base.with_name(f"{base.name}-damaged") / "checkpoints"
    (message,) = errors(base, "unreadable")
    assert message.startswith("AgreedStorageError: rank 1: ")
    assert f"{directory}/step_00000006/__" in message
    assert message.endswith("cannot be read: Input/output error")


def test_without_an_undamaged_checkpoint_the_run_says_so_at_every_start(base: Path) -> None:
    directory = base.with_name(f"{base.name}-damaged") / "checkpoints"
    (message,) = errors(base, "error-0") | errors(base, "error-1")
    assert message.startswith(f"AgreedError: {directory}/step_00000006/__1_0.distcp: its bytes are not those")
    assert "no undamaged checkpoint is left" in message
    names = ["step_00000002", "step_00000004", "step_00000004.damaged", "step_00000006"]
    assert sorted(path.name for path in directory.iterdir()) == names
