"""Trains a SentencePiece model on the demonstration text and turns it into a tokenizer that transformers loads."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

# Small enough that rarer words are split into several pieces; odd, so that tensor parallelism has to pad it.
VOCAB_SIZE = 541
# Positions the base model is made for; prompt and answer together stay well below it.
MAX_TOKENS = 256
USER, ASSISTANT = "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{- '<|user|>' + message['content'] + eos_token }}"
    "{%- elif message['role'] == 'assistant' %}{{- '<|assistant|>' + message['content'] + eos_token }}"
    "{%- else %}{{- raise_exception('roles are user and assistant, not ' + message['role']) }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def train_sentencepiece(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> bytes:
    """Returns a serialised SentencePiece BPE model with the role tokens among its control symbols."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        normalization_rule_name="identity",
        character_coverage=1.0,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        control_symbols=[USER, ASSISTANT],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def to_tokenizers(sentencepiece_model: bytes) -> Tokenizer:
    """Returns a `tokenizers` tokenizer with the pieces, merges and ids of a serialised SentencePiece BPE model.

    Text after a role token is tokenised as if it stood alone (each word starts with the piece that holds its space),
    so a prompt's ids are always a prefix of the ids of prompt and response.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    special = [piece for piece, i in vocab.items() if processor.is_control(i) or processor.is_unknown(i)]
    unk = processor.id_to_piece(processor.unk_id())
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(vocab, special), unk_token=unk, fuse_unk=True))
    # SentencePiece's remove_extra_whitespaces, which is on by default.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    return tokenizer


def _merges(vocab: dict[str, int], special: list[str]) -> list[tuple[str, str]]:
    """SentencePiece's merges, which it does not store: every split of a piece into two, earlier pieces first."""
    merges = []
    for piece in sorted(vocab.keys() - set(special), key=vocab.__getitem__):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [split for split in splits if split[0] in vocab and split[1] in vocab]
        merges += sorted(known, key=lambda split: (vocab[split[0]], vocab[split[1]]))
    return merges


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> list[int]:
    """Returns the token ids of chat messages in the tokenizer's own template."""
    ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)
    return list(ids)


def save_tokenizer(sentencepiece_model: bytes, out: Path) -> None:
    """Writes a tokenizer directory that every supported transformers loads, with the SentencePiece model beside it."""
    (out / "tokenizer.model").write_bytes(sentencepiece_model)
    write_tokenizer(to_tokenizers(sentencepiece_model), out, MAX_TOKENS)


def write_tokenizer(tokenizer: Tokenizer, out: Path, max_tokens: int) -> None:
    """Writes a tokenizer with this language's special tokens and chat template as a directory for transformers."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
    }
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
