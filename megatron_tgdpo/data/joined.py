"""Several datasets as one, and the way from an entry of the configuration to them."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from megatron_tgdpo.data.dataset import PreferenceDataset, PreferencePair, open_or_preprocess, prepared_prefix
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.sources import Source


class JoinedDataset(PreferenceDataset):
    """Several datasets one after another as a single one. Attributes as in `PreferenceDataset`.

    Args:
        parts: the datasets, made with one tokenizer, template and set of length limits.

    Attributes:
        parts: as given.
    """

    def __init__(self, parts: Sequence[PreferenceDataset]) -> None:
        self.parts = tuple(parts)
        self.prefix = ", ".join(part.prefix for part in parts)
        self.manifest = {
            "pairs": sum(len(part) for part in parts),
            "tokenizer": parts[0].manifest["tokenizer"],
            "max_token_id": max(part.manifest["max_token_id"] for part in parts),
        }
        self.fingerprint = hashlib.sha256("\n".join(part.fingerprint for part in parts).encode()).hexdigest()
        self.ids_fingerprint = parts[0].ids_fingerprint
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.trained_lengths = np.concatenate([part.trained_lengths for part in parts])
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __getitem__(self, index: int) -> PreferencePair:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        part, place = self._locate(index)
        return replace(part[place], index=int(index))

    def _locate(self, index: int) -> tuple[PreferenceDataset, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[number], int(index - self._starts[number])

    def source(self, index: int) -> str:
        part, place = self._locate(index)
        return part.source(place)

    def first_use(self, ids: Collection[int]) -> tuple[int, int] | None:
        for start, part in zip(self._starts, self.parts, strict=False):
            if (found := part.first_use(ids)) is not None:
                return int(start) + found[0], found[1]
        return None

    def require_pairs(self) -> None:
        for part in self.parts:
            part.require_pairs()

    @property
    def files(self) -> list[str]:
        return [file for part in self.parts for file in part.files]

    def verify(self, digests: Mapping[str, str] | None = None) -> None:
        for part in self.parts:
            part.verify(digests)


def join(parts: Sequence[PreferenceDataset]) -> PreferenceDataset:
    """Datasets as one, which has their pairs one after another."""
    return parts[0] if len(parts) == 1 else JoinedDataset(parts)


def open_sources(
    sources: Sequence[Source], options: PreprocessOptions, cache_dir: str
) -> list[tuple[PreferenceDataset, float]]:
    """Opens what an entry of the configuration names, as `open_or_preprocess` does, with the weight of each.

    Neighbouring raw files of the same weight become one dataset. In order, and on one rank, as there.

    Raises:
        UserError: as there.
    """
    opened: list[tuple[PreferenceDataset, float]] = []
    for (prefix, weight), group in groupby(sources, lambda source: (prepared_prefix(source.path), source.weight)):
        if prefix is None:
            opened.append((open_or_preprocess(list(group), options, cache_dir), weight))
        else:
            opened += [(open_or_preprocess(prefix, options, cache_dir), weight) for _ in group]
    return opened
