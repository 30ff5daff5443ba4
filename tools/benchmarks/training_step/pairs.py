"""The preference pairs of a benchmark, preprocessed: real ones where they are, else of the demonstration's language."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.preprocess import preprocess
from megatron_tgdpo.errors import UserError
from tools.examples.quickstart.language import draw_answer, draw_prompt
from tools.examples.quickstart.make_data import draw_pair, pair_record
from tools.examples.quickstart.tokenizer import save_tokenizer, train_sentencepiece

SHARED_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
_REAL_PAIRS, _REAL_TOKENIZER = "preference_pairs_en_300.json", "llama2_sentencepiece.model"
_TOKENIZER_TEXTS = 2000


@dataclass(frozen=True)
class Source:
    """Where pairs come from.

    Attributes:
        kind: ``real`` or ``generated``.
        records: The pairs.
        tokenizer: HF directory or SentencePiece model.
    """

    kind: str
    records: list[dict]
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


def find_source(directory: Path, count: int, shared_data: Path) -> Source:
    """The first ``count`` real pairs where they are, else so many of the demonstration's language.

    Args:
        directory: For a tokenizer that has to be made.
        count: Pairs.
        shared_data: Where the real pairs and their SentencePiece model may be.

    Raises:
        UserError: There are fewer real pairs.
    """
    path = shared_data / _REAL_PAIRS
    if not path.is_file():
        rng = Random("benchmark")
        records = [pair_record(*draw_pair(rng)) for _ in range(count)]
        return Source("generated", records, _demo_tokenizer(directory / "tokenizer"))
    records = json.loads(path.read_text(encoding="utf-8"))
    if len(records) < count:
        raise UserError(f"--pairs {count}: {path} has {len(records)}")
    return Source("real", records[:count], shared_data / _REAL_TOKENIZER)


def tokenise(directory: Path, source: Source, max_length: int) -> Pairs:
    """Preprocesses pairs into ``directory``.

    Raises:
        UserError: A pair was dropped.
    """
    dataset = _preprocessed(directory, source.records, source.tokenizer, max_length)
    if len(dataset) != len(source.records):
        raise UserError(f"--max-length {max_length} leaves {len(dataset)} of {len(source.records)} pairs: raise it")
    return Pairs(source.kind, dataset, str(source.tokenizer))


def _preprocessed(directory: Path, records: Sequence[dict], tokenizer: Path, max_length: int) -> PreferenceDataset:
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
