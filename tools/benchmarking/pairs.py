"""The preference pairs of a benchmark, preprocessed: real ones where they are, else of the demonstration's language."""

import json
from pathlib import Path
from random import Random

from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.preprocess import preprocess
from megatron_tgdpo.errors import UserError
from tools.demo.language import draw_answer, draw_prompt
from tools.demo.make_data import draw_pair, pair_record
from tools.demo.tokenizer import save_tokenizer, train_sentencepiece

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
_REAL_PAIRS, _REAL_TOKENIZER = "preference_pairs_en_300.json", "llama2_sentencepiece.model"
_TOKENIZER_TEXTS = 2000


def prepare_pairs(directory: Path, count: int, max_length: int, shared_data: Path = SHARED_DATA) -> PreferenceDataset:
    """Preprocesses ``count`` pairs into ``directory``.

    Args:
        directory: For the records, the tokenizer and the dataset.
        count: The first so many real pairs, or so many generated ones.
        max_length: Cutoff of prompt plus response, in tokens.
        shared_data: Where the real pairs and their SentencePiece model may be.

    Raises:
        UserError: There are fewer real pairs, or a pair was dropped.
    """
    source = shared_data / _REAL_PAIRS
    if source.is_file():
        records = json.loads(source.read_text(encoding="utf-8"))[:count]
        tokenizer = shared_data / _REAL_TOKENIZER
    else:
        rng = Random("benchmark")
        records = [pair_record(*draw_pair(rng)) for _ in range(count)]
        tokenizer = _generated_tokenizer(directory / "tokenizer")
    path = directory / "pairs.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    prefix = str(directory / "pairs")
    preprocess([str(path)], prefix, PreprocessOptions(str(tokenizer), max_length=max_length), progress=False)
    dataset = PreferenceDataset(prefix)
    if len(dataset) != count:
        raise UserError(f"{count} pairs were asked for and {source if source.is_file() else path} gives {len(dataset)}")
    return dataset


def describe(dataset: PreferenceDataset) -> str:
    """Where the pairs are from and how long they are, in one line."""
    name = "generated" if (Path(dataset.prefix).parent / "tokenizer").exists() else "real"
    prompt, chosen, rejected = (f"{mean:.0f}" for mean in dataset.lengths.mean(axis=0))
    return f"{len(dataset)} {name} pairs: prompt {prompt}, chosen {chosen}, rejected {rejected} tokens on average"


def _generated_tokenizer(directory: Path) -> Path:
    directory.mkdir()
    rng = Random("benchmark tokenizer")
    prompts = [draw_prompt(rng) for _ in range(_TOKENIZER_TEXTS)]
    texts = (text for prompt in prompts for text in (prompt, draw_answer(rng, prompt)))
    save_tokenizer(train_sentencepiece(texts), directory)
    return directory
