"""Models compared on held-out preference pairs and on answers of their own; the command is ``tgdpo evaluate``."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.tokenizer_compatibility import LackingTokens, compare_tokenizers
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.resilience.preflight_facts import package_versions
from tgdpo.generation.evaluation import (
    ComparedModels,
    answer_metrics,
    as_json,
    distinct_prompts,
    pair_rows,
    preference_metrics,
    sample_answers,
    score_pairs,
    swap_warning,
)
from tgdpo.generation.journal import check_writable, write_whole
from tgdpo.generation.logps import PromptAndResponse
from tgdpo.generation.models import default_device, hf_directory, tokenizer_directory
from tgdpo.generation.roles import REFERENCE
from tgdpo.generation.tables import align, with_interval
from tgdpo.generation.workers import Workers, process_count

_WIDTH = 100  # of the table, in characters, where one model does not take more

COLUMNS = {
    "accuracy": ("accuracy", "{:.1%}"),
    "accuracy_per_token": ("per token", "{:.1%}"),
    "margin": ("margin (nats)", "{:+.3f}"),
    "reward_chosen": ("reward chosen", "{:+.3f}"),
    "reward_rejected": ("reward rejected", "{:+.3f}"),
    "kl_per_token": ("KL per token (nats)", "{:.4f}"),
    "tokens": ("tokens", "{:.1f}"),
    "finished": ("finished", "{:.1%}"),
}


def report(given: argparse.Namespace, models: dict[str, Path], options: PreprocessOptions) -> None:
    """Compares the models of a command line, writes the metrics to its ``--out`` and prints the table.

    Args:
        given: The options of ``tgdpo evaluate``.
        models: Their directories by name, the reference first.
        options: How pairs become tokens; the tokenizer is looked for in the reference's directory.

    Raises:
        UserError: A model, the pairs or the output are not what they must be; says which.
    """
    results = evaluate(given, models, options)
    write_whole(given.out, [json.dumps({k: v for k, v in results.items() if k != "table"}, indent=2) + "\n"])
    counts = f"{results['pairs']} held-out pairs, {results['prompts']} answers a model"
    print(f"{counts}, beta {results['beta']}; in brackets 95% intervals")
    print(results["table"])
    print(f"{given.out}: written")
    for name, row in results["models"].items():
        if row["warning"]:
            bar = "!" * 100
            print(f"{bar}\n{name}: {row['warning']}\n{bar}", file=sys.stderr)


def evaluate(given: argparse.Namespace, models: dict[str, Path], options: PreprocessOptions) -> dict[str, Any]:
    """Scores every model and returns what goes into the JSON file, and its ``table``; see :func:`report`."""
    lacking = _shared_tokenizer(given, models)
    check_writable(given.out)
    options = replace(options, tokenizer=str(tokenizer_directory(given.reference)))
    rows, dropped = _read_pairs(given, options, lacking)
    prompts = distinct_prompts(rows, given.prompts)
    metrics = _all_metrics(given, models, rows, prompts)
    return {
        "pairs_file": given.pairs,
        "pairs": len(rows) // 2,
        "dropped_pairs": dropped,
        "prompts": len(prompts),
        "beta": given.beta,
        "temperature": given.temperature,
        "seed": given.seed,
        "max_new_tokens": given.max_new_tokens,
        "max_length": options.max_length,
        "max_prompt_length": options.max_prompt_length,
        "overlong_prompt": options.overlong_prompt,
        "dtype": given.dtype or ("bf16" if default_device().type == "cuda" else "fp32"),
        "versions": package_versions(),
        "models": {name: {"directory": str(models[name]), **as_json(row)} for name, row in metrics.items()},
        "table": table_of(metrics),
    }


def _read_pairs(
    given: argparse.Namespace, options: PreprocessOptions, lacking: Sequence[LackingTokens]
) -> tuple[list[PromptAndResponse], dict[str, int]]:
    """The pairs as training has them, and how many it would drop, by reason."""
    from megatron_tgdpo.data.dataset import open_or_preprocess

    with tempfile.TemporaryDirectory(prefix="tgdpo-pairs-") as cache:
        dataset = open_or_preprocess(given.pairs, options, cache)
        for tokens in lacking:
            tokens.check(dataset)
        return pair_rows(dataset, given.limit), dataset.manifest["dropped"]


def _all_metrics(
    given: argparse.Namespace,
    models: dict[str, Path],
    rows: list[PromptAndResponse],
    prompts: list[list[int]],
) -> dict[str, dict[str, Any]]:
    """One model at a time beside the reference, which stays loaded."""
    result: dict[str, dict[str, Any]] = {}
    reference = None
    with Workers(process_count(given.nproc), partial(ComparedModels, given)) as workers:
        for name, path in models.items():
            with hf_directory(path, given.scratch) as directory:
                workers.everywhere(ComparedModels.load, directory, f"loading {directory}")
            scores = score_pairs(workers, name, rows)
            metrics = preference_metrics(scores, reference, given.beta)
            metrics["warning"] = None if reference is None else swap_warning(metrics)
            if prompts:
                answers = sample_answers(
                    workers, name, prompts, temperature=given.temperature, seed=given.seed, batch=given.batch
                )
                metrics |= answer_metrics(workers, name, prompts, answers)
            result[name] = metrics
            reference = reference or scores
    return result


def _shared_tokenizer(given: argparse.Namespace, models: dict[str, Path]) -> list[LackingTokens]:
    """Refuses models that do not give text the reference's ids; what pairs must not hold."""
    tokenizer = load_tokenizer(str(tokenizer_directory(given.reference)), given.chat_template, given.template_kwargs)
    others = {name: path for name, path in models.items() if name != REFERENCE}
    told = f"the reference {given.reference}"
    return [
        compare_tokenizers(f"{name} {path}", load_tokenizer(str(tokenizer_directory(path))), told, tokenizer)
        for name, path in others.items()
    ]


def table_of(metrics: dict[str, dict[str, Any]]) -> str:
    """A line a metric and a column a model; models that do not fit beside the others stand below them."""
    rows = {
        title: [with_interval(row.get(key), form) for row in metrics.values()]
        for key, (title, form) in COLUMNS.items()
        if any(key in row for row in metrics.values())
    }
    widths = [max(len(name), *(len(cells[at]) for cells in rows.values())) for at, name in enumerate(metrics)]
    blocks: list[list[int]] = [[]]
    for at, width in enumerate(widths):
        taken = max(map(len, rows)) + sum(2 + widths[other] for other in blocks[-1])
        if blocks[-1] and taken + 2 + width > _WIDTH:
            blocks.append([])
        blocks[-1].append(at)
    lines = {"": list(metrics), **rows}
    return "\n\n".join(
        align([[title, *(cells[at] for at in block)] for title, cells in lines.items()]) for block in blocks
    )
