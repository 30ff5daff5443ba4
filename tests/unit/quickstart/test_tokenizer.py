"""The tokenizer directory loads in transformers, tokenises as SentencePiece does, and its template keeps prompt ids."""

from pathlib import Path
from random import Random

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tools.examples.quickstart.language import draw_answer, draw_prompt
from tools.examples.quickstart.scoring import encode_response
from tools.examples.quickstart.tokenizer import VOCAB_SIZE, save_tokenizer, train_sentencepiece


@pytest.fixture(scope="module")
def exchanges() -> list[tuple[str, str]]:
    rng = Random(0)
    return [(prompt, draw_answer(rng, prompt)) for prompt in (draw_prompt(rng) for _ in range(1000))]


@pytest.fixture(scope="module")
def directory(exchanges: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_sentencepiece(text for exchange in exchanges for text in exchange), out)
    return out


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def test_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)


def test_same_ids_as_sentencepiece_and_back(
    directory: Path, tokenizer: PreTrainedTokenizerBase, exchanges: list[tuple[str, str]]
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    # Text it was not trained on as well: unknown words fall to pieces, doubled spaces are one.
    texts = [text for exchange in exchanges for text in exchange] + ["the  sailrr zigzags. ", "rose rosa", "pröst"]
    for text in texts:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == processor.encode(text), text
    for text in texts[:-3]:
        assert tokenizer.decode(processor.encode(text)) == text


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    user = [{"role": "user", "content": "hi"}]
    both = [*user, {"role": "assistant", "content": "ho."}]
    assert tokenizer.apply_chat_template(both, tokenize=False) == "<s><|user|>hi</s><|assistant|>ho.</s>"
    prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    assert prompt == "<s><|user|>hi</s><|assistant|>"
    with pytest.raises(Exception, match="roles are user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "hi"}], tokenize=False)


def test_responses_start_where_prompts_end(
    tokenizer: PreTrainedTokenizerBase, exchanges: list[tuple[str, str]]
) -> None:
    for prompt, answer in exchanges[:100]:
        response = encode_response(tokenizer, prompt, answer)
        assert tokenizer.decode(response.prompt_ids) == f"<s><|user|> {prompt}</s><|assistant|>"
        assert tokenizer.decode(response.response_ids, skip_special_tokens=True) == answer
        assert response.response_ids[-1] == tokenizer.eos_token_id
        assert len(response.bad) == len(response.content) == len(response.response_ids)


def test_bad_tokens_spell_the_bad_words(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = "the lousy sailor rows the orchard. every fool moors the net."
    response = encode_response(tokenizer, "write two sentences about the harbor", answer)
    bad = [token for token, is_bad in zip(response.response_ids, response.bad, strict=True) if is_bad]
    assert tokenizer.decode(bad) == "lousy orchard fool"
    content = [token for token, flag in zip(response.response_ids, response.content, strict=True) if flag]
    assert tokenizer.decode(content) == "lousy sailor rows orchard fool moors net"
