"""The preference pairs of a benchmark, preprocessed: those of a given file, else of the demonstration's language."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.preprocess import preprocess
from megatron_tgdpo.data.records import detect_format, read_records
from megatron_tgdpo.errors import UserError
from tools.examples.quickstart.language import draw_answer, draw_prompt
from tools.examples.quickstart.make_data import draw_pair, pair_record
from tools.examples.quickstart.tokenizer import save_tokenizer, train_sentencepiece

_TOKENIZER_TEXTS = 2000


@dataclass(frozen=True)
class Source:
    """Where pairs come from.

    Attributes:
        kind: ``given`` or ``generated``.
        records: The pairs.
        tokenizer: HF directory or SentencePiece model.
    """

    kind: str
    records: list[dict[str, Any]]
    tokenizer: Path


@dataclass(frozen=True)
class Pairs:
    """Preprocessed pairs.

    Attributes:
        kind: What they are.
        dataset: Their token ids.
        tokenizer: Path of the tokenizer.
    """

    kind: str
    dataset: PreferenceDataset
    tokenizer: str

    def sequence_tokens(self) -> int:
        """Tokens of all sequences, prompt plus response, without padding: what every variant is asked about."""
        return int(self.dataset.lengths.sum() + self.dataset.lengths[:, 0].sum())

    def describe(self) -> str:
        """One line."""
        prompt, chosen, rejected = (f"{mean:.0f}" for mean in self.dataset.lengths.mean(axis=0))
        return (
            f"{len(self.dataset)} {self.kind} pairs, cut to {self.dataset.manifest['options']['max_length']} tokens; "
            f"on average prompt {prompt}, chosen {chosen}, rejected {rejected}"
        )


def find_source(directory: Path, count: int, file: Path | None, tokenizer: Path | None) -> Source:
    """The first ``count`` pairs of a file, or so many of the demonstration's language.

    Args:
        directory: For a tokenizer that has to be made.
        count: Pairs.
        file: What training reads, JSON or JSONL; None: the demonstration's.
        tokenizer: Of the pairs of a file.

    Raises:
        UserError: The file cannot be read, or has fewer pairs.
    """
    if file is None or tokenizer is None:
        rng = Random("benchmark")
        generated = [pair_record(*draw_pair(rng)) for _ in range(count)]
        return Source("generated", generated, _demo_tokenizer(directory / "tokenizer"))
    kind = detect_format(str(file))
    payloads = (raw.payload for raw in islice(read_records(str(file), kind), count))
    records = [json.loads(payload) if kind == "jsonl" else payload for payload in payloads]
    if len(records) < count:
        raise UserError(f"--pairs-from {file}: has {len(records)} pairs, {count} are needed: give a longer file")
    return Source("given", records, tokenizer)


def tokenise(directory: Path, source: Source, max_length: int) -> Pairs:
    """Preprocesses pairs into ``directory``.

    Raises:
        UserError: A pair was dropped.
    """
    dataset = _preprocessed(directory, source.records, source.tokenizer, max_length)
    if len(dataset) != len(source.records):
        raise UserError(f"--max-length {max_length} leaves {len(dataset)} of {len(source.records)} pairs: raise it")
    return Pairs(source.kind, dataset, str(source.tokenizer))


def _preprocessed(
    directory: Path, records: Sequence[dict[str, Any]], tokenizer: Path, max_length: int
) -> PreferenceDataset:
    path, prefix = directory / "pairs.json", str(directory / "pairs")
    path.write_text(json.dumps(records), encoding="utf-8")
    preprocess([str(path)], prefix, PreprocessOptions(str(tokenizer), max_length=max_length), progress=False)
    return PreferenceDataset(prefix)


def _demo_tokenizer(directory: Path) -> Path:
    directory.mkdir()
    rng = Random("benchmark tokenizer")
    prompts = [draw_prompt(rng) for _ in range(_TOKENIZER_TEXTS)]
    texts = (text for prompt in prompts for text in (prompt, draw_answer(rng, prompt)))
    save_tokenizer(train_sentencepiece(texts), directory)
    return directory
