"""Runs modules on one or several ranks, as torchrun would: its environment, its store, all ended when one fails."""

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path

from torch.distributed import TCPStore

from tests.forked import Forked
from tests.launch import PATIENCE, checked

_SECONDS_TO_END = 30  # after which a rank is killed: of others, not of the test


def run_forked(
    module: str, arguments: Sequence[str], *, processes: int = 1, timeout: float = PATIENCE, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Does what ``launch.run_module`` does, without its seconds of imports; the status is that of the first failure."""
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary, name) for name in ("stdout", "stderr")]
        with _joined(processes) as places:
            ranks = [Forked(module, arguments, place, *files) for place in places]
            try:
                status = _wait(ranks, timeout)
            finally:
                for rank in ranks:
                    rank.kill()
        done = subprocess.CompletedProcess([module, *arguments], status, *(file.read_text() for file in files))
    return checked(done, processes) if check else done


@contextmanager
def started_ranks(arguments: list[str], count: int, logs: Path) -> Iterator[list[Forked]]:
    """Starts ``count`` ranks of ``megatron_tgdpo.train``, whose output goes to ``logs/N.log``; kills what is left.

    Nobody ends the others when one ends.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with _joined(count) as places:
        ranks = []
        try:
            for number, place in enumerate(places):
                log = logs / f"{number}.log"
                ranks.append(Forked("megatron_tgdpo.train", arguments, place, log, log))
            yield ranks
        finally:
            for rank in ranks:
                rank.kill()


@contextmanager
def _joined(count: int) -> Iterator[list[dict[str, str]]]:
    """The variables of each rank, and the store that they find by them; one rank is alone."""
    if count == 1:
        yield [{}]
        return
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    yield [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _wait(ranks: list[Forked], timeout: float) -> int:
    """Waits until all ranks have ended; the first failure ends the others."""
    running, status = list(ranks), 0
    while running and not status:
        ended = connection.wait([rank.process.sentinel for rank in running], timeout)
        if not ended:
            raise TimeoutError(f"the ranks have not ended in {timeout} s")
        status = next((rank.wait() for rank in running if rank.process.sentinel in ended and rank.wait()), 0)
        running = [rank for rank in running if rank.process.sentinel not in ended]
    for rank in running:
        rank.send_signal(signal.SIGTERM)
    for rank in running:
        with contextlib.suppress(TimeoutError):
            rank.wait(_SECONDS_TO_END)
    return status
