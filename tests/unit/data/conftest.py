"""Small real tokenizers, made here: a byte-level BPE in Hugging Face format, and two SentencePiece models."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
]
TEXT = [
    "Human: What is the capital of France?\nAssistant: The capital of France is Paris.\n",
    "user model assistant system Name a colour. Blue is a colour, and so is green. [INST] [/INST] think",
    "Write a poem about the sea. The sea is wide, the sea is deep, it never sleeps.",
]


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Byte-level BPE (every text survives encoding), no chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    directory = tmp_path_factory.mktemp("hf_tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def llama_like_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BPE that, like Llama-2's, writes spaces as U+2581 and puts one before a text that stands alone."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    # Llama-2's merges never span a space.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581?[^\u2581]+|\u2581"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    directory = tmp_path_factory.mktemp("llama_like")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SentencePiece BPE with byte fallback and two user-defined pieces; keeps white space as it is."""
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(_train_sentencepiece(normalization_rule_name="identity", remove_extra_whitespaces=False))
    return str(path)


def _train_sentencepiece(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXT for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture
def write_jsonl(tmp_path: Path):
    """Writes records to a JSONL file and returns its path."""

    def write(records: list[Any], name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    return write


def plain_record(index: int, length: int = 3) -> dict[str, str]:
    """A TRL plain pair that differs from every other index."""
    return {
        "prompt": f"Question {index}: what is {index} plus one?",
        "chosen": " It is" + f" {index + 1}" * length,
        "rejected": " I do not know" + f" {index}" * length,
    }
