"""Memory, traffic and estimated step time of a run, on paper: for one layout, or ranked over all that are possible.

    tgdpo plan --model MODEL_OR_CONFIG_JSON [--method dpo] [--nodes 4] [--tensor 8 --pipeline 4 ...]
    tgdpo plan --model MODEL_OR_CONFIG_JSON --schedules [--tensor 8]

Reads only ``config.json``. Reference and guide have the policy's shape unless given; with ``--lora-rank`` they are the
policy's base and an adapter on it. What is computed, and how well it
is checked: docs/planning.md. ``tgdpo train CONFIG --dry-run`` gives the same memory for a config.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_tgdpo.config.constraints import MOMENTS, RECOMPUTE_CHOICES, RECOMPUTE_MODULES
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.loss.methods import METHODS
from megatron_tgdpo.planning.cluster import Cluster
from tgdpo.command_line import find_models, positive, positive_number, run

_MAY_BE_ZERO = ("reserve_gib", "response_share", "memory_gbytes")
_LARGEST = 10**9


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tgdpo plan", description=(__doc__ or "").splitlines()[0])
    models = parser.add_argument_group("models (each a config.json, or what training takes for a model)")
    models.add_argument("--model", required=True, help="the policy")
    models.add_argument("--reference", help="if its shape differs from the policy's")
    models.add_argument("--guide", help="if its shape differs from the policy's")
    models.add_argument(
        "--method", choices=tuple(METHODS), default="tgdpo", help="default %(default)s; dpo has no guide"
    )
    models.add_argument(
        "--guidance",
        choices=("colocated", "cached"),
        default="colocated",
        help="guidance.mode; cached has no frozen models; default %(default)s",
    )
    lora = parser.add_argument_group(
        "LoRA (an adapter trains; the reference is its base, and the guide an adapter as large, unless --guide names a "
        "whole model or another adapter)"
    )
    lora.add_argument("--lora-rank", type=positive, help="lora.rank; default: all weights train")
    lora.add_argument(
        "--lora-targets", default="all-linear", help="lora.targets, with commas between; default %(default)s"
    )
    batch = parser.add_argument_group("batch")
    batch.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="precision.dtype; default %(default)s")
    batch.add_argument("--global-pairs", type=int, default=128, help="batch.global_pairs; default %(default)s")
    batch.add_argument("--max-length", type=int, default=2048, help="data.max_length; default %(default)s")
    batch.add_argument(
        "--pack-tokens", type=int, dest="seq_length", help="batch.tokens_per_micro_batch; default 2 x max-length"
    )
    # The option's name in scripts that were written for 0.1.
    batch.add_argument("--row-tokens", type=int, dest="seq_length", help=argparse.SUPPRESS)
    batch.add_argument(
        "--pair-tokens", type=int, help="mean tokens of a pair (sft: of prompt and answer); default max-length"
    )
    batch.add_argument(
        "--response-share", type=float, default=0.5, help="part of a pair that is responses; default %(default)s"
    )
    batch.add_argument("--no-shared-prompts", action="store_true", help="batch.shared_prompts=false")
    layout = parser.add_argument_group("layout (none given: all, ranked)")
    layout.add_argument("--tensor", type=int, help="parallel.tensor")
    layout.add_argument("--pipeline", type=int, help="parallel.pipeline")
    layout.add_argument("--context", type=int, help="parallel.context")
    layout.add_argument("--virtual-pipeline", type=int, help="parallel.virtual_pipeline, chunks of a stage")
    layout.add_argument("--expert", type=int, help="parallel.expert")
    layout.add_argument("--expert-tensor", type=int, help="parallel.expert_tensor; default: as --tensor")
    layout.add_argument("--no-sequence-parallel", action="store_true", help="default: on with --tensor above 1")
    layout.add_argument(
        "--recompute",
        type=_recomputation,
        default="none",
        metavar="WHAT",
        help="train.recompute of a given layout (none, selective, full), or its recompute_modules, joined by commas; "
        "default %(default)s",
    )
    layout.add_argument(
        "--moments",
        choices=MOMENTS,
        default="fp32",
        help="optimizer.moments of a given layout; default %(default)s",
    )
    layout.add_argument(
        "--offload-frozen",
        action="store_true",
        help="offload.frozen of a given layout: reference and guide visit the GPU",
    )
    layout.add_argument(
        "--schedules",
        action="store_true",
        help="instead of layouts: the bubble of every pipeline schedule for 2 to 8 stages and 8 to 64 packs",
    )
    layout.add_argument("--top", type=int, default=12, help="lines of the ranking; default %(default)s")
    written = parser.add_argument_group("a config of the layout, that tgdpo train takes as it is")
    written.add_argument("--write", type=Path, metavar="YAML", help="file to make; needs --train")
    written.add_argument("--train", metavar="DATA", help="data.train: a file of pairs, or what else training takes")
    written.add_argument("--lr", type=positive_number, help="optimizer.lr; default 7e-7, with --lora-rank 7e-6")
    cluster = parser.add_argument_group("cluster (H100 SXM; figures and sources in docs/planning.md)")
    for field in fields(Cluster):
        name = f"--{field.name.replace('_', '-')}"
        cluster.add_argument(name, type=type(field.default), default=field.default, help="default %(default)s")
    return parser


def _recomputation(text: str) -> str:
    """A value of ``TrainConfig.recomputation``."""
    modules = text.split(",")
    if text in RECOMPUTE_CHOICES or (set(modules) <= set(RECOMPUTE_MODULES) and len(set(modules)) == len(modules)):
        return text
    words = ", ".join(RECOMPUTE_CHOICES)
    raise argparse.ArgumentTypeError(f"'{text}': choose {words}, or some of {', '.join(RECOMPUTE_MODULES)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status, 1 too where the layout that was asked for, or none at all, fits."""
    given = _parser().parse_args(arguments)
    answers: list[bool] = []
    return run(lambda: answers.append(_plan(given))) or int(not answers[0])


