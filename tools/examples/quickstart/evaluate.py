"""Compares models of the demonstration language and prints one aligned table; writes the same metrics as JSON.

    python -m tools.examples.quickstart.evaluate --base DIR --model dpo=DIR --model tgdpo=DIR --guide DIR \
        --pairs heldout.jsonl --out results.json [--beta 0.1] [--prompts 400] [--seed 0]

On the held-out pairs:
- accuracy: share of pairs whose chosen response has the higher implicit reward, beta * (log pi - log pi_base) summed
  over the response. The base model's own implicit reward is zero everywhere, so its row counts the pairs whose chosen
  response it gives the higher log-probability.
- margin: mean implicit reward of chosen minus rejected, in nats; not defined for the base model.

On answers sampled at temperature 1 to the held-out prompts: the oracle's mean quality, the share of content words that
are bad, the share of well-formed sentences, the share with as many sentences as asked, and the length in tokens.

Of the guide: AUC of its token rewards against the oracle's bad words, on the chosen and rejected held-out responses.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from megatron_tgdpo.storage.atomic_file import write_atomically
from tgdpo.generation.tables import align
from tools.examples.quickstart.language import judge
from tools.examples.quickstart.make_data import read_jsonl
from tools.examples.quickstart.scoring import Response, auc, encode_response, response_logps, sample_answers

COLUMNS = {
    "accuracy": ("held-out accuracy", "{:.1%}"),
    "margin": ("margin (nats)", "{:+.3f}"),
    "quality": ("oracle quality", "{:.3f}"),
    "bad_words": ("bad words", "{:.1%}"),
    "well_formed": ("well formed", "{:.1%}"),
    "right_count": ("count as asked", "{:.1%}"),
    "tokens": ("tokens", "{:.1f}"),
}


def preference_metrics(
    logps: list[torch.Tensor], base_logps: list[torch.Tensor] | None, beta: float
) -> dict[str, float | None]:
    """Accuracy and margin over pairs.

    Args:
        logps: token log-probs, chosen and rejected responses alternating.
        base_logps: the same under the base model; None when the model is the base model.
        beta: scale of the implicit reward.
    """
    scores = torch.stack([values.double().sum() for values in logps])
    if base_logps is not None:
        scores = beta * (scores - torch.stack([values.double().sum() for values in base_logps]))
    margins = scores[0::2] - scores[1::2]
    return {
        "accuracy": (margins > 0).double().mean().item(),
        "margin": None if base_logps is None else margins.mean().item(),
    }


def sampling_metrics(prompts: list[str], answers: list[tuple[str, int]]) -> dict[str, float]:
    """The oracle's means over sampled answers; bad_words is over all their content words together."""
    verdicts = [judge(prompt, text) for prompt, (text, _) in zip(prompts, answers, strict=True)]
    return {
        "quality": statistics.fmean(v.quality for v in verdicts),
        "bad_words": sum(v.bad_words for v in verdicts) / max(1, sum(v.content_words for v in verdicts)),
        "well_formed": statistics.fmean(v.well_formed for v in verdicts),
        "right_count": statistics.fmean(v.right_count for v in verdicts),
        "tokens": statistics.fmean(length for _, length in answers),
    }


def guide_metrics(
    guide_logps: list[torch.Tensor], base_logps: list[torch.Tensor], responses: list[Response], beta: float
) -> dict[str, float]:
    """AUC of low token rewards, beta * (log pi_guide - log pi_base), as a sign of bad words.

    `auc_content` is over tokens of content words only, where telling good from bad is hardest; `surprisal_auc` puts
    -log pi_base in the place of the guide, to show what the base model knows by itself.
    """
    bad = [label for response in responses for label in response.bad]
    content = [label for response in responses for label in response.content]
    base = torch.cat(base_logps)
    rewards = beta * (torch.cat(guide_logps) - base)
    among_content = [i for i, is_content in enumerate(content) if is_content]
    surprise, low = (-base).tolist(), (-rewards).tolist()
    return {
        "auc": auc(low, bad),
        "auc_content": auc([low[i] for i in among_content], [bad[i] for i in among_content]),
        "surprisal_auc": auc(surprise, bad),
        "surprisal_auc_content": auc([surprise[i] for i in among_content], [bad[i] for i in among_content]),
        "reward_bad": statistics.fmean(r for r, b in zip(rewards.tolist(), bad, strict=True) if b),
        "reward_good": statistics.fmean(r for r, b in zip(rewards.tolist(), bad, strict=True) if not b),
        "tokens": len(bad),
        "bad_tokens": sum(bad),
    }


