"""Prompt and response ids beside TRL's, of each layout that TRL's DPOTrainer reads. Skipped where TRL is not installed.

docs/data.md lists the differences, and why they are.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tgdpo.data.encode import encode_responses
from megatron_tgdpo.data.layouts import detect_layout, parse_record
from tests.unit.data.test_chat import LLAMA3, with_template
from tests.unit.data.test_messages import CALL, REASONING, TOOLS, USER, said

# Without what ChatML writes behind an end of turn: TRL trains on that too.
TOOLS_ENDING, REASONING_ENDING = (source.replace("<|im_end|>\n", "<|im_end|>") for source in (TOOLS, REASONING))
ASSISTANT = [said("Blue.")], [said("No.")]
DIALOGUE = [USER, said("a"), USER]
RECORDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (LLAMA3, {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}),
    "plain_implicit": (LLAMA3, {"chosen": "The sky is blue.", "rejected": "The sky is green."}),
    "conversational": (LLAMA3, {"prompt": DIALOGUE, "chosen": ASSISTANT[0], "rejected": ASSISTANT[1]}),
    "implicit": (LLAMA3, {"chosen": [*DIALOGUE, *ASSISTANT[0]], "rejected": [*DIALOGUE, *ASSISTANT[1]]}),
    "tools": (
        TOOLS_ENDING,
        {
            "prompt": [USER],
            "chosen": [said("", tool_calls=[CALL])],
            "rejected": ASSISTANT[1],
            "tools": [{"type": "function", "function": {"name": "add"}}],
        },
    ),
    "reasoning": (
        REASONING_ENDING,
        {"prompt": [USER], "chosen": [said("4", reasoning_content="why")], "rejected": ASSISTANT[1]},
    ),
    # The same ids; TRL trains on the user's turn as well.
    "parting early": (
        LLAMA3,
        {"chosen": [USER, said("a"), USER, said("b")], "rejected": [USER, said("A"), USER, said("B")]},
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_ids_are_those_of_trl(hf_directory: str, tmp_path: Path, name: str) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    template, record = RECORDS[name]
    tokenizer = with_template(hf_directory, template, tmp_path)
    theirs = tokenizer._hf
    theirs.chat_template = template
    trainer = SimpleNamespace(_tokenizer=theirs)
    given = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    data = datasets.Dataset.from_list([record])
    (row,) = trl.DPOTrainer._prepare_dataset(trainer, data, theirs, given, "train")
    example = parse_record(record, detect_layout(record, "f:1"), "f:1")
    ours = [[max(token, ~token) for token in ids] for ids in encode_responses(example, tokenizer, "f:1")]
    assert ours == [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]
