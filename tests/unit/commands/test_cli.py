"""The command line as a whole: every command answers, soon, and is what ``python -m`` with its module is."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

from checkpoints_convert.arguments import DTYPE_NAMES
from checkpoints_convert.command_line import DTYPES
from megatron_tgdpo import __version__
from tests.launch import PATIENCE, ROOT, environment
from tgdpo.commands import COMMANDS, CONVERSIONS, Command

ROWS = [*(("", command) for command in COMMANDS), *(("convert", command) for command in CONVERSIONS)]
# What takes seconds to import, and what only work needs.
HEAVY = ("torch", "transformers", "megatron.core", "datasets", "pyarrow", "nltk", "omegaconf", "numpy", "tokenizers")
# Runs a module as python -m does, and then says on a line of its own which of HEAVY were imported for it.
PROBE = f"""
import atexit, json, os, runpy, sys
os._exit = sys.exit
atexit.register(lambda: print("\\n" + json.dumps([name for name in {HEAVY} if name in sys.modules])))
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        # Lines as wide as they are, whatever this terminal has.
        env={**environment(), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def tgdpo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "tgdpo", *arguments)


def words(group: str, command: Command) -> list[str]:
    return [*([group] if group else []), command.name]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments: list[str]) -> None:
    done = tgdpo(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    listed = re.findall(r"^  ([a-z-]+)  +(\S.*)$", done.stdout, re.M)
    assert listed == [(command.name, command.help) for command in COMMANDS]


@pytest.mark.parametrize(("group", "command"), ROWS, ids=lambda part: getattr(part, "name", part))
def test_a_command_is_its_module_and_answers_before_anything_heavy_is_imported(group: str, command: Command) -> None:
    ours = python("-c", PROBE, "tgdpo", *words(group, command), "--help")
    help_text, imported = ours.stdout.rstrip("\n").rsplit("\n", 1)
    assert (ours.returncode, ours.stderr) == (0, "")
    assert help_text.startswith(f"usage: {' '.join(['tgdpo', *words(group, command)])} ")
    assert json.loads(imported) == []
    alone = python("-m", command.module, "--help")
    assert (alone.returncode, alone.stdout.rstrip("\n")) == (0, help_text.rstrip("\n"))


def test_the_probe_sees_what_is_imported() -> None:
    done = python("-c", PROBE, "megatron_tgdpo.loss.preference")
    assert "torch" in json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preprocess", "--input", "x", "--tokenizer", "{tmp}", "--output", "{tmp}/o", "--max-length", "0"],
         "error: max_length is 0: "),
        (["preprocess", "--input", "x", "--tokenizer", "{tmp}", "--output", "{tmp}/o", "--chat-template", "{tmp}/no"],
         "error: --chat-template {tmp}/no: no such file"),
        (["train", "x.yaml", "--dry-run", "--world-size", "0"], "error: --world-size is 0: it must be positive"),
        (["convert", "to-hf", "--megatron", "{tmp}", "--out", "{tmp}/o", "--max-shard-size", "5"],
         "error: --max-shard-size '5': not a size"),
        (["verify", "--hf", "{tmp}", "--megatron", "{tmp}", "--tensor", "0"], "error: --tensor is 0"),
        (["guidance", "x.yaml", "--verify", "0"], "error: --verify is 0"),
        (["report", "x.yaml", "--out", "{tmp}"], "error: {tmp}: is a directory"),
        (["evaluate", "--reference", "{tmp}/no", "--guide", "{tmp}", "--pairs", "x", "--out", "o"],
         "error: --reference {tmp}/no: no such directory"),
        (["evaluate", "--reference", "{tmp}", "--pairs", "x", "--out", "o"], "error: nothing to compare"),
        (["generate", "--benchmark", "mt_bench", "--questions", "{tmp}", "--model", "{tmp}/no", "--name", "n", "--out",
          "n.jsonl"], "error: --model {tmp}/no: no such directory"),
        (["plan", "--model", "{tmp}/no"], "error: --model {tmp}/no: no such directory"),
        (["report", "x.yaml", "--out", "{tmp}/o", "--guide", "{tmp}/no"], "error: --guide {tmp}/no: no such directory"),
        (["generate", "--benchmark", "mt_bench", "--questions", "{tmp}", "--model", "{tmp}", "--name", "n", "--out",
          "o"], "error: --out o: mt_bench takes names from files"),
        (["build-preferences", "--prompts", "{tmp}", "--model", "{tmp}", "--score", "a:b", "--out", "o", "--top-p",
          "2"], "error: --top-p is 2.0"),
        (["plan", "--model", "{tmp}", "--nodes", "0"], "error: --nodes is 0: it must be positive"),
        (["plan", "--model", "{tmp}", "--row-tokens", "-1"], "error: --pack-tokens is -1: it must be positive"),
        (["plan", "--model", "{tmp}", "--response-share", "2"], "error: --response-share is 2: it must be at most 1"),
        (["plot", "{tmp}", "{tmp}"], "error: --out is needed for several runs"),
        (["plot", "{tmp}/no"], "error: {tmp}/no: no such directory"),
        (["import-config", "x.yaml", "--ranks", "0", "--train", "t", "--out", "o"], "error: --ranks is 0"),
    ],
)  # fmt: skip
def test_arguments_are_checked_before_anything_heavy_is_imported(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = python("-c", PROBE, "tgdpo", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(message.format(tmp=tmp_path))
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize("command", ["train", "guidance"])
def test_a_guide_that_is_not_trained_is_said_before_torch_is_imported(tmp_path: Path, command: str) -> None:
    file = tmp_path / "my run.yaml"
    sections = {
        "model": {"policy": "p"}, "data": {"train": "pairs.jsonl"}, "guide": {"method": "dpo"},
        "guidance": {"cache": "cache"}, "batch": {"global_pairs": 2}, "optimizer": {"lr": 1e-6},
        "train": {"steps": 2}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    file.write_text(json.dumps(sections))
    done = python("-c", PROBE, "tgdpo", command, str(file), "train.steps=3")
    assert done.stderr == (
        f"error: the guide {tmp_path}/run/guide is not trained yet: tgdpo dpo-guide '{file}' train.steps=3 does it, "
        f"tgdpo pipeline '{file}' train.steps=3 that and the rest\n"
    )
    assert {"torch", "transformers", "megatron.core"}.isdisjoint(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "tgdpo: there is no command 'trian': did you mean 'train'?"),
        (["build_preferences"], "tgdpo: there is no command 'build_preferences': did you mean 'build-preferences'?"),
        (["zzz"], "tgdpo: there is no command 'zzz': see tgdpo --help"),
        (["--verify"], "tgdpo: there is no command '--verify': did you mean 'verify'?"),
        (["convert", "hf"], "tgdpo convert: there is no command 'hf': did you mean 'to-hf'?"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest_name(arguments: list[str], message: str) -> None:
    done = tgdpo(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message + "\n")


def test_version() -> None:
    assert tgdpo("--version").stdout == f"megatron-tgdpo {__version__}\n"


def test_exit_status_is_the_commands_own(tmp_path: Path) -> None:
    done = tgdpo("plan", "--model", str(tmp_path / "no"))
    assert (done.returncode, done.stderr) == (1, f"error: --model {tmp_path / 'no'}: no such directory\n")
    assert tgdpo("plan").returncode == 2


def test_torchrun_runs_a_command_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("nonsense: 1\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tgdpo", "train"]
    done = python(*launcher, str(tmp_path / "config.yaml"))
    assert done.returncode == 1
    # Rank 0 says it, once.
    assert len(re.findall(r"^error: .*config\.yaml.*nonsense", done.stderr, re.M)) == 1
    assert "local_rank: 1" in done.stderr or "local_rank: 0" in done.stderr


@pytest.mark.parametrize(
    "module",
    sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__"),
)
def test_the_old_names_work_in_a_checkout(module: str) -> None:
    done = python("-m", f"tools.{module}", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: tgdpo ")


def test_dtypes_by_name_are_those_that_can_be_stored() -> None:
    assert tuple(DTYPES) == DTYPE_NAMES


def test_what_is_installed() -> None:
    """The packages that pyproject.toml finds: all of ours, with the data they read, and no ``tools``."""
    text = (ROOT / "pyproject.toml").read_text()
    patterns = re.search(r"^include = \[(.*)\]$", text, re.M)
    assert patterns is not None
    found = set(find_packages(str(ROOT), include=re.findall(r'"([^"]+)"', patterns[1])))
    tops = ("megatron_tgdpo", "checkpoints_convert", "tgdpo")
    assert {name.partition(".")[0] for name in found} == set(tops)
    folders = {Path(folder) for top in tops for folder, _, files in os.walk(ROOT / top) if "__init__.py" in files}
    assert found == {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    # Files that are not Python belong to a package, and are in package-data.
    data = dict(re.findall(r'^"([\w.]+)" = \["([^"]+)"\]$', text, re.M))
    covered = {path for package, pattern in data.items() for path in (ROOT / package.replace(".", "/")).glob(pattern)}
    tracked = subprocess.run(["git", "ls-files", *tops], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    others = {ROOT / name for name in tracked.splitlines() if not name.endswith(".py")}
    assert others - covered == {path for path in others if path.name == "py.typed"}
    assert re.search(r'^tgdpo = "tgdpo\.__main__:main"$', text, re.M)
