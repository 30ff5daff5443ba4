"""Bad input and bad luck: one clear line, nothing lost, nobody left waiting."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tgdpo.data.manifest import digest_file
from megatron_tgdpo.signals import FAILED_STATUS, STORAGE_STATUS
from tests.checkpoints import is_complete
from tests.distributed.common import make_problem, merged, read_metrics
from tests.launch import PATIENCE, run_module
from tests.processes import run_forked, started_ranks
from tests.series import wait_for_step
from tests.tiny_models import make_tokenizer

Problem = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    root = tmp_path_factory.mktemp("failures")
    return root, make_problem(root)


def write_config(path: Path, config: dict[str, Any]) -> str:
    path.write_text(json.dumps(config))  # JSON is YAML
    return str(path)


def error_of(done: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The one error line of a run that failed as it should."""
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_unknown_key(problem: Problem) -> None:
    root, config = problem
    done = run_module("megatron_tgdpo.train", [write_config(root / "a.yaml", config), "loss.betta=1"], check=False)
    assert "loss.betta" in error_of(done)


def test_token_ids_beyond_the_vocabulary(problem: Problem, tmp_path: Path) -> None:
    """Tokenizers of 140 words for a policy of 131: padding and sharding would hide it from the embedding."""
    root, config = problem
    policy = tmp_path / "policy"
    copy_model(Path(config["model"]["policy"]), policy)
    make_tokenizer(140).save_pretrained(policy)
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "w9", "chosen": "w8", "rejected": "w139"}\n' * 2)
    config = merged(config, data={"train": str(data)}, loss={"method": "dpo"}, output_dir=str(tmp_path / "run"))
    config = {**config, "model": {"policy": str(policy)}}
    line = error_of(run_forked("megatron_tgdpo.train", [write_config(root / "b.yaml", config)], check=False))
    assert "token id 139" in line
    assert "131" in line


def test_a_loss_that_is_not_finite_names_the_pair_and_saves_nothing(problem: Problem, tmp_path: Path) -> None:
    _, config = problem
    bad_guide = tmp_path / "guide"
    copy_model(Path(config["model"]["guide"]), bad_guide)
    weights = load_file(bad_guide / "model.safetensors")
    # Finite weights that give the word w3 the logit -inf after any other.
    weights["model.embed_tokens.weight"][:, 0] = 100.0
    weights["lm_head.weight"][3, 0] = -3e38
    save_file(weights, bad_guide / "model.safetensors", metadata={"format": "pt"})
    records = [{"prompt": "w9 w8", "chosen": "w7", "rejected": "w6 w5"} for _ in range(12)]
    records[8]["rejected"] = "w6 w3 w5"  # line 9, in the second step of six
    data = tmp_path / "nan.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = merged(
        config,
        model={"guide": str(bad_guide)},
        data={"train": str(data), "shuffle": False},
        checkpoint={"every_steps": 1},
        output_dir=str(tmp_path / "run"),
    )
    line = error_of(run_forked("megatron_tgdpo.train", [write_config(tmp_path / "c.yaml", config)], check=False))
    assert "step 2" in line
    assert "nan.jsonl:9" in line
    assert len(read_metrics(tmp_path / "run")) == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]


def copy_model(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize("role", ["policy", "guide"])
def test_a_weight_that_is_not_finite_is_named_before_training(problem: Problem, tmp_path: Path, role: str) -> None:
    """It lies in the second rank's half of the packs, and both ranks say the same."""
    _, config = problem
    bad = tmp_path / "bad"
    copy_model(Path(config["model"][role]), bad)
    weights = load_file(bad / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][-1, 5] = float("inf")
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    config = merged(
        config, model={role: str(bad)}, parallel={"tensor": 2, "timeout_minutes": 1}, output_dir=str(tmp_path / "run")
    )
    done = run_forked("megatron_tgdpo.train", [write_config(tmp_path / "c.yaml", config)], processes=2, check=False)
    assert f"{bad}: model.layers.1.mlp.up_proj.weight has values that are not finite" in error_of(done)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_policy_that_differs_from_its_reference_is_stopped_unless_meant(problem: Problem, tmp_path: Path) -> None:
    _, config = problem
    other = tmp_path / "other"
    copy_model(Path(config["model"]["policy"]), other)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] += 0.01 * torch.randn_like(weights["lm_head.weight"])
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    config = merged(config, model={"reference": str(other)}, output_dir=str(tmp_path / "run"), train={"steps": 2})
    file = write_config(tmp_path / "c.yaml", config)
    line = error_of(run_forked("megatron_tgdpo.train", [file], check=False))
    assert "ln 2" in line
    assert "train.check_start=false" in line
    run_forked("megatron_tgdpo.train", [file, "train.check_start=false"])
    assert len(read_metrics(tmp_path / "run")) == 2


