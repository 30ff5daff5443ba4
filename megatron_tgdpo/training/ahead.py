"""Makes what the next step needs while this one computes."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """One thread that makes things, each while the caller does something else that mostly waits or runs in kernels.

    Nothing is made but between :meth:`start` and :meth:`take`: whatever forks or saves in between two steps finds no
    other thread at work.

    Args:
        make: Called in the thread with what :meth:`start` got.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._coming: Future[T] | None = None

    def start(self, number: int) -> None:
        """Begins to make one thing."""
        assert self._coming is None, "one at a time"
        self._coming = self._thread.submit(self._make, number)

    def take(self) -> tuple[T, float]:
        """What was begun, and for how many seconds it had to be waited for.

        Raises:
            Exception: What making it raised.
        """
        assert self._coming is not None, "nothing was begun"
        coming, self._coming = self._coming, None
        began = time.monotonic()
        return coming.result(), time.monotonic() - began

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
