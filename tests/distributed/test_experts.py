"""Models with experts train as plain PyTorch does, on every layout: losses, gradient norms, weights."""

import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests import reference
from tests.distributed.common import read_metrics, write_pairs
from tests.launch import PATIENCE
from tests.processes import run_forked
from tests.tiny_models import MIXED_OPTIONS, make_model

SETTINGS = reference.Settings(global_pairs=4, steps=5, lr=1e-3, weight_decay=0.1, clip_grad=1.0)
# Largest relative difference over steps or tensors.
LIMITS = {"loss": 1e-5, "gradient norm": 1e-5, "weights": 1e-4, "router losses": 1e-5}
VOCABULARY = 131


@dataclass(frozen=True)
class Case:
    """A training run: its layout (from step 3 on ``then``), the families of the policy and of the guide (None: DPO)."""

    name: str
    processes: int
    parallel: dict[str, Any] = field(default_factory=dict)
    family: str = "qwen3_moe"
    guide: str | None = "llama"
    sections: dict[str, Any] = field(default_factory=dict)
    then: dict[str, Any] | None = None
    method: str | None = None

    @property
    def settings(self) -> reference.Settings:
        moe = self.sections.get("moe", {})
        return replace(
            SETTINGS,
            method=self.method or ("dpo" if self.guide is None else "tgdpo"),
            aux_loss=moe.get("aux_loss_coeff", 0.0),
            z_loss=moe.get("z_loss_coeff", 0.0),
        )


_DENSE_STAGE = {"expert": 2, "pipeline": 2}
_SP = {"tensor": 2, "sequence_parallel": True}
_VPP = {"pipeline": 2, "virtual_pipeline": 2}
_CACHED = {"guidance": {"mode": "cached"}}
_LOSSES = {"moe": {"aux_loss_coeff": 0.05, "z_loss_coeff": 0.02}}
_TWICE = {"batch": {"shared_prompts": False}}
_OVERLAP = {"overlap": {"grad_reduce": True, "param_gather": True}}


def _again(*modules: str) -> dict[str, Any]:
    return {"train": {"recompute": "selective", "recompute_modules": list(modules)}}


