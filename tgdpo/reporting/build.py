"""From pairs and log-probs to the page, and to the few lines that are printed."""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_tgdpo.data.dataset import PreferenceDataset, PreferencePair
from megatron_tgdpo.data.tokenizers import Tokenizer
from tgdpo.reporting.metrics import NEGATIVE_SHARES, Metrics, make_metrics
from tgdpo.reporting.render import ReportPair
from tgdpo.reporting.sentences import SentenceSplitter
from tgdpo.reporting.token_text import token_texts


def report_metrics(pairs: Sequence[PreferencePair], logps: Mapping[str, Sequence[np.ndarray]]) -> Metrics:
    """Metrics of pairs whose ``logps["guide"]`` and ``logps["reference"]`` are [c + r] a pair."""
    by_response = []
    for pair, guide, reference in zip(pairs, logps["guide"], logps["reference"], strict=True):
        logratios = guide.astype(np.float64) - reference.astype(np.float64)
        chosen, _ = pair.trained_lengths
        by_response.append((logratios[:chosen], logratios[chosen:]))
    return make_metrics(by_response)


def report_pairs(
    dataset: PreferenceDataset,
    pairs: Sequence[PreferencePair],
    logps: Mapping[str, Sequence[np.ndarray]],
    tokenizer: Tokenizer,
) -> list[ReportPair]:
    """Adds text and sentences to pairs and their log-probs."""
    texts = [
        (
            _trained_texts(tokenizer, pair.prompt, pair.chosen, pair.chosen_trained),
            _trained_texts(tokenizer, pair.prompt, pair.rejected, pair.rejected_trained),
        )
        for pair in pairs
    ]
    splitter = SentenceSplitter("".join(parts) for both in texts for parts in both)
    return [
        ReportPair(
            index=pair.index,
            source=dataset.source(pair.index),
            prompt=tokenizer.decode(pair.prompt.tolist(), special=True),
            texts=both,
            sentences=(splitter.first_tokens(both[0]), splitter.first_tokens(both[1])),
            logps={model: arrays[k] for model, arrays in logps.items()},
        )
        for k, (pair, both) in enumerate(zip(pairs, texts, strict=True))
    ]


def _trained_texts(
    tokenizer: Tokenizer, prompt: np.ndarray, response: np.ndarray, trained: np.ndarray | None
) -> list[str]:
    """Texts of the tokens that are trained on; an ellipsis stands for the others between them."""
    texts = token_texts(tokenizer, prompt.tolist(), response.tolist())
    if trained is None:
        return texts
    follows = np.concatenate([[True], trained[:-1]])
    return [
        text if after else f" [...] {text}" for text, kept, after in zip(texts, trained, follows, strict=True) if kept
    ]


def chance_warning(metrics: Metrics) -> str:
    """What to say of a guide that knows no better than chance; empty for one that does."""
    if metrics.accuracy > 0.5:
        return ""
    return (
        f"The guide prefers the chosen response in only {metrics.correct} of {metrics.pairs} pairs, which is no better "
        "than chance. Are guide and reference swapped, or is the guide untrained? Its token weights would mislead."
    )


def summary(metrics: Metrics, alpha: float, beta: float) -> str:
    """The report's metrics in a few lines of text."""
    low, high = metrics.interval
    toward = alpha * beta * metrics.toward
    limits = ", ".join(f"{share:.1%} {metrics.alpha_limit(share, beta):.3g}" for share in NEGATIVE_SHARES)
    return "\n".join(
        [
            f"{metrics.pairs} pairs, {len(toward)} response tokens, alpha {alpha:g}, beta {beta:g}",
            f"guide accuracy   {metrics.accuracy:.1%} (95% interval {low:.1%} to {high:.1%}), "
            f"mean margin {beta * metrics.margins.mean():+.3f}",
            f"token weights    mean {1 + toward.mean():.3f}, deviation {toward.std():.3f}, "
            f"{1 + toward[0]:.3f} to {1 + toward[-1]:.3f}",
            f"negative weights {metrics.negative_fraction(alpha, beta):.2%} of the tokens",
            f"largest alpha for at most that share of negative weights: {limits}",
        ]
    )
