"""All that messages and records say reaches the template, and what is trained on, or they are refused by line."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo.batching.collate import collate
from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.data import sandbox
from megatron_tgdpo.data.chat import ChatTemplate
from megatron_tgdpo.data.dataset import PreferenceDataset, open_or_preprocess
from megatron_tgdpo.data.encode import encode_example, encode_prompt, encode_responses
from megatron_tgdpo.data.example import Example, as_keys
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import detect_layout, parse_prompt, parse_record
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.preprocess import preprocess
from megatron_tgdpo.data.tokenizers import HuggingFaceTokenizer
from megatron_tgdpo.data.truncation import DroppedPair
from megatron_tgdpo.errors import UserError
from tests.unit.data.test_chat import CHATML, with_template

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}" + PLAIN.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}",
)
REASONING = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}",
)
# As DeepSeek-R1-Distill's: it opens a block to be answered, and drops the reasoning of every answer.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}"
    "<|assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# As Qwen3's: an empty block before an answer without one, and in the prompt where thinking is off.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last and "
    "'<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "1+2?"}
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def texts(record: dict[str, Any], tokenizer: HuggingFaceTokenizer) -> tuple[str, ...]:
    """Prompt, chosen and rejected as text, with what is not trained on in double brackets."""
    example = parse_record(record, detect_layout(record, "f:1"), "f:1")
    shown = []
    for ids in encode_responses(example, tokenizer, "f:1"):
        text, run = "", []
        for token, following in zip(ids, [*ids[1:], None], strict=True):
            run.append(max(token, ~token))
            if following is None or (following < 0) != (token < 0):
                part = tokenizer.decode(run, special=True)
                text += f"[[{part}]]" if token < 0 else part
                run = []
        shown.append(text)
    return tuple(shown)


def test_tool_calls_and_tools_reach_the_template(hf_directory: str, tmp_path: Path) -> None:
    tokenizer = with_template(hf_directory, TOOLS, tmp_path)
    record = {
        "prompt": [USER, said("", tool_calls=[CALL]), {"role": "tool", "content": "3", "tool_call_id": "c1"}],
        "tools": json.dumps([{"type": "function", "function": {"name": "add"}}]),
        "chosen": [said("It is 3.")],
        "rejected": [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
    }
    prompt, chosen, rejected = texts(record, tokenizer)
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": "two"}}</tool_call>'
    assert prompt == (
        '<|im_start|>system\nTools: [{"type": "function", "function": {"name": "add"}}]<|im_end|>\n'
        f"<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n{call}<|im_end|>\n"
        "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (chosen, rejected) == ("It is 3.<|im_end|>", f"{call}<|im_end|>")
    # What generation makes of the record's prompt, also after a way through a file.
    example = parse_record(record, "trl_conversational", "f:1")
    ids = encode_prompt(parse_prompt(record, "f:1"), tokenizer, "f:1", example.variables)
    assert tokenizer.decode(ids, special=True) == prompt
    assert as_keys(example.variables) == {"tools": json.loads(record["tools"])}


def test_results_of_tools_in_a_response_are_not_trained_on(hf_directory: str, tmp_path: Path) -> None:
    tokenizer = with_template(hf_directory, TOOLS, tmp_path)
    record = {
        "messages": [USER],
        "chosen": [said("", tool_calls=[CALL]), {"role": "tool", "content": "3"}, said("It is 3.")],
        "rejected": said("It is 4."),
    }
    record["rejected"] = [record["rejected"]]
    _, chosen, rejected = texts(record, tokenizer)
    assert chosen == (
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": "two"}}</tool_call><|im_end|>'
        "[[\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n]]It is 3.<|im_end|>"
    )
    assert rejected == "It is 4.<|im_end|>"


def test_calls_that_are_written_as_text(hf_directory: str, tmp_path: Path) -> None:
    """ShareGPT's function_call turns, and arguments as JSON text for a template that would quote them again."""
    tokenizer = with_template(hf_directory, TOOLS, tmp_path)
    turns = [{"from": "human", "value": "1+2?"}]
    function = {"name": "add", "arguments": {"a": 1}}
    call = {"from": "function_call", "value": json.dumps(function)}
    record = {"conversations": turns, "chosen": call, "rejected": {"from": "gpt", "value": "No."}}
    expected = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'
    assert texts(record, tokenizer)[1] == expected
    quoted = {"type": "function", "function": {**function, "arguments": '{"a": 1}'}}
    record = {"prompt": [USER], "chosen": [said("", tool_calls=[quoted])], "rejected": [said("No.")]}
    assert texts(record, tokenizer)[1] == expected
    concatenating = PLAIN.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '!' + c.function.name + ' ' + "
        "c.function.arguments }}{% endfor %}"
    )  # fmt: skip
    record["chosen"] = [said("", tool_calls=[{"type": "function", "function": function}])]
    assert texts(record, with_template(hf_directory, concatenating, tmp_path))[1] == '!add {"a": 1}<|im_end|>'


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_the_template(hf_directory: str, tmp_path: Path, key: str) -> None:
    tokenizer = with_template(hf_directory, REASONING, tmp_path)
    sides = {"chosen": [said("4", **{key: "Two and two."})], "rejected": [said("5", **{key: "guess"})]}
    _, chosen, rejected = texts({"prompt": [USER], **sides}, tokenizer)
    assert chosen == "<think>\nTwo and two.\n</think>\n\n4<|im_end|>"
    assert rejected == "<think>\nguess\n</think>\n\n5<|im_end|>"