def format_table(rows: dict[str, dict[str, float | None]]) -> str:
    """Returns the metrics as text, one line a model, columns aligned."""
    lines = [["model", *(title for title, _ in COLUMNS.values())]]
    for name, metrics in rows.items():
        cells = ["-" if (value := metrics[key]) is None else form.format(value) for key, (_, form) in COLUMNS.items()]
        lines.append([name, *cells])
    return align(lines)


def _load(directory: Path) -> LlamaForCausalLM:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    result: LlamaForCausalLM = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return result


def _report(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    records = read_jsonl(args.pairs)
    texts = [(r["prompt"][0]["content"], r[role][0]["content"]) for r in records for role in ("chosen", "rejected")]
    responses = [encode_response(tokenizer, prompt, answer) for prompt, answer in texts]
    prompts = [prompt for prompt, _ in texts[::2]][: args.prompts]
    max_new_tokens = 2 * max(len(response.response_ids) for response in responses)
    rows: dict[str, dict[str, float | None]] = {}
    samples = {}
    base_logps: list[torch.Tensor] | None = None
    for name, directory in {"base": args.base, **dict(args.model)}.items():
        model = _load(directory)
        logps = response_logps(model, responses)
        answers = sample_answers(model, tokenizer, prompts, args.seed, max_new_tokens)
        rows[name] = {**preference_metrics(logps, base_logps, args.beta), **sampling_metrics(prompts, answers)}
        samples[name] = answers[0][0]
        base_logps = base_logps or logps
    assert base_logps is not None
    guide_logps = response_logps(_load(args.guide), responses)
    guide = guide_metrics(guide_logps, base_logps, responses, args.beta)
    return {"models": rows, "guide": guide, "pairs": len(records), "prompts": len(prompts), "beta": args.beta,
            "example": {"prompt": prompts[0], "answers": samples}}  # fmt: skip


def _named_directory(text: str) -> tuple[str, Path]:
    name, separator, directory = text.partition("=")
    if not (name and separator and directory) or name == "base":
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR (and NAME is not base)")
    return name, Path(directory)


def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="HF directory that training started from")
    parser.add_argument("--model", type=_named_directory, action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--guide", type=Path, required=True, help="HF directory of the guide")
    parser.add_argument("--pairs", type=Path, required=True, help="held-out pairs (JSONL)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--beta", type=float, default=0.1, help="scale of implicit and token rewards")
    parser.add_argument("--prompts", type=int, default=400, help="prompts to sample answers for")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    args = parser.parse_args(argv)
    report = _report(args, AutoTokenizer.from_pretrained(args.base, local_files_only=True))
    write_atomically(args.out, json.dumps(report, indent=2) + "\n")
    guide = report["guide"]
    print(f"{report['pairs']} held-out pairs, {report['prompts']} sampled answers a model, beta {report['beta']}")
    print(format_table(report["models"]))
    print(
        f"\nguide's token rewards as a detector of bad words: AUC {guide['auc']:.3f} over {guide['tokens']} tokens "
        f"({guide['bad_tokens']} bad), {guide['auc_content']:.3f} among content words\n"
        f"base model's surprisal instead: AUC {guide['surprisal_auc']:.3f}, "
        f"{guide['surprisal_auc_content']:.3f} among content words\n"
        f"mean token reward: {guide['reward_bad']:+.4f} on bad words, {guide['reward_good']:+.4f} on all other tokens"
    )
    print(f"\nprompt: {report['example']['prompt']}")
    for name, answer in report["example"]["answers"].items():
        print(f"  {name}: {answer}")


if __name__ == "__main__":
    main()
