"""How a pair is cut to the length limits. Pure functions of lengths."""


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
