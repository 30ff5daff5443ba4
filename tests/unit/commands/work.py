"""What processes of tests do: here, because they import the module that it is in, and the tests' own take long."""

import os
import signal
import time

from megatron_tgdpo.errors import UserError


def make_state() -> dict[str, int]:
    return {"pid": os.getpid(), "seen": 0}


def slow_if_even(state: dict[str, int], item: int) -> tuple[int, int]:
    time.sleep(0.05 * (item % 2 == 0))
    return item, state["pid"]


def refuse_three(state: dict[str, int], item: int) -> int:
    if item == 3:
        raise UserError("prompts.jsonl:3: no text")
    if item == 4:
        raise ValueError("broken\nin two lines")
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def see(state: dict[str, int], item: int) -> None:
    state["seen"] = item


def seen(state: dict[str, int], item: int) -> int:
    return state["seen"]
