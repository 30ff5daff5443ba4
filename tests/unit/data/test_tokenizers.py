import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from megatron_tgdpo.data.encode import encode_prompt, encode_responses
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import Example
from megatron_tgdpo.data.tokenizers import NO_TEMPLATE, load_tokenizer
from megatron_tgdpo.errors import UserError
from tests.tiny_models import make_tokenizer
from tests.unit.data.test_tokenizer_compatibility import bos_by_post_processor
from tgdpo.generation.sampling import make_answer


def test_plain_text_gets_eos_and_a_bos_only_where_it_is_the_default(hf_directory, tmp_path):
    without = load_tokenizer(hf_directory)
    prompt, chosen, _ = encode_responses(Example("The sea", " is wide.", " sleeps."), without, "f:1")
    assert without.bos_id == 0
    assert prompt == without.encode("The sea")
    assert chosen == [*without.encode(" is wide."), without.eos_id]

    adding = tmp_path / "adds_bos"
    shutil.copytree(hf_directory, adding)
    definition = json.loads((adding / "tokenizer.json").read_text())
    bos_by_post_processor(definition, {})
    (adding / "tokenizer.json").write_text(json.dumps(definition))
    with_bos = load_tokenizer(str(adding))
    assert with_bos.adds_bos
    assert encode_responses(Example("The sea", " is wide.", " sleeps."), with_bos, "f:1")[0] == [0, *prompt]
    # One that the text has already is not doubled, nor is an EOS.
    again, ended, _ = encode_responses(Example("<s>The sea", " is wide.</s>", " sleeps."), with_bos, "f:1")
    assert (again, ended) == ([0, *prompt], chosen)


def test_hugging_face_attributes(hf_directory):
    tokenizer = load_tokenizer(hf_directory)
    vocabulary = json.loads((Path(hf_directory) / "tokenizer.json").read_text())["model"]["vocab"]
    assert tokenizer.vocab_size == len(vocabulary)
    assert tokenizer.eos_id == vocabulary["</s>"]
    assert {"<|im_end|>", "<end_of_turn>", "</s>"} <= set(tokenizer.special_tokens)
    assert (tokenizer.template, tokenizer.template_fingerprint) == (None, NO_TEMPLATE)


def test_fingerprint_follows_ids_only(hf_directory, tmp_path):
    original = load_tokenizer(hf_directory)
    hf = PreTrainedTokenizerFast.from_pretrained(hf_directory)
    hf.chat_template = "{{ messages }}"
    hf.save_pretrained(tmp_path / "templated")
    templated = load_tokenizer(str(tmp_path / "templated"))
    assert templated.fingerprint == original.fingerprint
    assert templated.template_fingerprint != original.template_fingerprint

    hf.eos_token = "<|im_end|>"
    hf.save_pretrained(tmp_path / "other_eos")
    assert load_tokenizer(str(tmp_path / "other_eos")).fingerprint != original.fingerprint

    hf = PreTrainedTokenizerFast.from_pretrained(hf_directory)
    # Calling a tokenizer with padding or truncation leaves that in its files, and changes no id.
    hf.backend_tokenizer.enable_padding(pad_id=1, pad_token="</s>")
    hf.backend_tokenizer.enable_truncation(7)
    hf.save_pretrained(tmp_path / "padded")
    saved = json.loads((tmp_path / "padded" / "tokenizer.json").read_text())
    assert (saved["padding"]["strategy"], saved["truncation"]["max_length"]) == ("BatchLongest", 7)
    assert load_tokenizer(str(tmp_path / "padded")).fingerprint == original.fingerprint

    hf.add_tokens(["newtoken"])
    hf.save_pretrained(tmp_path / "grown")
    grown = load_tokenizer(str(tmp_path / "grown"))
    assert grown.fingerprint != original.fingerprint
    assert grown.vocab_size == original.vocab_size + 1

    definition = json.loads((Path(hf_directory) / "tokenizer.json").read_text())
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    shutil.copytree(hf_directory, tmp_path / "merges")
    (tmp_path / "merges" / "tokenizer.json").write_text(json.dumps(definition))
    assert load_tokenizer(str(tmp_path / "merges")).fingerprint != original.fingerprint


