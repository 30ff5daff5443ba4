"""Each command line in the pages is one that the command takes: options, their values, and what is required."""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_tgdpo import signals
from tests.unit.docs.pages import PAGES, ROOT, read_page
from tgdpo import __main__
from tgdpo.commands import COMMANDS

# The same modules by python -m.
BY_MODULE = {command.module: command for command in COMMANDS}


class Parsed(BaseException):
    """The command line was read; nothing else is to happen."""


def command_lines(text: str) -> Iterator[list[str]]:
    """The arguments of each ``tgdpo``, by whatever launcher, in a block of shell: from the command's name on."""
    # Of alternatives the first.
    text = re.sub(r"\(([^()|]*)\|[^()]*\)", r"\1", re.sub(r"(?<=\w)\|\w[\w|]*", "", text))
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r" (?:&&|;|\||>) ", line):
            words = shlex.split(part.removeprefix("$ "), comments=True)
            if words[:1] == ["tgdpo"]:
                yield words[1:]
            elif "-m" in words[:-1] and re.fullmatch(r"(.*/)?(python3?|torchrun|srun)", words[0]):
                module, *others = words[words.index("-m") + 1 :]
                if module == "tgdpo":
                    yield others
                elif module in BY_MODULE:
                    yield [BY_MODULE[module].name, *others]


def filled(word: str) -> str:
    """A word with a number for the placeholder of one, and without the brackets of what may be left out."""
    return re.sub(r"^N$", "1", word.strip("[]"))


LINES = sorted(
    {
        (str(page.relative_to(ROOT)), *(filled(word) for word in words if word.strip("[]") != "..."))
        for page in PAGES
        for block in read_page(page).blocks
        if block.lstrip().startswith("```bash")
        for words in command_lines(block)
    }
)


@pytest.fixture
def only_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end when they have read their command line."""

    def ending(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_and_end(*given: Any, **named: Any) -> Any:
            parse(*given, **named)
            raise Parsed

        return parse_and_end

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, ending(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(signals, "listen", lambda: None)
    monkeypatch.setattr(sys, "argv", ["tgdpo"])


def test_every_command_is_in_a_page() -> None:
    assert {command.name for command in COMMANDS} == {line[1] for line in LINES}


@pytest.mark.usefixtures("only_parsing")
@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_a_command_line_is_taken(line: tuple[str, ...]) -> None:
    with pytest.raises(Parsed):
        __main__.main(line[1:])


@pytest.mark.usefixtures("only_parsing")
@pytest.mark.parametrize(
    "text",
    ["tgdpo plan --tensor 8", "tgdpo verify --hf DIR --megatron DIR --long-tokens many", "tgdpo sweep a --alph 1"],
)
def test_a_wrong_one_is_found(text: str) -> None:
    (words,) = command_lines(f"$ {text}  # a comment")
    with pytest.raises(SystemExit):
        __main__.main(words)


def test_commands_are_found_behind_launchers() -> None:
    text = """
        torchrun --nproc-per-node 8 -m tgdpo train \\
            a.yaml  # x
        python -m tgdpo.plan --model DIR && ls | tgdpo verify (--hf A | --hf B) --dtype bf16|fp32
    """
    found = [["train", "a.yaml"], ["plan", "--model", "DIR"], ["verify", "--hf", "A", "--dtype", "bf16"]]
    assert list(command_lines(text)) == found
