"""Whether two tokenizers give a text the same ids.

Files say little of that: a tokenizer saved by another library version, with another EOS, post-processor or decoder is
written differently and encodes alike. So ids of tokens and of texts are compared.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tgdpo.data.encode import encode_prompt
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.tokenizers import Tokenizer
from megatron_tgdpo.errors import UserError

if TYPE_CHECKING:
    from megatron_tgdpo.data.dataset import PreferenceDataset

# What normalisation, the division into words and byte fallback treat each in its own way.
_TEXTS = (
    "The quick brown fox isn't here; it's 1234567 km away, 3.14% of $1,000.50.",
    " leading, trailing \n\n and   inner\t\twhite space\r\n    indented\n\n\n",
    "def f(x):\n    return {'a': [x**2, None]}  # done\n<tag attr=\"v\">&amp;</tag>",
    "Caf\u00e9 Cafe\u0301 \ufb01ne \u2460 \uff21\uff22 \u017f \u0130\u0131 "
    "na\u00efve \u00a0nbsp\u200bzero\u2028line \ufeffbom",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4 "
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940 "
    "\u0e44\u0e17\u0e22 \u05e2\u05d1\u05e8\u05d9\u05ea \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f "
    "\u0000\u0007\x1b[0m \U00010348",
    "aaaaaaaaaaaaaaaa ======== -------- ........ ____ !!!??? 'LL 'Re I'M",
)
_DIALOGUE = Message("user", "Which is it, 7 or 12?\n"), Message("assistant", " Neither."), Message("user", "Why?")
_CHUNK = 64  # tokens in a text
_JOINED = 16384  # tokens that are joined; all of a large vocabulary take too long
_EXCERPT = 40  # characters of a text in a message


@dataclass(frozen=True)
class LackingTokens:
    """Tokens of the data's tokenizer, by id, that a model's own does not have; ``model`` is how errors call that."""

    model: str
    tokens: Mapping[int, str]

    def check(self, dataset: "PreferenceDataset") -> None:
        """Refuses data that holds one.

        Raises:
            UserError: it does.
        """
        found = dataset.first_use(self.tokens)
        if found is not None:
            pair, number = found
            raise UserError(
                f"{dataset.source(pair)}: has the token {self.tokens[number]!r} ({number}), which the tokenizer of "
                f"{self.model} lacks: to that model it means nothing"
            )


def compare_tokenizers(model: str, theirs: Tokenizer, data: str, ours: Tokenizer) -> LackingTokens:
    """Checks that a model's tokenizer gives a text the ids that the data's gives it.

    Not a difference: BOS or EOS, what is added around a text, decoding, a token's ``special`` flag, and tokens that
    only one of them declares outside its vocabulary (padding, reserved places), as long as data does not hold them.

    Args:
        model: how errors call the model.
        theirs: its tokenizer.
        data: how errors call the data's tokenizer.
        ours: that one.

    Raises:
        UserError: some text gets other ids; names the first token that differs.
    """
    if theirs.ids_fingerprint == ours.ids_fingerprint:
        return LackingTokens(model, {})
    here, there = ours.vocabulary(), theirs.vocabulary()
    in_order = sorted(here.items(), key=lambda item: item[1])
    found = next((f"{t!r} is {there[t]} there and {n} here" for t, n in in_order if there.get(t, n) != n), None)
    differences = (_difference(text, ours, theirs) for text in _probes(ours, theirs, here, there))
    found = found or next(filter(None, differences), None)
    if found is not None:
        raise UserError(f"{model} has another tokenizer than {data}: {found}")
    return LackingTokens(model, {number: token for token, number in in_order if token not in there})


def _probes(ours: Tokenizer, theirs: Tokenizer, here: Mapping[str, int], there: Mapping[str, int]) -> Iterator[str]:
    """Texts: fixed ones, a dialogue, those around declared tokens, and all tokens, a line each, and many joined."""
    yield from _TEXTS
    if ours.template is not None:
        yield _rendered(ours)
    for token in sorted({*ours.special_tokens} & {*theirs.special_tokens}):
        yield f"a{token}b {token} c\n{token}\n{token}{token}"
    shuffled = random.Random(0)
    for tokenizer, own, others in ((ours, here, there), (theirs, there, here)):
        declared = set(tokenizer.special_tokens)
        # What both have is read from one of them.
        ids = sorted(
            number
            for token, number in own.items()
            if token not in declared and (tokenizer is ours or token not in others)
        )
        shuffled.shuffle(ids)
        line = tokenizer.encode("\n")
        for start in range(0, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK]
            if start < _JOINED:
                yield tokenizer.decode(chunk)
            yield tokenizer.decode([part for number in chunk for part in (number, *line)])


def _rendered(tokenizer: Tokenizer) -> str:
    """A dialogue as the chat template writes it, special tokens and all; empty if it refuses this one."""
    for messages in (_DIALOGUE, _DIALOGUE[:1]):
        try:
            return tokenizer.decode(encode_prompt(messages, tokenizer, "a dialogue"), special=True)
        except UserError:
            continue
    return ""


def _difference(text: str, ours: Tokenizer, theirs: Tokenizer) -> str | None:
    here, there = ours.encode(text), theirs.encode(text)
    if here == there:
        return None
    pairs = enumerate(zip(here, there, strict=False))
    first = next((i for i, (one, other) in pairs if one != other), min(len(here), len(there)))
    before = ours.decode(here[:first], special=True)[-_EXCERPT:]
    return f"after {before!r} comes {_shown(theirs, there[first:])} there and {_shown(ours, here[first:])} here"


def _shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return f"{tokenizer.decode(ids[:1], special=True)!r} ({ids[0]})" if ids else "nothing"
