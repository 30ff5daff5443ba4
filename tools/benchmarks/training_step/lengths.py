"""Pairs of chosen lengths: the same tokens in total, spread less or more widely around the same mean."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_tgdpo.errors import UserError
from tools.benchmarks.training_step.preference_pairs import Pairs, Source, tokenise

_VOCABULARY = 1000
# What preprocessing puts around the words of a plain record.
_BOS, _EOS = 1, 1


def spread_lengths(count: int, mean: int, spread: float, seed: int) -> list[int]:
    """``count`` lengths, evenly spaced from mean x (1 - spread) to mean x (1 + spread), in random order.

    Their sum is count x mean exactly, whatever the spread.
    """
    steps = [2 * number / max(1, count - 1) - 1 for number in range(count // 2)]
    below = [round(mean * spread * step) for step in steps]
    lengths = [mean + deviation for deviation in below] + [mean - deviation for deviation in below]
    lengths += [mean] * (count % 2)
    Random(seed).shuffle(lengths)
    return lengths


def spread_pairs(directory: Path, count: int, mean: int, spread: float) -> Pairs:
    """Pairs of random words whose prompts, chosen and rejected responses are ``mean`` tokens long on average.

    Raises:
        UserError: The shortest would have no words.
    """
    if not 0 <= spread < 1 or mean * (1 - spread) < 2 + max(_BOS, _EOS):
        raise UserError(f"--mean {mean} with a spread of {spread} leaves responses without words")
    columns = [spread_lengths(count, mean, spread, seed) for seed in range(3)]
    rng = Random(0)
    records = [
        {
            "prompt": _words(rng, prompt - _BOS),
            "chosen": _words(rng, chosen - _EOS),
            "rejected": _words(rng, rejected - _EOS),
        }
        for prompt, chosen, rejected in zip(*columns, strict=True)
    ]
    source = Source("synthetic", records, _word_tokenizer(directory / "tokenizer"))
    pairs = tokenise(directory, source, 2 * max(map(max, columns)))
    assert pairs.dataset.lengths.T.tolist() == columns, "the tokenizer's special tokens are not those assumed here"
    return pairs


def _words(rng: Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(3, _VOCABULARY)}" for _ in range(count))


def _word_tokenizer(directory: Path) -> Path:
    """One token a word, ``<s>`` in front of a text."""
    words: Sequence[str] = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, _VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=True
    )
    fast.save_pretrained(directory)
    return directory
