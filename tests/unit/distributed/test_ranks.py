"""What fails on one rank before process groups exist fails on all of them, with the same word and of the same kind."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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


def test_all_ranks_know_the_answers() -> None:
    assert on_ranks(lambda ranks, store: run_on_rank0(lambda: str(ranks.rank), store, ranks.rank)) == ["0"] * RANKS
    assert (
        on_ranks(lambda ranks, store: run_on_all_ranks(lambda: str(ranks.rank), store, ranks)) == [["0", "1", "2"]] * 3
    )


def test_all_ranks_get_the_same_value_of_json() -> None:
    """The rank that ran the action too: no tuple there that is a list elsewhere."""
    value, as_json = {"files": ("a", "b"), "none": None}, {"files": ["a", "b"], "none": None}
    found = on_ranks(lambda ranks, store: run_on_rank0(lambda: value, store, ranks.rank))
    assert found == [as_json] * RANKS
    assert on_ranks(lambda ranks, store: run_on_all_ranks(lambda: value, store, ranks)) == [[as_json] * RANKS] * RANKS


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