CASES = (
    Case("one", 1),
    Case("mixtral", 1, family="mixtral", guide="qwen3_moe", sections={**_LOSSES, "train": {"recompute": "full"}}),
    # Weights that are not normalised.
    Case("plain-softmax", 1, family="qwen3_moe-plain", guide=None, sections={**_LOSSES, **_TWICE}),
    Case("shared-expert", 1, family="qwen2_moe", sections=_again("core_attn", "layernorm", "shared_experts")),
    Case("frozen-experts", 1, family="llama", guide="mixtral"),
    Case("gpt-oss", 1, family="gpt_oss", guide=None, sections={"moe": {"aux_loss_coeff": 0.1}}),
    Case("losses-cp2-sft", 2, {"context": 2}, family="mixtral", guide=None, sections=_LOSSES, method="sft"),
    Case(
        "mixed-cached",
        1,
        family="qwen2_moe-mixed",
        guide="qwen3_moe-mixed",
        sections={**_CACHED, **_LOSSES, **_again("mlp", "moe")},
    ),
    Case("glm4-moe", 1, family="glm4_moe", guide=None, sections={**_LOSSES, **_again("mlp", "moe")}),
    Case("glm4-moe-pp2-then-ep2", 2, {"pipeline": 2}, family="glm4_moe", guide="glm4_moe", then={"expert": 2}),
    Case("mixed-ep2-then-tp2-sp", 2, {"expert": 2}, family="qwen3_moe-mixed", guide="qwen2_moe-mixed", then=_SP),
    # The first stage alone has a layer without experts; then no chunk of the second.
    Case("mixed-pp2-then-vpp2", 2, {"pipeline": 2}, family="qwen3_moe-mixed", guide="llama", then=_VPP),
    # Latent attention.
    Case("deepseek-ep2-cp2", 2, {"expert": 2, "context": 2}, family="deepseek_v2", guide="deepseek_v3"),
    Case("glm4-moe-lite-pp2-then-ep2", 2, {"pipeline": 2}, family="glm4_moe_lite", guide=None, then={"expert": 2}),
    Case("exaone-moe-dots1", 1, family="exaone_moe", guide="dots1", sections=_again("mlp", "moe")),
    Case("dots1-ep2-cp2", 2, {"expert": 2, "context": 2}, family="dots1", guide=None, sections=_LOSSES),
    Case("solar-open-tp2-sp-exaone-moe", 2, _SP, family="solar_open", guide="exaone_moe"),
    Case("deepseek-tp2-sp-then-pp2", 2, _SP, family="deepseek_v3", guide=None, then={"pipeline": 2}),
    Case("tp2-sp", 2, _SP),
    Case("ep2", 2, {"expert": 2}, guide="mixtral"),
    Case("ep2-cp2", 2, {"expert": 2, "context": 2}, sections={**_LOSSES, **_TWICE}),
    Case("ep2-over-tensor-ranks", 2, {**_SP, "expert": 2, "expert_tensor": 1}, sections=_LOSSES),
    # Each tensor rank has all experts whole, and sees half of the tokens.
    Case("tp2-sp-whole-experts", 2, {**_SP, "expert_tensor": 1}, family="mixtral", guide=None),
    # Data ranks share each expert.
    Case("etp2-over-data-ranks-cached", 2, {"expert_tensor": 2}, guide="mixtral", sections=_CACHED),
    Case("pp2", 2, {"pipeline": 2}, guide="qwen3_moe"),
    # Experts with an optimizer of their own, and without; whole and cut.
    Case("ep2-then-tp2-sp", 2, {"expert": 2}, then=_SP),
    Case("tp2-sp-then-ep2", 2, _SP, guide="mixtral", then={**_SP, "expert": 2, "expert_tensor": 1}),
    Case("ep2-over-tensor-ranks-shared-expert", 2, {**_SP, "expert": 2, "expert_tensor": 1}, family="qwen2_moe"),
    Case("ep2-over-tensor-ranks-gpt-oss", 2, {**_SP, "expert": 2, "expert_tensor": 1}, family="gpt_oss"),
    Case("tp2-sp-whole-experts-frozen-gpt-oss", 2, {**_SP, "expert_tensor": 1}, family="llama", guide="gpt_oss"),
    Case("tp2-sp-olmoe", 2, _SP, family="olmoe", guide=None),
    Case("pp2-cp2-gpt-oss", 4, {"pipeline": 2, "context": 2}, family="gpt_oss", guide=None),
    Case("ep4", 4, {"expert": 4}, family="mixtral"),
    Case("ep2-dp4-overlap", 4, {"expert": 2}, guide=None, sections=_OVERLAP),
    Case(
        "ep2-tp2-sp-mixtral",
        4,
        {**_SP, "expert": 2, "expert_tensor": 1},
        family="mixtral",
        sections={**_LOSSES, **_again("moe")},
    ),
    # The first stage has no experts, and megatron-core makes it an optimizer for them all the same.
    Case("dense-stage-ep2-pp2", 4, _DENSE_STAGE, family="glm4_moe-two-dense", guide=None, then=_DENSE_STAGE),
    Case("ep2-pp2-prefetch", 4, {"expert": 2, "pipeline": 2}, sections={"guidance": {"prefetch": True}}),
    Case("ep2-vpp2", 4, {"expert": 2, "pipeline": 2, "virtual_pipeline": 2}, guide="mixtral", sections=_LOSSES),
    Case(
        "ep2-cp2-tp2-recompute",
        4,
        {**_SP, "expert": 2, "context": 2},
        sections={**_LOSSES, "train": {"recompute": "full"}},
    ),
)
# What other cases have between them, with --full of tests/run.sh.
COVERED_CASES = (
    # ep2-dp4-overlap; ep2 has a guide with experts.
    Case("ep2-dp4", 4, {"expert": 2}, guide="qwen3_moe"),
    # ep2-cp2-tp2-recompute.
    Case("ep2-tp2-sp", 4, {**_SP, "expert": 2}, guide="mixtral"),
    # ep2-pp2-prefetch, ep2-vpp2.
    Case("ep2-pp2", 4, {"expert": 2, "pipeline": 2}, guide="mixtral"),
)
CASES += COVERED_CASES if os.environ.get("TGDPO_TESTS_FULL") else ()


@dataclass(frozen=True)
class Inputs:
    root: Path

    def policy(self, case: Case) -> Path:
        return self.root / f"policy-{case.family}"

    def guide(self, case: Case) -> Path | None:
        return None if case.guide is None else self.root / f"guide-{case.guide}"

    def output(self, case: Case) -> Path:
        return self.root / "runs" / case.name

    def config(self, case: Case) -> dict[str, Any]:
        guide = self.guide(case)
        config: dict[str, Any] = {
            "model": {"policy": str(self.policy(case)), "guide": None if guide is None else str(guide)},
            "data": {
                "train": str(self.root / "pairs.jsonl"),
                "max_length": 64,
                "shuffle": False,
                "workers": 1,
                "tokenizer": str(self.root / "policy-llama"),
            },
            "loss": {"method": case.settings.method},
            "parallel": {"timeout_minutes": 15, **case.parallel},
            "guidance": {"cache": str(self.root / f"cache-{case.name}")},
            "batch": {"global_pairs": SETTINGS.global_pairs, "tokens_per_micro_batch": 128},
            "optimizer": {
                "lr": SETTINGS.lr,
                "weight_decay": SETTINGS.weight_decay,
                "clip_grad": SETTINGS.clip_grad,
                "schedule": "constant",
                "warmup_ratio": 0.0,
            },
            "precision": {"dtype": "fp32"},
            "train": {"steps": SETTINGS.steps},
            "checkpoint": {"every_steps": SETTINGS.steps},
            "output_dir": str(self.output(case)),
        }
        for section, values in case.sections.items():
            config[section] = {**config.get(section, {}), **values}
        return config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("experts")
    small: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "mlp_size": 48}
    for family in ("llama", "qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss", "olmoe", "glm4_moe", "solar_open"):
        make_model(root / f"policy-{family}", family, seed=1, **small)
        make_model(root / f"guide-{family}", family, seed=2, **small)
    make_model(root / "policy-glm4_moe-two-dense", "glm4_moe", seed=3, **small, first_k_dense_replace=2)
    make_model(root / "policy-qwen3_moe-plain", "qwen3_moe", seed=3, **small, norm_topk_prob=False)
    for name, options in MIXED_OPTIONS.items():
        make_model(root / f"policy-{name}", seed=4, **small, **options)
        make_model(root / f"guide-{name}", seed=5, **small, **options)
    write_pairs(root / "pairs.jsonl", 12, VOCABULARY)
    return Inputs(root)


