"""What a judge is asked, and what its reply means."""

import re
from collections.abc import Sequence

from tgdpo.judging.answers import Dialogue

PAIR = """Compare two AI assistants' answers to a user. Judge how correct, complete, helpful and clear they are. Neither
the order of the answers nor their length is a merit.

{dialogues}

Explain your judgement in a few sentences. Then end with one line of its own, which is one of
Verdict: A
Verdict: B
Verdict: tie"""

SCORE = """Judge an AI assistant's answer to a user: how correct, complete, helpful and clear it is. Length is no merit.

{dialogues}

Explain your judgement in a few sentences. Then end with one line of its own, with a whole number from 1 (useless) to 10
(nothing to improve):
Score: NUMBER"""

_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.S | re.I)
_WINNER = re.compile(
    r"\[\[?\s*(A|B|C|tie)\s*\]\]?"  # as MT-Bench's judges answer, where C is a tie
    r"|\b(?:verdict|winner)\W{1,6}(?:(?:is|assistant|answer)\W{1,3})*(A|B|tie|draw)\b"
    r"|\A\W*(A|B|tie|draw)\W*\Z",
    re.I,
)
_SCORE = re.compile(
    r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]"
    r"|\b(?:score|rating|verdict)\W{1,6}(?:is\W{1,3})?(\d+(?:\.\d+)?)"
    r"|\A\W*(\d+(?:\.\d+)?)(?:\s*/\s*10)?\W*\Z",
    re.I,
)


def pair_prompt(first: Dialogue, second: Dialogue) -> str:
    """Asks which of two answers to a question is better: A, the first, or B."""
    parts = []
    for turn, text in enumerate(first.turns):
        parts += [
            _block("User", text),
            _block("Answer A", first.answers[turn]),
            _block("Answer B", second.answers[turn]),
        ]
    return PAIR.replace("{dialogues}", "\n\n".join(parts))


def score_prompt(dialogue: Dialogue) -> str:
    """Asks how good an answer is."""
    pairs = zip(dialogue.turns, dialogue.answers, strict=True)
    parts = [part for text, answer in pairs for part in (_block("User", text), _block("Answer", answer))]
    return SCORE.replace("{dialogues}", "\n\n".join(parts))


def parse_winner(reply: str) -> float | None:
    """1 if the reply prefers A, 0 if B, 0.5 if neither; None if it does not say. The last verdict in it counts."""
    word = _last(_WINNER, reply)
    return None if word is None else {"A": 1.0, "B": 0.0}.get(word.upper(), 0.5)


def parse_score(reply: str) -> float | None:
    """The last score in a reply; None if there is none, or it is not from 1 to 10."""
    word = _last(_SCORE, reply)
    return float(word) if word is not None and 1 <= float(word) <= 10 else None


def combine(winners: Sequence[float | None]) -> float | None:
    """The outcome for the first model, of its verdicts in both orders: a tie where they differ, None if one is None."""
    one, other = winners
    if one is None or other is None:
        return None
    return one if one == other else 0.5


def _block(title: str, text: str) -> str:
    return f"=== {title} ===\n{text}\n=== end of {title} ==="


def _last(pattern: re.Pattern[str], reply: str) -> str | None:
    found = list(pattern.finditer(_THOUGHT.sub("", reply).strip()))
    return next(word for word in found[-1].groups() if word is not None) if found else None
