"""The processes of a command that generates: one a GPU, each with the models, and results in the order of the items.

Those of ``concurrent.futures`` do not say how one of them died, cannot all be given the same task, and are waited for
when one of them has failed, whatever they are at.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from megatron_tgdpo import console
from megatron_tgdpo.errors import UserError, one_line
from megatron_tgdpo.resilience.launch import end_with_parent

_SECONDS_TO_END = 20
_DEVICES = "CUDA_VISIBLE_DEVICES"

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")


def process_count(nproc: int | None) -> int:
    """How many processes ``--nproc`` means: by default one a visible GPU, and one on a CPU.

    Raises:
        UserError: There are fewer GPUs.
    """
    gpus = _gpu_count()
    if nproc is None:
        return max(gpus, 1)
    if 0 < gpus < nproc:
        raise UserError(f"--nproc is {nproc}, but {gpus} GPUs are visible, and each process needs one")
    return nproc


class Workers(Generic[State]):
    """Context manager: processes with a state each, such as a model on a GPU of its own. One is this process itself.

    Each takes the next item when it has finished its last. An item is computed by one of them, so its result does not
    depend on how many there are.

    Args:
        count: Of :func:`process_count`. The visible GPUs are shared out evenly; a process sees its own only.
        make: Makes the state in each process. It, functions, items and results are pickled where there are several.

    Raises:
        UserError: Where there are several, on entering or later: one failed or was killed; names it.
    """

    def __init__(self, count: int, make: Callable[[], State]) -> None:
        self._count = count
        self._make = make
        self._processes: list[_Process] = []

    def __enter__(self) -> "Workers[State]":
        if self._count == 1:
            self._state = self._make()
            return self
        try:
            with console.waiting(f"starting {self._count} processes"):
                for number in range(self._count):
                    self._processes.append(_Process(number, self._count, self._make))
                for process in self._processes:
                    process.receive()
        except BaseException:
            self._end(at_once=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(at_once=kind is not None)

    def map(self, function: Callable[[State, Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """What ``function`` makes of each item, in their order; all must be taken before the next call."""
        if self._count == 1:
            yield from (function(self._state, item) for item in items)
            return
        todo, ready = iter(enumerate(items)), dict[int, Result]()
        busy: dict[_Process, int] = {}

        def give(process: _Process) -> None:
            for index, item in todo:
                process.send((function, item))
                busy[process] = index
                return

        for process in self._processes:
            give(process)
        for index in range(len(items)):
            while index not in ready:
                for process in _answering(busy):
                    ready[busy.pop(process)] = process.receive()
                    give(process)
            yield ready.pop(index)

    def everywhere(self, function: Callable[[State, Item], object], item: Item, label: str) -> None:
        """Has every process take an item, and waits until all have; ``label`` is what is said meanwhile."""
        if self._count == 1:
            function(self._state, item)
            return
        with console.waiting(label):
            for process in self._processes:
                process.send((function, item))
            for process in self._processes:
                process.receive()

    def _end(self, *, at_once: bool) -> None:
        for process in self._processes:
            process.end(at_once)
        for process in self._processes:
            process.join()


class _Process:
    """One of the processes, seen from the command's own."""

    def __init__(self, number: int, count: int, make: Callable[[], Any]) -> None:
        gpus = _share(number, count)
        self._name = f"process {number}" + (f" (GPU {gpus})" if gpus else "")
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # No daemon: vLLM starts processes of its own.
        self.process = context.Process(target=_serve, args=(theirs, gpus, make), name=self._name)
        # A terminal's Ctrl-C reaches all; this process alone answers it, and ends the others.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()

    def send(self, task: Any) -> None:
        try:
            self.pipe.send(task)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Any:
        """Waits for what it has made."""
        # The sentinel too: processes that it started may keep the pipe open.
        if self.pipe not in wait([self.pipe, self.process.sentinel]):
            raise self._died()
        try:
            failed, value = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if failed:
            raise UserError(f"{self._name}: {value}")
        return value

    def end(self, at_once: bool) -> None:
        with suppress(OSError):
            self.pipe.send(None)
        if at_once:
            self.process.terminate()

    def join(self) -> None:
        self.process.join(_SECONDS_TO_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()

    def _died(self) -> UserError:
        self.process.join(_SECONDS_TO_END)
        status = self.process.exitcode or 0
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        return UserError(f"{self._name} {how}; start the same command again")


def _answering(processes: dict[_Process, int]) -> list[_Process]:
    """Those that have made something, or have died; waits until there is one."""
    waited = {end: process for process in processes for end in (process.pipe, process.process.sentinel)}
    return list(dict.fromkeys(waited[end] for end in wait(list(waited))))  # type: ignore[index]


def _gpu_count() -> int:
    # Here, because a command that asks a server does without the seconds that this import takes.
    import torch

    return torch.cuda.device_count()


def _share(number: int, count: int) -> str | None:
    """The GPUs of a process, as CUDA_VISIBLE_DEVICES names them; None without any."""
    gpus = _gpu_count()
    names = os.environ[_DEVICES].split(",")[:gpus] if os.environ.get(_DEVICES) else list(map(str, range(gpus)))
    size = gpus // count
    return ",".join(names[number * size : (number + 1) * size]) or None


def _serve(pipe: Connection, gpus: str | None, make: Callable[[], Any]) -> None:
    """What a process does: makes its state, then takes tasks until there is none or the command has ended."""
    end_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what it started is ended, too
    if gpus is not None:
        os.environ[_DEVICES] = gpus  # CUDA is not initialised yet
    console.configure()
    try:
        state = make()
        result = None
        while True:
            pipe.send((False, result))
            if (task := _next(pipe)) is None:
                return
            function, item = task
            result = function(state, item)
    except UserError as error:
        pipe.send((True, str(error)))
    except Exception as error:
        traceback.print_exc()
        pipe.send((True, one_line(error, named=True)))


def _next(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None
