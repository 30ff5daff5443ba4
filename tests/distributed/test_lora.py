"""LoRA on every layout trains as ``peft`` with plain PyTorch does: losses, gradient norms, adapters after the steps."""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests import reference
from tests.distributed.common import read_metrics, write_pairs
from tests.launch import PATIENCE
from tests.processes import run_forked
from tests.tiny_models import MIXED_OPTIONS, make_model, make_tokenizer

peft = pytest.importorskip("peft")

VOCABULARY = 131
VALIDATION = 13  # pairs, the first ones
FULL = bool(os.environ.get("TGDPO_TESTS_FULL"))  # --full of tests/run.sh
# Adam's first steps would turn the rounding of gradients that are all but zero into whole steps.
SETTINGS = reference.Settings(
    global_pairs=4, steps=10 if FULL else 5, lr=5e-3, weight_decay=0.1, clip_grad=1.0, eps=1e-6
)
FIRST_LEG = SETTINGS.steps // 2  # steps before a run goes on on another layout
PAIRS = 18  # fewer than the steps take: a second epoch begins, in the middle of a batch
LIMITS = {"loss": 1e-5, "validation loss": 1e-5, "gradient norm": 1e-4, "weights": 1e-4}
_LATENT_QUERY, _LATENT_KEY_VALUE = ["q_a_proj", "q_b_proj"], ["kv_a_proj_with_mqa", "kv_b_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", *_LATENT_QUERY, *_LATENT_KEY_VALUE]
ALL = [*ATTENTION, "gate_proj", "up_proj", "gate_up_proj", "down_proj"]
GUIDE = ["q_proj", "k_proj", "qkv_proj", "o_proj", "down_proj", *_LATENT_QUERY]
SOME = ["q_proj", "v_proj", "up_proj", "gate_up_proj", *_LATENT_KEY_VALUE]


@dataclass(frozen=True)
class Case:
    """One run: its layout, and what its models are."""

    name: str
    processes: int = 1
    family: str = "llama"
    tied: bool = False
    method: str = "tgdpo"
    guide: str = "adapter"  # adapter | model
    start: str = "base"  # base | adapter: that the policy starts from
    targets: str = "all"  # all | some | attention
    rslora: bool = False
    parallel: tuple[tuple[str, Any], ...] = ()
    recompute: str = "none"
    guidance: str = "colocated"  # colocated | prefetch | cached
    overlap: bool = False  # of the traffic of data ranks
    dtype: str = "fp32"
    then: tuple[tuple[str, Any], ...] | None = None  # from the step after FIRST_LEG on

    @property
    def model(self) -> str:
        return f"{self.family}-{'tied' if self.tied else 'untied'}"

    @property
    def settings(self) -> reference.Settings:
        options = {"beta": 2.5, "gamma": 0.7} if self.method == "simpo" else {}
        return replace(SETTINGS, method=self.method, **options)


def _case(name: str, processes: int = 1, **options: Any) -> Case:
    own = {key: options.pop(key) for key in list(options) if key in Case.__dataclass_fields__}
    then = own.pop("then", None)
    return Case(
        name, processes, **own, parallel=tuple(options.items()), then=None if then is None else tuple(then.items())
    )


_SP = {"tensor": 2, "sequence_parallel": True}


