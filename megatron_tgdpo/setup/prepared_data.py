"""The run's datasets after preprocessing, and what became of their records."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.data.joined import join
from megatron_tgdpo.data.summary import lost_ends, lost_ends_warning, summary
from megatron_tgdpo.storage.atomic_file import write_atomically

logger = logging.getLogger(__name__)

# In the output directory.
SUMMARY_FILE = "data_summary.json"


@dataclass(frozen=True)
class Prepared:
    """A dataset of the run as :func:`prepare_data` leaves it: prefixes of its parts, and the weight of each."""

    prefixes: list[str]
    weights: list[float]

    def open(self) -> PreferenceDataset:
        """Its parts as one dataset.

        Raises:
            UserError: One is incomplete or damaged.
        """
        return join([PreferenceDataset(prefix) for prefix in self.prefixes])

    def fingerprint(self, dataset: PreferenceDataset) -> str:
        """sha256 (hex) of its tokens and, unless all are 1, weights; ``dataset`` is what :meth:`open` returned."""
        if set(self.weights) == {1.0}:
            return dataset.fingerprint
        return sha256(json.dumps([dataset.fingerprint, self.weights]).encode()).hexdigest()


def log_summary(name: str, dataset: PreferenceDataset) -> None:
    """Logs what became of a dataset's records."""
    for line in summary(name, dataset.manifest).splitlines():
        logger.info("%s", line)
    if (warning := lost_ends_warning(name, dataset.manifest, dataset.responses)) is not None:
        logger.warning("%s", warning)


def write_summary(output_dir: Path, prepared: Mapping[str, Prepared]) -> None:
    """Leaves in the output directory what became of the records of each dataset, by name.

    Raises:
        UserError: It cannot be written; a StorageError where that may pass.
    """
    found = {}
    for name, each in prepared.items():
        parts = zip(each.prefixes, each.weights, strict=True)
        found[name] = [_summary_of(PreferenceDataset(prefix), weight) for prefix, weight in parts]
    write_atomically(output_dir / SUMMARY_FILE, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def _summary_of(dataset: PreferenceDataset, weight: float) -> dict[str, Any]:
    manifest, responses = dataset.manifest, dataset.responses
    cut, _ = lost_ends(manifest, responses)
    found: dict[str, Any] = {"dataset": dataset.prefix, "sources": [source["path"] for source in manifest["sources"]]}
    found |= {"weight": weight, "responses": responses, "lost_ends": cut}
    return found | {key: manifest[key] for key in ("pairs", "dropped", "truncated", "lengths")}
