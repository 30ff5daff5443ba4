"""Chunks of the interleaved schedule leave no trace in a run: it stops and goes on with other chunks, or with none."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo.batching.packer import plan_packs
from megatron_tgdpo.checkpoints.listing import newest_checkpoint
from megatron_tgdpo.checkpoints.reader import CheckpointReader
from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.divisibility import check_layout
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.activations import Pack, layer_activations, stage_activations
from megatron_tgdpo.planning.memory import stage_parameters
from tests.distributed.common import make_problem, merged, read_metrics
from tests.processes import run_forked
from tests.tiny_models import make_llama

STEPS = 4
SERIES = ("train/loss", "train/grad_norm", "rewards/margins", "eval/loss")
CHUNKS = {"plain": None, "chunked": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("interleaved")
    config = make_problem(root, tied=True)
    config = merged(
        config,
        data={"validation": config["data"]["train"]},
        guidance={"mode": "cached", "cache": str(root / "cache")},
        parallel={"pipeline": 2},
        batch={"tokens_per_micro_batch": 128},
        train={"steps": STEPS},
        checkpoint={"every_steps": STEPS},
        preflight={"enabled": False},
    )

    def run(name: str, chunks: int | None, **train: Any) -> dict[str, Any]:
        parallel = {"virtual_pipeline": chunks}
        return {"config": merged(config, parallel=parallel, train=train, output_dir=str(root / name))}

    cases = [{"config": merged(config, parallel={"virtual_pipeline": 2}), "precompute": 32}]
    cases += [run(name, chunks) for name, chunks in CHUNKS.items()]
    for name, other in (("plain", "chunked"), ("chunked", "plain")):
        cases += [run(f"from-{name}", CHUNKS[name], exit_step=2), run(f"from-{name}", CHUNKS[other])]
    (root / "cases.json").write_text(json.dumps(cases))
    run_forked("tests.distributed.worker_train", [str(root / "cases.json")], processes=2)
    return root


@pytest.mark.parametrize("name", ["chunked", "from-plain", "from-chunked"])
def test_chunks_may_change_between_stop_and_start(runs: Path, name: str) -> None:
    plain = read_metrics(runs / "plain")
    steps = read_metrics(runs / name)
    assert len(steps) == len(plain) == STEPS
    assert "eval/loss" in steps[-1]
    for got, want in zip(steps, plain, strict=True):
        for key in SERIES:
            if key in want:
                assert got[key] == pytest.approx(want[key], rel=2e-5, abs=1e-5), f"{key} of step {want['step']}"


def test_a_checkpoint_does_not_tell_the_chunks(runs: Path) -> None:
    names = []
    for name in CHUNKS:
        checkpoint = newest_checkpoint(runs / name)
        assert checkpoint is not None
        names.append({key: info.size for key, info in CheckpointReader(checkpoint).tensors.items()})
    assert names[0] == names[1]
    assert len(names[0]) > 20


def test_stages_hold_their_chunks(tmp_path: Path) -> None:
    llama = read_hf_config(make_llama(tmp_path, layers=8))
    pack = Pack(tokens=256, sequence_tokens=64, dtype_bytes=4)
    for stage in range(2):
        plain, chunked = (make_layout(1, 2, 1, False, 2, virtual) for virtual in (1, 4))
        assert stage_parameters(llama, plain, stage) == stage_parameters(llama, chunked, stage)
    # The first stage keeps p (1 + (p - 1) / (p v)) micro batches of its layers (Korthikanti et al. 2022, 4.2.3).
    layer = layer_activations(llama, chunked, pack, "none", 0)
    assert stage_activations(llama, chunked, pack, "none", 0) == pytest.approx(4 * layer * 2 * (1 + 1 / 8))
    with pytest.raises(UserError, match=r"8 layers are fewer than parallel.pipeline x virtual_pipeline = 2 x 5"):
        check_layout({"policy": llama}, make_layout(1, 2, 1, False, 2, 5))


def test_packs_come_in_groups_of_the_stages() -> None:
    plan = plan_packs(range(5), [10] * 5, 10, 1, multiple=4)
    assert [len(pack) for pack in plan[0]] == [1] * 5 + [0] * 3
