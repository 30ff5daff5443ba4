"""Samples a model's answers to prompts of the language and has the oracle score them.

    python -m tools.examples.paper_in_miniature.judge --model DIR --prompts heldout.jsonl --out judged.json \
        --temperature 0.8 --seed 0

Prompt number i is answered with the same random numbers by every model. The JSON file has a list of records, in the
order of the prompts, with ``prompt``, ``answer``, ``finished`` and ``score``.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tgdpo.data.encode import encode_prompt
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.storage.atomic_file import write_atomically
from tgdpo.command_line import run
from tgdpo.generation.backends import make_generator
from tgdpo.generation.models import default_device, dtype_of
from tgdpo.generation.prompts import read_prompts
from tgdpo.generation.rewards import as_plain
from tgdpo.generation.sampling import Request, request_seed
from tools.examples.paper_in_miniature.language import MAX_WORDS, score

_BATCH = 200


def judge(model: Path, prompts_file: Path, *, temperature: float, seed: int) -> list[dict[str, Any]]:
    """One answer a prompt, and its score; see the module.

    Raises:
        UserError: Model or prompts cannot be read.
    """
    device = default_device()
    tokenizer = load_tokenizer(str(model), None)
    prompts = read_prompts(str(prompts_file))
    sampler = make_generator(
        "transformers",
        model,
        tokenizer,
        top_p=1.0,
        max_new_tokens=MAX_WORDS,
        dtype=dtype_of("fp32", device),
        device=device,
    )
    requests = [
        Request(
            encode_prompt(prompt.content, tokenizer, prompt.place), request_seed(seed, index), temperature, prompt.place
        )
        for index, prompt in enumerate(prompts)
    ]
    answers = [
        answer
        for start in range(0, len(requests), _BATCH)
        for answer in sampler.sample(requests[start : start + _BATCH])
    ]
    records = []
    for prompt, answer in zip(prompts, answers, strict=True):
        plain = as_plain(prompt.content)
        text = plain if isinstance(plain, str) else plain[-1]["content"]
        records.append(
            {
                "prompt": text,
                "answer": answer.text,
                "finished": answer.finished,
                "score": score(text, answer.text, answer.finished),
            }
        )
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.examples.paper_in_miniature.judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="HF directory")
    parser.add_argument("--prompts", type=Path, required=True, help="prompts of the language (JSONL)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True, help="of the sampling")
    args = parser.parse_args(arguments)

    def action() -> None:
        judged = judge(args.model, args.prompts, temperature=args.temperature, seed=args.seed)
        write_atomically(args.out, json.dumps(judged, indent=1) + "\n")

    return run(action)


if __name__ == "__main__":
    raise SystemExit(main())
