"""Ends the job, with the rank named, when a process is frozen or a node is lost without a word.

To a collective such a rank looks like a slow one: it waits for its whole time-out, and then cannot say for whom. A rank
that dies needs none of this if its launcher sees it; where none does, its silence ends the others. So does that of one
that never comes: ranks wait for one another without a time-out before they meet in process groups.
"""

import os
import socket
import threading
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from megatron_tgdpo.distributed.ranks import RankEnvironment
from megatron_tgdpo.signals import FAILED_STATUS, last_words

_LONGEST_INTERVAL = 5.0


class Heartbeat:
    """A daemon thread that counts up this rank's number in the store, and watches the number of the next rank.

    Silence is measured in this rank's own beats, so a job that was suspended as a whole goes on.

    Args:
        ranks: This process's place.
        store: Joins all ranks; a connection of the thread's own is opened, since a store serves one call at a time and
            the main thread may wait in it for long.
        timeout_minutes: Of collectives. Three quarters of it without a beat end this process, and so the job: before
            any collective has timed out.
    """

    def __init__(self, ranks: RankEnvironment, store: dist.Store, timeout_minutes: float) -> None:
        timeout = 60 * timeout_minutes
        self._interval = min(_LONGEST_INTERVAL, timeout / 20)
        self._limit = 0.75 * timeout
        self._rank, self._next = ranks.rank, (ranks.rank + 1) % ranks.world_size
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        if ranks.world_size > 1:
            self._store = _connect_again(store, timeout)
            self._store.set(f"host{self._rank}", socket.gethostname())
            self._store.add(f"beat{self._rank}", 1)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread. All ranks must have called this before the store may go."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        heard, silence = 0, 0.0
        while not self._stop.wait(self._interval):
            count = self._exchange()
            silence = silence + self._interval if count == heard else 0.0
            heard = count
            if silence >= self._limit and heard:
                self._end(f"rank {self._next} on {self._host()} has not answered for {silence:.0f} s: frozen or lost")
            if silence >= self._limit:
                self._end(f"rank {self._next} has not started within {silence:.0f} s of this rank: lost")

    def _exchange(self) -> int:
        # A request to a frozen server has no time-out.
        message = f"rank 0, or the launcher that keeps the store, has not answered for {self._limit:.0f} s"
        guard = threading.Timer(self._limit, self._end, [message])
        guard.daemon = True
        guard.start()
        try:
            self._store.add(f"beat{self._rank}", 1)
            return self._store.add(f"beat{self._next}", 0)
        except dist.DistError:
            # Without its launcher a rank would train on beside the next start of the same run.
            self._end("rank 0, or the launcher that keeps the store, has ended")
        finally:
            guard.cancel()

    def _host(self) -> str:
        return self._store.get(f"host{self._next}").decode()

    def _end(self, message: str) -> NoReturn:
        last_words(f"[rank {self._rank}] {message}")
        os._exit(FAILED_STATUS)


def _connect_again(store: dist.Store, timeout: float) -> dist.Store:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.TCPStore)
    connection = dist.TCPStore(
        store.host, store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )
    return dist.PrefixStore("heartbeat", connection)
