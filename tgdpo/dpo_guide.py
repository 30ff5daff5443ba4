"""Trains the guide of a TGDPO config: ``tgdpo train --guide``, with what is usually changed as options.

    tgdpo dpo-guide CONFIG.yaml [--nproc 8] [--beta 0.01] [--lr 5e-7] [--method dpo] [section.key=value ...]

The guide starts from the policy's weights and reads the same data; all that section ``guide`` does not say is as for
the policy. It is a run of its own in ``guide.output_dir`` (``guide/`` in ``output_dir`` by default): one that was
interrupted continues, one that is finished is left as it is. ``tgdpo train CONFIG.yaml`` then takes it, where CONFIG
says the same in its section ``guide``.
"""

import argparse
from collections.abc import Sequence

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.resilience.launch import nproc_argument
from tgdpo.command_line import positive, positive_number


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module. Exit status as that of ``tgdpo train``."""
    parser = argparse.ArgumentParser(
        prog="tgdpo dpo-guide", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of the TGDPO run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--method", help="guide.method: dpo, simpo or sft; default: the config's, or dpo")
    parser.add_argument("--beta", type=positive_number, help="guide.beta; 0.01 is the paper's better guide")
    parser.add_argument("--lr", type=positive_number, help="guide.lr; default: the policy's")
    parser.add_argument("--dry-run", action="store_true", help="print config, layout and memory per rank, then stop")
    parser.add_argument("--world-size", type=positive, help="ranks to assume in a dry run; default: as launched")
    nproc_argument(parser)
    given = parser.parse_intermixed_args(arguments)
    options = {"method": given.method or _method(given.config, given.overrides), "beta": given.beta, "lr": given.lr}
    overrides = [f"guide.{name}={value}" for name, value in options.items() if value is not None]
    from tgdpo import train

    dry_run = ["--dry-run"] if given.dry_run else []
    world_size = [] if given.world_size is None else ["--world-size", str(given.world_size)]
    nproc = [] if given.nproc is None else ["--nproc", str(given.nproc)]
    train.main(["--guide", *dry_run, *world_size, *nproc, given.config, *given.overrides, *overrides])


def _method(config: str, overrides: Sequence[str]) -> str | None:
    """What is added where neither the config nor its overrides say how the guide is trained."""
    if any(override.startswith("guide.method=") for override in overrides):
        return None
    from megatron_tgdpo.storage.yaml_text import read_yaml_file

    try:
        section = read_yaml_file(config).get("guide")
    except (OSError, UserError):
        return None  # said in its place, when the config is read
    return None if isinstance(section, dict) and section.get("method") else "dpo"


if __name__ == "__main__":
    main()
