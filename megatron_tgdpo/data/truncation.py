"""How a pair is cut to the length limits, and why one is dropped."""

from dataclasses import dataclass

from megatron_tgdpo.data.options import PreprocessOptions

DROP_REASONS = (
    "empty_prompt",
    "empty_response",
    "identical",
    "overlong_prompt",
    "identical_after_truncation",
    "tie",
)
# Those whose cause may be a rejected response: because of it, the length limits may leave nothing of a chosen one.
REASONS_OF_PAIRS = ("empty_response", "identical", "identical_after_truncation", "tie")


class DroppedPair(Exception):
    """A pair is no part of the dataset, for one of `DROP_REASONS`; that is no bad input, and is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class EncodedPair:
    """A pair's ids (as of `encode.encode_responses`) after truncation, and what was cut (`EncodedBatch.truncated`)."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    truncated: tuple[str, ...]


def truncate(prompt: list[int], chosen: list[int], rejected: list[int], options: PreprocessOptions) -> EncodedPair:
    """Cuts a pair's ids to ``max_prompt_length`` and ``max_length``.

    Raises:
        DroppedPair: too little is left of it.
    """
    truncated = []
    limit = options.max_prompt_length
    if limit is not None and len(prompt) > limit:
        # The end of a prompt holds the question and the header of the answer: it is the start that can go.
        prompt = prompt[-limit:]
        truncated.append("prompt_by_max_prompt_length")
    source_len, target_len = shared_cutoff(len(prompt), max(len(chosen), len(rejected)), options.max_length)
    if source_len == 0:
        raise DroppedPair("empty_prompt")
    if target_len == 0:
        raise DroppedPair("empty_response")
    parts = (("prompt", prompt, source_len), ("chosen", chosen, target_len), ("rejected", rejected, target_len))
    truncated.extend(name for name, ids, keep in parts if len(ids) > keep)
    if chosen[:target_len] == rejected[:target_len]:
        raise DroppedPair("identical_after_truncation")
    if any(ids and max(ids[:target_len]) < 0 for ids in (chosen, rejected)):
        raise DroppedPair("empty_response")
    return EncodedPair(prompt[:source_len], chosen[:target_len], rejected[:target_len], tuple(truncated))


def shared_cutoff(source_len: int, target_len: int, cutoff: int) -> tuple[int, int]:
    """Divides ``cutoff`` tokens between a prompt and its response, in proportion where both are long.

    The rule of the TGDPO reference code (LLaMA-Factory ``infer_seqlen``), where ``target_len`` is the longer of
    the two responses. A response shorter than half the limit is kept whole and the prompt gets the rest; else a
    prompt shorter than half is kept whole; else both shrink in proportion.

    Args:
        source_len: prompt tokens.
        target_len: tokens of the longer response.
        cutoff: most tokens of prompt plus response.

    Returns:
        Prompt tokens to keep and response tokens to keep; their sum is at most ``cutoff``.
    """
    if target_len * 2 < cutoff:
        max_target_len = cutoff
    elif source_len * 2 < cutoff:
        max_target_len = cutoff - source_len
    else:
        max_target_len = int(cutoff * (target_len / (source_len + target_len)))
    new_target_len = min(max_target_len, target_len)
    new_source_len = min(max(cutoff - new_target_len, 0), source_len)
    return new_source_len, new_target_len
