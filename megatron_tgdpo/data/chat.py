"""Chat templates: from messages to the prompt's text and the response's text, and where exactly one ends."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.files import read_error

# For a raw SentencePiece model, which carries no template: the reference code's template named "default".
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}System: {{ message.content }}\n"
    "{% elif message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n"
    "{% else %}Human: {{ message.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Some templates print today's date; data must not depend on the day, and this is what Llama 3's falls back to.
TEMPLATE_DATE = datetime(2024, 7, 26)
# Stands in for the answer, to see what the template puts around it.
ANSWER_SLOT = "f1c04b9e7a52ANSWERd83e6"


class _GenerationTag(Extension):
    """Accepts Hugging Face's ``{% generation %}`` blocks, which mark the assistant's text, as plain blocks."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # Jinja only asks what is in it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled Jinja chat template, run in Jinja's sandbox with the names Hugging Face templates rely on.

    Args:
        source: the template.
        tokens: special tokens by variable name (``bos_token``, ``eos_token``, ...).
        name: how errors call it.

    Raises:
        UserError: the template does not compile.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], name: str) -> None:
        self.source = source
        self.name = name
        self._tokens = dict(tokens)
        try:
            self._template = _compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}:{error.lineno}: the chat template does not compile: {error.message}") from error

    def render(self, messages: Sequence[Message], place: str, *, add_generation_prompt: bool = False) -> str:
        """Renders messages to text.

        Args:
            messages: the conversation.
            place: the record, for errors.
            add_generation_prompt: end with the header of an assistant turn.

        Raises:
            UserError: the template refuses these messages.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(
                messages=turns, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, IndexError, KeyError) as error:
            raise UserError(f"{place}: the chat template of {self.name} refuses this record: {error}") from error


@lru_cache(maxsize=4)
def _compile(source: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **keywords: Any) -> str:
        # Jinja's own filter escapes HTML, Hugging Face's does not.
        return json.dumps(value, ensure_ascii=False, indent=indent, **keywords)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    return environment.from_string(source)


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


def render_sides(
    template: ChatTemplate, prompt: Sequence[Message], responses: Sequence[str], special: Sequence[str], place: str
) -> tuple[str, list[str]]:
    """Renders a prompt and the responses to it, with the border exactly between header and answer.

    The prompt's text is the template with its generation prompt. Where a finished turn does not begin with that
    (say, the generation prompt opens a block that a finished turn lacks), it is the text that a finished
    turn has before its answer, so that no token of the answer is lost. A response ends with its end-of-turn token:
    what the template writes after that (a newline in ChatML and Gemma) is cut.

    Args:
        template: the chat template.
        prompt: messages before the response.
        responses: texts of the assistant turns that answer it.
        special: the tokenizer's special tokens, among which the end-of-turn token is looked for.
        place: the record, for errors.

    Returns:
        The prompt's text, shared, and each response's text.

    Raises:
        UserError: the template refuses the messages, or writes the prompt differently once it is answered.
    """
    around = template.render([*prompt, Message("assistant", ANSWER_SLOT)], place)
    if around.count(ANSWER_SLOT) != 1:
        count = around.count(ANSWER_SLOT)
        raise UserError(f"{place}: the chat template of {template.name} writes the answer {count} times, not once")
    head, tail = around.split(ANSWER_SLOT)
    prompt_text = template.render(prompt, place, add_generation_prompt=True)
    if not head.startswith(prompt_text):
        if not head.startswith(template.render(prompt, place)):
            raise UserError(
                f"{place}: the chat template of {template.name} is not prefix-stable: it writes the prompt "
                "differently once an answer follows; give a template that does not (--chat-template)"
            )
        prompt_text = head
    cut = len(tail) - _end_of_turn(tail, special)
    texts = []
    for response in responses:
        text = template.render([*prompt, Message("assistant", response)], place)
        if not (text.startswith(prompt_text) and text.endswith(tail) and len(text) >= len(prompt_text) + len(tail)):
            raise UserError(
                f"{place}: the chat template of {template.name} is not prefix-stable: what it writes around the "
                "answer depends on the answer; give a template that does not (--chat-template)"
            )
        texts.append(text[len(prompt_text) : len(text) - cut])
    return prompt_text, texts


def _end_of_turn(tail: str, special: Sequence[str]) -> int:
    """Characters of ``tail`` up to the end of its first special token; without one, up to trailing white space."""
    ends = [(tail.index(token), -len(token)) for token in special if token in tail]
    if not ends:
        return len(tail.rstrip())
    start, negative_length = min(ends)
    return start - negative_length
