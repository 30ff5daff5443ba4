"""What scores answers: a Hugging Face reward model, or a user's Python function."""

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForSequenceClassification

from megatron_tgdpo.data.chat import NO_VARIABLES
from megatron_tgdpo.data.encode import encode_responses
from megatron_tgdpo.data.example import as_keys
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import Example
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.errors import UserError
from tgdpo.generation.models import load_model

PromptContent = str | tuple[Message, ...]


class Scorer(Protocol):
    """Scores answers to a prompt; higher is better."""

    def score(
        self, prompt: PromptContent, answers: Sequence[str], place: str, variables: Mapping[str, Any] = NO_VARIABLES
    ) -> list[float]:
        """One finite number an answer.

        Args:
            prompt: Plain text or messages.
            answers: The answers to it.
            place: Its record, for errors.
            variables: What its record tells the chat template beside messages, such as ``tools``.

        Raises:
            UserError: It cannot; starts with ``place``.
        """
        ...


class FunctionScorer:
    """A user's ``module:function``, called as ``function(prompt, answers)``.

    ``prompt`` is a string, or a list of ``{"role": ..., "content": ...}``; ``answers`` a list of strings; the result
    one number for each. What else a record has for the chat template comes by name: ``tools``, ``documents``,
    ``chat_template_kwargs``.

    Raises:
        UserError: There is no such function.
    """

    def __init__(self, name: str) -> None:
        module, _, function = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"--score {name}: cannot be imported: {error}; give module:function") from error
        if not callable(found):
            raise UserError(f"--score {name}: not a function")
        self._name = name
        self._function = found

    def score(
        self, prompt: PromptContent, answers: Sequence[str], place: str, variables: Mapping[str, Any] = NO_VARIABLES
    ) -> list[float]:
        """See :class:`Scorer`."""
        try:
            scores = self._function(as_plain(prompt), list(answers), **as_keys(variables))
        except Exception as error:
            raise UserError(f"{place}: {self._name} raised {type(error).__name__}: {error}") from error
        try:
            numbers = [float(value) for value in scores]
        except (TypeError, ValueError) as error:
            raise UserError(f"{place}: {self._name} returned {scores!r}, not a list of numbers") from error
        return checked(numbers, len(answers), f"{place}: {self._name}")


class RewardModelScorer:
    """A sequence-classification model with one output, read in its own chat template.

    The text of prompt and answer is what the template makes of the whole conversation, to its last character; a plain
    prompt is followed by the answer and EOS.

    Args:
        directory: HF directory with its tokenizer.
        dtype: Of the weights.
        device: Where it runs.

    Raises:
        UserError: It cannot be loaded, or has more than one output.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._directory = directory
        self._tokenizer = load_tokenizer(str(directory))
        self._model = load_model(AutoModelForSequenceClassification, directory, dtype, device)
        if self._model.config.num_labels != 1:
            labels = self._model.config.num_labels
            raise UserError(f"{directory}: a reward model has 1 output, this one has {labels} (num_labels)")
        # A model without a padding token takes the last token of each row: rows of one length, or one at a time.
        self._pad = self._model.config.pad_token_id

    @torch.inference_mode()
    def score(
        self, prompt: PromptContent, answers: Sequence[str], place: str, variables: Mapping[str, Any] = NO_VARIABLES
    ) -> list[float]:
        """See :class:`Scorer`."""
        rows = [torch.tensor(self._ids(prompt, answer, place, variables)) for answer in answers]
        batches = [rows] if self._pad is not None else [[row] for row in rows]
        scores: list[float] = []
        for batch in batches:
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=self._pad or 0)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
            device = self._model.device
            logits = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            scores += logits[:, 0].float().tolist()
        return checked(scores, len(answers), f"{place}: {self._directory}")

    def _ids(self, prompt: PromptContent, answer: str, place: str, variables: Mapping[str, Any]) -> list[int]:
        if isinstance(prompt, str):
            before, response, _ = encode_responses(Example(prompt, answer, answer), self._tokenizer, place)
            return [*before, *response]
        template = self._tokenizer.template
        if template is None:
            raise UserError(f"{place}: the reward model {self._directory} has no chat template for messages")
        turns = [*prompt, Message("assistant", answer)]
        if variables or any(message.extra for message in prompt):
            template.check_read(turns, variables, place)
        return self._tokenizer.encode(template.render(turns, place, variables=variables))


def as_plain(prompt: PromptContent) -> Any:
    """A prompt as JSON has it: a string, or messages as dictionaries."""
    if isinstance(prompt, str):
        return prompt
    return [message.as_dict() for message in prompt]


def checked(scores: list[float], answers: int, source: str) -> list[float]:
    """The scores, if there are enough and all are finite.

    Raises:
        UserError: They are not.
    """
    if len(scores) != answers:
        raise UserError(f"{source} returned {len(scores)} scores for {answers} answers")
    if not all(map(math.isfinite, scores)):
        raise UserError(f"{source} returned a score that is not finite: {scores}")
    return scores
