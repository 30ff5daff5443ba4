"""One emulated cluster and one uninterrupted run for all tests here; they are skipped where Slurm cannot run."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.common import make_problem, merged
from tests.launch import PATIENCE, ROOT
from tests.slurm.cluster import Cluster

_EMULATOR = ROOT / "tests" / "slurm" / "emulator.sh"
STEPS = 4


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    # Not pytest's directory: the path of a socket must be short.
    directory = Path(tempfile.mkdtemp(prefix="slurm"))
    started = subprocess.run(
        ["bash", str(_EMULATOR), "start", str(directory)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if started.returncode == 77:
        shutil.rmtree(directory)
        pytest.skip(started.stdout.strip())
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        yield Cluster(directory / "etc" / "slurm.conf")
    finally:
        subprocess.run(["bash", str(_EMULATOR), "stop", str(directory)], timeout=PATIENCE, check=True)
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with TP2 x DP2: ranks 0 and 1 on the first node."""
    root = tmp_path_factory.mktemp("problem")
    config = merged(
        make_problem(root),
        parallel={"tensor": 2},
        train={"steps": STEPS},
        checkpoint={"every_steps": 10},
    )
    config["data"]["validation"] = config["data"]["train"]
    (root / "config.yaml").write_text(json.dumps(config))
    return root / "config.yaml"


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run that nothing disturbed."""
    work = tmp_path_factory.mktemp("uninterrupted")
    job = cluster.train(work, [str(config_file), f"output_dir={work}/run"])
    assert job.wait() == "COMPLETED", job.text()
    assert job.field("Restarts") == "0"
    return work / "run"
