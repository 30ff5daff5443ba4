"""Models with experts: HF in, the same experts and logits on every layout, and HF out to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from tests.distributed.common import assert_same_weights
from tests.distributed.test_conversion import stored_metadata
from tests.distributed.worker_conversion import LENGTHS, pack_tokens
from tests.processes import run_forked
from tests.tiny_models import EXPERT_OPTIONS, MIXED_OPTIONS, make_model

WORKER = "tests.distributed.worker_experts"
# Tensor, expert and expert-tensor ranks.
LAYOUTS = {1: ("1-1-1",), 2: ("1-2-1", "2-1-2", "2-2-1", "2-1-1"), 4: ("1-4-1", "2-2-2")}
MODELS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in EXPERT_OPTIONS},
    **{
        f"{family}-bf16-tied": {"family": family, "dtype": torch.bfloat16, "tied": True}
        for family in EXPERT_OPTIONS
        if family != "olmoe"
    },
    **MIXED_OPTIONS,
}
# Experts with biases are not cut.
CASES = [
    (layout, model)
    for layouts in LAYOUTS.values()
    for layout in layouts
    for model in MODELS
    if not (layout.endswith("2") and model.startswith("gpt_oss"))
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF models and their Megatron conversions, and what the worker made on every layout."""
    root = tmp_path_factory.mktemp("experts")
    for seed, (name, options) in enumerate(MODELS.items()):
        make_model(root / "hf" / name, hidden_size=32, layers=2, max_shard_size="60KB", seed=seed, **options)
    run_forked(WORKER, [str(root), "single", *LAYOUTS[1]])
    for processes in (2, 4):
        run_forked(WORKER, [str(root), *LAYOUTS[processes]], processes=processes)
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What transformers computes of the pack's sequences: logits [S, V], and to which experts each layer sends them."""
    found = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(
            root / "hf" / name, dtype=torch.float32, attn_implementation="eager"
        )
        sequences = pack_tokens()[: sum(LENGTHS)].split(LENGTHS)
        with torch.no_grad():
            outputs = [model(tokens[None], output_router_logits=True) for tokens in sequences]
        found[name] = {"logits": torch.cat([output.logits[0] for output in outputs])}
        for layer in range(len(outputs[0].router_logits)):
            logits = torch.cat([output.router_logits[layer].flatten(0, -2) for output in outputs])
            chosen = logits.topk(model.config.num_experts_per_tok).indices
            found[name][f"experts.{layer}"] = torch.zeros(logits.shape, dtype=torch.uint8).scatter(1, chosen, 1)
    return found


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_experts_and_logits_equal_hf(root: Path, expected: dict[str, Any], layout: str, model: str) -> None:
    ours, wanted = load_file(root / "out" / layout / model / "logits.safetensors"), expected[model]
    rows = sum(LENGTHS)
    difference = (ours.pop("logits")[:rows] - wanted["logits"]).abs().max() / wanted["logits"].abs().max()
    assert difference < 1e-5
    # With sequence parallelism a rank routes its part of the tokens.
    assert bool(ours) == layout.startswith("1")
    for layer, experts in ours.items():
        assert torch.equal(experts[:rows], wanted[layer]), layer
        shares = experts.float().mean(0)
        assert shares.count_nonzero() > experts[0].count_nonzero(), "all go the same way"
        assert shares.max() < 1, "an expert has all"


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_weights_come_back_to_the_bit(root: Path, layout: str, model: str) -> None:
    for source in ("hf", "megatron"):
        assert_same_weights(root / "out" / layout / model / source, root / "hf" / model)


@pytest.mark.parametrize("model", MODELS)
def test_weights_come_back_without_a_model(root: Path, model: str) -> None:
    assert_same_weights(root / "back" / model, root / "hf" / model)


@pytest.mark.parametrize("model", MODELS)
def test_imports_what_megatron_core_would_save(root: Path, model: str) -> None:
    ours, theirs = (stored_metadata(root / folder / model) for folder in ("megatron", "live"))
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for key, info in theirs.state_dict_metadata.items():
        assert type(ours.state_dict_metadata[key]) is type(info), key
        if isinstance(info, TensorStorageMetadata):
            assert ours.state_dict_metadata[key].size == info.size, key
    assert ours.planner_data == theirs.planner_data
    assert any("experts" in key for key in theirs.state_dict_metadata)