class Runs:
    """Trains all chosen cases of a process count in one launch, the first time one of them is asked for."""

    def __init__(self, inputs: Inputs, chosen: set[str]) -> None:
        self.inputs, self.chosen = inputs, chosen
        self._launched: set[int] = set()
        self._expected: dict[tuple[str, str | None, reference.Settings], reference.Result] = {}

    def output(self, case: Case) -> Path:
        if case.processes not in self._launched:
            self._launched.add(case.processes)
            cases: list[dict[str, Any]] = []
            for each in CASES:
                if each.processes == case.processes and each.name in self.chosen:
                    config = self.inputs.config(each)
                    if config["guidance"].get("mode") == "cached":
                        # Three shards for two data ranks, which need each other's experts.
                        cases.append({"config": config, "precompute": 5})
                    if each.then is not None:
                        first = {**config, "train": {**config["train"], "exit_step": 3}}
                        cases.append({"config": first, "export": None})
                        config = {**config, "parallel": {"timeout_minutes": 15, **each.then}}
                    cases.append({"config": config, "export": str(self.inputs.output(each) / "hf")})
            file = self.inputs.root / f"cases{case.processes}.json"
            file.write_text(json.dumps(cases))
            patience = PATIENCE * len(cases)
            run_forked("tests.distributed.worker_train", [str(file)], processes=case.processes, timeout=patience)
        return self.inputs.output(case)

    def expected(self, case: Case) -> reference.Result:
        key = (case.family, case.guide, case.settings)
        if key not in self._expected:
            tokenizer = AutoTokenizer.from_pretrained(self.inputs.root / "policy-llama")
            records = [json.loads(line) for line in (self.inputs.root / "pairs.jsonl").read_text().splitlines()]
            sides = (("prompt", []), ("chosen", [2]), ("rejected", [2]))  # 2 is </s>
            pairs = [reference.Tokens(*(tokenizer(r[side])["input_ids"] + end for side, end in sides)) for r in records]
            policy = self.inputs.policy(case)
            self._expected[key] = reference.train(policy, policy, self.inputs.guide(case), pairs, case.settings)
        return self._expected[key]


@pytest.fixture(scope="module")
def runs(inputs: Inputs, request: pytest.FixtureRequest) -> Runs:
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return Runs(inputs, {one["case"].name for one in params if isinstance(one.get("case"), Case)})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_equals_plain_pytorch(runs: Runs, case: Case) -> None:
    output, expected = runs.output(case), runs.expected(case)
    steps = read_metrics(output)
    assert [step["step"] for step in steps] == list(range(1, SETTINGS.steps + 1))
    if case.method is None:
        assert steps[0]["train/loss"] == pytest.approx(math.log(2), rel=LIMITS["loss"])
    assert abs(steps[-1]["train/loss"] - steps[0]["train/loss"]) > 0.01, "nothing was learned"
    # Loaded by transformers: what it calls the tensors of experts differs between its versions.
    exported = {name: p.detach() for name, p in reference.load(output / "hf").named_parameters()}
    assert exported.keys() == expected.weights.keys()
    differences = {
        "loss": [abs(s["train/loss"] / want - 1) for s, want in zip(steps, expected.losses, strict=True)],
        "gradient norm": [
            abs(s["train/grad_norm"] / want - 1) for s, want in zip(steps, expected.grad_norms, strict=True)
        ],
        "weights": [float(torch.dist(exported[name], want) / want.norm()) for name, want in expected.weights.items()],
    }
    if "moe" in case.sections:
        reported = [(step["moe/aux_loss"], step["moe/z_loss"]) for step in steps]
        differences["router losses"] = [
            abs(ours / want - 1)
            for step in zip(reported, expected.router_losses, strict=True)
            for ours, want in zip(*step, strict=True)
        ]
    else:
        assert "moe/aux_loss" not in steps[0]
    # Shown by pytest -rP.
    print(case.name, {what: f"{max(values):.1e}" for what, values in differences.items()})
    for what, limit in LIMITS.items():
        assert all(value < limit for value in differences.get(what, [])), f"{what}: {differences.get(what)}"
