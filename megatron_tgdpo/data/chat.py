"""Chat templates: from messages to text."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.sandbox import compile_template, run_template, split_marks
from megatron_tgdpo.errors import UserError, one_line
from megatron_tgdpo.storage.files import read_error

# In messages: what a config calls it, and what commands without one do.
TEMPLATE_KEY = "data.chat_template, or --chat-template"

# For a raw SentencePiece model, which carries no template: the reference code's template named "default".
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}System: {{ message.content }}\n"
    "{% elif message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n"
    "{% else %}Human: {{ message.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Names under which templates read a message's reasoning; transformers passes each as the others.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Keys of a message that name it and are no part of what is said: they may be lost.
LABEL_KEYS = frozenset({"id", "index", "timestamp", "tool_call_id"})
RESERVED_VARIABLES = frozenset({"messages", "add_generation_prompt"})
NO_VARIABLES: Mapping[str, Any] = {}


class ChatTemplate:
    """A compiled Jinja chat template, run in Jinja's sandbox with the names Hugging Face templates rely on.

    Args:
        source: the template.
        tokens: special tokens by variable name (``bos_token``, ``eos_token``, ...).
        name: how errors call it.
        variables: further variables that it reads, such as ``enable_thinking``.

    Attributes:
        names: every word in the source: what a template can read, it names.
        has_generation_prompt: whether it reads ``add_generation_prompt``.
        usual: what it writes before and after a plain answer to a generation prompt, and how much of the latter belongs
            to the answer, as last seen; None before.
        usual_credit: falls where records are otherwise; below zero there is no use in trying.
        marks_answers: whether it has ``{% generation %}`` blocks.

    Raises:
        UserError: the template does not compile, or does not read one of the variables.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str], name: str, variables: Mapping[str, Any] = NO_VARIABLES
    ) -> None:
        self.source = source
        self.name = name
        self.names = frozenset(re.findall(r"\w+", source))
        self.has_generation_prompt = "add_generation_prompt" in self.names
        self.marks_answers = re.search(r"{%[-+]?\s*generation\b", source) is not None
        for key in variables:
            if key in RESERVED_VARIABLES or key not in self.names:
                raise UserError(f"template_kwargs: '{key}' is no variable that the chat template of {name} reads")
        self._variables = {"tools": None, "documents": None, **tokens, **variables}
        self.usual: tuple[str, str, str] | None = None
        self.usual_credit = 16
        self._prompted: set[str] = set()
        try:
            self._template = compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}:{error.lineno}: the chat template does not compile: {error.message}") from error
        except Exception as error:  # too deep for the parser, too large for Python's compiler, ...
            raise UserError(f"{name}: the chat template does not compile: {_reason(error)}") from error

    def render(
        self,
        messages: Sequence[Message],
        place: str,
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> str:
        """Renders messages to text.

        Args:
            messages: the conversation.
            place: the record, for errors.
            add_generation_prompt: end with the header of an assistant turn.
            variables: the record's own, such as ``tools``.

        Raises:
            UserError: the template refuses these messages, or does not end.
        """
        return self._rendered(messages, place, add_generation_prompt, variables)[0]

    def render_marked(
        self, messages: Sequence[Message], place: str, variables: Mapping[str, Any] = NO_VARIABLES
    ) -> tuple[str, list[tuple[int, int]]]:
        """`render`, and the [start, end) of the text that stands in ``{% generation %}`` blocks."""
        return self._rendered(messages, place, False, variables)

    def _rendered(
        self, messages: Sequence[Message], place: str, prompting: bool, variables: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        turns = [
            self._turn(message) if message.extra else {"role": message.role, "content": message.content}
            for message in messages
        ]
        values = {**self._variables, **variables, "messages": turns, "add_generation_prompt": prompting}
        try:
            return split_marks(run_template(self._template, values))
        except Exception as error:  # what a template does may raise anything
            reason = _reason(error)
            raise UserError(f"{place}: the chat template of {self.name} refuses this record: {reason}") from error

    def _turn(self, message: Message) -> dict[str, Any]:
        """A message with its tool calls and its reasoning as this template reads them."""
        turn = message.as_dict()
        reasoning = next((turn[key] for key in REASONING_KEYS if turn.get(key)), None)
        if reasoning is not None:
            turn |= {key: reasoning for key in REASONING_KEYS if key in self.names}
        if isinstance(turn.get("tool_calls"), list):
            turn["tool_calls"] = [self._call(call) for call in turn["tool_calls"]]
        return turn

    def _call(self, call: Any) -> Any:
        """A tool call with its arguments as an object or as JSON text, whichever the template writes whole."""
        if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
            return call
        function = call["function"]
        arguments = function.get("arguments")
        if isinstance(arguments, str) and self._argument_kinds == {"object"}:
            try:
                return {**call, "function": {**function, "arguments": json.loads(arguments)}}
            except (ValueError, RecursionError):
                return call
        if isinstance(arguments, Mapping) and self._argument_kinds == {"text"}:
            return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}
        return call

    @cached_property
    def _argument_kinds(self) -> set[str]:
        """Of ``object`` and ``text``, those in which the template writes arguments whole, without quoting quotes."""
        kinds: dict[str, Any] = {"object": {"k7d2": "v9a4"}, "text": '{"k7d2": "v9a4"}'}
        found = set()
        for kind, arguments in kinds.items():
            call = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "probe", "arguments": arguments}}
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
            values = {**self._variables, "messages": turns, "add_generation_prompt": False}
            try:
                text = run_template(self._template, values)
            except Exception:  # as above: one that cannot write these arguments
                continue
            if "k7d2" in text and "v9a4" in text and '\\"' not in text:
                found.add(kind)
        return found

    def check_read(self, messages: Sequence[Message], variables: Mapping[str, Any], place: str) -> None:
        """Checks that the template can read all that the messages, and the record besides them, say.

        Raises:
            UserError: it writes the same without some key.
        """
        for key in variables:
            if variables[key] and key not in self.names:
                raise UserError(
                    f"{place}: the chat template of {self.name} does not read '{key}': remove it from the data, or "
                    f"give a template that reads it ({TEMPLATE_KEY})"
                )
        for number, message in enumerate(messages):
            for key, value in message.extra.items():
                if key in self.names or key in LABEL_KEYS or not value:
                    continue
                if key in REASONING_KEYS and not self.names.isdisjoint(REASONING_KEYS):
                    continue
                if key == "name" and message.role == "tool":  # the call before it names the function
                    continue
                # One that writes whole messages need not name their keys.
                rest = {name: item for name, item in message.extra.items() if name != key}
                without = [*messages]
                without[number] = Message(message.role, message.content, rest)
                if self.render(without, place, variables=variables) == self.render(
                    messages, place, variables=variables
                ):
                    raise UserError(
                        f"{place}: the chat template of {self.name} does not read '{key}' of a message of "
                        f"{message.role}: remove it from the data, or give a template that reads it ({TEMPLATE_KEY})"
                    )

    def asks_for_answer(self, prompt: Sequence[Message], text: str, place: str, variables: Mapping[str, Any]) -> bool:
        """Whether ``text``, the prompt rendered to be answered, differs from the prompt rendered as it is."""
        last = prompt[-1].role if prompt else ""
        if last not in self._prompted and self.render(prompt, place, variables=variables) != text:
            # Not asked again: it depends on the template, and at most on whose turn it is.
            self._prompted.add(last)
        return last in self._prompted


def read_template(path: str) -> str:
    """Reads a user's Jinja file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        # Editors end files with a newline that the author did not mean to put after every prompt.
        return Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise read_error(path, error) from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the chat template {path}: {error}") from error


def _reason(error: BaseException) -> str:
    return one_line(error, named=not isinstance(error, jinja2.TemplateError))