CASES = (
    _case("tp1"),
    _case("tp1-some-rslora", targets="some", rslora=True, tied=True),
    _case("tp1-guide-model", guide="model"),
    _case("tp1-reference-adapter", start="adapter"),
    _case("tp1-simpo", method="simpo"),
    _case("gemma2", family="gemma2", tied=True),
    _case("tp2", 2, tensor=2),
    _case("tp2-sp-tied", 2, tensor=2, sequence_parallel=True, tied=True),
    _case("pp2-tied", 2, pipeline=2, tied=True),
    _case("cp2", 2, context=2),
    _case("dp2-overlap", 2, overlap=True),
    _case("pp2-prefetch-guide-model", 2, pipeline=2, guidance="prefetch", guide="model"),
    _case("vpp2", 2, pipeline=2, virtual_pipeline=2),
    _case("pp2-cached", 2, pipeline=2, guidance="cached"),
    _case("tp2-pp2-sp-recompute", 4, tensor=2, pipeline=2, sequence_parallel=True, recompute="full"),
    _case("tp4-some", 4, tensor=4, targets="some"),
    _case("gemma2-tp2-sp-pp2", 4, tensor=2, pipeline=2, sequence_parallel=True, family="gemma2", tied=True),
    _case("phi3-tp2-sp", 2, tensor=2, sequence_parallel=True, family="phi3"),
    _case("youtu-tp2", 2, tensor=2, family="youtu"),
    _case("youtu-tp2-sp", 2, **_SP, family="youtu", targets="some"),
    _case("qwen2-tp2-pp2", 4, tensor=2, pipeline=2, family="qwen2", guide="model"),
    _case("experts", family="qwen3_moe"),
    _case("experts-attention-alone-shared-expert", family="qwen2_moe", targets="attention", guide="model"),
    _case("experts-attention-alone-gpt-oss-ep2", 2, expert=2, family="gpt_oss", targets="attention", guide="model"),
    _case("experts-dp2", 2, family="qwen3_moe", targets="some", overlap=True),
    _case("experts-ep2", 2, expert=2, family="mixtral", start="adapter"),
    # Each tensor rank has all experts whole.
    _case("experts-tp2-sp-whole", 2, **_SP, expert_tensor=1, family="qwen3_moe", targets="some"),
    # Data ranks share each expert.
    _case("experts-etp2", 2, expert_tensor=2, family="qwen3_moe"),
    _case("experts-tp2-sp-then-ep2", 2, **_SP, family="qwen3_moe", then={"expert": 2}),
    _case("mixed-pp2-then-ep2", 2, pipeline=2, family="qwen3_moe-mixed", then={"expert": 2}),
    _case("experts-ep2-tp2-sp", 4, **_SP, expert=2, family="mixtral", guide="model"),
    _case("experts-ep2-pp2-recompute", 4, pipeline=2, expert=2, family="qwen3_moe", recompute="full"),
)
# With --full of tests/run.sh.
FULL_CASES = (
    _case("tp1-dpo", method="dpo"),
    _case("deepseek-ep2-cp2", 2, expert=2, context=2, family="deepseek_v2"),
    _case("tp1-sft", method="sft"),
    _case("tp1-recompute", recompute="full"),
    _case("qwen3-tp2-dp2", 4, tensor=2, family="qwen3"),
    _case("mistral-tp2-pp2", 4, tensor=2, pipeline=2, family="mistral"),
    _case("cp2-tp2-sp", 4, context=2, tensor=2, sequence_parallel=True),
    _case("cp2-pp2-sft", 4, context=2, pipeline=2, method="sft"),
    _case("dp2-pp2-dpo", 4, pipeline=2, method="dpo", start="adapter"),
    _case("vpp2-tp2-sp-simpo", 4, pipeline=2, virtual_pipeline=2, tensor=2, sequence_parallel=True, method="simpo"),
)
BF16_CASES = (_case("tp2-sp-bf16", 2, tensor=2, sequence_parallel=True, dtype="bf16"),)
CASES += FULL_CASES if FULL else ()


def make_adapter(path: Path, base: Path, seed: int, *, targets: list[str], rslora: bool = False) -> Path:
    """A ``peft`` adapter whose A and B are random."""
    torch.manual_seed(seed)
    model = reference.load(base)
    # Experts are parameters, and a shared one's linears have none of the names here.
    there = {name.rpartition(".")[2] for name, _ in model.named_modules() if "expert" not in name}
    experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj") if name in targets]
    if not any(name.endswith(f".{experts[0]}") for name, _ in model.named_parameters()) if experts else True:
        experts = []
    targets = [name for name in targets if name in there]
    if experts:
        # Beside them ``peft`` takes modules of a dense MLP's names for theirs.
        dense = [name for name in targets if name not in ATTENTION]
        experts += [f"mlp.{name}.weight" for name in dense]
        targets = [name for name in targets if name not in dense]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, target_parameters=experts or None, use_rslora=rslora,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(path)
    return path


