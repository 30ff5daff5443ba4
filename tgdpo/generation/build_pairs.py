"""Preference pairs from a model's own answers; ``tgdpo build-preferences`` says how they are made."""

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tgdpo.data.encode import encode_prompt
from megatron_tgdpo.data.example import as_keys
from megatron_tgdpo.data.manifest import digest_file
from megatron_tgdpo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tgdpo.errors import UserError
from tgdpo.generation.backends import make_sampler, sampling_settings
from tgdpo.generation.journal import SUFFIX, Journal, finished_summary, summary_path, write_whole
from tgdpo.generation.models import default_device, dtype_of, fingerprint, hf_directory, tokenizer_directory
from tgdpo.generation.prompts import Prompt, read_prompts
from tgdpo.generation.rewards import FunctionScorer, RewardModelScorer, Scorer, as_plain
from tgdpo.generation.sampling import Request, Sampler, request_seed
from tgdpo.generation.text_metrics import length_metrics
from tgdpo.generation.workers import Workers, process_count


class NoPairError(Exception):
    """A prompt's answers make no pair.

    Attributes:
        reason: ``ties`` (no score differs) or ``too_few_answers`` (fewer than two different texts).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def pick_pair(samples: Sequence[str], scores: Sequence[float]) -> tuple[int, int]:
    """Which answer is the best and which the worst, the earlier of equals.

    Args:
        samples: The answers; blank ones cannot be trained on and are left out.
        scores: One an answer.

    Returns:
        Two indices.

    Raises:
        NoPairError: There is none.
    """
    usable = [index for index, text in enumerate(samples) if text.strip()]
    if len({samples[index] for index in usable}) < 2:
        raise NoPairError("too_few_answers")
    best, worst = max(usable, key=lambda i: scores[i]), min(usable, key=lambda i: scores[i])
    if scores[best] == scores[worst] or samples[best] == samples[worst]:
        raise NoPairError("ties")
    return best, worst


def build(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the whole job, or what is left of it, and returns the summary."""
    processes = process_count(given.nproc)
    device = default_device()
    dtype = dtype_of(given.dtype, device)
    tokenizer = load_tokenizer(str(tokenizer_directory(given.model)), given.chat_template, given.template_kwargs)
    settings = {
        "prompts": digest_file(given.prompts).sha256,
        **({"columns": given.columns} if given.columns else {}),
        "score": given.score if ":" in given.score else fingerprint(Path(given.score)),
        "samples": given.samples,
        "max_prompt_length": given.max_prompt_length,
        **sampling_settings(given, tokenizer, dtype, device),
    }
    summary = finished_summary(given.out, settings)
    if summary is not None:
        return summary
    prompts, encoded, overlong = _encode(read_prompts(given.prompts, given.columns), tokenizer, given.max_prompt_length)
    with Journal(given.out.with_name(given.out.name + SUFFIX), settings, created=time.time()) as journal:
        if journal.done < math.ceil(len(prompts) / given.batch):
            with (
                hf_directory(given.model, given.scratch) as directory,
                Workers(processes, partial(_scorer_and_sampler, given, directory)) as workers,
            ):
                journal.fill(
                    len(prompts),
                    given.batch,
                    "prompt",
                    lambda parts: workers.map(
                        partial(_answer_batch, samples=given.samples, seed=given.seed, temperature=given.temperature),
                        [[(prompts[i], encoded[i]) for i in items] for items in parts],
                    ),
                )
        summary = _finish(journal, prompts, given.out, settings, overlong)
        journal.remove()
    return summary


def _encode(
    prompts: list[Prompt], tokenizer: Tokenizer, limit: int | None
) -> tuple[list[Prompt], list[list[int]], int]:
    kept, encoded = [], []
    for prompt in prompts:
        ids = encode_prompt(prompt.content, tokenizer, prompt.place, prompt.variables)
        if limit is None or len(ids) <= limit:
            kept.append(prompt)
            encoded.append(ids)
    if not kept:
        raise UserError(f"all {len(prompts)} prompts are longer than --max-prompt-length {limit}")
    return kept, encoded, len(prompts) - len(kept)


