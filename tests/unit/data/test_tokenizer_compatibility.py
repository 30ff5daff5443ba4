"""Tokenizers that give texts the same ids, however their files differ, and those that do not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo.data.dataset import open_or_preprocess
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.tokenizer_compatibility import LackingTokens, compare_tokenizers
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Definition = dict[str, Any]
Edit = Callable[[Definition, Definition], object]


@pytest.fixture
def changed(hf_directory: str, tmp_path: Path) -> Callable[[Edit, str], str]:
    """Writes the fixture's tokenizer with tokenizer.json and tokenizer_config.json edited; its directory."""

    def change(edit: Edit, name: str = "changed") -> str:
        shutil.copytree(hf_directory, tmp_path / name)
        files = [tmp_path / name / file for file in ("tokenizer.json", "tokenizer_config.json")]
        definition, config = (json.loads(file.read_text()) for file in files)
        edit(definition, config)
        for file, content in zip(files, (definition, config), strict=True):
            file.write_text(json.dumps(content))
        return str(tmp_path / name)

    return change


def compare(theirs: str, ours: str) -> LackingTokens:
    return compare_tokenizers("model.guide", load_tokenizer(theirs), "the policy", load_tokenizer(ours))


def bos_by_post_processor(definition: Definition, config: Definition) -> None:
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }


def other_special_flag(definition: Definition, config: Definition) -> None:
    next(t for t in definition["added_tokens"] if t["content"] == "<|im_end|>")["special"] = False


def pad_behind(definition: Definition, config: Definition) -> None:
    last = max(definition["model"]["vocab"].values())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition["added_tokens"].append({"id": last + 1, "content": "<pad>", **flags})
    config["pad_token"] = "<pad>"


def merges_as_strings(definition: Definition, config: Definition) -> None:
    definition["model"]["merges"] = [" ".join(pair) for pair in definition["model"]["merges"]]


def other_decoder(definition: Definition, config: Definition) -> None:
    definition["decoder"] = {"type": "Sequence", "decoders": [definition["decoder"], {"type": "Fuse"}]}


def prefix_space_of_the_post_processor(definition: Definition, config: Definition) -> None:
    definition["post_processor"] = {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": False
    }  # fmt: skip


def division_into_words_written_otherwise(definition: Definition, config: Definition) -> None:
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [definition["pre_tokenizer"]]}


