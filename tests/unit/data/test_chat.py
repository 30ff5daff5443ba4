"""The border between prompt and response, per family of templates, against literal text."""

import pytest

from megatron_tgdpo.data.chat import ChatTemplate
from megatron_tgdpo.data.encode import encode_responses
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import Example
from megatron_tgdpo.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from megatron_tgdpo.errors import UserError

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + "
    "' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Ends every conversation that asks for no answer with EOS, as Phi-3 does.
PHI3 = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Opens a block in the generation prompt that a finished turn does not have, as R1 distillations do.
THINK_PROMPT = CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>\n' }}")
# Writes a block before a finished answer that the generation prompt does not have, as Qwen3 does.
THINK_ANSWER = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' and "
    "loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ message['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION_TAG = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

PROMPT = (Message("user", "Name a colour."), Message("assistant", "Blue."), Message("user", "Another?"))
CASES = {
    "chatml": (
        CHATML,
        "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n"
        "<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n",
        "Green.<|im_end|>",
    ),
    "llama3": (
        LLAMA3,
        "<s><|start_header_id|>user<|end_header_id|>\n\nName a colour.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBlue.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnother?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Green.<|eot_id|>",
    ),
    "gemma": (
        GEMMA,
        "<s><start_of_turn>user\nName a colour.<end_of_turn>\n<start_of_turn>model\nBlue.<end_of_turn>\n"
        "<start_of_turn>user\nAnother?<end_of_turn>\n<start_of_turn>model\n",
        "Green.<end_of_turn>",
    ),
    "llama2": (LLAMA2, "<s>[INST] Name a colour. [/INST] Blue. </s><s>[INST] Another? [/INST]", " Green. </s>"),
    "phi3": (
        PHI3,
        "<|user|>\nName a colour.<|end|>\n<|assistant|>\nBlue.<|end|>\n<|user|>\nAnother?<|end|>\n<|assistant|>\n",
        "Green.<|end|>",
    ),
    "think_prompt": (
        THINK_PROMPT,
        "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n"
        "<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "Green.<|im_end|>",
    ),
    "think_answer": (
        THINK_ANSWER,
        "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n"
        "<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nGreen.<|im_end|>",
    ),
    "generation_tag": (
        GENERATION_TAG,
        "<|user|>Name a colour.<|assistant|>Blue.</s><|user|>Another?<|assistant|>",
        "Green.</s>",
    ),
}


def with_template(directory: str, source: str, tmp_path) -> HuggingFaceTokenizer:
    path = tmp_path / "template.jinja"
    path.write_text(source)
    tokenizer = load_tokenizer(directory, str(path))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


def text(tokenizer: HuggingFaceTokenizer, ids: list[int]) -> str:
    return tokenizer._hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", CASES)
def test_prompt_ends_with_the_header_and_response_with_its_end_of_turn(hf_directory, tmp_path, name):
    source, prompt_text, chosen_text = CASES[name]
    tokenizer = with_template(hf_directory, source, tmp_path)
    prompt, chosen, rejected = encode_responses(Example(PROMPT, "Green.", "No!"), tokenizer, "f:1")
    assert text(tokenizer, prompt) == prompt_text
    assert text(tokenizer, chosen) == chosen_text
    assert text(tokenizer, rejected) == chosen_text.replace("Green.", "No!")
    end = tokenizer._hf.convert_tokens_to_ids(chosen_text[chosen_text.rindex("<") :])
    assert chosen[-1] == rejected[-1] == end
    assert prompt.count(0) == prompt_text.count("<s>")


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "llama2", "think_answer"])
def test_hugging_face_writes_the_same_prompt(hf_directory, tmp_path, name):
    """Our sandbox against transformers' own rendering of the same template."""
    tokenizer = with_template(hf_directory, CASES[name][0], tmp_path)
    tokenizer._hf.chat_template = CASES[name][0]
    turns = [{"role": message.role, "content": message.content} for message in PROMPT]
    expected = tokenizer._hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt, _, _ = encode_responses(Example(PROMPT, "Green.", "No!"), tokenizer, "f:1")
    assert text(tokenizer, prompt) == expected


