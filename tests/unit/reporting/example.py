"""A report whose metrics are known: tokens with markup in them, and many pairs of plain ones."""

import numpy as np

from tgdpo.reporting.metrics import Metrics, make_metrics
from tgdpo.reporting.render import ReportPair, render_page

MARKUP = [
    "<b>bold</b>",
    " </script><script>window.pwned = 1</script>",
    " <img src=x onerror='window.pwned = 2'>",
    "&lt;",
]
ALPHA, BETA = 2.0, 0.5
PLACE = "<i>pairs</i>.jsonl:{}"


def make_pairs(count: int, tokens: int, guides: tuple[str, ...] = ("guide",), size: float = 1.0) -> list[ReportPair]:
    """Pairs of records 1, 3, 5 and so on: the others were dropped. A second guide has -x / 2; all x times ``size``.

    Pair 0 has the markup and x = 0.5, -0.25, 0, 1 on chosen tokens, -3 on the rejected one; the rest is random."""
    first = _pair(0, (MARKUP, ["no"]), size * np.array([0.5, -0.25, 0.0, 1.0, -3.0]), guides)
    rng = np.random.default_rng(0)
    texts = [" word", " sentence", ".", " \u8a9e", "\n"]
    others = []
    for index in range(1, count):
        words = ([texts[k] for k in rng.integers(0, len(texts), tokens)], ["Word", *texts])
        others.append(_pair(index, words, size * rng.standard_t(3, tokens + len(texts) + 1), guides))
    return [first, *others]


def _pair(index: int, texts: tuple[list[str], list[str]], x: np.ndarray, guides: tuple[str, ...]) -> ReportPair:
    reference = np.full(len(x), -2.0, dtype=np.float32)
    return ReportPair(
        source=PLACE.format(2 * index + 1),
        prompt="Why <u>so</u>?",
        texts=texts,
        sentences=([0], [0]),
        logps={
            "reference": reference,
            **{guide: (reference + x * (-0.5) ** k).astype(np.float32) for k, guide in enumerate(guides)},
        },
    )


def metrics_of(pairs: list[ReportPair], guide: str = "guide") -> Metrics:
    """Metrics of the pairs' log-probs, in double precision as the page computes them."""
    logratios_by_response = []
    for pair in pairs:
        x = pair.logps[guide].astype(np.float64) - pair.logps["reference"].astype(np.float64)
        logratios_by_response.append((x[: len(pair.texts[0])], x[len(pair.texts[0]) :]))
    return make_metrics(logratios_by_response)


def render(pairs: list[ReportPair], guides: tuple[str, ...] = ("guide",)) -> str:
    """The page of the pairs, whose own text has markup too."""
    return render_page(
        pairs,
        {guide: metrics_of(pairs, guide) for guide in guides},
        alpha=ALPHA,
        beta=BETA,
        facts={guide: f"<em>{guide}'s model</em>" for guide in guides},
        warnings=["<s>careful</s>"],
        notes=["<u>perhaps</u>"],
    )
