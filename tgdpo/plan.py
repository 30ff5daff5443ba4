"""Memory, traffic and estimated step time of a run, on paper: for one layout, or ranked over all that are possible.

    python -m tgdpo.plan --model DIR_OR_CONFIG_JSON [--method dpo] [--nodes 4] [--tensor 8 --pipeline 4 ...]
    python -m tgdpo.plan --model DIR_OR_CONFIG_JSON --schedules [--tensor 8]

Reads only ``config.json``. Reference and guide have the policy's shape unless given. What is computed, and how well it
is checked: docs/planning.md. ``python -m megatron_tgdpo.train CONFIG --dry-run`` gives the same memory for a config.
"""

import argparse
import sys
import warnings
from dataclasses import fields

from megatron_tgdpo.config.constraints import RECOMPUTE_CHOICES
from megatron_tgdpo.config.methods import METHODS
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.planning.cluster import Cluster


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tgdpo.plan")
    models = parser.add_argument_group("models (HF directory, or its config.json)")
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
    batch = parser.add_argument_group("batch")
    batch.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="precision.dtype; default %(default)s")
    batch.add_argument("--global-pairs", type=int, default=128, help="batch.global_pairs; default %(default)s")
    batch.add_argument("--max-length", type=int, default=2048, help="data.max_length; default %(default)s")
    batch.add_argument("--row-tokens", type=int, help="batch.tokens_per_micro_batch; default 2 x max-length")
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
    layout.add_argument("--no-sequence-parallel", action="store_true", help="default: on with --tensor above 1")
    layout.add_argument(
        "--recompute",
        choices=RECOMPUTE_CHOICES,
        default="none",
        help="train.recompute of a given layout; default %(default)s",
    )
    layout.add_argument(
        "--schedules",
        action="store_true",
        help="instead of layouts: the bubble of every pipeline schedule for 2 to 8 stages and 8 to 64 rows",
    )
    layout.add_argument("--top", type=int, default=12, help="lines of the ranking; default %(default)s")
    cluster = parser.add_argument_group("cluster (H100 SXM; figures and sources in docs/planning.md)")
    for field in fields(Cluster):
        name = f"--{field.name.replace('_', '-')}"
        cluster.add_argument(name, type=type(field.default), default=field.default, help="default %(default)s")
    return parser


def main() -> None:
    """Prints the plan."""
    arguments = _parser().parse_args()
    # megatron-core warns of parts that only training needs.
    warnings.filterwarnings("ignore")
    from megatron_tgdpo.planning.command import plan

    try:
        print(plan(arguments))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
