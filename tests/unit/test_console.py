"""Commands write their own lines and none of the libraries that they use."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.common import make_problem, merged
from tests.launch import PATIENCE, ROOT, environment

# What a library may do, before and after a command has set itself up.
FOREIGN = """
import logging, os, sys, warnings
from megatron_tgdpo import console
console.configure()
from tqdm import tqdm
for _ in tqdm(range(3), desc="a library's bar"):
    pass
warnings.simplefilter("always")
warnings.warn("a library's warning")
logging.getLogger("megatron.core.models").warning("a library's log")
logging.getLogger().warning("a library's root log")
logging.getLogger("megatron.core.models").error("a library's error")
logging.getLogger("megatron_tgdpo.training").warning("ours")
exec(sys.argv[1])
"""
PROGRESS = """
console._LOG_SECONDS = 0.01
import time
with console.progress("tokenise", 4, "pair", initial=1) as bar:
    for _ in range(3):
        time.sleep(0.02)
        bar.update(1)
with console.progress("hidden", 4, "pair", shown=False) as bar:
    time.sleep(0.02)
    bar.update(4)
import io
class Stderr(io.StringIO):
    encoding = "utf-8"
    def isatty(self): return True
real, sys.stderr = sys.stderr, Stderr()
with console.progress("seen", 4, "pair") as bar:
    bar.update(4)
written, sys.stderr = sys.stderr.getvalue(), real
assert "seen: 100%|" in written and "4/4" in written and "pair/s" in written, written
with console.waiting("loading /m"):
    time.sleep(0.1)
"""
QUICK = """
with console.progress("tokenise", 4, "pair") as bar:
    bar.update(4)
with console.waiting("loading /m"):
    pass
"""


def without_filters() -> dict[str, str]:
    """The environment of a user, who has not told Python to be silent."""
    return {name: value for name, value in environment().items() if name != "PYTHONWARNINGS"}


def errors_of(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=without_filters(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_only_errors_of_libraries_are_shown_and_our_lines() -> None:
    assert errors_of("-c", FOREIGN, "") == "a library's error\nWARNING: ours\n"


def test_who_asks_for_warnings_gets_them() -> None:
    assert "a library's warning" in errors_of("-W", "default", "-c", FOREIGN, "")


def test_what_a_command_starts_is_as_quiet_as_itself() -> None:
    """It has inherited a filter from the command, which libraries put theirs before."""
    for wish in ("ignore", "ignore::FutureWarning"):
        assert errors_of("-W", wish, "-c", FOREIGN, "") == "a library's error\nWARNING: ours\n"


def test_examples_set_up_the_console_before_libraries_read_what_to_show() -> None:
    """Which they do when they are imported, and these commands import them in what they run."""
    examples = ("paper_in_miniature", "paper_in_miniature.ablations", "real_pairs")
    imports = "".join(f"import tools.examples.{name}.__main__\n" for name in examples)
    assert (
        errors_of("-c", f"{imports}import sys\nassert not {{'megatron', 'tqdm', 'transformers'}} & set(sys.modules)")
        == ""
    )


def test_progress_is_a_line_now_and_then_where_nobody_looks() -> None:
    *bars, last = errors_of("-c", FOREIGN, PROGRESS).splitlines()[2:]
    assert re.fullmatch(r"loading /m: \d+ s", last)
    bars = [line for line in bars if not line.startswith("loading")]
    assert bars
    for line in bars:
        assert re.fullmatch(r"tokenise: \d+%, \d of 4 \[00:00<(00:0\d|\?), +(\?|[\d.]+)(pair/s|s/pair)\]", line), line


def test_short_work_says_nothing() -> None:
    assert errors_of("-c", FOREIGN, QUICK) == "a library's error\nWARNING: ours\n"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("console")
    config = merged(make_problem(root, layers=2), train={"steps": 1}, preflight={"enabled": False})
    (root / "config.yaml").write_text(json.dumps(config))
    return root / "config.yaml"


@pytest.mark.parametrize(
    "words",
    [
        ["preprocess", "--input", "{root}/pairs.jsonl", "--tokenizer", "{root}/policy", "--output", "{root}/data"],
        ["convert", "to-megatron", "--hf", "{root}/policy", "--out", "{root}/megatron"],
        ["plan", "--model", "{root}/policy"],
        ["evaluate", "--reference", "{root}/policy", "--guide", "{root}/guide", "--pairs", "{root}/pairs.jsonl",
         "--out", "{root}/e.json", "--prompts", "2", "--max-new-tokens", "2", "--max-length", "64"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_command_that_succeeds_has_nothing_on_stderr(config_file: Path, words: list[str]) -> None:
    errors = errors_of("-m", "tgdpo", *(word.format(root=config_file.parent) for word in words))
    # Of 32 random pairs a random guide may well prefer fewer than half, which evaluate says.
    assert [line for line in errors.splitlines() if not re.match("!+$|guide: GUIDE AT OR BELOW CHANCE", line)] == []


def test_every_line_of_a_training_is_ours(config_file: Path) -> None:
    errors = errors_of("-m", "tgdpo", "train", str(config_file), "--nproc", "2")
    lines = errors.splitlines()
    assert any("step 1/1" in line for line in lines)
    # Loggers of libraries write in the same form; test_only_errors_of_libraries_are_shown_and_our_lines is about them.
    assert [line for line in lines if not re.match(r"\d\d:\d\d:\d\d ", line)] == []
    foreign = re.compile(r"DEPRECATED|Warning|full_param_layout|destroy_process_group|OMP_NUM_THREADS|it/s|Gloo|\[W")
    assert [line for line in lines if foreign.search(line)] == []
