"""From messages to the text of a prompt and of each response to it, and where exactly one ends."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tgdpo.data.chat import LABEL_KEYS, NO_VARIABLES, TEMPLATE_KEY, ChatTemplate
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.errors import UserError

# Stands in for the answer, to see what the template puts around it.
ANSWER_SLOT = "f1c04b9e7a52ANSWERd83e6"


@dataclass(frozen=True)
class Segment:
    """A part of a response's text, and whether the model is trained to write it."""

    text: str
    trained: bool


@dataclass(frozen=True)
class _Border:
    """Where a prompt ends: its text, what a finished turn has before a plain answer, and what follows that answer.

    ``generation`` says whether the prompt ends with the template's generation prompt. ``opened`` is the end of it that
    a finished turn may lack or write itself: a think block.
    """

    prompt: str
    head: str
    tail: str
    generation: bool = False

    @property
    def opened(self) -> str:
        if self.head.startswith(self.prompt) or self.prompt.startswith(self.head):
            return self.prompt[len(self.head) :]
        pairs = zip(self.prompt, self.head, strict=False)
        same = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), len(self.head))
        return self.prompt[same:]

    def answer_start(self, text: str) -> int | None:
        """Where the answer begins in a finished conversation; None if that does not begin with the prompt."""
        if text.startswith(self.prompt):
            return len(self.prompt)
        if not text.startswith(self.head):
            return None
        start, opened = len(self.head), self.opened.strip()
        # An answer that opens the block itself, in other white space.
        blank = len(text) - start - len(text[start:].lstrip())
        return start + blank + len(opened) if opened and text.startswith(opened, start + blank) else start


def render_responses(
    template: ChatTemplate,
    prompt: Sequence[Message],
    responses: Sequence[str | Sequence[Message]],
    special: Sequence[str],
    place: str,
    variables: Mapping[str, Any] = NO_VARIABLES,
) -> tuple[str, list[list[Segment]]]:
    """Renders a prompt and the responses to it, with the border exactly between header and answer.

    The prompt's text is the template with its generation prompt, which is what a model is given to answer. A template
    without one ends it where the answer begins. A response is what follows, up to the end-of-turn token of its last
    turn: what the template writes after that (a newline in ChatML and Gemma) is cut. It is trained on where it is the
    assistant's turns, each with its end-of-turn token, or, if the template has ``{% generation %}`` blocks, where it
    stands in these.

    Args:
        template: the chat template.
        prompt: messages before the response.
        responses: each the text of an assistant turn, or messages of which the last is the assistant's.
        special: the tokenizer's special tokens, among which the end-of-turn token is looked for.
        place: the record, for errors.
        variables: the record's own variables, such as ``tools``.

    Returns:
        The prompt's text, shared, and each response's text in parts.

    Raises:
        UserError: the template refuses the messages, writes the prompt differently once it is answered, or leaves out
            some of what is said.
    """
    plain = bool(responses) and not (template.marks_answers or variables)
    found = _as_usual(template, prompt, responses, place) if plain else None
    if found is None:
        border = _border(template, prompt, place, variables)
        if plain and border.generation and border.head.startswith(border.prompt):
            own = border.tail[: _end_of_turn(border.tail, special)]
            template.usual = border.head[len(border.prompt) :], border.tail, own
        rendered = []
        for response in responses:
            turns = [Message("assistant", response)] if isinstance(response, str) else list(response)
            rendered.append(_render_response(template, list(prompt), turns, border, special, place, variables))
        found = border.prompt, rendered
    if variables or any(message.extra for message in prompt):
        template.check_read(prompt, variables, place)
    for message in prompt:
        if message.role in ("user", "system") and not _holds(found[0], message.text):
            raise _loss(template, f"the {message.role}'s text", place)
    return found


def _as_usual(
    template: ChatTemplate, prompt: Sequence[Message], responses: Sequence[str | Sequence[Message]], place: str
) -> tuple[str, list[list[Segment]]] | None:
    """`render_responses` where the template writes about the answers just what it wrote about others before.

    Then the border need not be looked for: the whole text is the proof. None where it does not.
    """
    if template.usual is None or template.usual_credit < 0:
        return None
    lead, tail, own = template.usual
    text = template.render(prompt, place, add_generation_prompt=True)
    rendered = []
    for response in responses:
        whole = isinstance(response, str) and template.render([*prompt, Message("assistant", response)], place)
        if whole != f"{text}{lead}{response}{tail}":
            template.usual_credit -= 4
            return None
        rendered.append([Segment(f"{lead}{response}{own}", True)])
    template.usual_credit = min(template.usual_credit + 1, 64)
    return text, rendered


def _border(template: ChatTemplate, prompt: Sequence[Message], place: str, variables: Mapping[str, Any]) -> _Border:
    around = template.render([*prompt, Message("assistant", ANSWER_SLOT)], place, variables=variables)
    if around.count(ANSWER_SLOT) != 1:
        count = around.count(ANSWER_SLOT)
        raise UserError(f"{place}: the chat template of {template.name} writes the answer {count} times, not once")
    head, tail = around.split(ANSWER_SLOT)
    # A space between header and answer is the answer's first token's, as tokenizers have it.
    own = head.rstrip(" ")
    if not template.has_generation_prompt:
        return _Border(own, head, tail)
    text = template.render(prompt, place, add_generation_prompt=True, variables=variables)
    if head.startswith(text):
        # Beyond the generation prompt a finished turn may have more, as an empty think block.
        asks = head == text or template.asks_for_answer(prompt, text, place, variables)
        return _Border(text if asks else own, head, tail, asks)
    if not text.startswith(head):
        plain = template.render(prompt, place, variables=variables)
        if not (head.startswith(plain) and text.startswith(plain)):
            raise UserError(
                f"{place}: the chat template of {template.name} is not prefix-stable: it writes the prompt "
                f"differently once an answer follows; give a template that does not ({TEMPLATE_KEY})"
            )
    return _Border(text, head, tail)


