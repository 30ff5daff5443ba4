"""Guidance by sentence: each token gets the mean of the guide's log-ratios over the sentence that it is in."""

import numpy as np

from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.data.sentences import SentenceSplitter
from megatron_tgdpo.data.token_text import token_texts
from megatron_tgdpo.data.tokenizers import Tokenizer

# Pairs whose responses Punkt learns abbreviations from: the first ones, so that all ranks and starts learn the same.
_LEARNT_FROM = 1000


class SentenceMeans:
    """Averages a dataset's guidance over sentences.

    Args:
        dataset: Of the pairs.
        tokenizer: That made its ids.
    """

    def __init__(self, dataset: PreferenceDataset, tokenizer: Tokenizer) -> None:
        self._dataset, self._tokenizer = dataset, tokenizer
        pairs = (dataset[index] for index in range(min(len(dataset), _LEARNT_FROM)))
        self._splitter = SentenceSplitter(
            tokenizer.decode(response.tolist()) for pair in pairs for response in (pair.chosen, pair.rejected)
        )

    def __call__(self, index: int, logps: np.ndarray) -> np.ndarray:
        """Log-probs of a pair with the guide's changed so that its log-ratio is the same in all of a sentence.

        Args:
            index: Of the pair.
            logps: [2, chosen + rejected tokens that are trained on] float32, the reference's and the guide's.

        Returns:
            The same shape; the reference's as they are, and the guide's log-ratios summing to what they did.
        """
        pair = self._dataset[index]
        sentences = [self._sentences(pair.prompt, response) for response in (pair.chosen, pair.rejected)]
        numbers = np.concatenate([sentences[0], sentences[0][-1] + 1 + sentences[1]])[pair.trained]
        reference, guide = logps.astype(np.float64)
        return np.stack([reference, reference + means_within(guide - reference, numbers)]).astype(np.float32)

    def _sentences(self, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        """[tokens] int64, the number of the sentence that each token of a response is in."""
        starts = self._splitter.first_tokens(token_texts(self._tokenizer, prompt.tolist(), response.tolist()))
        numbers = np.zeros(len(response), dtype=np.int64)
        numbers[starts[1:]] = 1
        return numbers.cumsum()


def means_within(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[tokens] float64, the mean of the values of each token's group; ``groups`` [tokens] int64 need not be dense."""
    counts = np.bincount(groups)
    means = np.bincount(groups, weights=values) / np.maximum(counts, 1)
    result: np.ndarray = means[groups]
    return result
