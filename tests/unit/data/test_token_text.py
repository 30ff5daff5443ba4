"""Token texts are the response's text, cut between tokens; sentences cut it further."""

import pytest
from transformers import ByT5Tokenizer

from megatron_tgdpo.data.sentences import SentenceSplitter
from megatron_tgdpo.data.token_text import token_texts
from megatron_tgdpo.data.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from tests.unit.data.conftest import hf_directory, llama_like_directory, sp_model  # noqa: F401 - fixtures

TEXT = " The sea\u2014w\u00f6rld \u8a9e is <b>wide</b>.\n\n\U0001f642  Blue\tis a colour, and so is green"


@pytest.fixture(params=["hf_directory", "llama_like_directory", "sp_model", "slow"])
def tokenizer(request: pytest.FixtureRequest, tmp_path) -> Tokenizer:
    if request.param == "slow":  # no Rust behind it, and a token a byte
        ByT5Tokenizer().save_pretrained(tmp_path)
        return HuggingFaceTokenizer(str(tmp_path), None, "slow")
    return load_tokenizer(request.getfixturevalue(request.param))


def test_parts_join_to_the_text_whatever_the_tokenizer(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Human: Name a colour.\nAssistant:")
    assert tokenizer.eos_id is not None
    response = [*tokenizer.encode(TEXT), tokenizer.eos_id]
    texts = token_texts(tokenizer, prompt, response)
    assert len(texts) == len(response)
    whole = tokenizer.decode([*prompt, *response], special=True)
    assert whole.endswith("".join(texts))
    assert whole == tokenizer.decode(prompt, special=True) + "".join(texts)
    assert texts[-1].strip() == "</s>"


def test_a_character_of_many_tokens_is_at_the_last(hf_directory: str) -> None:  # noqa: F811
    tokenizer = load_tokenizer(hf_directory)
    response = tokenizer.encode("a\u8a9e!")
    assert len(response) == 5  # one byte each
    assert token_texts(tokenizer, [], response) == ["a", "", "", "\u8a9e", "!"]
    # A response that was cut inside a character.
    assert token_texts(tokenizer, [], response[:3]) == ["a", "", "\ufffd"]


def test_sentences_cover_the_tokens_in_order() -> None:
    texts = ["It", " rains", ".", " He", " left", "!", "\n", "\n", "- one", "\n", " two", ".", "</s>"]
    splitter = SentenceSplitter(["It rains. He left! Two."])
    starts = splitter.first_tokens(texts)
    ends = [*starts[1:], len(texts)]
    sentences = ["".join(texts[a:b]) for a, b in zip(starts, ends, strict=True)]
    assert sentences == ["It rains.", " He left!\n\n", "- one\n", " two.</s>"]
    assert splitter.first_tokens(["", "\n"]) == [0]
