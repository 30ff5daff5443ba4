"""Parts of tools.benchmarks.training_step: tables, lengths, groups of operators, profiles that add up, bad input."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_tgdpo.errors import UserError
from tools.benchmarks.training_step import __main__
from tools.benchmarks.training_step.lengths import spread_lengths, spread_pairs
from tools.benchmarks.training_step.models import SHAPES, llama_config, write_model
from tools.benchmarks.training_step.operators import GROUPS, PYTHON, STEP, group_of
from tools.benchmarks.training_step.preference_pairs import find_source
from tools.benchmarks.training_step.profiling import ProfilingRecorder, group_seconds, step_operators
from tools.benchmarks.training_step.roofline import product_rate, variant_flops
from tools.benchmarks.training_step.table import Spread, aligned


def test_table() -> None:
    table = aligned(
        ["variant", "s", "ratio"], [["reference", "10.00", "1.0"], ["ours", "4.50", Spread.of([2, 9, 3]).text(1)]]
    )
    assert table.splitlines() == [
        "variant        s          ratio",
        "reference  10.00            1.0",
        "ours        4.50  3.0 (2.0-9.0)",
    ]


@pytest.mark.parametrize("count", [8, 9])
def test_spread_lengths_keep_their_sum(count: int) -> None:
    narrow, wide = (spread_lengths(count, 100, spread, seed=1) for spread in (0.2, 0.4))
    assert sum(narrow) == sum(wide) == 100 * count
    assert (min(narrow), max(narrow), min(wide), max(wide)) == (80, 120, 60, 140)
    assert statistics.pstdev(wide) == pytest.approx(2 * statistics.pstdev(narrow), rel=0.02)


def test_spread_pairs_have_these_lengths(tmp_path: Path) -> None:
    pairs = spread_pairs(tmp_path, 4, 20, 0.5)
    assert pairs.dataset.lengths.sum(axis=0).tolist() == [80, 80, 80]
    assert sorted(pairs.dataset.lengths[:, 0].tolist()) == [10, 17, 23, 30]
    assert pairs.sequence_tokens() == 4 * 80


def test_what_variants_compute() -> None:
    """Passes of a model: three of a policy, two beside an adapter, one of a frozen one; a prompt once where shared."""
    shape = llama_config(SHAPES["20m"], 1000, tied=False, max_length=64)
    shape.architectures = ["LlamaForCausalLM"]
    lengths = np.array([[10, 20, 30], [5, 6, 7]])
    cached, colocated, lora = (
        variant_flops(shape, lengths, frozen=frozen, adapter=adapter, shared_prompts=True)
        for frozen, adapter in ((0, False), (2, False), (2, True))
    )
    assert colocated * 3 == cached * 5
    assert lora * 3 == cached * 4
    assert variant_flops(shape, lengths, frozen=0, adapter=False, shared_prompts=False) > cached
    layers = sum(p.numel() for p in LlamaForCausalLM(shape).model.layers.parameters() if p.dim() == 2)
    logits = 1000 * shape.hidden_size
    # Without attention: two operations a weight, token and pass.
    assert cached > 3 * 2 * (78 * layers + 63 * logits) > 0.97 * cached
    assert product_rate(torch.device("cpu"), torch.float32) > 1e8


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_pairs_of_a_file(tmp_path: Path, kind: str) -> None:
    """The first ones, as they are; without a file, as many of the demonstration's."""
    records = [{"prompt": f"{k}", "chosen": " a", "rejected": " b"} for k in range(3)]
    file = tmp_path / "pairs"
    lines = [json.dumps(record) for record in records]
    file.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    source = find_source(tmp_path, 2, file, tmp_path)
    assert (source.kind, source.records, source.tokenizer) == ("given", records[:2], tmp_path)
    with pytest.raises(UserError, match="pairs: has 3 pairs, 4 are needed"):
        find_source(tmp_path, 4, file, tmp_path)
    generated = find_source(tmp_path, 4, None, None)
    assert (generated.kind, len(generated.records)) == ("generated", 4)
    assert generated.tokenizer.is_dir()