def test_white_space_of_the_answer_itself_is_kept(hf_directory, tmp_path):
    tokenizer = with_template(hf_directory, CHATML, tmp_path)
    _, chosen, rejected = encode_responses(Example(PROMPT, "\n Green. \n", "No!"), tokenizer, "f:1")
    assert text(tokenizer, chosen) == "\n Green. \n<|im_end|>"
    assert text(tokenizer, rejected) == "No!<|im_end|>"


def test_answer_that_repeats_the_template_s_own_text(hf_directory, tmp_path):
    """The border is found by position, not by searching for the answer's text."""
    tokenizer = with_template(hf_directory, CHATML, tmp_path)
    for answer in ("a", "assistant\n", "user", "im_end", "<|im_end|>\n", "Another?"):
        _, chosen, _ = encode_responses(Example(PROMPT, answer, "No!"), tokenizer, "f:1")
        assert text(tokenizer, chosen) == answer + "<|im_end|>"


def test_response_of_a_spaced_tokenizer_is_encoded_in_its_place(llama_like_directory, tmp_path):
    """Alone, ' Blue. </s>' would begin with two spaces: the ids must be those of the whole conversation."""
    tokenizer = with_template(llama_like_directory, LLAMA2, tmp_path)
    prompt, chosen, _ = encode_responses(
        Example((Message("user", "Name a colour."),), "Blue.", "No."), tokenizer, "f:1"
    )
    whole = tokenizer._hf.encode("<s>[INST] Name a colour. [/INST] Blue. </s>", add_special_tokens=False)
    assert prompt + chosen == whole
    assert chosen != tokenizer._hf.encode(" Blue. </s>", add_special_tokens=False)
    assert tokenizer._hf.convert_ids_to_tokens(chosen)[0].startswith("\u2581B")


def test_sides_share_the_prompt_when_a_token_would_span_the_border(hf_directory):
    """Plain text: 'capi' + 'tal' would merge into one token; prompt ids must not depend on the answer."""
    tokenizer = load_tokenizer(hf_directory)
    prompt, chosen, rejected = encode_responses(Example("The capi", "tal of France", "?"), tokenizer, "f:1")
    assert tokenizer.encode("The capital of France")[: len(prompt)] != prompt
    assert prompt == tokenizer.encode("The capi")
    assert chosen == [*tokenizer.encode("tal of France"), tokenizer.eos_id]
    assert rejected == [*tokenizer.encode("?"), tokenizer.eos_id]


def test_template_error_names_the_record(hf_directory, tmp_path):
    tokenizer = with_template(hf_directory, GEMMA, tmp_path)
    example = Example((Message("system", "Be brief."), *PROMPT), "Green.", "No!")
    with pytest.raises(UserError, match=r"^f:9: .*System role not supported"):
        encode_responses(example, tokenizer, "f:9")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | length }}" + CHATML,  # the prompt is written differently once answered
        "{{ messages[-1]['content'] | length }}" + CHATML,  # the prompt depends on the answer
    ],
)
def test_template_that_is_not_prefix_stable(hf_directory, tmp_path, source):
    with pytest.raises(UserError, match=r"^f:3: .*is not prefix-stable"):
        encode_responses(Example(PROMPT, "Green.", "No!"), with_template(hf_directory, source, tmp_path), "f:3")


def test_template_that_loses_the_answer(hf_directory, tmp_path):
    tokenizer = with_template(hf_directory, "{{ messages[0]['content'] }}", tmp_path)
    with pytest.raises(UserError, match="writes the answer 0 times"):
        encode_responses(Example(PROMPT, "Green.", "No!"), tokenizer, "f:3")


def test_template_that_does_not_compile(hf_directory, tmp_path):
    with pytest.raises(UserError, match=r"template\.jinja:2: the chat template does not compile"):
        with_template(hf_directory, "{{ bos_token }}\n{% for %}", tmp_path)


def test_messages_without_a_template(hf_directory):
    with pytest.raises(UserError, match=r"^f:3: messages need a chat template"):
        encode_responses(Example(PROMPT, "Green.", "No!"), load_tokenizer(hf_directory), "f:3")


def test_date_does_not_depend_on_the_day():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, "t")
    assert template.render([], "f:1") == "26 Jul 2024"


def test_template_cannot_reach_python(hf_directory):
    template = ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", {}, "t")
    with pytest.raises(UserError, match="unsafe"):
        template.render([], "f:1")
