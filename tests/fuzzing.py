"""Mutations of texts and of JSON, for tests that no input ends in a traceback."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from megatron_tgdpo.errors import UserError

# The same few examples each time; TGDPO_FUZZ_EXAMPLES=3000 takes other ones each time, or by --hypothesis-seed=N.
_ASKED = os.environ.get("TGDPO_FUZZ_EXAMPLES")
EXAMPLES = int(_ASKED or 30)

TOKENS = [
    "null", "~", "true", "no", "off", "012", "0x1F", "1_000", "1:30", "-1", "0", "1e400", ".inf", "nan", "NaN",
    "Infinity",
    "9" * 30, "9" * 5000, "-0.0", "1e-400", "2026-11-27", "2026_11_27", "'", '"', "''",
    '"\\U99999999"', '"\\x00"', "\\ud800",
    "{", "}", "[", "]", "[[", "{{", "{%", "%}", "}}", "{}", "[]", ",", ":", ": ", " #", "&a ", "*a", "<<: ", "!!int ",
    "!!python/name:os.system ", "? ", "- ", "---\n", "...\n", "%YAML 1.1\n", "|\n", ">\n", "\t", "\n", "\r\n", "\x00",
    "\x85",
    "\ufeff", "\u2028", "${", "${x}", "${oc.env:HOME}", "${oc.env:NOT_THERE}", "???", "=", ".", "..", "/", "é", "😀",
    "raise_exception('x')", "| tojson", ".x", "[0]", "()", "1 / 0", "* 'a'", "namespace(x=1)", "strftime_now(1)",
]  # fmt: skip
_DEEP = 20_000
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 1.5, -0.0, float("inf"), float("nan"), "", "x", "1", "\x00",
    "\ud800", "a/b", "../x", "9" * 5000, [], {}, [None], [[]], [1, 2], {"x": 1}, {"": None}, {"role": "user"},
    [["a", "b"]], [{"role": "user", "content": "a"}], [{"from": "human", "value": 3}],
]  # fmt: skip

_edit = st.tuples(
    st.sampled_from(["insert", "replace", "delete", "repeat", "cut", "move"]),
    st.integers(0, 10_000),
    st.integers(0, 40),
    st.one_of(st.sampled_from(TOKENS), st.text(max_size=6)),
)
_json = st.one_of(
    st.sampled_from(VALUES),
    st.recursive(
        st.sampled_from(VALUES), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
    ),
)


@st.composite
def texts(draw: st.DrawFn, originals: list[str]) -> str:
    """One of some texts, with a few places changed."""
    text = draw(st.sampled_from(originals))
    for kind, place, length, token in draw(st.lists(_edit, min_size=1, max_size=2)):
        start = place % (len(text) + 1)
        end = min(start + length, len(text))
        text = {
            "insert": text[:start] + token + text[start:],
            "replace": text[:start] + token + text[end:],
            "delete": text[:start] + text[end:],
            "repeat": text[:end] + text[start:],
            "cut": text[:start],
            "move": text[end:] + text[start:end] + text[:start],
        }[kind]
    return text


@st.composite
def jsons(draw: st.DrawFn, originals: list[Any]) -> str:
    """The text of one of some JSON values, with a few of the inner ones replaced, or the text itself changed."""
    value = json.loads(json.dumps(draw(st.sampled_from(originals))))
    for place, new, kind in draw(
        st.lists(st.tuples(st.integers(0, 10_000), _json, st.sampled_from(["set", "drop", "add"])), max_size=2)
    ):
        new = copy.deepcopy(new)
        holders = list(_places(value))
        if not holders:
            value = new
            continue
        holder, key = holders[place % len(holders)]
        if kind == "drop":
            del holder[key]
        elif kind == "add" and isinstance(holder, list):
            holder.insert(key, new)
        else:
            holder[key] = new
    text = json.dumps(value)
    if draw(st.integers(0, 30)) == 0:
        return draw(st.sampled_from(["[" * _DEEP, '{"a":' * _DEEP, "", "\ufeff" + text, text * 2]))
    return text if draw(st.integers(0, 2)) else draw(texts([text]))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, item in inner:
        yield value, key
        yield from _places(item)


def to_bytes(text: str) -> bytes:
    """As a file could hold it: what is no text is not UTF-8 there."""
    return text.encode("utf-8", "surrogatepass")


def one_line_or_result(action: Callable[[], Any]) -> Any:
    """Runs what may refuse its input in one line, and nothing else.

    Returns:
        What it returns; None if it refuses.
    """
    try:
        result = action()
        event("taken")
        return result
    except UserError as error:
        event("refused")
        message = str(error)
        assert message.strip()
        assert len(message.splitlines()) == 1, message
        return None


def fuzz(**strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test on :data:`EXAMPLES` examples."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        chosen = settings(
            max_examples=EXAMPLES,
            derandomize=_ASKED is None,
            deadline=None,  # a loaded machine is no fault
            database=None,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        return chosen(given(**strategies)(test))

    return decorate
