"""Services that a run logs to: neither their absence nor their slowness may keep training waiting, or end it."""

import abc
import contextlib
import importlib
import logging
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar

from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError, one_line
from megatron_tgdpo.output.logger import LoggedStep, Logger
from megatron_tgdpo.storage.atomic_file import replacing

logger = logging.getLogger(__name__)

_OPEN_SECONDS, _RETRY_SECONDS, _CLOSE_SECONDS = 300.0, 60.0, 120.0


class Service(Logger):
    """One run of a service for the whole of a training, however often it is interrupted.

    All calls of the service's library are made in a thread of their own. A step that it does not take is kept, and sent
    again every minute with those behind it; what it still does not take at the end is said to be lost. ``output_dir``
    keeps the id by which the service knows the run, and the last step that it has: steps that are made again after an
    interruption are not sent again.

    Attributes:
        name: Of the package, and of the key in section ``log``.
        directory: The run's.
    """

    name: ClassVar[str]

    def __init__(self, config: Config, step: int) -> None:
        self.directory = Path(config.output_dir)
        self._config = config
        self._record = self.directory / f"{self.name}_run"
        recorded = self._record.read_text(encoding="utf-8").split() if self._record.exists() else []
        self._id = recorded[0] if recorded else None
        self._sent = int(recorded[1]) if len(recorded) > 1 else 0
        self._steps: SimpleQueue[LoggedStep | None] = SimpleQueue()
        self._closing, self._opened = threading.Event(), False
        first: Future[None] = Future()
        # Of this thread because some libraries take over a main thread's signals.
        self._thread = threading.Thread(target=self._work, args=(first,), name=self.name, daemon=True)
        self._thread.start()
        try:
            first.result(_OPEN_SECONDS)
        except Exception as error:
            what = f"no answer in {_OPEN_SECONDS:.0f} s" if isinstance(error, FutureTimeout) else one_line(error)
            if step == 0:
                self._closing.set()
                self._steps.put(None)
                raise UserError(
                    f"log.{self.name} is true but {self.name} cannot begin a run ({what}): see that it can, or set "
                    f"log.{self.name}=false"
                ) from error
            logger.warning("log.%s: cannot be opened (%s): metrics are kept and sent later", self.name, what)

    @classmethod
    def package(cls) -> Any:
        """The service's package.

        Raises:
            UserError: It is not installed.
        """
        try:
            return importlib.import_module(cls.name)
        except ImportError as error:
            raise UserError(
                f"log.{cls.name} is true but {cls.name} cannot be imported ({error}): pip install {cls.name}, or set "
                f"log.{cls.name}=false"
            ) from error

    @classmethod
    def check(cls) -> None:
        """Raises a UserError if the package is not installed."""
        cls.package()

    @abc.abstractmethod
    def open(self, config: Config, run_id: str | None) -> str:
        """Begins a run, or goes on with one; returns its id, one word. It, and those below, may raise anything."""

    @abc.abstractmethod
    def send(self, step: LoggedStep) -> None:
        """Logs a step."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Ends the run, when all is sent."""

    def write(self, step: LoggedStep) -> None:
        """Leaves a step to the thread."""
        if step.number > self._sent:
            self._steps.put(step)

    def close(self) -> None:
        """Waits, not for ever, until all is sent."""
        self._closing.set()
        self._steps.put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("log.%s: not everything is sent after %.0f s", self.name, _CLOSE_SECONDS)

    def _work(self, first: "Future[None]") -> None:
        try:
            self._open()
            first.set_result(None)
        except Exception as error:
            first.set_exception(error)
        failing = False
        while (step := self._steps.get()) is not None:
            while (refused := self._error_of(step)) is not None:
                if self._closing.is_set():
                    logger.warning("log.%s: step %d and later are lost (%s)", self.name, step.number, one_line(refused))
                    return
                if not failing:
                    failing = True
                    logger.warning("log.%s: %s: metrics are kept and sent later", self.name, one_line(refused))
                self._closing.wait(_RETRY_SECONDS)
            failing = False
        if self._opened:
            with contextlib.suppress(Exception):
                self.finish()

    def _open(self) -> None:
        if not self._opened:
            self._id = self.open(self._config, self._id)
            self._opened = True
            self._note()

    def _error_of(self, step: LoggedStep) -> Exception | None:
        try:
            self._open()
            self.send(step)
        except Exception as error:
            return error
        self._sent = step.number
        self._note()
        return None

    def _note(self) -> None:
        # Without it a step may be sent twice after an interruption, which is no reason to stop.
        with contextlib.suppress(OSError), replacing(self._record, synced=False) as file:
            file.write_text(f"{self._id} {self._sent}\n", encoding="utf-8")