class Runs:
    """All cases of a process count, trained in one launch, and what ``peft`` makes of the same."""

    def __init__(self, root: Path, chosen: set[str]) -> None:
        self.root, self.chosen = root, chosen
        self._launched: set[int] = set()
        self._expected: dict[Any, reference.Result] = {}
        for family, tied in {(case.family, case.tied) for case in CASES}:
            base = self.base(family, tied)
            options = MIXED_OPTIONS.get(family, {"family": family})
            make_model(base, seed=1, vocab_size=VOCABULARY, tied=tied, **options)
            make_model(Path(f"{base}-guide"), seed=2, vocab_size=VOCABULARY, tied=tied, hidden_size=32, **options)
            for name, targets, rslora in (("all", ALL, False), ("some", SOME, True), ("attention", ATTENTION, False)):
                make_adapter(Path(f"{base}-{name}"), base, 3, targets=targets, rslora=rslora)
            make_adapter(Path(f"{base}-guide-adapter"), base, 4, targets=GUIDE)
        for file in root.glob("*/*token*.json"):
            file.unlink()
        make_tokenizer(VOCABULARY).save_pretrained(root / "tokenizer")
        write_pairs(root / "pairs.jsonl", PAIRS, VOCABULARY)
        lines = (root / "pairs.jsonl").read_text().splitlines(keepends=True)
        (root / "validation.jsonl").write_text("".join(lines[:VALIDATION]))

    def base(self, family: str, tied: bool) -> Path:
        return self.root / f"{family}-{'tied' if tied else 'untied'}"

    def paths(self, case: Case) -> dict[str, Path | None]:
        base = self.base(case.family, case.tied)
        guide = Path(f"{base}-guide-adapter" if case.guide == "adapter" else f"{base}-guide")
        return {
            "base": base,
            "adapter": Path(f"{base}-{case.targets}"),
            "guide": guide if case.method == "tgdpo" else None,
        }

    def config(self, case: Case) -> dict[str, Any]:
        paths = self.paths(case)
        frozen = case.method in ("tgdpo", "dpo")
        return {
            "model": {
                "policy": str(paths["base"]),
                "reference": str(paths["base"]) if frozen and case.start == "base" else None,
                "guide": None if paths["guide"] is None else str(paths["guide"]),
            },
            "lora": {"adapter": str(paths["adapter"])},
            "data": {
                "train": str(self.root / "pairs.jsonl"),
                "validation": str(self.root / "validation.jsonl"),
                "max_length": 64,
                "shuffle": False,
                "workers": 1,
                "tokenizer": str(self.root / "tokenizer"),
            },
            "loss": {"method": case.method, **({"beta": 2.5, "gamma": 0.7} if case.method == "simpo" else {})},
            "parallel": {**dict(case.parallel), "timeout_minutes": 15},
            "guidance": {
                "mode": "cached" if case.guidance == "cached" else "colocated",
                "cache": str(self.root / f"cache-{case.name}"),
                "prefetch": case.guidance == "prefetch",
            },
            "overlap": {"grad_reduce": case.overlap, "param_gather": case.overlap},
            "batch": {"global_pairs": SETTINGS.global_pairs, "tokens_per_micro_batch": 256},
            "optimizer": {
                "lr": SETTINGS.lr,
                "eps": SETTINGS.eps,
                "weight_decay": SETTINGS.weight_decay,
                "clip_grad": SETTINGS.clip_grad,
                "schedule": "constant",
                "warmup_ratio": 0.0,
            },
            "precision": {"dtype": case.dtype},
            # A policy that is not its reference has another loss than ln 2.
            "train": {"steps": SETTINGS.steps, "recompute": case.recompute, "check_start": case.start != "base"},
            "checkpoint": {"every_steps": SETTINGS.steps},
            "output_dir": str(self.root / "runs" / case.name),
        }

    def output(self, case: Case) -> Path:
        if case.processes not in self._launched:
            self._launched.add(case.processes)
            ours = [c for c in (*CASES, *BF16_CASES) if c.processes == case.processes and c.name in self.chosen]
            cases: list[dict[str, Any]] = [
                {"config": self.config(c), "precompute": 8} for c in ours if c.guidance == "cached"
            ]
            for c in ours:
                config = self.config(c)
                if c.then is not None:
                    cases.append(
                        {"config": {**config, "train": {**config["train"], "exit_step": FIRST_LEG}}, "export": None}
                    )
                    config = {**config, "parallel": {"timeout_minutes": 15, **dict(c.then)}}
                cases.append(
                    {
                        "config": config,
                        "export": str(self.root / "runs" / c.name / "adapter"),
                        "bucket_parameters": 1500 if c.overlap else None,
                    }
                )
            file = self.root / f"cases{case.processes}.json"
            file.write_text(json.dumps(cases))
            run_forked(
                "tests.distributed.worker_train",
                [str(file)],
                processes=case.processes,
                timeout=PATIENCE * len(cases),
            )
        return self.root / "runs" / case.name

    def expected(self, case: Case, base_dtypes: tuple[torch.dtype, ...] = ()) -> reference.Result:
        """By ``peft``, whose adapters are fp32; the base's weights are cast to these dtypes, one after the other.

        Layouts that train the same share it.
        """
        key = (*self.paths(case).values(), case.guide, case.start, case.method, base_dtypes)
        if key not in self._expected:
            self._expected[key] = self._by_peft(case, base_dtypes)
        return self._expected[key]

    def _by_peft(self, case: Case, base_dtypes: tuple[torch.dtype, ...]) -> reference.Result:
        paths = self.paths(case)

        def base() -> Any:
            model = reference.load(paths["base"])
            for dtype in base_dtypes:
                model = model.to(dtype)
            return model

        def adapted(adapter: Path, *, trains: bool) -> Any:
            return peft.PeftModel.from_pretrained(base(), adapter, is_trainable=trains)

        policy = adapted(paths["adapter"], trains=True).train()
        ref = base() if case.start == "base" else adapted(paths["adapter"], trains=False)
        guide = None
        if paths["guide"] is not None:
            guide = (
                adapted(paths["guide"], trains=False) if case.guide == "adapter" else reference.load(paths["guide"])
            ).eval()
        return reference.train_models(policy, ref.eval(), guide, self._pairs(), case.settings, VALIDATION)

    def _pairs(self) -> list[reference.Tokens]:
        tokenizer = AutoTokenizer.from_pretrained(self.root / "tokenizer")
        records = [json.loads(line) for line in (self.root / "pairs.jsonl").read_text().splitlines()]
        sides = (("prompt", []), ("chosen", [2]), ("rejected", [2]))
        return [reference.Tokens(*(tokenizer(r[side])["input_ids"] + end for side, end in sides)) for r in records]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = {one["case"].name for one in params if isinstance(one.get("case"), Case)}
    return Runs(tmp_path_factory.mktemp("lora"), chosen)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_equals_peft(runs: Runs, case: Case) -> None:
    output, expected = runs.output(case), runs.expected(case)
    steps = read_metrics(output)
    assert [step["step"] for step in steps] == list(range(1, SETTINGS.steps + 1))
    if case.method in ("tgdpo", "dpo") and case.start == "adapter":
        assert steps[0]["train/loss"] == pytest.approx(math.log(2), rel=LIMITS["loss"])
    assert abs(steps[-1]["train/loss"] - steps[0]["train/loss"]) > 0.01, "nothing was learned"
    exported = load_file(output / "adapter" / "adapter_model.safetensors")
    wanted = {name.replace(".default.", "."): tensor for name, tensor in expected.weights.items()}
    assert exported.keys() == wanted.keys()
    differences = {
        "loss": [abs(s["train/loss"] / want - 1) for s, want in zip(steps, expected.losses, strict=True)],
        "validation loss": [abs(steps[-1]["eval/loss"] / expected.final_loss - 1)],
        "gradient norm": [
            abs(s["train/grad_norm"] / want - 1) for s, want in zip(steps, expected.grad_norms, strict=True)
        ],
        "weights": [float((exported[name] - want).norm() / want.norm()) for name, want in wanted.items()],
    }
    print(case.name, {what: f"{max(values):.1e}" for what, values in differences.items()})
    for what, values in differences.items():
        assert max(values) < LIMITS[what], (case.name, what, max(values))


@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.name)
def test_training_in_bf16_is_as_near_to_fp32_as_that_of_peft(runs: Runs, case: Case) -> None:
    """From one base, rounded to bf16: the losses computed in fp32, by ``peft`` in bf16, and here in bf16."""
    ours = [step["train/loss"] for step in read_metrics(runs.output(case))]
    exact, rounded = (
        runs.expected(case, dtypes).losses for dtypes in ((torch.bfloat16, torch.float32), (torch.bfloat16,))
    )
    assert abs(exact[-1] - exact[0]) > 0.01, "nothing was learned"
    errors = [max(abs(a - b) for a, b in zip(losses, exact, strict=True)) for losses in (ours, rounded)]
    print(case.name, [f"{error:.1e}" for error in errors])
    # Two roundings of one thing; theirs rounds logits, too.
    assert 0 < errors[0] < 3 * errors[1]
