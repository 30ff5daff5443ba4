"""Jinja's sandbox for chat templates: the names they rely on, marks around what is trained on, and an end to loops."""

import json
import re
import time
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Some templates print today's date; data must not depend on the day, and this is what Llama 3's falls back to.
TEMPLATE_DATE = datetime(2024, 7, 26)
# A conversation of a thousand messages takes some thousands.
MAX_TURNS = 1_000_000
MAX_SECONDS = 60.0
# Of what one operation makes: characters or items of a product, bits of a number.
MAX_SIZE = 1_000_000
# Around the text of a generation block, for as long as it takes to see where that is.
_BEGIN, _END = "\ue000f1c04b9e\ue001", "\ue000a52d83e6\ue001"
_MARKS = re.compile(f"({_BEGIN}|{_END})")


class _GenerationTag(Extension):
    """Marks the text of Hugging Face's ``{% generation %}`` blocks, which is the assistant's."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # Jinja only asks what is in it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (_BEGIN, _END))
        return [begin, *body, end]


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with limits on loops, recursion and the size of products."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = TEMPLATE_DATE.strftime
        self.start_clock()

    def start_clock(self) -> None:
        """Begins to count; call it before each rendering."""
        self._turns = 0
        self._end = time.monotonic() + MAX_SECONDS

    @property
    def turn(self) -> None:
        """Counts, at each turn of a loop and each call of a macro. A call would go through the sandbox's checks."""
        self._turns += 1
        if self._turns > MAX_TURNS or (not self._turns % 256 and time.monotonic() > self._end):
            raise jinja2.TemplateRuntimeError(
                f"it does not end: more than {MAX_TURNS:,} turns of loops, or {MAX_SECONDS:.0f} seconds"
            )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            count = nodes.ExprStmt(nodes.EnvironmentAttribute("turn")).set_lineno(node.lineno)
            body: list[nodes.Node] = node.body  # type: ignore[attr-defined]
            body.insert(0, count)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """``*`` and ``**``, as far as the result is of a reasonable size."""
        if _product_size(operator, left, right) > MAX_SIZE:
            raise jinja2.TemplateRuntimeError(f"the result of '{operator}' would be too large")
        return super().call_binop(context, operator, left, right)


def _product_size(operator: str, left: Any, right: Any) -> int:
    numbers = [value for value in (left, right) if isinstance(value, int)]
    if len(numbers) == 2:
        bits = left.bit_length()
        result: int = bits * max(right, 1) if operator == "**" else bits + right.bit_length()
        return result
    others = [value for value in (left, right) if isinstance(value, str | list | tuple)]
    return len(others[0]) * numbers[0] if others and numbers else 0


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, Hugging Face's does not; the order of the arguments is theirs.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def compile_template(source: str) -> jinja2.Template:
    """Compiles a template in an environment of its own.

    Raises:
        jinja2.TemplateSyntaxError: it is malformed; other exceptions where it is too large or too deep.
    """
    return _Environment().from_string(source)


def run_template(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """The text that a template of `compile_template` makes, with marks where it has generation blocks.

    One thread at a time. Raises whatever the template raises.
    """
    template.environment.start_clock()  # type: ignore[attr-defined]
    return template.render(variables)


def split_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text of `run_template` without its marks, and the [start, end) in it that they were around."""
    if _BEGIN not in text:
        return text, []
    clean, spans, begin = "", [], 0
    for part in _MARKS.split(text):
        if part == _BEGIN:
            begin = len(clean)
        elif part == _END:
            spans.append((begin, len(clean)))
        else:
            clean += part
    return clean, spans
