"""What determines the tokens of a preprocessed dataset, as one frozen object."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_tgdpo.errors import UserError

OVERLONG_PROMPT_RULES = ("truncate", "drop", "error")


def json_object(text: str) -> dict[str, Any]:
    """An object as the option of a command line has it: JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


@dataclass(frozen=True)
class PreprocessOptions:
    """How text becomes token pairs.

    Attributes:
        tokenizer: Hugging Face tokenizer directory, or a SentencePiece ``.model`` file.
        chat_template: Jinja file that replaces the tokenizer's own chat template; None keeps the tokenizer's own.
        template_kwargs: variables that the chat template is given, such as ``enable_thinking``.
        columns: by a layout's key, the records' own, where it has another name.
        max_length: most tokens of prompt plus one response (the reference code's ``cutoff_len``).
        max_prompt_length: most tokens of the prompt, applied before ``max_length``; None sets no limit.
        overlong_prompt: what happens to a prompt above ``max_prompt_length``: ``truncate`` keeps its last
            tokens, ``drop`` drops the pair and counts it, ``error`` stops.
        workers: processes that tokenise; the output does not depend on it.
        strict: make any dropped pair an error that names it.
        chosen_only: leave rejected responses out, as if a record had none: what they are, or are not, decides nothing.

    Raises:
        UserError: a value is out of range.
    """

    tokenizer: str
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    max_length: int = 2048
    max_prompt_length: int | None = None
    overlong_prompt: str = "truncate"
    workers: int = 1
    strict: bool = False
    chosen_only: bool = False

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserError(f"max_length is {self.max_length}: it must be at least 2 (one prompt, one response token)")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise UserError(f"max_prompt_length is {self.max_prompt_length}: it must be at least 1, or left out")
        if self.overlong_prompt not in OVERLONG_PROMPT_RULES:
            raise UserError(
                f"overlong_prompt is {self.overlong_prompt!r}: it must be one of {', '.join(OVERLONG_PROMPT_RULES)}"
            )
        if self.workers < 1:
            raise UserError(f"workers is {self.workers}: it must be at least 1")

    def length_rules(self) -> dict[str, int | str | None]:
        """The options that change which tokens are kept (``overlong_prompt`` is null where no limit makes it act)."""
        limited = self.max_prompt_length is not None
        return {
            "max_length": self.max_length,
            "max_prompt_length": self.max_prompt_length,
            "overlong_prompt": self.overlong_prompt if limited else None,
        }