def _plan(given: argparse.Namespace) -> bool:
    _check_numbers(given)
    if given.write is not None and (given.train is None or given.schedules):
        raise UserError("--write makes the config of a training: give its data with --train, and no --schedules")
    if given.write is not None and given.write.exists():
        raise UserError(f"--write {given.write}: is there already: name another file, or remove it")
    named = {role: getattr(given, role) for role in ("model", "reference", "guide")}
    if not _is_config_file(given.model):
        from megatron_tgdpo.checkpoints.find_model import find_model

        given.model = find_model(given.model, "--model", weights=False)
    options = [f"--{role}" for role in ("reference", "guide") if not _is_config_file(getattr(given, role))]
    find_models(given, *options, weights=False)
    # Only now: these imports take seconds, a wrong option should not.
    from tgdpo.planning import plan, write_config

    text, chosen = plan(given)
    print(text)
    if unused := _unused(given):
        print(f"not used: {', '.join(unused)}")
    if given.write is not None and chosen is not None:
        write_config(given, chosen, named)
        ranks, file = chosen.layout.world_size, shlex.quote(str(given.write))
        guide_first = "guide" in METHODS[given.method].frozen and not given.guide
        command = f"tgdpo pipeline {file} --nproc {ranks}" if guide_first else f"tgdpo train {file} --nproc {ranks}"
        print(f"{given.write}: written; to train: {command}")
    elif chosen is not None and chosen.fits:
        print("to train with it: --write config.yaml --train PAIRS makes a config")
    return chosen is None or chosen.fits


def _unused(given: argparse.Namespace) -> list[str]:
    """Options that were given and change nothing, each with the reason."""
    from tgdpo.planning import LAYOUT_OPTIONS

    method = METHODS[given.method]
    ranked = all(getattr(given, name) is None for name in LAYOUT_OPTIONS) and not given.schedules
    found = {
        f"--{role} (--method {given.method} has no {role})": getattr(given, role) and role not in method.frozen
        for role in ("reference", "guide")
    }
    layout = [*LAYOUT_OPTIONS[1:], "offload_frozen"]
    found |= {
        f"--{name.replace('_', '-')} (--schedules tells bubbles alone)": (given.schedules and getattr(given, name))
        for name in layout
    }
    found |= {
        "--moments (--schedules tells bubbles alone)": given.schedules and given.moments != "fp32",
        f"--offload-frozen (no frozen model runs with --method {given.method} --guidance {given.guidance})": (
            given.offload_frozen and (given.guidance == "cached" or not method.frozen)
        ),
        f"--guidance cached (--method {given.method} has no frozen model)": (
            given.guidance == "cached" and not method.frozen
        ),
        f"--no-shared-prompts (--method {given.method} has one answer)": given.no_shared_prompts and method.chosen_only,
        "--lora-targets (without --lora-rank)": given.lora_targets != "all-linear" and given.lora_rank is None,
        "--recompute (without a layout each gets the least that fits)": given.recompute != "none" and ranked,
        "--moments (without a layout, only where nothing else fits)": given.moments != "fp32" and ranked,
        "--offload-frozen (without a layout, only where nothing else fits)": given.offload_frozen and ranked,
        "--lr (without --write)": given.lr and given.write is None,
        "--train (without --write)": given.train and given.write is None,
    }
    return [option for option, unused in found.items() if unused]


def _is_config_file(text: str | None) -> bool:
    return text is not None and Path(text).name == "config.json" and Path(text).is_file()


def _check_numbers(given: argparse.Namespace) -> None:
    for name, value in vars(given).items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        option = "--pack-tokens" if name == "seq_length" else f"--{name.replace('_', '-')}"
        if value < 0 if name in _MAY_BE_ZERO else value <= 0:
            raise UserError(f"{option} is {value}: it must be positive")
        most = 1 if name == "response_share" else _LARGEST
        if not value <= most:
            raise UserError(f"{option} is {value:g}: it must be at most {most:,}")


if __name__ == "__main__":
    sys.exit(main())
