"""What the commands refuse before they join any other rank."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints_convert import hf_to_megatron, megatron_to_hf
from checkpoints_convert.command_line import run
from megatron_tgdpo.errors import UserError
from tests.tiny_models import make_llama


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hf"), layers=1)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (hf_to_megatron.main, ["--hf", "{tmp}/nowhere", "--out", "{tmp}/out"], "no config.json there"),
        (hf_to_megatron.main, ["--hf", "{hf}", "--out", "{hf}"], "exists and is not empty"),
        (megatron_to_hf.main, ["--megatron", "{hf}", "--out", "{tmp}/out"], "neither a Megatron checkpoint"),
        (megatron_to_hf.main, ["--megatron", "{tmp}/nowhere", "--out", "{tmp}/out"], "neither a Megatron checkpoint"),
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
    arguments = [argument.format(hf=hf, tmp=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(UserError, match=message):
        main()
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("config.json: hidden_act is 'gelu'")

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: config.json: hidden_act is 'gelu'\n"
