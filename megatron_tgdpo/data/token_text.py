"""Each token's part of a response's text."""

from collections.abc import Sequence
from typing import Protocol

# Tokens before the ones that are decoded, so that a tokenizer which treats a text's first token in a special way
# (SentencePiece drops its space) does not do so here.
_CONTEXT = 4
_WINDOW = 16
_INCOMPLETE = "\ufffd"


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids, special tokens left out or written out; bytes that make no whole character are U+FFFD."""
        ...


def token_texts(decoder: Decoder, prompt: Sequence[int], response: Sequence[int]) -> list[str]:
    """The text that each response token adds to what stands before it.

    A character that takes several tokens belongs to the last of them, and the others are empty. All parts joined are
    the response's text.

    Args:
        decoder: Of the tokenizer that made the ids.
        prompt: Ids before the response.
        response: Ids of the response.

    Returns:
        One string a response token.
    """
    before = list(prompt[-_CONTEXT:])
    ids = [*before, *response]
    start, known = 0, decoder.decode(before, special=True)
    texts = []
    for end in range(len(before) + 1, len(ids) + 1):
        grown = decoder.decode(ids[start:end], special=True)
        if grown.endswith(_INCOMPLETE) and end < len(ids):
            texts.append("")
            continue
        texts.append(grown[len(known) :])
        known = grown
        if end - start > _WINDOW:
            start = end - _CONTEXT
            known = decoder.decode(ids[start:end], special=True)
    return texts