def _render_response(
    template: ChatTemplate,
    prompt: list[Message],
    turns: list[Message],
    border: _Border,
    special: Sequence[str],
    place: str,
    variables: Mapping[str, Any],
) -> list[Segment]:
    text, marked = template.render_marked([*prompt, *turns], place, variables)
    start = border.answer_start(text)
    if start is None:
        raise _unstable(template, place)
    if any(turn.extra for turn in turns):
        template.check_read([*prompt, *turns], variables, place)
    if template.marks_answers:
        spans = [(max(begin, start), end) for begin, end in marked if end > start]
        if not spans:
            raise UserError(
                f"{place}: the chat template of {template.name} marks no part of the response with "
                "{% generation %}: nothing of it would be trained on"
            )
        _check_turns(template, turns, [border.opened + text[start:]] * len(turns), place)
    else:
        spans = _spans(template, prompt, turns, border, text, start, special, place, variables)
        own = iter([text[begin:end] for begin, end in spans])
        parts = [next(own) if turn.role == "assistant" else text for turn in turns]
        _check_turns(template, turns, [border.opened + parts[0], *parts[1:]], place)
    segments, at = [], start
    for begin, end in spans:
        segments += [Segment(text[at:begin], False), Segment(text[begin:end], True)]
        at = end
    return [segment for segment in segments if segment.text]


def _spans(
    template: ChatTemplate,
    prompt: list[Message],
    turns: list[Message],
    border: _Border,
    text: str,
    start: int,
    special: Sequence[str],
    place: str,
    variables: Mapping[str, Any],
) -> list[tuple[int, int]]:
    """The [start, end) of each assistant turn in ``text``, which is the prompt and all turns."""
    spans = []
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before = [*prompt, *turns[:number]]
        if number:
            border = _border(template, before, place, variables)
            found = border.answer_start(text)
            if found is None:
                raise _unstable(template, place)
            start = found
        end = len(text)
        if number < len(turns) - 1:
            alone = template.render([*before, turn], place, variables=variables)
            shared = _shared_start(alone, text, special)
            if shared <= start:
                raise _unstable(template, place)
            end = shared
        tail = border.tail
        if text.endswith(tail, start, end) and start + len(tail) <= end:
            end -= len(tail) - _end_of_turn(tail, special)
        elif turn.extra or number < len(turns) - 1:
            end = start + len(text[start:end].rstrip())
        else:
            raise _unstable(template, place)
        spans.append((start, end))
    return spans


def _shared_start(alone: str, text: str, special: Sequence[str]) -> int:
    """How much of ``text`` is ``alone``, without what the template writes only at a conversation's end; 0 if none."""
    while alone and not text.startswith(alone):
        bare = alone.rstrip()
        ends = [token for token in special if token and bare.endswith(token)]
        alone = bare if len(bare) < len(alone) else bare.removesuffix(max(ends, key=len)) if ends else ""
    return len(alone)


def _check_turns(template: ChatTemplate, turns: Sequence[Message], texts: Sequence[str], place: str) -> None:
    """Checks that what the assistant says stands in what is trained on."""
    for turn, text in zip(turns, texts, strict=True):
        if turn.role != "assistant":
            continue
        if turn.content and not _holds(text, turn.content):
            raise _loss(template, "text of the answer", place)
        for key, value in turn.extra.items():
            if key not in LABEL_KEYS and not all(_holds_leaf(text, leaf) for leaf in _strings(value)):
                raise _loss(template, f"'{key}' of the answer", place)


def _holds(text: str, part: str) -> bool:
    """Whether a text has a part; templates may trim it and space it otherwise."""
    return part in text or "".join(part.split()) in "".join(text.split())


def _holds_leaf(text: str, leaf: str) -> bool:
    if _holds(text, leaf):
        return True
    if any(_holds(text, json.dumps(leaf, ensure_ascii=ascii_only)[1:-1]) for ascii_only in (False, True)):
        return True
    try:
        inner = json.loads(leaf)  # arguments that are JSON text, written as an object
    except (ValueError, RecursionError):
        return False
    return isinstance(inner, dict | list) and all(_holds_leaf(text, part) for part in _strings(inner))


def _strings(value: Any) -> Iterator[str]:
    """The texts in a value of JSON, without what only names or types a part."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in LABEL_KEYS and key != "type":
                yield from _strings(item)


def _end_of_turn(tail: str, special: Sequence[str]) -> int:
    """Characters of ``tail`` up to the end of its first special token; without one, up to trailing white space."""
    ends = [(tail.index(token), -len(token)) for token in special if token in tail]
    if not ends:
        return len(tail.rstrip())
    start, negative_length = min(ends)
    return start - negative_length


def _unstable(template: ChatTemplate, place: str) -> UserError:
    return UserError(
        f"{place}: the chat template of {template.name} is not prefix-stable: what it writes around the answer depends "
        f"on the answer; give a template that does not ({TEMPLATE_KEY})"
    )


def _loss(template: ChatTemplate, what: str, place: str) -> UserError:
    return UserError(
        f"{place}: the chat template of {template.name} leaves out or rewrites {what}, so that it would not be trained "
        f"on: give a template that writes it ({TEMPLATE_KEY})"
    )