def test_sentencepiece_special_pieces_become_ids(sp_model):
    tokenizer = load_tokenizer(sp_model)
    reference = sentencepiece.SentencePieceProcessor(model_file=sp_model)
    ids = tokenizer.encode("<s>The sea</s><s>is wide")
    assert ids == [1, *reference.encode("The sea"), 2, 1, *reference.encode("is wide")]
    start = reference.piece_to_id("<|im_start|>")
    assert tokenizer.encode("a<|im_start|>user").count(start) == 1
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, reference.get_piece_size())
    assert set(tokenizer.special_tokens) == {"<s>", "</s>", "<|im_start|>", "<|im_end|>"}


def test_sentencepiece_default_template(sp_model):
    tokenizer = load_tokenizer(sp_model)
    example = Example((Message("user", "Name a colour."),), "Blue.", "No.")
    prompt, chosen, rejected = encode_responses(example, tokenizer, "f:1")
    reference = sentencepiece.SentencePieceProcessor(model_file=sp_model)
    assert prompt == [1, *reference.encode("Human: Name a colour.\nAssistant:")]
    for answer, ids in (("Blue.", chosen), ("No.", rejected)):
        assert prompt[1:] + ids == [*reference.encode(f"Human: Name a colour.\nAssistant: {answer}"), 2]


def test_sentencepiece_given_template(sp_model, tmp_path):
    path = tmp_path / "chatml.jinja"
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}\n"
    )
    tokenizer = load_tokenizer(sp_model, str(path))
    prompt, chosen, _ = encode_responses(Example((Message("user", "Hi"),), "Blue.", "No."), tokenizer, "f:1")
    reference = sentencepiece.SentencePieceProcessor(model_file=sp_model)
    assert reference.decode(prompt) == "<|im_start|>user:Hi<|im_end|>\n<|im_start|>assistant:"
    assert chosen[-1] == reference.piece_to_id("<|im_end|>")
    assert reference.decode(chosen[:-1]) == "Blue."


def test_prompts_alone_have_the_ids_they_have_in_pairs(hf_directory, llama_like_directory, sp_model, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    for directory in (hf_directory, llama_like_directory, sp_model):
        tokenizer = load_tokenizer(directory, str(template))
        for prompt in ("The sky is", (Message("system", "S"), Message("user", "Name a colour."))):
            pair = encode_responses(Example(prompt, " blue", " green"), tokenizer, "here")
            assert encode_prompt(prompt, tokenizer, "here") == pair[0]


def test_answers_decode_to_the_text_they_are_behind_their_prompt(hf_directory, llama_like_directory, sp_model):
    for directory in (hf_directory, llama_like_directory, sp_model):
        tokenizer = load_tokenizer(directory)
        prompt, response, _ = encode_responses(Example("The sky is", " wide", " deep"), tokenizer, "here")
        answer = make_answer(prompt, [*response, 7, 7], [tokenizer.eos_id], tokenizer)
        assert (answer.text, answer.ids, answer.finished) == (" wide", response, True)
        unfinished = make_answer(prompt, response[:-1], [tokenizer.eos_id], tokenizer)
        assert (unfinished.text, unfinished.finished) == (" wide", False)


def test_sentencepiece_fingerprints(sp_model, tmp_path):
    changed = tmp_path / "other.model"
    changed.write_bytes(Path(sp_model).read_bytes() + b"\x22\x00")
    copied = tmp_path / "copy.model"
    copied.write_bytes(Path(sp_model).read_bytes())
    fingerprint = load_tokenizer(sp_model).fingerprint
    assert load_tokenizer(str(copied)).fingerprint == fingerprint
    assert load_tokenizer(str(changed)).fingerprint != fingerprint


def test_tokenizers_that_do_not_open(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"cannot open .*bad\.model as a SentencePiece model"):
        load_tokenizer(str(tmp_path / "bad.model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the tokenizer in .*empty") as error:
        load_tokenizer(str(tmp_path / "empty"))
    assert "\n" not in str(error.value)


def test_missing_template_file(sp_model, tmp_path):
    with pytest.raises(UserError, match=r"none\.jinja: cannot be read: No such file"):
        load_tokenizer(sp_model, str(tmp_path / "none.jinja"))


def test_a_length_limit_of_the_tokenizer_is_not_asked_for(tmp_path: Path) -> None:
    make_tokenizer(131).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": ""}))
    assert load_tokenizer(str(tmp_path)).encode("w3 w4")