@pytest.mark.parametrize(
    ("template", "change", "message"),
    [
        (CHATML, {"chosen": [said("4", reasoning_content="why")]}, "does not read 'reasoning_content' of a message"),
        (CHATML, {"chosen": [said("4", tool_calls=[CALL])]}, "does not read 'tool_calls' of a message of assistant"),
        (CHATML, {"prompt": [{**USER, "name": "Bob"}]}, "does not read 'name' of a message of user"),
        (CHATML, {"prompt": [{**USER, "weight": 0.5}]}, "does not read 'weight' of a message of user"),
        (CHATML, {"tools": [{"name": "add"}]}, "does not read 'tools': remove it from the data, or"),
        # It reads reasoning, but not that of an answer that it ends with.
        (
            CHATML + "{# m.reasoning_content #}",
            {"chosen": [said("4", reasoning_content="why")]},
            "leaves out or rewrites 'reasoning_content' of the answer",
        ),
        (R1, {"chosen": [said("<think>\nTwo and two.\n</think>\n\n4")]}, "leaves out or rewrites text of the answer"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            {"prompt": [{"role": "system", "content": "Be brief."}, USER]},
            "leaves out or rewrites the system's text",
        ),
        (MARKED.replace("== 'assistant'", "== 'nobody'"), {}, "marks no part of the response with {% generation %}"),
    ],
)
def test_what_the_template_would_lose_is_refused(
    hf_directory: str, tmp_path: Path, template: str, change: dict[str, Any], message: str
) -> None:
    record = {"prompt": [USER], "chosen": [said("4")], "rejected": [said("5")]} | change
    with pytest.raises(UserError, match=f"^f:1: the chat template of .*{message}"):
        texts(record, with_template(hf_directory, template, tmp_path))


def test_keys_that_say_nothing_may_be_lost(hf_directory: str, tmp_path: Path) -> None:
    """Labels, what is null or empty, as Parquet gives it, and all keys where a template writes whole messages."""
    tokenizer = with_template(hf_directory, CHATML, tmp_path)
    record = {
        "prompt": [{**USER, "id": 7, "name": None, "tool_calls": []}],
        "chosen": [said("4", reasoning_content=None, tool_calls=None)],
        "rejected": [said("5")],
        "tools": None,
    }
    assert texts(record, tokenizer)[1] == "4<|im_end|>"
    whole = with_template(hf_directory, "{{ messages | tojson }}", tmp_path)
    record["prompt"] = [{**USER, "mood": "curious"}]
    assert '"mood": "curious"' in texts(record, whole)[0]


