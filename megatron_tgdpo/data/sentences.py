"""Sentences of a response as runs of its tokens."""

from collections.abc import Iterable, Sequence
from itertools import accumulate


class SentenceSplitter:
    """Splits texts at line ends and, within a line, at Punkt's sentence ends.

    Punkt learns which words are abbreviations from the texts themselves, so no data is downloaded.

    Args:
        texts: What to learn from.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        # It imports scipy: more than a second of the start of each rank and command, of which few split sentences.
        from nltk.tokenize import RegexpTokenizer
        from nltk.tokenize.punkt import PunktSentenceTokenizer

        self._lines = RegexpTokenizer(r"[\r\n]+", gaps=True)
        self._punkt = PunktSentenceTokenizer("\n".join(texts))

    def starts(self, text: str) -> list[int]:
        """Where each sentence begins, as character offsets; empty for a text of white space."""
        return [
            line_start + start
            for line_start, line_end in self._lines.span_tokenize(text)
            for start, _ in self._punkt.span_tokenize(text[line_start:line_end])
        ]

    def first_tokens(self, texts: Sequence[str]) -> list[int]:
        """The first token of each sentence; a sentence's tokens are those up to the next one's first.

        A token belongs to the sentence of its first visible character; one without any, to the sentence before it.

        Args:
            texts: Of the tokens; joined they are the response.

        Returns:
            Increasing token positions from 0.
        """
        bounds = self.starts("".join(texts))
        first, sentence = [0], 0
        for token, (text, end) in enumerate(zip(texts, accumulate(map(len, texts)), strict=True)):
            visible = text.lstrip()
            if not visible:
                continue
            before = sentence
            while sentence + 1 < len(bounds) and bounds[sentence + 1] <= end - len(visible):
                sentence += 1
            if sentence > before and token:
                first.append(token)
        return first
