"""Which checkpoint of a run is the best by a metric of its evaluations: ``best.json`` in the output directory."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tgdpo.checkpoints.listing import saved_checkpoints
from megatron_tgdpo.checkpoints.manifest import check_files
from megatron_tgdpo.errors import DamageError
from megatron_tgdpo.storage.atomic_file import write_atomically
from megatron_tgdpo.storage.files import read_error
from megatron_tgdpo.storage.json_text import parse_json

logger = logging.getLogger(__name__)

BEST_FILE = "best.json"


@dataclass(frozen=True)
class Best:
    """The best of the evaluations that a run has made.

    Attributes:
        metric: Its name in ``metrics.jsonl``.
        mode: ``max`` or ``min``, which values are better.
        value: Of the metric; finite.
        step: The evaluation's, and the checkpoint's.
        basis: A fingerprint of what else the value follows from, such as the validation data.
    """

    metric: str
    mode: str
    value: float
    step: int
    basis: str

    def is_better(self, other: "Best | None") -> bool:
        """Whether this takes the other's place: not for an equal value; always if the other was measured otherwise."""
        if other is None or (self.metric, self.mode, self.basis) != (other.metric, other.mode, other.basis):
            return True
        return self.value > other.value if self.mode == "max" else self.value < other.value

    def record(self) -> dict[str, Any]:
        """As plain values, for ``best.json`` and for the checkpoints that follow."""
        return asdict(self)


def best_of_record(content: Any) -> Best | None:
    """What :meth:`Best.record` made of one; None for anything else."""
    if not isinstance(content, Mapping):
        return None
    try:
        best = Best(**content)
    except TypeError:
        return None
    texts = all(isinstance(text, str) for text in (best.metric, best.mode, best.basis))
    known = texts and best.mode in ("max", "min") and type(best.step) is int
    # Neither NaN nor what no float holds.
    return best if known and isinstance(best.value, int | float) and abs(best.value) < 1e300 else None


def read_best(output_dir: Path) -> Best | None:
    """What ``best.json`` says; None if there is none, or, with a warning, if it is damaged.

    Raises:
        StorageError: It cannot be read.
    """
    file = output_dir / BEST_FILE
    try:
        best = best_of_record(parse_json(file.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise read_error(file, error) from error
    except ValueError:
        best = None
    if best is None:
        logger.warning("%s: not readable: it is not used", file)
    return best


def write_best(output_dir: Path, best: Best) -> None:
    """Writes ``best.json``; its checkpoint is complete.

    Raises:
        UserError: It cannot be written; a StorageError where that may pass.
    """
    write_atomically(output_dir / BEST_FILE, json.dumps(best.record(), indent=2) + "\n")


def checkpoint_of(output_dir: Path, best: Best) -> Path | None:
    """The checkpoint that a record means; None, with a warning, if it is not there whole.

    Raises:
        UserError: It is of another format version.
        StorageError: It cannot be read.
    """
    path = next((path for path in saved_checkpoints(output_dir) if int(path.name[5:]) == best.step), None)
    if path is None:
        logger.warning("the best checkpoint, of step %d, is not in %s", best.step, output_dir / "checkpoints")
        return None
    try:
        check_files(path)
    except DamageError as error:
        logger.warning("%s; it was the best checkpoint", error)
        return None
    return path
