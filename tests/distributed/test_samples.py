"""Answers of the policy during training: those of transformers from the exported checkpoint, under every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.common import make_problem, merged, write_pairs
from tests.processes import run_forked

PROMPTS, TOKENS = 3, 6
LAYOUTS = {
    "one rank": (1, {}),
    "tp2 sp": (2, {"tensor": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline": 2}),
    "cp2": (2, {"context": 2}),
    "dp2": (2, {}),
    "interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("samples")
    problem = make_problem(root)
    write_pairs(root / "validation.jsonl", 5)
    return merged(
        problem,
        data={"validation": str(root / "validation.jsonl")},
        train={"steps": 3},
        eval={"every_steps": 2},
        export={"hf": "end"},
        preflight={"enabled": False},
    )


def train(directory: Path, config: dict[str, Any], *overrides: str, processes: int = 1) -> Path:
    directory.mkdir()
    file = directory / "config.yaml"
    file.write_text(json.dumps(merged(config, output_dir=str(directory / "run"))))
    run_forked("tgdpo.train", [str(file), *overrides], processes=processes)
    return directory / "run"


ASKED = (f"eval.generate.prompts={PROMPTS}", f"eval.generate.max_tokens={TOKENS}")


def samples_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def metrics_of(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in records]


@pytest.mark.parametrize("name", LAYOUTS)
def test_answers_are_those_of_transformers(config: dict[str, Any], tmp_path: Path, name: str) -> None:
    processes, parallel = LAYOUTS[name]
    given = merged(config, parallel={**config["parallel"], **parallel})
    if name == "interleaved":  # with a method that has no frozen models, which such stages do not run
        given = merged(given, model={"guide": None}, loss={"method": "simpo"})
    run = train(tmp_path / "with", given, *ASKED, processes=processes)
    found = samples_of(run)
    assert [(each["step"], each["number"], each["source"].rpartition(":")[2]) for each in found] == [
        (step, number, line) for step in (2, 3) for number, line in ((1, "1"), (2, "3"), (3, "5"))
    ]
    model = AutoModelForCausalLM.from_pretrained(run / "hf" / "step_00000003", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "hf" / "step_00000003")
    for each in found[PROMPTS:]:
        ids = torch.tensor([tokenizer.encode(each["prompt"], add_special_tokens=False)])
        answer = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert each["answer"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert each["tokens"] == len(answer)
        assert each["ended"] == (int(answer[-1]) == tokenizer.eos_token_id)
    if name == "one rank":
        without = train(tmp_path / "without", given)
        assert metrics_of(run) == metrics_of(without)
        assert not (without / "samples.jsonl").exists()


def test_a_run_that_continues_has_each_answer_once(config: dict[str, Any], tmp_path: Path) -> None:
    often = (*ASKED, "eval.generate.every_steps=1")
    run = train(tmp_path / "a", config, *often, "train.exit_step=1")
    # As if it had been killed behind its checkpoint.
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 2, "answer": "lost"}\n{"step": 2, "ans')
    run_forked("tgdpo.train", [str(tmp_path / "a" / "config.yaml"), *often])
    found = samples_of(run)
    assert [each["step"] for each in found] == [1] * PROMPTS + [2] * PROMPTS + [3] * PROMPTS
    board = EventAccumulator(str(run / "tensorboard" / "eval"))
    board.Reload()
    texts = board.Tensors("samples/2/text_summary")
    assert [event.step for event in texts] == [1, 2, 3]
    assert "    " + found[1]["answer"] in texts[0].tensor_proto.string_val[0].decode()
