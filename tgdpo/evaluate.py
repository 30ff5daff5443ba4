"""Compares models on held-out preference pairs and on answers of their own, in one table; writes the figures as JSON.

    python -m tgdpo.evaluate --reference DIR --model dpo=DIR --model tgdpo=DIR --guide DIR --pairs heldout.jsonl \
        --out results.json

Directories are HF ones, Megatron checkpoints or training output directories. What each figure is, and which interval
is given for it: docs/evaluation.md.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from megatron_tgdpo.data.options import OVERLONG_PROMPT_RULES, PreprocessOptions
from megatron_tgdpo.data.same_ids import LackingTokens, compare_tokenizers
from megatron_tgdpo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tgdpo.errors import UserError
from tgdpo.generation.command import (
    add_columns_argument,
    add_precision_arguments,
    add_template_arguments,
    positive,
    run,
)
from tgdpo.generation.evaluation import (
    answer_figures,
    as_json,
    distinct_prompts,
    pair_rows,
    preference_figures,
    sample_answers,
    score_pairs,
    swap_warning,
)
from tgdpo.generation.journal import check_writable, write_whole
from tgdpo.generation.logps import PromptAndResponse
from tgdpo.generation.models import default_device, dtype_of, hf_directory, load_causal_lm, tokenizer_directory
from tgdpo.generation.sampling import TransformersSampler
from tgdpo.generation.tables import align, with_interval

REFERENCE, GUIDE = "reference", "guide"
COLUMNS = {
    "accuracy": ("accuracy", "{:.1%}"),
    "accuracy_per_token": ("per token", "{:.1%}"),
    "margin": ("margin (nats)", "{:+.3f}"),
    "reward_chosen": ("reward chosen", "{:+.3f}"),
    "reward_rejected": ("reward rejected", "{:+.3f}"),
    "kl_per_token": ("KL / token", "{:.4f}"),
    "tokens": ("tokens", "{:.1f}"),
    "finished": ("finished", "{:.1%}"),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``None`` means this process's."""
    parser = argparse.ArgumentParser(prog="python -m tgdpo.evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR", help="what rewards are relative to")
    parser.add_argument(
        "--model", type=_named_directory, action="append", default=[], metavar="NAME=DIR", help="a model to compare"
    )
    parser.add_argument("--guide", type=Path, metavar="DIR", help="a guide, compared too; a swapped one is reported")
    parser.add_argument("--pairs", required=True, metavar="FILE", help="held-out pairs, raw or preprocessed")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("--limit", type=positive, help="pairs to score (default: all)")
    parser.add_argument("--beta", type=float, default=0.1, help="scale of the implicit reward (default: %(default)s)")
    parser.add_argument(
        "--prompts", type=int, default=200, help="prompts to answer; 0 leaves it out (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=512, help="limit of an answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the answers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the answers (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=16, help="answers made together (default: %(default)s)")
    add_template_arguments(parser)
    add_columns_argument(parser)
    parser.add_argument("--max-length", type=int, default=PreprocessOptions.max_length, help="as in training")
    parser.add_argument("--max-prompt-length", type=int, help="as in training")
    parser.add_argument(
        "--overlong-prompt", choices=OVERLONG_PROMPT_RULES, default=PreprocessOptions.overlong_prompt, help="same"
    )
    add_precision_arguments(parser)
    return parser.parse_args(arguments)


def evaluate(given: argparse.Namespace) -> dict[str, Any]:
    """Scores every model and returns the report that goes into the JSON file."""
    models = _models(given)
    tokenizer, lacking = _shared_tokenizer(given, models)
    check_writable(given.out)
    options = PreprocessOptions(
        tokenizer=str(tokenizer_directory(given.reference)),
        chat_template=given.chat_template,
        template_kwargs=given.template_kwargs,
        columns=given.columns,
        max_length=given.max_length,
        max_prompt_length=given.max_prompt_length,
        overlong_prompt=given.overlong_prompt,
    )
    rows, dropped = _read_pairs(given, options, lacking)
    prompts = distinct_prompts(rows, given.prompts)
    figures = _all_figures(given, models, tokenizer, rows, prompts)
    return {
        "pairs_file": given.pairs,
        "pairs": len(rows) // 2,
        "dropped_pairs": dropped,
        "prompts": len(prompts),
        "beta": given.beta,
        "temperature": given.temperature,
        "seed": given.seed,
        "max_new_tokens": given.max_new_tokens,
        "models": {name: {"directory": str(models[name]), **as_json(row)} for name, row in figures.items()},
        "table": _table(figures),
    }


def _read_pairs(
    given: argparse.Namespace, options: PreprocessOptions, lacking: Sequence[LackingTokens]
) -> tuple[list[PromptAndResponse], dict[str, int]]:
    """The pairs as training has them, and how many it would drop, by reason."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="tgdpo-pairs-") as cache:
        # megatron-core, which reads datasets, warns of missing GPU libraries.
        warnings.simplefilter("ignore")
        from megatron_tgdpo.data.dataset import open_or_preprocess

        dataset = open_or_preprocess(given.pairs, options, cache)
        for tokens in lacking:
            tokens.check(dataset)
        return pair_rows(dataset, given.limit), dataset.manifest["dropped"]


def _all_figures(
    given: argparse.Namespace,
    models: dict[str, Path],
    tokenizer: Tokenizer,
    rows: list[PromptAndResponse],
    prompts: list[list[int]],
) -> dict[str, dict[str, Any]]:
    """One model at a time beside the reference, which stays loaded."""
    reference = _load(given, models[REFERENCE])
    reference_scores = score_pairs(reference, rows)
    result = {REFERENCE: preference_figures(reference_scores, None, given.beta) | {"warning": None}}
    result[REFERENCE] |= _answers(given, reference, None, tokenizer, prompts)
    for name, path in models.items():
        if name != REFERENCE:
            model = _load(given, path)
            figures = preference_figures(score_pairs(model, rows), reference_scores, given.beta)
            figures["warning"] = swap_warning(figures)
            result[name] = figures | _answers(given, model, reference, tokenizer, prompts)
            del model  # before the next is loaded
    return result


def _answers(
    given: argparse.Namespace,
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
) -> dict[str, Any]:
    if not prompts:
        return {}
    sampler = TransformersSampler(model, tokenizer, top_p=1.0, max_new_tokens=given.max_new_tokens)
    answers = sample_answers(sampler, prompts, temperature=given.temperature, seed=given.seed, batch=given.batch)
    return answer_figures(model, reference, prompts, answers)


def _load(given: argparse.Namespace, path: Path) -> PreTrainedModel:
    device = default_device()
    with hf_directory(path, given.scratch) as directory:
        return load_causal_lm(directory, dtype_of(given.dtype, device), device)


def _models(given: argparse.Namespace) -> dict[str, Path]:
    named = [*given.model, *([(GUIDE, given.guide)] if given.guide else [])]
    models = {REFERENCE: given.reference}
    for name, path in named:
        if name in models:
            raise UserError(f"--model {name}={path}: the name {name} is taken")
        models[name] = path
    if len(models) == 1:
        raise UserError("nothing to compare with the reference: give --model NAME=DIR or --guide DIR")
    return models


def _shared_tokenizer(given: argparse.Namespace, models: dict[str, Path]) -> tuple[Tokenizer, list[LackingTokens]]:
    """The reference's tokenizer, once all models are known to give text the same ids; and what pairs must not hold."""
    tokenizer = load_tokenizer(str(tokenizer_directory(given.reference)), given.chat_template, given.template_kwargs)
    others = {name: path for name, path in models.items() if name != REFERENCE}
    told = f"the reference {given.reference}"
    return tokenizer, [
        compare_tokenizers(f"{name} {path}", load_tokenizer(str(tokenizer_directory(path))), told, tokenizer)
        for name, path in others.items()
    ]


def _table(figures: dict[str, dict[str, Any]]) -> str:
    columns = {key: value for key, value in COLUMNS.items() if any(key in row for row in figures.values())}
    rows = [["model", *(title for title, _ in columns.values())]]
    for name, row in figures.items():
        rows.append([name, *(with_interval(row.get(key), form) for key, (_, form) in columns.items())])
    return align(rows)


def _named_directory(text: str) -> tuple[str, Path]:
    name, _, directory = text.partition("=")
    if not name or not directory or name in (REFERENCE, GUIDE):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR, with a name other than {REFERENCE} and {GUIDE}")
    return name, Path(directory)


def _report(given: argparse.Namespace) -> None:
    report = evaluate(given)
    write_whole(given.out, [json.dumps({k: v for k, v in report.items() if k != "table"}, indent=2) + "\n"])
    print(f"{report['pairs']} held-out pairs, {report['prompts']} answers a model, beta {report['beta']}; in brackets "
          "95% intervals")  # fmt: skip
    print(report["table"])
    for name, row in report["models"].items():
        if row["warning"]:
            bar = "!" * 100
            print(f"{bar}\n{name}: {row['warning']}\n{bar}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    given = parse_arguments(arguments)
    return run(lambda: _report(given))


if __name__ == "__main__":
    sys.exit(main())
