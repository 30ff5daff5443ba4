"""Metrics of a set of answers: how long they are, and how much they are alike."""

import random
import statistics
from collections.abc import Sequence

from nltk.tokenize import wordpunct_tokenize
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

# Self-BLEU compares each answer with every other one.
SELF_BLEU_ANSWERS = 100


def length_metrics(lengths: Sequence[int]) -> dict[str, float]:
    """Mean, median, 95th percentile (nearest rank), least and greatest of token counts; at least one."""
    ordered = sorted(lengths)
    return {
        "mean": statistics.fmean(ordered),
        "median": statistics.median(ordered),
        "p95": ordered[-(-95 * len(ordered) // 100) - 1],
        "min": ordered[0],
        "max": ordered[-1],
    }


def self_bleu(texts: Sequence[str], *, limit: int = SELF_BLEU_ANSWERS, seed: int = 0) -> float | None:
    """Mean BLEU-4 of each text with all others as its references: 1 where all are alike, low where they are diverse.

    Source: Texygen, arXiv 1802.01886. Words are nltk's ``wordpunct_tokenize``; missing n-grams are smoothed by nltk's
    method 1 (Chen and Cherry, 2014).

    Args:
        texts: Answers; those without words are left out.
        limit: Above so many, a random sample of that size is taken.
        seed: Of that sample.

    Returns:
        None for fewer than two texts.
    """
    words = [tokens for text in texts if (tokens := wordpunct_tokenize(text))]
    if len(words) > limit:
        words = random.Random(seed).sample(words, limit)
    if len(words) < 2:
        return None
    smoothing = SmoothingFunction().method1
    scores = [
        float(sentence_bleu(words[:index] + words[index + 1 :], own, smoothing_function=smoothing))  # type: ignore[arg-type]
        for index, own in enumerate(words)
    ]
    return statistics.fmean(scores)
