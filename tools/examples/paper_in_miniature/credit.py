"""How well a guide's token rewards follow the oracle's token credits, on the answers of the reference.

    python -m tools.examples.paper_in_miniature.credit --guide DIR --reference DIR --answers judged.json \
        --out credit.json

The token reward is log pi_guide - log pi_reference (beta only scales it). ``pearson`` and ``spearman`` are over all
tokens of all answers, ``auc_bad`` is the chance that a bad token has a lower reward than a token that is not bad, and
``sequence_pearson`` compares an answer's mean reward with its score. The same of the reference's own log-prob, in the
place of the reward, is under ``reference``: what is seen without a guide.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tgdpo.data.encode import encode_responses
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import Example
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.storage.atomic_file import write_atomically
from tgdpo.command_line import run
from tgdpo.generation.logps import response_logps
from tgdpo.generation.models import default_device, load_causal_lm
from tools.examples.paper_in_miniature.language import BAD, token_credits
from tools.examples.quickstart.scoring import auc


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    result: Tensor = (ends - (counts - 1) / 2)[inverse]
    return result


def correlation(left: Tensor, right: Tensor) -> float:
    """Pearson's; of constants it is not defined, and NaN."""
    return torch.corrcoef(torch.stack([left.double(), right.double()]))[0, 1].item()


def agreement(rewards: Sequence[Tensor], credits_: Sequence[Tensor]) -> dict[str, float]:
    """The metrics of the module's text, of one tensor [tokens] an answer each."""
    reward, credit = torch.cat(list(rewards)).double(), torch.cat(list(credits_)).double()
    return {
        "pearson": correlation(reward, credit),
        "spearman": correlation(_ranks(reward), _ranks(credit)),
        "auc_bad": auc((-reward).tolist(), (credit == BAD).tolist()),
        "sequence_pearson": correlation(
            torch.stack([r.double().mean() for r in rewards]), torch.stack([c.double().mean() for c in credits_])
        ),
        "reward_good": reward[credit > 0].mean().item(),
        "reward_bad": reward[credit < 0].mean().item(),
        "tokens": len(reward),
    }


def measure(guide: Path, reference: Path, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Agreement over the answers that came to an end and are not empty."""
    tokenizer, device = load_tokenizer(str(reference), None), default_device()
    rows, credits_ = [], []
    for number, record in enumerate(records):
        if not record["finished"] or not record["answer"].strip():
            continue
        example = Example((Message("user", record["prompt"]),), record["answer"], None)
        prompt, response, _ = encode_responses(example, tokenizer, f"answer {number}")
        rows.append((list(prompt), list(response)))
        credits_.append(torch.tensor(token_credits(record["prompt"], record["answer"])))
        assert len(rows[-1][1]) == len(credits_[-1]), "a token is a word"
    logps = [response_logps(load_causal_lm(path, torch.float32, device), rows) for path in (guide, reference)]
    rewards = [ours - theirs for ours, theirs in zip(*logps, strict=True)]
    return {
        **agreement(rewards, credits_),
        "reference": agreement(logps[1], credits_),
        "answers": len(rows),
        "mean_words": statistics.fmean(len(response) for _, response in rows) - 1,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.examples.paper_in_miniature.credit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--guide", type=Path, required=True, help="HF directory")
    parser.add_argument("--reference", type=Path, required=True, help="HF directory")
    parser.add_argument("--answers", type=Path, required=True, help="what judge.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(arguments)

    def action() -> None:
        records = json.loads(args.answers.read_text(encoding="utf-8"))
        write_atomically(args.out, json.dumps(measure(args.guide, args.reference, records), indent=2) + "\n")

    return run(action)


if __name__ == "__main__":
    raise SystemExit(main())