def test_damage_seen_by_one_rank_is_reported_by_it(problem: Problem, tmp_path: Path) -> None:
    """Two data ranks; a token id beyond the vocabulary lies in a pair that only rank 1 reads."""
    _, config = problem
    config = merged(config, output_dir=str(tmp_path / "run"), data={"shuffle": False}, batch={"global_pairs": 2})
    config = merged(config, batch={"tokens_per_micro_batch": 128}, train={"steps": 1})
    file = write_config(tmp_path / "c.yaml", config)
    run_forked("megatron_tgdpo.train", [file, "train.exit_step=1"])
    (binary,) = (tmp_path / "run" / "data").glob("*.bin")
    manifest_file = binary.with_suffix(".manifest.json")
    manifest = json.loads(manifest_file.read_text())
    assert manifest["pairs"] == 32
    content = bytearray(binary.read_bytes())
    damaged = merged(config, output_dir=str(tmp_path / "again"), data={"train": str(binary.with_suffix(""))})
    for position in range(0, 4 * 40, 4):  # the first pair, whichever rank it goes to
        content[position : position + 4] = (9999).to_bytes(4, "little")
    binary.write_bytes(bytes(content))
    # Written so, as far as the checksums tell: otherwise all ranks would know before any reads a pair.
    manifest["files"][".bin"]["sha256"] = digest_file(str(binary)).sha256
    manifest_file.write_text(json.dumps(manifest))
    # Nobody waits in a collective for the rank that left: this would outlast the test.
    damaged["parallel"]["timeout_minutes"] = 2 * PATIENCE / 60
    done = run_forked("megatron_tgdpo.train", [write_config(tmp_path / "d.yaml", damaged)], processes=2, check=False)
    assert done.returncode != 0
    assert "damaged" in done.stderr
    assert "pairs.jsonl:1" in done.stderr


def test_an_exception_on_one_rank_ends_all_and_shows_its_traceback(problem: Problem, tmp_path: Path) -> None:
    _, config = problem
    config = merged(config, output_dir=str(tmp_path / "run"), train={"steps": 100000}, parallel={"tensor": 2})
    arguments = [json.dumps({"broken": 3}), write_config(tmp_path / "c.yaml", config)]
    done = run_module("tests.distributed.worker_saves", arguments, processes=2, check=False)
    assert done.returncode != 0
    assert "[rank 1] ZeroDivisionError" in done.stderr
    assert "[rank 1]   File" in done.stderr


def test_a_frozen_rank_is_named_before_collectives_time_out(problem: Problem, tmp_path: Path) -> None:
    """Rank 0 keeps the store too, so its silence is noticed in another way; both runs are watched at the same time."""
    _, config = problem
    config = merged(config, train={"steps": 100000}, parallel={"timeout_minutes": 0.75})
    file = write_config(tmp_path / "c.yaml", config)
    with ExitStack() as stack:
        jobs = []
        for frozen in (0, 1):
            run = tmp_path / f"run{frozen}"
            ranks = stack.enter_context(started_ranks([file, f"output_dir={run}"], 2, tmp_path / f"logs{frozen}"))
            wait_for_step(run, 2, lambda ranks=ranks: ranks[0].poll() is None)
            ranks[frozen].send_signal(signal.SIGSTOP)
            jobs.append(ranks)
        for frozen, ranks in enumerate(jobs):
            assert ranks[1 - frozen].wait(timeout=PATIENCE) == FAILED_STATUS
    for frozen in (0, 1):
        output = (tmp_path / f"logs{frozen}" / f"{1 - frozen}.log").read_text()
        assert re.search(rf"\[rank {1 - frozen}\] rank {frozen}\b.* has not answered for \d+ s", output), output


def test_a_rank_that_never_comes_ends_the_others(problem: Problem, tmp_path: Path) -> None:
    """Where no launcher sees that it died, as one that a signal reached before it listened."""
    _, config = problem
    config = merged(config, parallel={"timeout_minutes": 0.1})
    file = write_config(tmp_path / "c.yaml", config)
    with started_ranks([file, f"output_dir={tmp_path / 'run'}"], 2, tmp_path / "logs") as ranks:
        ranks[1].send_signal(signal.SIGKILL)
        assert ranks[0].wait(timeout=PATIENCE) == FAILED_STATUS
    assert re.search(r"\[rank 0\] rank 1 has not started within \d s", (tmp_path / "logs" / "0.log").read_text())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB: one checkpoint of the tiny model fits, two do not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=False).returncode
    if mounted:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_loses_nothing(problem: Problem, small_disk: Path, tmp_path: Path) -> None:
    _, config = problem
    config = merged(
        config, train={"steps": 3}, checkpoint={"every_steps": 1, "keep": 0}, output_dir=str(small_disk / "run")
    )
    file = write_config(tmp_path / "c.yaml", config)
    line = error_of(run_forked("megatron_tgdpo.train", [file], check=False), STORAGE_STATUS)
    assert "checkpoints/step_" in line
    assert "free" in line
    saved = sorted((small_disk / "run" / "checkpoints").iterdir())
    assert saved, "the first checkpoint should have fitted"
    assert all(is_complete(path) for path in saved)
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    run_forked("megatron_tgdpo.train", [file])
    assert [step["step"] for step in read_metrics(small_disk / "run")] == [1, 2, 3]
    assert is_complete(small_disk / "run" / "checkpoints" / "step_00000003")


def test_a_truncated_weight_file(problem: Problem, tmp_path: Path) -> None:
    _, config = problem
    broken = tmp_path / "broken"
    copy_model(Path(config["model"]["policy"]), broken)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = merged(config, model={"policy": str(broken)}, output_dir=str(tmp_path / "run"))
    done = run_forked("megatron_tgdpo.train", [write_config(tmp_path / "c.yaml", config)], processes=2, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "model.safetensors" in lines[0]
