"""From a record to token ids: what one worker process does.

Imports neither torch nor megatron, so that workers start fast.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_tgdpo.data.chat import NO_VARIABLES, TEMPLATE_KEY, ChatTemplate
from megatron_tgdpo.data.example import Example, Response
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import detect_layout, is_single, parse_record, rename
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.records import parse_line, where
from megatron_tgdpo.data.responses import Segment, render_responses
from megatron_tgdpo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tgdpo.data.truncation import DroppedPair, EncodedPair, truncate
from megatron_tgdpo.errors import UserError


@dataclass(frozen=True)
class RecordBatch:
    """Records of one file on their way to a worker.

    Attributes:
        path: the file.
        kind: json, jsonl, parquet or arrow.
        layout: name of the layout of the file's first record: it says whether the file holds pairs or single answers.
        numbers: line or record number of each payload.
        payloads: undecoded lines (jsonl) or decoded objects.
    """

    path: str
    kind: str
    layout: str
    numbers: tuple[int, ...]
    payloads: tuple[Any, ...]


@dataclass
class EncodedBatch:
    """What became of a `RecordBatch`.

    Attributes:
        tokens: int32 ids of all kept pairs: prompt, chosen, rejected, and so on; ``~id`` where a response's token is
            not trained on.
        lengths: int32 [kept pairs, 3]: tokens of prompt, chosen, rejected; 0 where there is no rejected response.
        numbers: record number of each kept pair.
        dropped: pairs dropped by reason.
        truncated: pairs by what was cut: ``prompt_by_max_prompt_length``, ``prompt``, ``chosen``, ``rejected``.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    numbers: list[int]
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)


def encode_batch_in_worker(batch: RecordBatch, options: PreprocessOptions) -> EncodedBatch:
    """`encode_batch` for a worker process, which opens the tokenizer once."""
    kwargs = json.dumps(options.template_kwargs)
    return encode_batch(batch, _worker_tokenizer(options.tokenizer, options.chat_template, kwargs), options)


def start_worker() -> None:
    """Worker initialiser: leaves Ctrl-C and USR1 to the parent, and ends with the parent however that ends."""
    # Ctrl-C reaches the whole process group, and Slurm's signals every process of a step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # A pool's workers wait on a pipe of which they hold both ends, so the parent's death does not wake them.
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@lru_cache(maxsize=1)
def _worker_tokenizer(path: str, chat_template: str | None, template_kwargs: str) -> Tokenizer:
    return load_tokenizer(path, chat_template, json.loads(template_kwargs))


def encode_batch(batch: RecordBatch, tokenizer: Tokenizer, options: PreprocessOptions) -> EncodedBatch:
    """Encodes records in order.

    Raises:
        UserError: a record is malformed, or is dropped although ``options.strict``; names file and record.
    """
    result = EncodedBatch(np.empty(0, np.int32), np.empty((0, 3), np.int32), [])
    tokens: list[int] = []
    lengths: list[tuple[int, int, int]] = []
    for number, payload in zip(batch.numbers, batch.payloads, strict=True):
        place = where(batch.path, batch.kind, number)
        record = decode_record(payload, batch.kind, place, options)
        layout = detect_layout(record, place, chosen_only=options.chosen_only)
        if is_single(layout) != is_single(batch.layout):
            first, this = ("a single answer", "a pair") if is_single(batch.layout) else ("a pair", "a single answer")
            raise UserError(f"{place}: {this} in a file that begins with {first}: keep them in files of their own")
        example = parse_record(record, layout, place, chosen_only=options.chosen_only)
        try:
            pair = encode_example(example, tokenizer, options, place)
        except DroppedPair as dropped:
            if options.strict:
                raise UserError(
                    f"{place}: this pair would be dropped ({dropped.reason}) and strict is on; mend or remove it"
                ) from dropped
            result.dropped[dropped.reason] += 1
            continue
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            tokens.extend(ids)
        lengths.append((len(pair.prompt), len(pair.chosen), len(pair.rejected)))
        result.numbers.append(number)
        result.truncated.update(pair.truncated)
    result.tokens = np.array(tokens, dtype=np.int32)
    result.lengths = np.array(lengths, dtype=np.int32).reshape(-1, 3)
    return result


def decode_record(payload: Any, kind: str, place: str, options: PreprocessOptions) -> Any:
    """The record that a payload of `RecordBatch` holds, with the keys that ``options.columns`` gives it.

    Raises:
        UserError: it cannot be decoded, or lacks one of these keys.
    """
    record = parse_line(payload, place) if kind == "jsonl" else payload
    if kind not in ("json", "jsonl"):
        record = _without_nulls(record)
    return rename(record, options.columns, place)


