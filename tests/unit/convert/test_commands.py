"""What the commands refuse before they join any other rank."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints_convert import hf_to_megatron, megatron_to_hf
from checkpoints_convert.arguments import parse_size, run
from megatron_tgdpo.errors import UserError
from tests.launch import ROOT, environment
from tests.tiny_models import make_llama


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hf"), layers=1)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (hf_to_megatron.main, ["--hf", "{tmp}/nowhere", "--out", "{tmp}/out"], "--hf .*: no such directory"),
        (hf_to_megatron.main, ["--hf", "{hf}", "--out", "{hf}"], "exists and is not empty"),
        (hf_to_megatron.main, ["--hf", "{adapter}", "--out", "{tmp}/out"], "a LoRA adapter .* merge_and_unload"),
        (megatron_to_hf.main, ["--megatron", "{hf}", "--out", "{tmp}/out"], "--megatron .*: an HF model"),
        (megatron_to_hf.main, ["--megatron", "{tmp}/nowhere", "--out", "{tmp}/out"], "no such directory"),
        (
            megatron_to_hf.main,
            ["--megatron", "{hf}", "--out", "{tmp}/out", "--max-shard-size", "5XB"],
            "--max-shard-size '5XB': not a size, give a number and a unit such as 500MB",
        ),
    ],
)
def test_bad_arguments(
    hf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    main: Callable[[], None],
    arguments: list[str],
    message: str,
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    arguments = [argument.format(hf=hf, tmp=tmp_path, adapter=adapter) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(UserError, match=message):
        main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1.5KB", 1500), ("64KiB", 65536), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--max-shard-size", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "0.1B", "5", "5GBs", "1e3MB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match="not a size"):
        parse_size("--max-shard-size", text)


def test_conversions_do_not_import_megatron_core() -> None:
    """It would add seconds and print warnings."""
    code = "import sys, checkpoints_convert.import_hf, checkpoints_convert.export; "
    code += "sys.exit('megatron.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, env=environment(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("config.json: hidden_act is 'gelu'")

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: config.json: hidden_act is 'gelu'\n"