def test_the_prompt_is_what_inference_begins_with(hf_directory: str, tmp_path: Path) -> None:
    """A generation prompt that opens a block is part of the prompt, however finished answers are written."""
    record = {"prompt": [USER], "chosen": [said("4")], "rejected": [said("5")]}
    tokenizer = with_template(hf_directory, R1, tmp_path)
    prompt, chosen, rejected = texts(record, tokenizer)
    assert (prompt, chosen, rejected) == ("<s><|user|>1+2?<|assistant|><think>\n", "4</s>", "5</s>")
    assert tokenizer.decode(encode_prompt((Message("user", "1+2?"),), tokenizer, "f:1"), special=True) == prompt
    # A template that keeps what the answer opens itself, exactly or not: it is opened once.
    keeping = with_template(hf_directory, R1.replace(".split('</think>')[-1]", ""), tmp_path)
    for opening in ("<think>\n", "<think>", "\n<think>\n"):
        record["chosen"] = [said(f"{opening}why\n</think>\n\n4")]
        prompt, chosen, rejected = texts(record, keeping)
        assert prompt == "<s><|user|>1+2?<|assistant|><think>\n"
        assert (chosen.lstrip("\n"), rejected) == ("why\n</think>\n\n4</s>", "5</s>")


def test_template_kwargs_reach_the_template(hf_directory: str, tmp_path: Path, write_jsonl: Any) -> None:
    template = tmp_path / "qwen3.jinja"
    template.write_text(QWEN3)
    record = {"prompt": [USER], "chosen": [said("4")], "rejected": [said("5")]}
    source = write_jsonl([record])
    options = {
        name: PreprocessOptions(hf_directory, str(template), template_kwargs=kwargs)
        for name, kwargs in (("default", {}), ("off", {"enable_thinking": False}), ("on", {"enable_thinking": True}))
    }
    made = {name: open_or_preprocess(source, each, str(tmp_path / "cache")) for name, each in options.items()}
    tokenizer = with_template(hf_directory, QWEN3, tmp_path)
    block = "<think>\n\n</think>\n\n"
    for name, opened in (("default", ""), ("off", block), ("on", "")):
        pair = made[name][0]
        prompt, chosen = (tokenizer.decode(ids.tolist(), special=True) for ids in (pair.prompt, pair.chosen))
        assert prompt == f"<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n{opened}"
        assert opened + chosen == f"{block}4<|im_end|>"
    fingerprints = {data.manifest["tokenizer"]["template_fingerprint"] for data in made.values()}
    assert len(fingerprints) == 3
    # The default's is the source's alone: datasets made before there were variables are still good.
    assert tokenizer.template_fingerprint == made["default"].manifest["tokenizer"]["template_fingerprint"]
    with pytest.raises(UserError, match="was made with another chat template or template_kwargs"):
        open_or_preprocess(made["off"].prefix, options["default"], str(tmp_path / "cache"))
    with pytest.raises(UserError, match="template_kwargs: 'enable_thinkin' is no variable that the chat template"):
        open_or_preprocess(
            source, PreprocessOptions(hf_directory, str(template), template_kwargs={"enable_thinkin": 1}), str(tmp_path)
        )
    # One record's own.
    record["chat_template_kwargs"] = {"enable_thinking": False}
    assert texts(record, tokenizer)[0].endswith(f"assistant\n{block}")