@pytest.mark.parametrize(
    ("name", "within", "group"),
    [
        ("aten::mm", [STEP, "LinearWithFrozenWeight"], "matrix products of layers"),
        ("aten::mm", [STEP, "_TokenLogps"], "matrix products of log-probs"),
        ("aten::exp_", [STEP, "autograd::engine::evaluate_function: _TokenLogpsBackward"], "log-probs, the rest"),
        ("aten::_log_softmax", [STEP], "log-probs, the rest"),
        ("aten::bmm", [STEP, "aten::scaled_dot_product_attention"], "attention"),
        ("aten::add_", [STEP, "torch::autograd::AccumulateGrad"], "gradient accumulation"),
        ("aten::mul_", [STEP, "Optimizer.step#AdamW.step"], "zeroing, norm, clipping, update"),
        ("aten::mul", [STEP, "tgdpo::clip"], "zeroing, norm, clipping, update"),
        ("aten::copy_", [STEP, "gloo:all_gather"], "collectives"),
        ("aten::cat", [STEP], "copies, fills, indexing"),
        ("aten::silu", [STEP], "norms, activations, rotary"),
        ("aten::view", [STEP], PYTHON),
        ("autograd::engine::evaluate_function: MmBackward0", [STEP], PYTHON),
    ],
)  # fmt: skip
def test_groups(name: str, within: list[str], group: str) -> None:
    assert group in (*GROUPS, PYTHON)
    assert group_of(name, within) == group


def test_a_profile_adds_up_to_the_step() -> None:
    recorder = ProfilingRecorder(torch.device("cpu"))
    weight = torch.nn.Parameter(torch.randn(256, 256))
    optimizer = torch.optim.AdamW([weight])
    recorder.built([weight])
    for _ in range(3):
        recorder.begin()
        hidden = torch.nn.functional.silu(torch.randn(256, 256) @ weight)
        hidden.log_softmax(dim=-1).sum().backward()
        optimizer.step()
        recorder.end(0.0)
    events = recorder.profiler.events()
    operators = step_operators(events, torch.device("cpu"))
    (step,) = [event for event in events if event.name == STEP]
    assert sum(operator.seconds for operator in operators) == pytest.approx(step.cpu_time_total / 1e6, rel=1e-3)
    # Only one of the three steps: two products, and no more.
    assert sum(operator.calls for operator in operators if operator.name == "aten::mm") == 2
    groups = group_seconds(operators)
    assert {"matrix products of layers", "log-probs, the rest", "zeroing, norm, clipping, update"} <= groups.keys()
    assert sum(groups.values()) == pytest.approx(sum(operator.seconds for operator in operators))
    assert list(groups.values()) == sorted(groups.values(), reverse=True)
    assert len(recorder.result(torch.float32).seconds) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_with_and_without_embeddings(tmp_path: Path, tied: bool) -> None:
    config = llama_config(SHAPES["tiny"], 50, tied=tied, max_length=64)
    count = write_model(tmp_path, config, dtype=torch.float32, seed=0)
    attention, mlp = 128 * 128 * 2 + 128 * 64 * 2, 3 * 128 * 320
    assert count.layers == 2 * (attention + mlp + 2 * 128) + 128
    assert count.embeddings == 50 * 128 * (1 if tied else 2)
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(4 * count.total, rel=0.01)


@pytest.mark.parametrize("name", ["20m", "60m", "160m"])
def test_sizes_are_what_they_are_called(name: str) -> None:
    shape = SHAPES[name]
    head = shape.hidden // shape.heads
    attention = 2 * shape.hidden**2 + 2 * shape.hidden * head * shape.groups
    layers = shape.layers * (attention + 3 * shape.hidden * shape.mlp)
    assert layers == pytest.approx(1e6 * int(name[:-1]), rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--pairs", "6", "--global-pairs", "4"], "--pairs 6 is not a multiple of --global-pairs 4"),
        (["compare", "--rounds", "0"], "--rounds is 0: it must be positive"),
        (["compare", "--json", "absent/out.json"], "there is no directory absent"),
        (["profile", "--trace", "absent/out.json"], "there is no directory absent"),
        (["preprocess", "--factor", "1"], "--factor is 1"),
        (["lengths", "--variants", "swift"], "there is no variant 'swift', choose from reference"),
        (["lengths", "--mean", "4"], "leaves responses without words"),
        (["preprocess", "--pairs-from", __file__], "--pairs-from and --tokenizer go together"),
        (["preprocess", "--pairs-from", "absent", "--tokenizer", __file__], "--pairs-from absent: no such file"),
        (["profile", "--pairs-from", __file__, "--tokenizer", "absent"], "--tokenizer absent: no such file"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_older_names_of_options_work() -> None:
    parse = __main__._parser().parse_args
    assert parse(["compare", "--sides", "reference", "cached"]) == parse(
        ["compare", "--variants", "reference", "cached"]
    )
    assert parse(["compare"]).variants is None
    assert parse(["profile", "--side", "cached"]).variant == "cached"
    assert parse(["profile"]).variant == "colocated"
