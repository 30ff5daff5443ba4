"""Both layer specs are one model: same results, same gradients, same checkpoints. Transformer Engine is a look-alike.

The look-alike (``tests/fake_te.py``) has its signatures and parameter names, so this covers the spec, the names and the
packing; Transformer Engine's own numbers are for ``tests/gpu/prove.py``.
"""

import json

import pytest

from tests.processes import run_forked
from tests.tiny_models import EXPERT_OPTIONS, FAMILY_OPTIONS, MIXED_OPTIONS, make_model

# Of the families beyond the first, those whose layers have other parts.
FAMILIES = (*FAMILY_OPTIONS, "gemma3_text", "phi3", "olmo3", "glm4", "granite", "youtu")

# Of some, what is computed again, and the modules of a layer that then run twice, by layer spec.
NORMS, EXPERTS = {"input_layernorm", "pre_mlp_layernorm"}, {"mlp.router", "mlp.experts"}
ATTENTION = "self_attention.core_attention"
RECOMPUTED: dict[str, tuple[list[str], set[str], set[str]]] = {
    "llama": (["layernorm", "mlp"], {*NORMS, "mlp"}, {"mlp"}),
    "gemma2": (["core_attn", "mlp"], {ATTENTION, "mlp"}, {ATTENTION, "mlp"}),
    "mixtral": (["layernorm", "moe"], NORMS | EXPERTS, {"pre_mlp_layernorm"} | EXPERTS),
    "youtu": (["layernorm", "mlp"], {*NORMS, "mlp"}, {"input_layernorm", "mlp"}),
    "qwen3_moe-mixed": (["layernorm", "mlp"], NORMS, {"pre_mlp_layernorm"}),
    "qwen2_moe": (["shared_experts"], {"mlp.shared_experts"}, {"mlp.shared_experts"}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("te_spec")
    for family in FAMILIES + tuple(EXPERT_OPTIONS):
        make_model(root / "hf" / family, family, layers=2, tied=family == "gemma2")
    for name, options in MIXED_OPTIONS.items():
        make_model(root / "hf" / name, layers=2, **options)
    recomputed = {family: modules for family, (modules, *_) in RECOMPUTED.items()}
    (root / "recomputed.json").write_text(json.dumps(recomputed))
    run_forked("tests.distributed.worker_te_spec", [str(root)], processes=2)
    return {path.stem: json.loads(path.read_text()) for path in (root / "out").iterdir()}


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERT_OPTIONS, *MIXED_OPTIONS])
def test_the_specs_are_one_model(results: dict[str, dict], family: str) -> None:
    found = results[family]
    assert found["hidden"] < 2e-6
    assert found["offloaded"] == [True, True]
    assert len(found["gradients"]) > 10
    assert max(found["gradients"].values()) < 2e-5, found["gradients"]


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERT_OPTIONS, *MIXED_OPTIONS])
def test_adapters_are_the_same_on_both_specs(results: dict[str, dict], family: str) -> None:
    found = results[family]["adapters"]
    assert found["effect"] > 1e-2
    assert found["hidden"] < 2e-6
    assert found["same_gradients"]
    dense, experts = 7 if family == "youtu" else 4, 2 + 2 * (8 if family in ("glm4_moe", "dots1") else 4)
    mixed = family in MIXED_OPTIONS or family == "glm4_moe"
    linears = dense + experts if mixed else 2 * (experts if family in EXPERT_OPTIONS else dense)
    own = {"gpt_oss": 2 * 2, "deepseek_v2": 6 + 4 + 2 * 4, "deepseek_v3": 7 + 5 + 2 * 8, "glm4_moe_lite": 7 + 5 + 2 * 4}
    linears = own.get(family, linears)
    assert len(found["gradients"]) == linears * 2  # of both layers; a and b
    assert max(found["gradients"].values()) < 2e-5, found["gradients"]


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERT_OPTIONS, *MIXED_OPTIONS])
def test_checkpoints_do_not_depend_on_the_spec(results: dict[str, dict], family: str) -> None:
    assert results[family]["same_description"]
    assert results[family]["local to te"]
    assert results[family]["te to local"]


@pytest.mark.parametrize("family", RECOMPUTED)
def test_parts_that_are_computed_again_change_nothing(results: dict[str, dict], family: str) -> None:
    """Nor with adapters. A norm's gradient is then summed in another order, as is a shared expert's."""
    _, *ran_twice = RECOMPUTED[family]
    for found in results[family]["recomputed"]:
        for again, twice in zip((found["local"], found["te"]), ran_twice, strict=True):
            assert again["same_hidden"]
            assert again["gradients"] < 2e-6
            assert set(again["twice"]) == twice
