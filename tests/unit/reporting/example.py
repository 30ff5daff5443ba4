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


def make_pairs(count: int, tokens: int) -> list[ReportPair]:
    """Pair 0 has the markup and x = 0.5, -0.25, 0, 1 on chosen tokens, -3 on the rejected one; the rest is random."""
    first = _pair(0, (MARKUP, ["no"]), np.array([0.5, -0.25, 0.0, 1.0, -3.0]))
    rng = np.random.default_rng(0)
    texts = [" word", " sentence", ".", " \u8a9e", "\n"]
    others = []
    for index in range(1, count):
        words = ([texts[k] for k in rng.integers(0, len(texts), tokens)], ["Word", *texts])
        others.append(_pair(index, words, rng.standard_t(3, tokens + len(texts) + 1)))
    return [first, *others]


def _pair(index: int, texts: tuple[list[str], list[str]], x: np.ndarray) -> ReportPair:
    reference = np.full(len(x), -2.0, dtype=np.float32)
    return ReportPair(
        index=index,
        source=f"<i>pairs</i>.jsonl:{index + 1}",
        prompt="Why <u>so</u>?",
        texts=texts,
        sentences=([0], [0]),
        logps={"reference": reference, "guide": (reference + x).astype(np.float32)},
    )


def metrics_of(pairs: list[ReportPair]) -> Metrics:
    """Metrics of the pairs' log-probs, in double precision as the page computes them."""
    logratios_by_response = []
    for pair in pairs:
        x = pair.logps["guide"].astype(np.float64) - pair.logps["reference"].astype(np.float64)
        logratios_by_response.append((x[: len(pair.texts[0])], x[len(pair.texts[0]) :]))
    return make_metrics(logratios_by_response)


def render(pairs: list[ReportPair]) -> str:
    """The page of the pairs, whose own text has markup too."""
    return render_page(
        pairs, metrics_of(pairs), alpha=ALPHA, beta=BETA, facts={"guide": "<em>g</em>"}, warning="<s>careful</s>"
    )
