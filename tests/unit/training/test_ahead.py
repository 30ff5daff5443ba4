"""What is made ahead is made meanwhile, one at a time, and its errors are those of who takes it."""

import threading

import pytest

from megatron_tgdpo.training.ahead import Ahead


def test_it_is_made_while_the_caller_goes_on() -> None:
    asked, going_on = threading.Event(), threading.Event()

    def make(number: int) -> int:
        asked.set()
        assert going_on.wait(60)
        return 10 * number

    with Ahead(make) as ahead:
        for number in (3, 4):
            asked.clear()
            going_on.clear()
            ahead.start(number)
            assert asked.wait(60)
            going_on.set()
            made, waited = ahead.take()
            assert made == 10 * number
            assert waited >= 0


def test_an_error_is_raised_where_it_is_taken() -> None:
    def make(number: int) -> int:
        raise OSError(f"no data for step {number}")

    with Ahead(make) as ahead:
        ahead.start(5)
        with pytest.raises(OSError, match="no data for step 5"):
            ahead.take()
        ahead.start(6)
        with pytest.raises(OSError, match="step 6"):
            ahead.take()


def test_leaving_waits_for_what_was_begun() -> None:
    done = []
    with Ahead(done.append) as ahead:
        ahead.start(1)
    assert done == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
