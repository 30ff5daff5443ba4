"""Writes the demonstration's data: text to pretrain on, preference pairs to train on, and pairs held out.

    python -m tools.examples.quickstart.make_data --out DIR [--seed 0] [--pretrain 12000] [--train 4000]
        [--validation 64] [--heldout 400]

Files, one JSON object a line: `pretrain.jsonl` (prompt, response); `train.jsonl`, `validation.jsonl` and
`heldout.jsonl` (prompt, chosen, rejected as lists of chat messages, the layout that TRL calls conversational).

A pair is two answers drawn alike, exactly as the pretraining answers are: the oracle only says which of them is the
better. Chosen answers therefore still hold some bad words, and rejected ones many good words.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from megatron_tgdpo.storage.atomic_file import replacing
from tools.examples.quickstart.language import draw_answer, draw_prompt, judge

# Two answers nearer to each other than this in quality are not worth a preference, and are drawn again.
MIN_QUALITY_GAP = 0.15


def draw_pair(rng: Random) -> tuple[str, str, str]:
    """Returns (prompt, chosen, rejected)."""
    prompt = draw_prompt(rng)
    while True:
        answers = sorted((draw_answer(rng, prompt), draw_answer(rng, prompt)), key=lambda a: judge(prompt, a).quality)
        if judge(prompt, answers[1]).quality - judge(prompt, answers[0]).quality >= MIN_QUALITY_GAP:
            return prompt, answers[1], answers[0]


def pair_record(prompt: str, chosen: str, rejected: str) -> dict[str, list[dict[str, str]]]:
    """Returns a pair in the conversational prompt/chosen/rejected layout."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a JSONL file that `main` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def main(argv: list[str] | None = None) -> None:
    """Writes the four files and prints what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain", type=int, default=12000, help="answers to pretrain on")
    parser.add_argument("--train", type=int, default=4000, help="preference pairs to train on")
    parser.add_argument("--validation", type=int, default=64, help="pairs for evaluation during training")
    parser.add_argument("--heldout", type=int, default=400, help="pairs for the final table")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    # One stream of random numbers per file: the size of one never changes the content of another.
    rng = Random(f"{args.seed}/pretrain")
    prompts = [draw_prompt(rng) for _ in range(args.pretrain)]
    _write_jsonl(args.out / "pretrain.jsonl", ({"prompt": p, "response": draw_answer(rng, p)} for p in prompts))
    for name in ("train", "validation", "heldout"):
        rng = Random(f"{args.seed}/{name}")
        pairs = [draw_pair(rng) for _ in range(getattr(args, name))]
        _write_jsonl(args.out / f"{name}.jsonl", (pair_record(*pair) for pair in pairs))
        for response, index in (("chosen", 1), ("rejected", 2)):
            verdicts = [judge(pair[0], pair[index]) for pair in pairs]
            bad = sum(v.bad_words for v in verdicts) / max(1, sum(v.content_words for v in verdicts))
            quality = sum(v.quality for v in verdicts) / max(1, len(verdicts))
            print(f"{name}.jsonl: {len(pairs)} pairs, {response}: oracle quality {quality:.3f}, bad words {bad:.1%}")
    prompt, chosen, rejected = draw_pair(Random(args.seed))
    print(f"example\n  prompt:   {prompt}\n  chosen:   {chosen}\n  rejected: {rejected}")


if __name__ == "__main__":
    main()
