"""Answers to a benchmark's questions, in the file that its project reads; the command is ``tgdpo generate``."""

import argparse
import json
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_tgdpo.data.encode import encode_prompt
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.manifest import digest_file
from megatron_tgdpo.data.tokenizers import Tokenizer, load_tokenizer
from tgdpo.generation.backends import make_sampler, sampling_settings
from tgdpo.generation.journal import SUFFIX, Journal, finished_summary, summary_path, write_whole
from tgdpo.generation.models import default_device, dtype_of, hf_directory, tokenizer_directory
from tgdpo.generation.prompt_sets import BENCHMARKS, AnswerSet, Benchmark, Question
from tgdpo.generation.questions import read_questions
from tgdpo.generation.sampling import Request, Sampler, request_seed
from tgdpo.generation.text_metrics import SELF_BLEU_ANSWERS, length_metrics, self_bleu
from tgdpo.generation.workers import Workers, process_count


def answer(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the whole job, or what is left of it, and returns the summary."""
    benchmark = BENCHMARKS[given.benchmark]
    processes = process_count(given.nproc)
    device = default_device()
    dtype = dtype_of(given.dtype, device)
    tokenizer = load_tokenizer(str(tokenizer_directory(given.model)), given.chat_template, given.template_kwargs)
    settings = {
        "benchmark": given.benchmark,
        "questions": digest_file(given.questions).sha256,
        "name": given.name,
        **sampling_settings(given, tokenizer, dtype, device),
    }
    summary = finished_summary(given.out, settings)
    if summary is not None:
        return summary
    questions = read_questions(given.questions, benchmark)
    with Journal(given.out.with_name(given.out.name + SUFFIX), settings, created=time.time()) as journal:
        if journal.done < math.ceil(len(questions) / given.batch):
            with (
                hf_directory(given.model, given.scratch) as directory,
                Workers(processes, partial(make_sampler, given, directory)) as workers,
            ):
                journal.fill(
                    len(questions),
                    given.batch,
                    "question",
                    lambda parts: workers.map(
                        partial(
                            _answer_batch, benchmark=given.benchmark, seed=given.seed, temperature=given.temperature
                        ),
                        [[questions[i] for i in items] for items in parts],
                    ),
                )
        summary = _finish(journal, questions, benchmark, given, settings)
        journal.remove()
    return summary


def _answer_batch(
    state: tuple[Sampler, Tokenizer],
    questions: Sequence[Question],
    *,
    benchmark: str,
    seed: int,
    temperature: float | None,
) -> list[dict[str, list[Any]]]:
    """Turn after turn, each with the answers before it in its prompt; ``temperature`` None is the benchmark's own."""
    sampler, tokenizer = state
    talks: list[list[Message]] = [[] for _ in questions]
    results: list[dict[str, list[Any]]] = [{"texts": [], "tokens": [], "finished": []} for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        active = [index for index, question in enumerate(questions) if turn < len(question.turns)]
        requests = []
        for index in active:
            question = questions[index]
            talks[index].append(Message("user", question.turns[turn]))
            own = BENCHMARKS[benchmark].temperature(question.record)
            requests.append(
                Request(
                    encode_prompt(talks[index], tokenizer, question.place),
                    request_seed(seed, question.key, turn),
                    own if temperature is None else temperature,
                    question.place,
                )
            )
        for index, made in zip(active, sampler.sample(requests), strict=True):
            text = made.text.strip()
            talks[index].append(Message("assistant", text))
            results[index]["texts"].append(text)
            results[index]["tokens"].append(len(made.ids))
            results[index]["finished"].append(made.finished)
    return results


def _finish(
    journal: Journal,
    questions: Sequence[Question],
    benchmark: Benchmark,
    given: argparse.Namespace,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Writes the answers, then the summary."""
    results = [result for part in journal.parts() for result in part]
    records = [
        benchmark.render(question, AnswerSet(result["texts"], result["tokens"], given.name, journal.created))
        for question, result in zip(questions, results, strict=True)
    ]
    if benchmark.named_by_file:
        write_whole(given.out, [json.dumps(record, ensure_ascii=False) + "\n" for record in records])
    else:
        write_whole(given.out, [json.dumps(records, ensure_ascii=False, indent=2) + "\n"])
    texts = [text for result in results for text in result["texts"]]
    finished = [flag for result in results for flag in result["finished"]]
    summary = {
        "settings": settings,
        "questions": len(questions),
        "answers": len(texts),
        "answers_cut_off": finished.count(False),
        "empty_answers": sum(not text for text in texts),
        "tokens": length_metrics([count for result in results for count in result["tokens"]]),
        "characters": length_metrics([len(text) for text in texts]),
        "self_bleu": self_bleu(texts),
        "self_bleu_answers": min(SELF_BLEU_ANSWERS, sum(bool(text) for text in texts)),
    }
    write_whole(summary_path(given.out), [json.dumps(summary, indent=2) + "\n"])
    return summary