def _scorer_and_sampler(given: argparse.Namespace, directory: Path) -> tuple[Scorer, Sampler]:
    device = default_device()
    dtype, name = dtype_of(given.dtype, device), given.score
    scorer = FunctionScorer(name) if ":" in name else RewardModelScorer(Path(name), dtype, device)
    return scorer, make_sampler(given, directory)[0]


def _answer_batch(
    state: tuple[Scorer, Sampler],
    prompts: Sequence[tuple[Prompt, list[int]]],
    *,
    samples: int,
    seed: int,
    temperature: float,
) -> list[dict[str, Any]]:
    """Samples and scores the answers to some prompts, given with their ids."""
    scorer, sampler = state
    requests = [
        Request(ids, request_seed(seed, prompt.number, sample), temperature, prompt.place)
        for prompt, ids in prompts
        for sample in range(samples)
    ]
    answers = sampler.sample(requests)
    results = []
    for index, (prompt, _) in enumerate(prompts):
        own = answers[index * samples : (index + 1) * samples]
        texts = [answer.text for answer in own]
        results.append(
            {
                "samples": texts,
                "scores": scorer.score(prompt.content, texts, prompt.place, prompt.variables),
                "finished": [answer.finished for answer in own],
                "tokens": [len(answer.ids) for answer in own],
            }
        )
    return results


def _finish(
    journal: Journal, prompts: Sequence[Prompt], out: Path, settings: dict[str, Any], overlong: int
) -> dict[str, Any]:
    """Writes the pairs, then the summary."""
    counts: Counter[str] = Counter()
    gaps: list[float] = []
    tokens: dict[str, list[int]] = {"chosen": [], "rejected": [], "all": []}

    def lines() -> Iterator[str]:
        results = (result for part in journal.parts() for result in part)
        for prompt, result in zip(prompts, results, strict=True):
            counts["cut_off"] += result["finished"].count(False)
            tokens["all"] += result["tokens"]
            try:
                pair = pick_pair(result["samples"], result["scores"])
            except NoPairError as error:
                counts[error.reason] += 1
                continue
            gaps.append(result["scores"][pair[0]] - result["scores"][pair[1]])
            for response, index in zip(("chosen", "rejected"), pair, strict=True):
                tokens[response].append(result["tokens"][index])
            yield json.dumps(_record(prompt, pair, result), ensure_ascii=False) + "\n"
        if not gaps:
            raise UserError(
                f"{out}: no pair: of {len(prompts)} prompts {counts['ties']} had answers of one score, "
                f"{counts['too_few_answers']} fewer than two different answers"
            )

    write_whole(out, lines())
    summary = {
        "settings": settings,
        "prompts": len(prompts),
        "pairs": len(gaps),
        "ties": counts["ties"],
        "too_few_answers": counts["too_few_answers"],
        "overlong_prompts": overlong,
        "answers_cut_off": counts["cut_off"],
        "score_gap_mean": statistics.fmean(gaps),
        "tokens": {name: length_metrics(values) for name, values in tokens.items()},
    }
    write_whole(summary_path(out), [json.dumps(summary, indent=2) + "\n"])
    return summary


def _record(prompt: Prompt, pair: tuple[int, int], result: dict[str, Any]) -> dict[str, Any]:
    """A pair in TRL's layout: plain where the prompt is plain, else conversational."""
    chosen, rejected = (
        text if isinstance(prompt.content, str) else [{"role": "assistant", "content": text}]
        for text in (result["samples"][index] for index in pair)
    )
    record = {"prompt": as_plain(prompt.content), **as_keys(prompt.variables), "chosen": chosen, "rejected": rejected}
    return {**record, **{key: result[key] for key in ("samples", "scores", "finished")}, "source": prompt.number}
