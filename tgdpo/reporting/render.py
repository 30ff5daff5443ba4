"""The report as one HTML file that needs nothing else, and runs nothing but its own script."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tgdpo.reporting.metrics import NEGATIVE_SHARES, QUANTILES, Metrics, extreme_tokens

_DIRECTORY = Path(__file__).parent / "page"
_SCRIPTS = ("data.js", "tokens.js", "plot.js", "charts.js", "pairs.js", "main.js")


@dataclass(frozen=True)
class ReportPair:
    """One pair as the page shows it; everything with two entries is of chosen, then of rejected.

    Attributes:
        source: Where it came from, as in error messages; its name on the page, too.
        prompt: Its text.
        texts: Text of each response token.
        sentences: First token of each sentence.
        logps: float32 [c + r] by model, in nats: ``reference``, each guide by its name, and perhaps ``policy``.
    """

    source: str
    prompt: str
    texts: tuple[list[str], list[str]]
    sentences: tuple[list[int], list[int]]
    logps: dict[str, np.ndarray]


def render_page(
    pairs: Sequence[ReportPair],
    metrics: Mapping[str, Metrics],
    *,
    alpha: float,
    beta: float,
    facts: Mapping[str, str],
    guide_beta: float | None = None,
    plain_loss: bool = True,
    weights: Mapping[str, Sequence[np.ndarray]] | None = None,
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """Renders the page.

    Args:
        pairs: What it shows, at least one pair; all with the same models.
        metrics: Of the same pairs, by the guide's name.
        alpha: Strength of the guidance that the page opens with.
        beta: Strength of the KL constraint that it opens with.
        facts: What the heading says, by name; of a guide's name, the model.
        guide_beta: Scale of the guides' log-ratios, where it is not beta.
        weights: Of each pair's tokens, by the guide's name, where they are 0 or 1 and alpha and beta do not make them.
        plain_loss: Whether a policy's loss is ``-log sigmoid`` of its margin; else none is shown.
        warnings: Shown on top.
        notes: Shown below them.

    Returns:
        HTML in which all text is escaped, and whose policy lets the browser run its own script alone.
    """
    environment = Environment(loader=FileSystemLoader(_DIRECTORY), autoescape=True, undefined=StrictUndefined)
    style = _read("style.css")
    script = "\n".join(_read(name) for name in _SCRIPTS)
    return environment.get_template("page.html").render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data={
            "alpha": alpha,
            "beta": beta,
            "guide_beta": guide_beta,
            "plain_loss": plain_loss,
            **_payload(pairs, metrics, facts, weights or {}),
        },
        facts=facts,
        guides=[facts[name] for name in metrics],
        warnings=warnings,
        notes=notes,
    )


def _payload(
    pairs: Sequence[ReportPair],
    metrics: Mapping[str, Metrics],
    facts: Mapping[str, str],
    weights: Mapping[str, Sequence[np.ndarray]],
) -> dict[str, Any]:
    return {
        "quantiles": QUANTILES,
        "logps": {name: _floats([pair.logps[name] for pair in pairs]) for name in pairs[0].logps},
        "pairs": [
            {"source": pair.source, "prompt": pair.prompt, "texts": pair.texts, "sentences": pair.sentences}
            for pair in pairs
        ],
        "guides": [
            {
                "name": name,
                "model": facts[name],
                "weights": _floats(weights[name]) if name in weights else None,
                **_of_guide(pairs, name, one),
            }
            for name, one in metrics.items()
        ],
    }


def _of_guide(pairs: Sequence[ReportPair], name: str, metrics: Metrics) -> dict[str, Any]:
    toward, by_length = metrics.toward, metrics.by_length
    texts = (text for pair in pairs for response in pair.texts for text in response)
    x = np.concatenate([pair.logps[name].astype(np.float64) - pair.logps["reference"] for pair in pairs])
    least_count, most, least = extreme_tokens(texts, x)
    return {
        "correct": metrics.correct,
        "ties": metrics.ties,
        "accuracy": metrics.accuracy,
        "interval": metrics.interval,
        "margin": float(metrics.margins.mean()),
        "by_length": by_length and [by_length.value, by_length.low, by_length.high],
        "toward": [float(value) for value in (toward.mean(), toward.std(), toward[0], toward[-1])],
        "tails": [[share, metrics.tail(share)] for share in NEGATIVE_SHARES],
        "scale": metrics.scale,
        "edges": metrics.edges.tolist(),
        "counts": metrics.counts.tolist(),
        "positions": [[asdict(one) for one in response] for response in metrics.positions],
        "tokens": {
            "least_count": least_count,
            "most": [asdict(token) for token in most],
            "least": [asdict(token) for token in least],
        },
    }


def _floats(arrays: Sequence[np.ndarray]) -> str:
    return base64.b64encode(np.concatenate(arrays).astype("<f4").tobytes()).decode("ascii")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _read(name: str) -> str:
    return (_DIRECTORY / name).read_text(encoding="utf-8")
