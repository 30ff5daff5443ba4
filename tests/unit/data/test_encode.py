"""Truncation and dropping of pairs, on a tokenizer of one id a character, so that ids can be read."""

import pytest

from megatron_tgdpo.data.chat import ChatTemplate
from megatron_tgdpo.data.encode import RecordBatch, encode_batch, encode_example
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import Example
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.truncation import DROP_REASONS, DroppedPair, EncodedPair
from megatron_tgdpo.errors import UserError


class CharacterTokenizer:
    """Every character is its code point; U+0001 is EOS, and there is no BOS."""

    vocab_size = 0x110000
    bos_id: int | None = None
    eos_id: int | None = 1
    adds_bos = False
    special_tokens: tuple[str, ...] = ()
    template: ChatTemplate | None = None
    fingerprint = template_fingerprint = "test"

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def encode(prompt, chosen, rejected, **options):
    example = Example(prompt, chosen, rejected)
    return encode_example(example, CharacterTokenizer(), PreprocessOptions("none", **options), "pairs.jsonl:17")


def ids(text: str) -> list[int]:
    return [1 if character == "$" else ord(character) for character in text]


def test_nothing_is_cut_within_the_limits():
    pair = encode("0123456789", "abcd", "xyz", max_length=15, max_prompt_length=10)
    assert pair == EncodedPair(ids("0123456789"), ids("abcd$"), ids("xyz$"), ())


def test_max_prompt_length_keeps_the_last_tokens():
    pair = encode("0123456789", "abcd", "xyz", max_length=100, max_prompt_length=4)
    assert pair == EncodedPair(ids("6789"), ids("abcd$"), ids("xyz$"), ("prompt_by_max_prompt_length",))


def test_max_length_keeps_the_first_tokens_of_each():
    # 10 prompt and 10 response tokens in 10: 5 and 5.
    pair = encode("0123456789", "abcdefghi", "xyz", max_length=10)
    assert pair == EncodedPair(ids("01234"), ids("abcde"), ids("xyz$"), ("prompt", "chosen"))


def test_max_prompt_length_comes_first():
    # 10 prompt tokens become 4, which is below half of 10: the response gets the other 6.
    pair = encode("0123456789", "abcdefghi", "zyxwvutsr", max_length=10, max_prompt_length=4)
    cuts = ("prompt_by_max_prompt_length", "chosen", "rejected")
    assert pair == EncodedPair(ids("6789"), ids("abcdef"), ids("zyxwvu"), cuts)


def test_overlong_prompt_can_drop_or_stop():
    with pytest.raises(DroppedPair, match=r"^overlong_prompt$"):
        encode("0123456789", "a", "b", max_prompt_length=9, overlong_prompt="drop")
    assert isinstance(encode("0123456789", "a", "b", max_prompt_length=10, overlong_prompt="drop"), EncodedPair)
    with pytest.raises(UserError, match=r"^pairs\.jsonl:17: the prompt has 10 tokens, above max_prompt_length 9"):
        encode("0123456789", "a", "b", max_prompt_length=9, overlong_prompt="error")


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "reason"),
    [
        ("", "a", "b", "empty_prompt"),
        (" \n", "a", "b", "empty_prompt"),
        ((), "a", "b", "empty_prompt"),
        ((Message("system", "Be brief."), Message("user", " ")), "a", "b", "empty_prompt"),
        ("0", "", "b", "empty_response"),
        ("0", "a", " \n", "empty_response"),
        ("0", "", "", "empty_response"),
        ("0", "ab", "ab", "identical"),
        ("0123456789", "same start, then this", "same start, then that", "identical_after_truncation"),
        # 8 * 4/1004 rounds to no response token at all.
        ("p" * 1000, "abc", "xyz", "empty_response"),
    ],
)
def test_drop_reasons(prompt, chosen, rejected, reason):
    assert reason in DROP_REASONS
    with pytest.raises(DroppedPair, match=f"^{reason}$"):
        encode(prompt, chosen, rejected, max_length=8)


def test_no_template_is_only_missed_when_needed():
    with pytest.raises(UserError, match="messages need a chat template"):
        encode((Message("user", "Hi"),), "a", "b")


def test_batch_keeps_order_numbers_and_counts():
    payloads = tuple(
        f'{{"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}"}}'.encode()
        for prompt, chosen, rejected in (("01", "a", "b"), ("2", "same", "same"), ("345", "cd", "e"))
    )
    batch = RecordBatch("p.jsonl", "jsonl", "trl_plain", (1, 2, 4), payloads)
    result = encode_batch(batch, CharacterTokenizer(), PreprocessOptions("none"))
    assert result.tokens.tolist() == ids("01a$b$345cd$e$")
    assert result.lengths.tolist() == [[2, 2, 2], [3, 3, 2]]
    assert result.numbers == [1, 4]
    assert result.dropped == {"identical": 1}
    with pytest.raises(UserError, match=r"^p\.jsonl:2: this pair would be dropped \(identical\)"):
        encode_batch(batch, CharacterTokenizer(), PreprocessOptions("none", strict=True))


@pytest.mark.parametrize(
    "wrong",
    [{"max_length": 1}, {"max_prompt_length": 0}, {"overlong_prompt": "cut"}, {"workers": 0}],
)
def test_options_out_of_range(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        PreprocessOptions("none", **wrong)
