"""Every shell script is clean."""

import shutil
import subprocess

import pytest

from tests.launch import PATIENCE, ROOT

SCRIPTS = sorted(
    str(path.relative_to(ROOT)) for suffix in ("sh", "sbatch") for path in ROOT.glob(f"[!.]*/**/*.{suffix}")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "--external-sources", "--severity=info", script],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
