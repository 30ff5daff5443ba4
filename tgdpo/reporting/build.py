"""From pairs and log-probs to the page, and to the few lines that are printed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_tgdpo.data.dataset import PreferenceDataset, PreferencePair
from megatron_tgdpo.data.tokenizers import Tokenizer
from megatron_tgdpo.guidance.monitor import guide_doubt, guide_warning
from megatron_tgdpo.loss.choices import WEIGHTS
from tgdpo.reporting.metrics import NEGATIVE_SHARES, Metrics, histogram_reach, make_metrics
from tgdpo.reporting.numbers import decimals_of
from tgdpo.reporting.render import ReportPair
from tgdpo.reporting.sentences import SentenceSplitter
from tgdpo.reporting.token_text import token_texts


def report_metrics(
    pairs: Sequence[PreferencePair], logps: Mapping[str, Sequence[np.ndarray]], guides: Sequence[str]
) -> dict[str, Metrics]:
    """Metrics by guide of pairs whose ``logps["reference"]`` and, of each guide's name, are [c + r] a pair."""
    by_guide: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for guide in guides:
        by_guide[guide] = []
        for pair, values, reference in zip(pairs, logps[guide], logps["reference"], strict=True):
            logratios = values.astype(np.float64) - reference.astype(np.float64)
            chosen, _ = pair.trained_lengths
            by_guide[guide].append((logratios[:chosen], logratios[chosen:]))
    reach = max(histogram_reach(by_response) for by_response in by_guide.values())
    return {guide: make_metrics(by_response, reach) for guide, by_response in by_guide.items()}


def selected_tokens(
    pairs: Sequence[PreferencePair],
    logps: Mapping[str, Sequence[np.ndarray]],
    guides: Sequence[str],
    options: Mapping[str, Any],
) -> dict[str, list[np.ndarray]]:
    """Weights of 0 and 1 by guide, [c + r] a pair, as a run with these options of the loss computes them; none where
    ``weights`` is not such."""
    # Here, since the page is tried without torch.
    import torch

    from megatron_tgdpo.loss.preference import on_one_rank

    row = WEIGHTS[options["weights"]]
    if not row.selecting:
        return {}
    found: dict[str, list[np.ndarray]] = {guide: [] for guide in guides}
    for guide, weights in found.items():
        for pair, values, reference in zip(pairs, logps[guide], logps["reference"], strict=True):
            rewards, lengths = torch.from_numpy(values - reference), torch.tensor(pair.trained_lengths)
            weights.append(row.weight_function(rewards, rewards, lengths, options, on_one_rank).numpy())
    return found


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


def remarks(metrics: Mapping[str, Metrics]) -> tuple[list[str], list[str]]:
    """What to warn of, and what is not known, of guides by name: is one no better than chance?"""
    found: tuple[list[str], list[str]] = ([], [])
    for texts, remark in zip(found, (guide_warning, guide_doubt), strict=True):
        for name, of_guide in metrics.items():
            text = remark(of_guide.correct, of_guide.pairs, ties=of_guide.ties)
            if text is not None:
                texts.append(f"{name}: {text}" if len(metrics) > 1 else text)
    return found


def summary(
    metrics: Mapping[str, Metrics],
    facts: Mapping[str, str],
    alpha: float,
    beta: float,
    guide_beta: float | None = None,
    weights: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> str:
    """The report's metrics in a few lines of text.

    Args:
        metrics: By the guide's name.
        facts: The models by what they are here.
        alpha: Strength of the guidance.
        beta: Strength of the KL constraint.
        guide_beta: Scale of the guides' log-ratios, where it is not beta.
        weights: From :func:`selected_tokens`; then alpha is not used.
    """
    of_all = next(iter(metrics.values()))
    own = "" if guide_beta is None else f", guide_beta {guide_beta:g}"
    strength = f"beta {beta:g}{own}" if weights else f"alpha {alpha:g}, beta {beta:g}{own}"
    blocks = [f"{of_all.pairs} pairs, {len(of_all.toward)} response tokens, {strength}"]
    scale = beta if guide_beta is None else guide_beta
    for name, one in metrics.items():
        lines = [_accuracy(one, scale), *(_selected(weights[name]) if weights else _weights(one, alpha, scale))]
        blocks.append("\n".join([f"{name:<16} {facts[name]}", *lines]))
    return "\n".join(blocks)


def _accuracy(metrics: Metrics, beta: float) -> str:
    low, high = metrics.interval
    margin = beta * float(metrics.margins.mean())
    ties = f", {metrics.ties} tie{'s' * (metrics.ties > 1)}" if metrics.ties else ""
    return (
        f"  accuracy       {metrics.accuracy:.1%} (95% interval {low:.1%} to {high:.1%}){ties}, "
        f"mean margin {margin:+.{decimals_of([margin], 3)}f}"
    )


def _selected(weights: Sequence[np.ndarray]) -> list[str]:
    every = np.concatenate(weights)
    return [f"  token weights  1 on {int(every.sum())} of {len(every)} tokens ({every.mean():.1%}), 0 on the others"]


def _weights(metrics: Metrics, alpha: float, beta: float) -> list[str]:
    toward = alpha * beta * metrics.toward
    weights = [1 + float(toward.mean()), float(toward.std()), 1 + float(toward[0]), 1 + float(toward[-1])]
    mean, deviation, least, most = (f"{value:.{decimals_of([*weights, 1.0], 3)}f}" for value in weights)
    limits = [metrics.alpha_limit(share, beta) for share in NEGATIVE_SHARES]
    digits = decimals_of(limits, 2)
    negative = 100 * metrics.negative_fraction(alpha, beta)
    texts = [f"{share:.1%} {limit:.{digits}f}" for share, limit in zip(NEGATIVE_SHARES, limits, strict=True)]
    return [
        f"  token weights  mean {mean}, deviation {deviation}, {least} to {most}",
        f"  negative       {negative:.{decimals_of([negative], 2)}f}% of the weights",
        f"  largest alpha for at most that share of negative weights: {', '.join(texts)}",
    ]
