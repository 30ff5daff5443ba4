"""The two kinds of tokenizer, Hugging Face directories and raw SentencePiece models, behind one interface."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from megatron_tgdpo.data.chat import DEFAULT_TEMPLATE, NO_VARIABLES, TEMPLATE_KEY, ChatTemplate, read_template
from megatron_tgdpo.errors import UserError, one_line
from megatron_tgdpo.storage.files import read_error

NO_TEMPLATE = "none"


class Tokenizer(Protocol):
    """What preprocessing needs of a tokenizer.

    Attributes:
        vocab_size: one above the largest id.
        bos_id: id of the beginning-of-sequence token, None if there is none.
        eos_id: id of the end-of-sequence token, None if there is none.
        adds_bos: whether plain text gets a BOS in front by default.
        special_tokens: texts that become one id each, never text; where an end-of-turn token is looked for.
        template: the chat template, None if there is none.
        fingerprint: sha256 (hex) of what determines the ids, BOS and EOS.
        ids_fingerprint: sha256 (hex) of what determines the ids of a text alone. Two that differ may still encode alike
            (`tokenizer_compatibility.py`).
        template_fingerprint: sha256 (hex) of the template's source and of the variables it is given, ``none`` without
            one.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    special_tokens: tuple[str, ...]
    template: ChatTemplate | None
    fingerprint: str
    ids_fingerprint: str
    template_fingerprint: str

    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens, special ones too, by the text in which the tokenizer's own files write them."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written in it become their ids, none is added."""
        ...

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids, special tokens left out or written out; bytes that make no whole character become U+FFFD."""
        ...


def load_tokenizer(
    path: str, chat_template: str | None = None, template_kwargs: Mapping[str, Any] | None = None
) -> Tokenizer:
    """Opens a tokenizer from local files; nothing is downloaded and no code in it is run.

    Args:
        path: Hugging Face directory, or SentencePiece ``.model`` file.
        chat_template: Jinja file to use instead of the tokenizer's own template.
        template_kwargs: variables that the template is given, such as ``enable_thinking``.

    Raises:
        UserError: it cannot be opened, or its template does not read one of the variables.
    """
    template = None if chat_template is None else read_template(chat_template)
    name = path if chat_template is None else chat_template
    kwargs = dict(template_kwargs or {})
    if Path(path).is_dir():
        return HuggingFaceTokenizer(path, template, name, kwargs)
    if Path(path).is_file():
        return SentencePieceTokenizer(path, template, name, kwargs)
    raise UserError(f"no tokenizer at {path}: give a Hugging Face directory or a SentencePiece .model file")


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer directory. Attributes as in `Tokenizer`."""

    def __init__(
        self, path: str, template: str | None, template_name: str, kwargs: Mapping[str, Any] = NO_VARIABLES
    ) -> None:
        from transformers import AutoTokenizer

        try:
            hf: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a broken file raises anything from KeyError to the Rust library's own type
            raise UserError(f"cannot open the tokenizer in {path}: {one_line(error)}") from error
        # A text is cut by the run's own limits; a directory may say anything here, also what is no number.
        hf.model_max_length = int(1e30)
        self._hf = hf
        vocabulary = hf.get_vocab()
        if not vocabulary:
            raise UserError(f"the tokenizer in {path} has an empty vocabulary; is tokenizer.json missing?")
        self.vocab_size: int = max(len(hf), max(vocabulary.values()) + 1)
        self.bos_id: int | None = hf.bos_token_id
        self.eos_id: int | None = hf.eos_token_id
        self.adds_bos = self.bos_id is not None and hf("a")["input_ids"][:1] == [self.bos_id]
        added = [token.content for token in hf.added_tokens_decoder.values()]
        self.special_tokens = tuple(sorted({token for token in [*added, *hf.all_special_tokens] if _is_visible(token)}))
        self.fingerprint = _sha256(_definition(hf))
        self.ids_fingerprint = _sha256(_ids_definition(hf))
        source = template if template is not None else _own_template(hf)
        tokens = {key: value for key, value in hf.special_tokens_map.items() if isinstance(value, str)}
        self.template, self.template_fingerprint = _template(source, tokens, template_name, kwargs)

    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens."""
        return dict(self._hf.get_vocab())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without added BOS or EOS."""
        result: list[int] = self._hf.encode(text, add_special_tokens=False)
        return result

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids."""
        result: str = self._hf.decode(
            [int(i) for i in ids], skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return result


class SentencePieceTokenizer:
    """A raw SentencePiece model. Attributes as in `Tokenizer`.

    Control pieces such as ``<s>`` and ``</s>`` in a text become their ids, and the text between two of them is
    encoded as SentencePiece encodes a text of its own. User-defined pieces are SentencePiece's own business.
    """

    def __init__(
        self, path: str, template: str | None, template_name: str, kwargs: Mapping[str, Any] = NO_VARIABLES
    ) -> None:
        import sentencepiece
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        protobuf: Any = sentencepiece_model_pb2

        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise read_error(path, error) from error
        try:
            definition = protobuf.ModelProto.FromString(model)
            pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, DecodeError) as error:
            raise UserError(f"cannot open {path} as a SentencePiece model: {one_line(error)}") from error
        self._pieces = pieces
        self.vocab_size: int = pieces.get_piece_size()
        self.bos_id = pieces.bos_id() if pieces.bos_id() >= 0 else None
        self.eos_id = pieces.eos_id() if pieces.eos_id() >= 0 else None
        self.adds_bos = self.bos_id is not None
        kinds = protobuf.ModelProto.SentencePiece
        self._control_ids: dict[str, int] = {
            entry.piece: index for index, entry in enumerate(definition.pieces) if entry.type == kinds.CONTROL
        }
        self._controls = {index: piece for piece, index in self._control_ids.items()}
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        user_defined = [entry.piece for entry in definition.pieces if entry.type == kinds.USER_DEFINED]
        self.special_tokens = tuple(sorted({*self._control_ids, *filter(_is_visible, user_defined)}))
        self.fingerprint = self.ids_fingerprint = hashlib.sha256(model).hexdigest()
        source = DEFAULT_TEMPLATE if template is None else template
        tokens = {
            "bos_token": "" if self.bos_id is None else pieces.id_to_piece(self.bos_id),
            "eos_token": "" if self.eos_id is None else pieces.id_to_piece(self.eos_id),
        }
        self.template, self.template_fingerprint = _template(source, tokens, template_name, kwargs)

    def vocabulary(self) -> dict[str, int]:
        """Ids of all pieces."""
        return {self._pieces.id_to_piece(index): index for index in range(self.vocab_size)}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without added BOS or EOS."""
        ids: list[int] = []
        for part in self._split.split(text) if self._split else [text]:
            if part in self._control_ids:
                ids.append(self._control_ids[part])
            elif part:
                ids.extend(self._pieces.encode(part))
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids; around control pieces that are written out as SentencePiece decodes a text of its own."""
        if not special:
            result: str = self._pieces.decode([int(i) for i in ids])
            return result
        parts = []
        for is_control, run in groupby((int(i) for i in ids), self._controls.__contains__):
            same = list(run)
            parts.append("".join(self._controls[i] for i in same) if is_control else self._pieces.decode(same))
        return "".join(parts)


def _is_visible(token: str) -> bool:
    # Gemma declares runs of white space as tokens of their own; they end no turn.
    return bool(token.strip("\u2581 \t\r\n"))


def _template(
    source: str | None, tokens: Mapping[str, str], name: str, kwargs: Mapping[str, Any]
) -> tuple[ChatTemplate | None, str]:
    """A chat template, and the fingerprint of what it writes: without variables that of the source alone."""
    if source is None:
        if kwargs:
            raise UserError(f"template_kwargs are given and the tokenizer {name} has no chat template")
        return None, NO_TEMPLATE
    given = json.dumps(kwargs, sort_keys=True) if kwargs else ""
    return ChatTemplate(source, tokens, name, kwargs), _sha256(source + given)


def _own_template(hf: Any) -> str | None:
    if not hf.chat_template:
        return None
    try:
        result: str | None = hf.get_chat_template()
        return result
    except ValueError as error:  # several named templates and none called default
        raise UserError(
            f"the tokenizer has several chat templates and no default: give one ({TEMPLATE_KEY}): {error}"
        ) from error


def _backend_definition(hf: Any) -> dict[str, Any]:
    """The tokenizer as a mapping; padding and truncation, which any call may leave in it, do not matter."""
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:
        added = {index: token.content for index, token in hf.added_tokens_decoder.items()}
        return {"vocabulary": hf.get_vocab(), "added": added, "class": type(hf).__name__}
    definition = json.loads(backend.to_str())
    definition.pop("padding", None)
    definition.pop("truncation", None)
    result: dict[str, Any] = definition
    return result


def _definition(hf: Any) -> str:
    """All that determines ids, with BOS and EOS, as one string."""
    return json.dumps({**_backend_definition(hf), "special": [hf.bos_token_id, hf.eos_token_id]}, sort_keys=True)


def _ids_definition(hf: Any) -> str:
    """Vocabulary, merges, normalisation and added tokens as one string: what the ids of a text follow from."""
    definition = _backend_definition(hf)
    for key in ("version", "post_processor", "decoder"):
        definition.pop(key, None)
    # Whether a token is special matters to decoding, and to encoding only through ``normalized``.
    definition["added_tokens"] = [
        {key: value for key, value in token.items() if key != "special"} for token in definition.get("added_tokens", [])
    ]
    return json.dumps(definition, sort_keys=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
