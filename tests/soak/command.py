"""The command line that the soaks share."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path


def run(soak: Callable[[Path, int, int], None], about: str | None, counted: str, default: int) -> None:
    """Runs a soak as the command line says.

    Args:
        soak: Takes a directory, how often what it does is done, and a seed.
        about: Its description.
        counted: What is done, as the option is called.
        default: How often.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{counted}", type=int, default=default, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where to leave the runs (default: a temporary directory)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        soak(directory, getattr(arguments, counted), arguments.seed)
