"""Writes a seed's texts and untrained model.

``base`` (HF directory with random weights), ``sft.jsonl`` (answers of speakers of any skill), ``prompts.jsonl`` (for
preference pairs), and ``heldout.jsonl`` (prompts to judge by: none of them is in the other files), each drawn from a
generator of its own. The last file written is ``DONE``.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random

from tgdpo.command_line import positive
from tools.examples.paper_in_miniature.base import write_base
from tools.examples.paper_in_miniature.language import draw_answer, draw_request


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _prompt(rng: Random, *, held_out: bool) -> dict[str, object]:
    return {"prompt": _message("user", draw_request(rng, held_out=held_out).prompt)}


def _sft_record(rng: Random) -> dict[str, object]:
    request = draw_request(rng, held_out=False)
    answer = _message("assistant", draw_answer(rng, request))
    return {"prompt": _message("user", request.prompt), "completion": answer}


def write_lines(path: Path, count: int, make: Callable[[Random], dict[str, object]], seed: str) -> None:
    """Writes ``count`` records, drawn from a generator with this seed."""
    rng = Random(seed)
    path.write_text("".join(json.dumps(make(rng)) + "\n" for _ in range(count)), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.examples.paper_in_miniature.make_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, required=True, help="of texts and weights")
    for name, what in (("sft", "answers"), ("prompts", "prompts"), ("heldout", "prompts")):
        parser.add_argument(f"--{name}", type=positive, required=True, help=f"{what} of {name}.jsonl")
    args = parser.parse_args(arguments)
    write_base(args.out / "base", args.seed)
    kinds: dict[str, Callable[[Random], dict[str, object]]] = {
        "sft": _sft_record,
        "prompts": partial(_prompt, held_out=False),
        "heldout": partial(_prompt, held_out=True),
    }
    for name, make in kinds.items():
        write_lines(args.out / f"{name}.jsonl", getattr(args, name), make, f"{args.seed} {name}")
    (args.out / "DONE").touch()


if __name__ == "__main__":
    main()
