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
def chosen(request: pytest.FixtureRequest) -> set[str]:
    """The models that this run's tests are of."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return {one["model"] for one in params if one.get("model") in MODELS}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, chosen: set[str]) -> Path:
    """HF models and their Megatron conversions, and what the worker made on every layout."""
    root = tmp_path_factory.mktemp("experts")
    for seed, (name, options) in enumerate(MODELS.items()):
        if name in chosen:
            make_model(root / "hf" / name, hidden_size=32, layers=2, max_shard_size="60KB", seed=seed, **options)
    run_forked(WORKER, [str(root), "single", *LAYOUTS[1]])
    for processes in (2, 4):
        run_forked(WORKER, [str(root), *LAYOUTS[processes]], processes=processes)
    return root


@pytest.fixture(scope="module")
def expected(root: Path, chosen: set[str]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: by_transformers(root / "hf" / name) for name in chosen}


def by_transformers(path: Path) -> dict[str, torch.Tensor]:
    """What a model makes of the pack's sequences: logits [S, V], and to which experts each layer sends them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    sequences = pack_tokens()[: sum(LENGTHS)].split(LENGTHS)
    recorded = record_choices(model)
    with torch.no_grad():
        outputs = [model(tokens[None], output_router_logits=True) for tokens in sequences]
    found = {"logits": torch.cat([output.logits[0] for output in outputs])}
    if recorded:
        count = next(router.weight.shape[0] for name, router in model.named_modules() if name.endswith(".gate"))
        for layer, parts in enumerate(recorded):
            experts = torch.cat(parts)
            routed = torch.zeros(len(experts), count, dtype=torch.uint8)
            found[f"experts.{layer}"] = routed.scatter(1, experts, 1)
        return found
    for layer in range(len(outputs[0].router_logits)):
        logits = torch.cat([output.router_logits[layer].flatten(0, -2) for output in outputs])
        experts = logits.topk(model.config.num_experts_per_tok).indices
        found[f"experts.{layer}"] = torch.zeros(logits.shape, dtype=torch.uint8).scatter(1, experts, 1)
    return found


def record_choices(model: torch.nn.Module) -> list[list[torch.Tensor]]:
    """Filled by the model's forwards: of each router that does not choose by its logits alone, [tokens, k] experts."""
    found: list[list[torch.Tensor]] = []
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            found.append(parts := [])

            def record(router: object, args: object, output: Any, parts: list = parts) -> None:
                parts.extend(part for part in output if not part.is_floating_point())

            module.register_forward_hook(record)
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
            assert ours.state_dict_metadata[key].properties.dtype == info.properties.dtype, key
    assert ours.planner_data == theirs.planner_data
    assert any("experts" in key for key in theirs.state_dict_metadata)
