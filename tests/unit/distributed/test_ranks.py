"""What fails on one rank before process groups exist fails on all of them, with the same word and of the same kind."""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import cast

import pytest
import torch.distributed as dist

from megatron_tgdpo.distributed.ranks import RankEnvironment, run_on_all_ranks, run_on_rank0
from megatron_tgdpo.errors import AgreedError, AgreedStorageError, DamageError, StorageError, UserError
from megatron_tgdpo.signals import StoppedEarly

RANKS = 3
KINDS = [
    (UserError, UserError, AgreedError),
    (DamageError, DamageError, AgreedError),
    (StorageError, StorageError, AgreedStorageError),
    (StoppedEarly, StoppedEarly, StoppedEarly),
    (ZeroDivisionError, ZeroDivisionError, AgreedError),
]


def on_ranks(one: Callable[[RankEnvironment, dist.Store], object]) -> list[object]:
    """What each rank, in a thread, gets or raises."""
    store = dist.HashStore()

    def outcome(rank: int) -> object:
        try:
            return one(RankEnvironment(rank, RANKS, rank, None, None), store)
        except Exception as error:
            return error

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(outcome, range(RANKS)))


def failing(rank: int, error: type[Exception], own: int) -> str:
    if rank == own:
        raise error("file.bin: why")
    return f"answer of {rank}"


def test_all_ranks_know_the_first_ones_answer_and_the_first_one_all() -> None:
    """What all tell all would be as many answers as ranks squared, through one store."""
    assert on_ranks(lambda ranks, store: run_on_rank0(lambda: str(ranks.rank), store, ranks.rank)) == ["0"] * RANKS
    found = on_ranks(lambda ranks, store: run_on_all_ranks(lambda: str(ranks.rank), store, ranks))
    assert found == [["0", "1", "2"], [], []]


class CountedStore:
    """A store that adds up the bytes that ranks get from it."""

    def __init__(self) -> None:
        self.store, self.read = dist.HashStore(), 0

    def set(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def wait(self, keys: list[str], patience: timedelta) -> None:
        self.store.wait(keys, patience)

    def get(self, key: str) -> bytes:
        value: bytes = self.store.get(key)
        self.read += len(value)
        return value


@pytest.mark.parametrize("fails", [False, True])
def test_what_ranks_tell_grows_with_their_number_and_not_with_its_square(fails: bool) -> None:
    """With failures of all, too, as of a limit that all machines have."""

    def action() -> str:
        if fails:
            raise UserError("x" * 100)
        return "x" * 100

    def read(ranks: int) -> int:
        store = CountedStore()

        def one(rank: int) -> None:
            with contextlib.suppress(AgreedError):
                run_on_all_ranks(action, cast(dist.Store, store), RankEnvironment(rank, ranks, rank, None, None))

        with ThreadPoolExecutor(ranks) as pool:
            list(pool.map(one, range(ranks)))
        return store.read

    assert read(32) < 5 * read(8)


def test_all_ranks_get_the_same_value_of_json() -> None:
    """The rank that ran the action too: no tuple there that is a list elsewhere."""
    value, as_json = {"files": ("a", "b"), "none": None}, {"files": ["a", "b"], "none": None}
    found = on_ranks(lambda ranks, store: run_on_rank0(lambda: value, store, ranks.rank))
    assert found == [as_json] * RANKS
    assert on_ranks(lambda ranks, store: run_on_all_ranks(lambda: value, store, ranks))[0] == [as_json] * RANKS


def test_an_answer_that_is_no_json_fails_for_all() -> None:
    found = on_ranks(lambda ranks, store: run_on_rank0(set, store, ranks.rank))
    assert [type(error) for error in found] == [TypeError, AgreedError, AgreedError]
    assert len({str(error) for error in found}) == 1


@pytest.mark.parametrize(("raised", "own", "others"), KINDS)
def test_the_first_rank_fails_for_all(raised: type[Exception], own: type, others: type) -> None:
    errors = on_ranks(lambda ranks, store: run_on_rank0(lambda: failing(ranks.rank, raised, own=0), store, ranks.rank))
    assert [type(error) for error in errors] == [own, others, others]
    assert {str(error) for error in errors} == {"file.bin: why"}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("raised", "own", "others"), KINDS)
def test_any_rank_fails_for_all(raised: type[Exception], own: type, others: type, place: int) -> None:
    """With one word; what is no bad input shows its traceback where it happened."""
    errors = on_ranks(lambda ranks, store: run_on_all_ranks(lambda: failing(ranks.rank, raised, place), store, ranks))
    there = own if raised is ZeroDivisionError else others
    assert [type(error) for error in errors] == [there if rank == place else others for rank in range(RANKS)]
    said = {str(error) for rank, error in enumerate(errors) if rank != place or there is others}
    assert said == {"file.bin: why" if place == 0 else "rank 1: file.bin: why"}
