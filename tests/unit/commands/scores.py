"""Scoring functions for tests, as a user would write them."""

import os
import signal
from pathlib import Path


def even_words(prompt: list[dict[str, str]], answers: list[str]) -> list[int]:
    """How many words end in an even digit; the same for every answer to prompts that ask about w9."""
    if "w9" in prompt[-1]["content"].split():
        return [1] * len(answers)
    return [sum(word[-1] in "02468" for word in answer.split()) for answer in answers]


def even_words_and_tools(prompt: list[dict[str, str]], answers: list[str], tools: list[object]) -> list[int]:
    """The same, and how many tools there are."""
    return [len(tools) + words for words in even_words(prompt, answers)]


def even_words_killed_once(prompt: list[dict[str, str]], answers: list[str]) -> list[int]:
    """The same; the process is killed at the prompt about w17, if the file KILL is in the working directory."""
    kill = Path("KILL")
    if "w17" in prompt[-1]["content"].split() and kill.exists():
        kill.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return even_words(prompt, answers)


def infinite(prompt: list[dict[str, str]], answers: list[str]) -> list[float]:
    return [float("inf")] * len(answers)


def too_few(prompt: list[dict[str, str]], answers: list[str]) -> list[float]:
    return [1.0]


def broken(prompt: list[dict[str, str]], answers: list[str]) -> list[float]:
    raise RuntimeError("out of order")