HARMLESS: dict[str, Edit] = {
    "BOS by a post-processor": bos_by_post_processor,
    "EOS": lambda _, config: config.update(eos_token="<|im_end|>"),
    "decoder": other_decoder,
    "decoder options": lambda d, _: d["decoder"].update(trim_offsets=not d["decoder"].get("trim_offsets", True)),
    "special flag": other_special_flag,
    "padding side": lambda _, config: config.update(padding_side="left", model_max_length=77),
    "truncation": lambda d, _: d.update(
        truncation={"direction": "Left", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    ),
    "class name": lambda _, config: config.update(tokenizer_class="TokenizersBackend"),
    "merges": merges_as_strings,
    "post-processor options": prefix_space_of_the_post_processor,
    "pre-tokenizer": division_into_words_written_otherwise,
    "clean-up": lambda _, config: config.update(clean_up_tokenization_spaces=True),
    "padding token behind the vocabulary": pad_behind,
}


@pytest.mark.parametrize("what", HARMLESS)
def test_same_ids_from_other_files(what: str, changed: Any, hf_directory: str) -> None:
    other = changed(HARMLESS[what])
    assert compare(other, hf_directory).tokens == {}
    back = compare(hf_directory, other).tokens
    assert back == ({load_tokenizer(other).vocab_size - 1: "<pad>"} if what.startswith("padding token") else {})


def swap(definition: Definition, config: Definition) -> None:
    vocabulary = definition["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]


def renamed(old: str, new: str) -> Edit:
    def edit(definition: Definition, config: Definition) -> None:
        vocabulary = definition["model"]["vocab"]
        vocabulary[new] = vocabulary.pop(old)
        next(token for token in definition["added_tokens"] if token["content"] == old)["content"] = new

    return edit


def lower_case(definition: Definition, config: Definition) -> None:
    definition["normalizer"] = {"type": "Lowercase"}


def without_last_merge(definition: Definition, config: Definition) -> None:
    definition["model"]["merges"].pop()


def spaces_eaten(definition: Definition, config: Definition) -> None:
    next(t for t in definition["added_tokens"] if t["content"] == "<|im_end|>").update(lstrip=True, rstrip=True)


OTHER: dict[str, tuple[Edit, str]] = {
    "ids": (swap, r"'e' is \d+ there and \d+ here"),
    "normaliser": (lower_case, r"after '' comes 't' \(\d+\) there and 'The' \(\d+\) here"),
    "merges": (without_last_merge, r"comes .* there and .* here"),
    "white space around special tokens": (spaces_eaten, r"comes .* there and .* here"),
}


@pytest.mark.parametrize("what", OTHER)
def test_other_ids_name_the_first_token(what: str, changed: Any, hf_directory: str) -> None:
    edit, message = OTHER[what]
    with pytest.raises(UserError, match=f"model.guide has another tokenizer than the policy: .*{message}"):
        compare(changed(edit), hf_directory)


def test_another_order_of_merges(changed: Any, hf_directory: str) -> None:
    def edit(definition: Definition, config: Definition) -> None:
        definition["model"]["merges"].reverse()

    with pytest.raises(UserError, match="another tokenizer"):
        compare(changed(edit), hf_directory)


def test_a_token_of_the_dialogue_that_a_guide_lacks(changed: Any) -> None:
    """The guide would read each header as text of another token, or as nothing it knows."""
    ours = changed(lambda _, config: config.update(chat_template=CHATML), "ours")
    theirs = changed(renamed("<|im_start|>", "<|reserved_0|>"), "theirs")
    with pytest.raises(UserError, match=r"comes '<' \(\d+\) there and '<\|im_start\|>' \(2\) here"):
        compare(theirs, ours)


def test_a_token_that_only_one_has_counts_where_data_holds_it(
    changed: Any, hf_directory: str, write_jsonl: Any, tmp_path: Path
) -> None:
    lacking = compare(changed(renamed("<|eot_id|>", "<|reserved_0|>")), hf_directory)
    assert list(lacking.tokens.values()) == ["<|eot_id|>"]
    records = [
        {"prompt": "one", "chosen": " is", "rejected": " was"},
        {"prompt": "two", "chosen": " <|eot_id|>", "rejected": " b"},
    ]
    options, cache = PreprocessOptions(tokenizer=hf_directory), str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"pairs.jsonl:2: has the token '<\|eot_id\|>' \(6\), .* model.guide lacks"):
        lacking.check(open_or_preprocess(write_jsonl(records), options, cache))
    lacking.check(open_or_preprocess(write_jsonl(records[:1], "one.jsonl"), options, cache))


def test_sentencepiece_model_and_the_same_in_other_bytes(sp_model: str, tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    protobuf: Any = sentencepiece_model_pb2
    model = protobuf.ModelProto.FromString(Path(sp_model).read_bytes())
    model.trainer_spec.input_sentence_size = 4711
    (tmp_path / "same.model").write_bytes(model.SerializeToString())
    assert compare(str(tmp_path / "same.model"), sp_model).tokens == {}
    a, b = (next(piece for piece in model.pieces if piece.piece == text) for text in ("a", "e"))
    a.piece, b.piece = b.piece, a.piece
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="another tokenizer"):
        compare(str(tmp_path / "other.model"), sp_model)


def test_a_dataset_is_good_for_whatever_gives_its_ids(
    changed: Any, hf_directory: str, write_jsonl: Any, tmp_path: Path
) -> None:
    """A tokenizer saved anew by another library version needs no second preprocessing; another EOS does."""
    raw = write_jsonl([{"prompt": "one", "chosen": " is", "rejected": " was"}])
    made = open_or_preprocess(raw, PreprocessOptions(tokenizer=hf_directory), str(tmp_path / "cache"))
    same = PreprocessOptions(tokenizer=changed(other_decoder, "same"))
    assert load_tokenizer(same.tokenizer).fingerprint != load_tokenizer(hf_directory).fingerprint
    again = open_or_preprocess(made.prefix, same, str(tmp_path / "cache"))
    assert again.ids_fingerprint == load_tokenizer(same.tokenizer).ids_fingerprint
    for name in ("EOS", "BOS by a post-processor"):
        other = PreprocessOptions(tokenizer=changed(HARMLESS[name], name.replace(" ", "")))
        with pytest.raises(UserError, match="made with another tokenizer"):
            open_or_preprocess(made.prefix, other, str(tmp_path / "cache"))