def test_without_a_generation_prompt_the_header_is_the_prompt_s(hf_directory: str, tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    record = {"prompt": [USER], "chosen": [said("It is 3.")], "rejected": [said("No.")]}
    expected = ("user: 1+2?</s>\nassistant:", " It is 3.</s>", " No.</s>")
    assert texts(record, with_template(hf_directory, source, tmp_path)) == expected
    # One that reads the variable and writes nothing for it.
    reading = source + "{% if add_generation_prompt and messages[-1].role == 'system' %}assistant: {% endif %}"
    assert texts(record, with_template(hf_directory, reading, tmp_path)) == expected


def test_generation_marks_decide_what_is_trained_on(hf_directory: str, tmp_path: Path) -> None:
    tokenizer = with_template(hf_directory, MARKED, tmp_path)
    sides = {"chosen": [said("1"), USER, said("2")], "rejected": [said("5")]}
    _, chosen, rejected = texts({"prompt": [USER], **sides}, tokenizer)
    between = "[[<|im_end|>\n<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n]]"
    assert (chosen, rejected) == (f"1{between}2", "5")
    assert tokenizer.template is not None
    assert "\ue000" not in tokenizer.template.render([Message("assistant", "a")], "f:1")


def test_masked_tokens_from_file_to_row(hf_directory: str, tmp_path: Path, write_jsonl: Any) -> None:
    """What is not trained on is read as context: no target, and no part of the lengths of responses."""
    template = tmp_path / "tools.jinja"
    template.write_text(TOOLS)
    several = [said("One"), USER, said("two.")]
    source = write_jsonl([{"prompt": [USER], "chosen": several, "rejected": [said("No.")]}])
    preprocess([source], str(tmp_path / "d"), PreprocessOptions(hf_directory, str(template)), progress=False)
    dataset = PreferenceDataset(str(tmp_path / "d"))
    dataset.verify()
    tokenizer = with_template(hf_directory, TOOLS, tmp_path)
    pair = dataset[0]
    assert pair.chosen_trained is not None
    assert pair.rejected_trained is None
    whole = tokenizer.decode(pair.chosen.tolist(), special=True)
    assert whole == "One<|im_end|>\n<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\ntwo.<|im_end|>"
    kept = pair.chosen[pair.chosen_trained]
    assert tokenizer.decode(kept.tolist(), special=True) == "One<|im_end|>two.<|im_end|>"
    assert dataset.manifest["untrained_tokens"] == len(pair.chosen) - len(kept)
    assert dataset.trained_lengths.tolist() == [[len(pair.prompt), len(kept), len(pair.rejected)]]
    assert dataset.lengths.tolist() == [[len(pair.prompt), len(pair.chosen), len(pair.rejected)]]
    for shared in (True, False):
        batch = collate([pair], PackFormat(512, shared_prompts=shared))
        assert batch.targets.tolist() == [*kept.tolist(), *pair.rejected.tolist()]
        assert batch.response_lengths.tolist() == [len(kept), len(pair.rejected)]
        row = batch.tokens[0]
        # Each target but the rejected response's first, where the prompt is shared, follows what predicts it.
        following = row[batch.logit_positions + 1].tolist()
        differ = [at for at, (ours, theirs) in enumerate(zip(following, batch.targets.tolist(), strict=True))
                  if ours != theirs]  # fmt: skip
        assert differ == ([len(kept)] if shared else [])


def test_response_cut_down_to_what_is_not_trained_on_is_dropped(hf_directory: str, tmp_path: Path) -> None:
    marked = MARKED.replace("{% generation %}", f"{'Think. ' * 20}{{% generation %}}")
    tokenizer = with_template(hf_directory, marked, tmp_path)
    example = Example((Message("user", "a"),), "b", None)
    pair = encode_example(example, tokenizer, PreprocessOptions("none"), "f:1")
    assert pair.chosen[-2] < 0 <= pair.chosen[-1]
    # The prompt is whole, and the response loses its last token.
    options = PreprocessOptions("none", max_length=len(pair.prompt) + len(pair.chosen) - 1)
    with pytest.raises(DroppedPair, match=r"^empty_response$"):
        encode_example(example, tokenizer, options, "f:1")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "it does not end: more than",
        ),
        ("{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(40) }}", "it does not end"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 1 // (messages | length - 1) }}", "ZeroDivisionError"),
        ("{{ 10 ** (10 ** 10) }}", r"the result of '\*\*' would be too large"),
        ("{{ 'a' * 10 ** 9 }}", r"the result of '\*' would be too large"),
        ("{{ messages[0].content.nothing() }}", "has no attribute 'nothing'"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{{ raise_exception('two\nlines') }}", "two lines"),
    ],
)
def test_hostile_templates_end_with_one_line(source: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^f:1: the chat template of t refuses this record: .*{message}") as error:
        ChatTemplate(source, {}, "t").render([Message("user", "a")], "f:1")
    assert "\n" not in str(error.value)


def refused(source: str) -> str:
    with pytest.raises(UserError) as error:
        ChatTemplate(source, {}, "t").render([Message("user", "a")], "f:1")
    return str(error.value)


# Without the limits these end all the same, so that it shows.
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(1000) %}{% endfor %}",
        "{% for i in range(40) %}{% for j in range(40) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(9) }}",
        "{% macro f() %}{{ caller() }}{% endmacro %}" + "{% call f() %}{% endcall %}" * 600,
    ],
)
def test_loops_and_macros_end_by_turns_and_by_time(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [Message("user", "a")]
    assert ChatTemplate(source, {}, "t").render(talk, "f:1") == ""
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "MAX_TURNS", 900)
        assert "it does not end" in refused(source)
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "MAX_SECONDS", -1.0)
        assert "it does not end" in refused(source)
    # Each rendering has its own turns and time.
    template = ChatTemplate(source, {}, "t")
    monkeypatch.setattr(sandbox, "MAX_TURNS", 2000)
    assert [template.render(talk, "f:1") for _ in range(5)] == [""] * 5


