"""What errors of others become in a message of ours."""

import pytest

from megatron_tgdpo.errors import one_line


@pytest.mark.parametrize(
    ("error", "said", "named"),
    [
        (ValueError("a\n  b\tc"), "a b c", "ValueError: a b c"),
        (KeyError("norm"), "'norm'", "KeyError: 'norm'"),
        (EOFError(), "EOFError", "EOFError"),
        (OSError("x" * 600), "x" * 500, "OSError: " + "x" * 500),
    ],
)
def test_an_error_of_any_length_is_one_line(error: Exception, said: str, named: str) -> None:
    assert one_line(error) == said
    assert one_line(error, named=True) == named
