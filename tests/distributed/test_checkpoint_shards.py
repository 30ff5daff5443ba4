"""Every data rank saves and loads the part that it owns; megatron-core's own state and this one read each other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tgdpo.checkpoints.listing import newest_checkpoint
from megatron_tgdpo.checkpoints.reader import CheckpointReader
from tests.distributed.common import make_problem, merged, read_metrics
from tests.processes import run_forked
from tests.series import assert_same_series

STEPS = 6
TP2 = {"tensor": 2, "sequence_parallel": True}
SERIES = ("train/loss", "train/grad_norm", "rewards/margins")
# Who writes the checkpoint of step 3 and who goes on from it, and on which layouts.
CHANGES = {
    "old-to-new-dp2": (("megatron-core", {}), ("ours", {})),
    "new-to-old-dp2": (("ours", {}), ("megatron-core", {})),
    "old-to-new-tp2-to-dp2": (("megatron-core", TP2), ("ours", {})),
    "new-to-old-dp2-to-tp2": (("ours", {}), ("megatron-core", TP2)),
}
# Several buckets a buffer, whose ends are padded.
BUCKET_PARAMETERS = 20_000
PRECISIONS = ("fp32", "bf16")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shards")
    config = merged(make_problem(made, tied=True), train={"steps": STEPS}, checkpoint={"keep": 0})
    cases: list[dict[str, Any]] = [
        {"config": merged(config, parallel=layout, output_dir=str(made / name))}
        for name, layout in (("dp2", {}), ("tp2", TP2))
    ]
    for name, parts in CHANGES.items():
        for (writer, layout), stop in zip(parts, ({"exit_step": 3}, {}), strict=True):
            changed = merged(config, parallel=layout, train=stop, output_dir=str(made / name))
            cases.append({"config": changed, "state": writer})
    for dtype in PRECISIONS:
        buckets = merged(
            config,
            overlap={"grad_reduce": True},
            precision={"dtype": dtype},
            train={"exit_step": 2},
            output_dir=str(made / f"buckets-{dtype}"),
        )
        cases.append({"config": buckets, "bucket_parameters": BUCKET_PARAMETERS})
    file = made / "cases.json"
    file.write_text(json.dumps(cases))
    run_forked("tests.distributed.worker_train", [str(file)], processes=2)
    return made


@pytest.mark.parametrize("name", ["old-to-new-dp2", "new-to-old-dp2"])
def test_megatron_cores_state_and_ours_read_each_other(root: Path, name: str) -> None:
    assert_same_series(root / name, root / "dp2")


@pytest.mark.parametrize("name", ["old-to-new-tp2-to-dp2", "new-to-old-dp2-to-tp2"])
def test_so_they_do_on_another_layout(root: Path, name: str) -> None:
    ours, whole = read_metrics(root / name), read_metrics(root / "dp2")
    assert [step["step"] for step in ours] == list(range(1, STEPS + 1))
    for got, want in zip(ours, whole, strict=True):
        for key in SERIES:
            assert got[key] == pytest.approx(want[key], rel=2e-4, abs=1e-6), (got["step"], key)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(checkpoint)
    return {name: reader.rows(name, None, 0, info.size[0]) for name, info in reader.tensors.items()}


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_with_several_buckets_the_main_copy_is_that_of_its_weight(root: Path, dtype: str) -> None:
    checkpoint = newest_checkpoint(root / f"buckets-{dtype}")
    assert checkpoint is not None
    saved = tensors(checkpoint)
    main = {name.removeprefix("optimizer.state.param."): name for name in saved if ".state.param." in name}
    assert main.keys() == {name for name in saved if not name.startswith("optimizer.")}
    for name, copy in main.items():
        assert torch.equal(saved[copy].to(saved[name].dtype), saved[name]), name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert saved[f"optimizer.state.{moment}.{name}"].count_nonzero() > 0, name


def test_both_data_ranks_write_their_half(root: Path) -> None:
    checkpoint = newest_checkpoint(root / "dp2")
    assert checkpoint is not None
    sizes = [file.stat().st_size for file in sorted(checkpoint.glob("*.distcp"))]
    assert len(sizes) == 2
    assert max(sizes) < 1.1 * min(sizes)