@pytest.mark.parametrize(
    "operation", ["'a' * 101", "101 * 'a'", "[1] * 101", "(1, 2) * 51", "2 ** 101", "2 ** 45 * 2 ** 45 * 2 ** 45"]
)
def test_products_have_a_size(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"{{% set x = {operation} %}}done"
    assert ChatTemplate(source, {}, "t").render([Message("user", "a")], "f:1") == "done"
    monkeypatch.setattr(sandbox, "MAX_SIZE", 100)
    assert "would be too large" in refused(source)
    smaller = "{% set x = ('a' * 100, [1] * 99, 2 ** 49, 2 ** 40 * 2 ** 40) %}done"
    assert ChatTemplate(smaller, {}, "t").render([Message("user", "a")], "f:1") == "done"


@pytest.mark.parametrize(
    "source", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if a %}" * 200 + "{% endif %}" * 200]
)
def test_templates_too_deep_to_compile(source: str) -> None:
    with pytest.raises(UserError, match=r"^t:.* does not compile: ") as error:
        ChatTemplate(source, {}, "t")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        "tojson(True)",
        "tojson(False, 2)",
        "tojson(ensure_ascii=True, indent=1)",
        "tojson(False, None, (',', ':'), True)",
    ],
)
def test_tojson_is_that_of_transformers(hf_directory: str, tmp_path: Path, call: str) -> None:
    source = "{{ messages | " + call + " }}"
    tokenizer = with_template(hf_directory, source, tmp_path)
    assert tokenizer.template is not None
    ours = tokenizer.template.render([Message("user", "é <b>")], "f:1")
    turns = [{"role": "user", "content": "é <b>"}]
    assert ours == tokenizer._hf.apply_chat_template(turns, chat_template=source, tokenize=False)


def test_loops_count_anew_in_each_record() -> None:
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}done", {}, "t")
    assert {template.render([], "f:1") for _ in range(13)} == {"done"}