def _without_nulls(value: Any) -> Any:
    """A value of a file with columns, whose objects all have the keys of any: those that were not given are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def encode_example(example: Example, tokenizer: Tokenizer, options: PreprocessOptions, place: str) -> EncodedPair:
    """Encodes and truncates one pair.

    Args:
        example: the pair's text.
        tokenizer: the tokenizer.
        options: the length rules.
        place: how errors name the record.

    Raises:
        DroppedPair: nothing can be learnt from it, or the length rules drop it.
        UserError: the template refuses it, or its prompt is too long and ``overlong_prompt`` is ``error``.
    """
    if not _prompt_has_text(example):
        raise DroppedPair("empty_prompt")
    single = example.rejected is None
    if _is_blank(example.chosen) or (example.rejected is not None and _is_blank(example.rejected)):
        raise DroppedPair("empty_response")
    if example.tie:
        raise DroppedPair("tie")
    prompt, chosen, rejected = encode_responses(example, tokenizer, place)
    if not prompt:
        raise DroppedPair("empty_prompt")
    if not chosen or not (single or rejected):
        raise DroppedPair("empty_response")
    if chosen == rejected:
        raise DroppedPair("identical")

    limit = options.max_prompt_length
    overlong = limit is not None and len(prompt) > limit
    if overlong and options.overlong_prompt == "error":
        raise UserError(
            f"{place}: the prompt has {len(prompt)} tokens, above max_prompt_length {limit}; "
            "raise the limit, or set overlong_prompt to truncate or drop"
        )
    if overlong and options.overlong_prompt == "drop":
        raise DroppedPair("overlong_prompt")
    return truncate(prompt, chosen, rejected, options)


def encode_responses(example: Example, tokenizer: Tokenizer, place: str) -> tuple[list[int], list[int], list[int]]:
    """Ids of the prompt, shared by both responses, and of each response with its end-of-turn token; untruncated.

    A rejected response that is not there has no ids. A token that is not trained on, as of a tool's result between
    two turns of the assistant, is ``~id``, which is negative.

    Args:
        example: the pair's text. A plain prompt is used as it is, with a BOS in front where the tokenizer adds
            one by default, and its responses end with EOS; messages go through the chat template.
        tokenizer: the tokenizer.
        place: how errors name the record.

    Raises:
        UserError: messages without a chat template, plain text without an EOS token, or an unfit template.
    """
    responses = [response for response in (example.chosen, example.rejected) if response is not None]
    if isinstance(example.prompt, str):
        texts = [each if isinstance(each, str) else "".join(turn.text for turn in each) for each in responses]
        prompt, *encoded = _encode_plain(example.prompt, texts, tokenizer, place)
    else:
        template = _template(tokenizer, place)
        special = tokenizer.special_tokens
        text, parts = render_responses(template, example.prompt, responses, special, place, example.variables)
        prompt = tokenizer.encode(text)
        encoded = [_continue_in_parts(tokenizer, text, prompt, each) for each in parts]
    return prompt, encoded[0], encoded[1] if len(encoded) > 1 else []


def encode_prompt(
    prompt: str | Sequence[Message], tokenizer: Tokenizer, place: str, variables: Mapping[str, Any] = NO_VARIABLES
) -> list[int]:
    """Ids of a prompt that waits for its response: those that `encode_responses` gives it in a pair.

    Args:
        prompt: plain text, or messages that end with a user's.
        tokenizer: the tokenizer.
        place: how errors name the record.
        variables: what the record tells the chat template besides its messages.

    Raises:
        UserError: messages without a chat template, or an unfit template.
    """
    if isinstance(prompt, str):
        return _with_bos(tokenizer.encode(prompt), tokenizer)
    text, _ = render_responses(_template(tokenizer, place), prompt, (), tokenizer.special_tokens, place, variables)
    return tokenizer.encode(text)


def _encode_plain(text: str, responses: Sequence[str], tokenizer: Tokenizer, place: str) -> list[list[int]]:
    """Ids of the prompt, then of each response."""
    eos = tokenizer.eos_id
    if eos is None:
        raise UserError(f"{place}: plain prompts need an EOS token to end responses and this tokenizer has none")
    prompt = tokenizer.encode(text)
    encoded = []
    for response in responses:
        ids = _continue(tokenizer, text, prompt, response)
        encoded.append(ids if ids[-1:] == [eos] else [*ids, eos])
    return [_with_bos(prompt, tokenizer), *encoded]


def _with_bos(prompt: list[int], tokenizer: Tokenizer) -> list[int]:
    if tokenizer.adds_bos and tokenizer.bos_id is not None and prompt[:1] != [tokenizer.bos_id]:
        return [tokenizer.bos_id, *prompt]
    return prompt


def _template(tokenizer: Tokenizer, place: str) -> ChatTemplate:
    if tokenizer.template is None:
        raise UserError(
            f"{place}: messages need a chat template and this tokenizer has none: give one ({TEMPLATE_KEY})"
        )
    return tokenizer.template


def _continue(tokenizer: Tokenizer, prompt_text: str, prompt: list[int], response_text: str) -> list[int]:
    """Ids of a response as it follows its prompt.

    SentencePiece-like tokenizers put a space before a text that stands alone, which an answer inside a conversation
    does not have; so the response is encoded behind its prompt. Where the prompt's own ids would change by that
    (a token would span the border), the response is encoded alone, because both responses must share the prompt's ids.
    """
    together = tokenizer.encode(prompt_text + response_text)
    if together[: len(prompt)] == prompt:
        return together[len(prompt) :]
    return tokenizer.encode(response_text)


def _continue_in_parts(
    tokenizer: Tokenizer, prompt_text: str, prompt: list[int], parts: Sequence[Segment]
) -> list[int]:
    """Ids of a response, ``~id`` where it is not trained on; no token spans the border of two parts."""
    if len(parts) == 1 and parts[0].trained:
        return _continue(tokenizer, prompt_text, prompt, parts[0].text)
    text, before, response = prompt_text, list(prompt), []
    for part in parts:
        ids = _continue(tokenizer, text, before, part.text)
        text += part.text
        before += ids
        response += ids if part.trained else [~token for token in ids]
    return response


def _is_blank(response: Response) -> bool:
    """Whether the assistant says nothing in it."""
    if isinstance(response, str):
        return not response.strip()
    return all(turn.is_blank for turn in response if turn.role == "assistant")


def _prompt_has_text(example: Example) -> bool:
    if isinstance(example.prompt, str):
        return bool(example.prompt.strip())
    return any(not message.is_blank for message in example.prompt if message.role != "system")
