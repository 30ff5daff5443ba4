"""Every layout trains as plain PyTorch does: losses, gradient norms and final weights over the optimizer steps."""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_tgdpo.data.dataset import PreferenceDataset
from tests import reference
from tests.distributed.common import read_metrics, write_pairs
from tests.launch import OTHER_PYTHON, PATIENCE, SHARED_DATA, run_module
from tests.processes import run_forked
from tests.tiny_models import MORE_FAMILY_OPTIONS, make_model, make_tokenizer

FULL = bool(os.environ.get("TGDPO_TESTS_FULL"))  # --full of tests/run.sh
SETTINGS = reference.Settings(global_pairs=4, steps=10 if FULL else 5, lr=1e-3, weight_decay=0.1, clip_grad=1.0)
PAIRS = 18  # fewer than the steps take: a second epoch begins, in the middle of a batch
LIMITS = {
    "loss": 1e-5,
    "validation loss": 1e-5,
    "gradient norm": 1e-4,
    "weights": 1e-4,
}  # largest relative difference over steps or tensors
VOCABULARY = 131  # a prime: divisible by no tensor-parallel size
VALIDATION = 13  # pairs, the first ones: divisible by no number of ranks or of pairs in a batch


@dataclass(frozen=True)
class Case:
    """One training run: name, what it trains on, and on which layout."""

    name: str
    processes: int
    data: str  # random | real
    tied: bool = False
    method: str = "tgdpo"
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    seq_length: int = 512
    family: str = "llama"
    recompute: str = "none"
    recompute_modules: list[str] | None = None
    context: int = 1
    shared_prompts: bool | None = None
    virtual: int | None = None
    guidance: str = "colocated"  # colocated | prefetch | cached
    overlap: str = "none"  # none | grad_reduce | both
    global_pairs: int = SETTINGS.global_pairs
    layers: int = 4
    guide_layers: int = 4
    pipeline_layers: dict[str, list[int]] | None = None

    @property
    def settings(self) -> reference.Settings:
        """What the independent implementation is told."""
        sentences = self.method == "sentence"
        return replace(SETTINGS, global_pairs=self.global_pairs, sentences=sentences, **self.loss)

    @property
    def loss(self) -> dict[str, Any]:
        """The method and its options."""
        return {"method": self.method, **METHOD_OPTIONS[self.method]}

    @property
    def cached(self) -> bool:
        """Whether it reads a guidance cache."""
        frozen = self.loss["method"] in ("tgdpo", "dpo")
        return frozen and self.guidance == "cached"

    @property
    def model(self) -> str:
        """Names what is trained, apart from how."""
        depths = "" if self.layers == self.guide_layers == 4 else f"-{self.layers}-{self.guide_layers}"
        return f"{self.family}-{self.data}-{'tied' if self.tied else 'untied'}{depths}"


_MEANS = {"form": "sigmoid_norm", "reference_free": True, "beta": 2.0}
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "tgdpo": {},
    "dpo": {},
    "smoothed-dpo": {"method": "dpo", "beta": 0.3, "label_smoothing": 0.2, "sft_weight": 0.5},
    "ipo": {"method": "tgdpo", "form": "ipo", "beta": 0.5, "guide_beta": 0.2, "sft_weight": 0.5},
    "orpo": {"beta": 0.4},
    "sentence": {"method": "tgdpo", "alpha": 2.0},
    "sepo": {"method": "tgdpo", "weights": "sepo", "select_share": 0.4, **_MEANS},
    "confpo": {"method": "dpo", "weights": "confpo", "gamma": 0.7, **_MEANS},
    "simpo": {"beta": 2.5, "gamma": 0.7},
    "sft": {},
}

CASES = (
    Case("tp1", 1, "random"),
    Case("tp1-small-rows", 1, "random", seq_length=128),
    # Packs that hold the longest pair and no token more.
    Case("least-rows", 1, "random", seq_length=90),
    Case("sft-least-rows", 1, "random", seq_length=54, method="sft"),
    Case("pp2-least-rows", 2, "random", pipeline=2, seq_length=90),
    Case("tp1-tied", 1, "random", tied=True),
    Case("tp1-dpo", 1, "random", method="dpo"),
    Case("tp1-real", 1, "real"),
    Case("tp2", 2, "random", tensor=2),
    Case("tp2-tied", 2, "random", tied=True, tensor=2),
    Case("tp2-sp", 2, "random", tensor=2, sequence_parallel=True),
    Case("tp2-sp-real", 2, "real", tensor=2, sequence_parallel=True),
    Case("pp2-small-rows", 2, "random", pipeline=2, seq_length=128),
    Case("pp2-tied", 2, "random", tied=True, pipeline=2, seq_length=256),
    Case("pp2-dpo", 2, "random", method="dpo", pipeline=2),
    Case("pp2-real", 2, "real", pipeline=2),
    Case("dp2", 2, "random"),
    Case("dp2-real", 2, "real"),
    Case("tp2-pp2-tied", 4, "random", tied=True, tensor=2, pipeline=2),
    Case("tp2-pp2-sp-real", 4, "real", tensor=2, pipeline=2, sequence_parallel=True),
    Case("dp2-tp2-real", 4, "real", tensor=2),
    Case("dp2-pp2-tied", 4, "random", tied=True, pipeline=2, seq_length=128),
    Case("pp4", 4, "random", pipeline=4, seq_length=128),
    Case("tp4", 4, "random", tensor=4),
    # Random sequences are up to 60 tokens long, windows 24.
    Case("gemma2", 1, "random", tied=True, family="gemma2"),
    Case("gemma2-tp2-pp2-sp", 4, "random", tied=True, tensor=2, pipeline=2, sequence_parallel=True, family="gemma2"),
    Case("qwen2-tp4-tied", 4, "random", tied=True, tensor=4, family="qwen2"),
    Case("qwen3-tp2-pp2-sp", 4, "random", tensor=2, pipeline=2, sequence_parallel=True, family="qwen3"),
    Case("qwen3-tp4-tied", 4, "random", tied=True, tensor=4, family="qwen3"),
    Case("mistral-tp2-pp2", 4, "random", tensor=2, pipeline=2, family="mistral"),
    # Prompts are shared above, where nothing else is said.
    Case("unshared", 1, "random", seq_length=256, shared_prompts=False),
    Case("unshared-pp2", 2, "random", pipeline=2, seq_length=128, shared_prompts=False),
    Case("cp2", 2, "random", context=2, seq_length=256),
    Case("cp2-unshared", 2, "random", context=2, seq_length=256, shared_prompts=False),
    Case("cp2-real", 2, "real", context=2),
    Case("cp2-tp2-sp", 4, "random", context=2, tensor=2, sequence_parallel=True, seq_length=128),
    Case("cp2-vpp2", 4, "random", context=2, pipeline=2, virtual=2, seq_length=128),
    Case("cp2-dp2-qwen3", 4, "random", context=2, seq_length=128, family="qwen3"),
    Case("cp4", 4, "random", context=4, seq_length=256),
    Case("cp2-pp2-gemma2", 4, "random", tied=True, context=2, pipeline=2, family="gemma2"),
    Case("smoothed-dpo-cp2", 2, "random", context=2, seq_length=256, method="smoothed-dpo"),
    # Rewards of whole sentences, which random words without a full stop are one of.
    Case("sentence-cp2", 2, "random", context=2, seq_length=128, method="sentence", guidance="cached"),
    # Scores that are means, over the tokens of all context ranks.
    Case("ipo-cp2", 2, "random", context=2, seq_length=128, method="ipo"),
    # Tokens that are selected by what those on other ranks are.
    Case("sepo-cp2", 2, "random", context=2, seq_length=128, method="sepo"),
    Case("confpo-cp2", 2, "random", context=2, seq_length=128, method="confpo"),
    Case("orpo-cp2", 2, "random", context=2, seq_length=128, method="orpo"),
    Case("simpo-tp2-pp2", 4, "random", tensor=2, pipeline=2, seq_length=128, method="simpo"),
    Case("simpo-dp2", 2, "random", method="simpo"),
    Case("simpo-cp2", 2, "random", context=2, method="simpo"),
    Case("sft-tp2-pp2", 4, "random", tensor=2, pipeline=2, seq_length=128, method="sft"),
    Case("sft-dp2", 2, "random", seq_length=128, method="sft"),
    Case("sft-cp2", 2, "random", context=2, seq_length=128, method="sft"),
    Case("recompute-full", 4, "random", tensor=2, pipeline=2, sequence_parallel=True, seq_length=128, recompute="full"),
    # Two chunks a stage; four packs, and fewer, which empty ones fill up to a multiple of the stages.
    Case("vpp2", 2, "random", pipeline=2, virtual=2, seq_length=128),
    Case("vpp2-tied-cached", 2, "random", tied=True, pipeline=2, virtual=2, guidance="cached"),
    Case("vpp2-tied", 2, "random", tied=True, pipeline=2, virtual=2),
    Case("pp4-vpp2", 4, "random", pipeline=4, virtual=2, seq_length=128, layers=8, guide_layers=8),
    # Stages that are not equal: by cost, given, and in chunks; the guide has other layers than the policy.
    Case("pp2-uneven", 2, "random", pipeline=2, seq_length=128, layers=5, guide_layers=3),
    Case("pp2-uneven-prefetch", 2, "random", pipeline=2, layers=5, guide_layers=3, guidance="prefetch"),
    Case("pp2-uneven-cached", 2, "random", pipeline=2, layers=5, guide_layers=3, guidance="cached"),
    Case(
        "pp2-given-tied",
        2,
        "random",
        tied=True,
        pipeline=2,
        pipeline_layers={"policy": [1, 3], "reference": [3, 1], "guide": [2, 2]},
    ),
    Case("vpp2-uneven", 2, "random", pipeline=2, virtual=2, seq_length=128, layers=6, guide_layers=5),
    Case("pp3-gemma2", 3, "random", tied=True, pipeline=3, family="gemma2"),
    Case("pp4-uneven", 4, "random", pipeline=4, seq_length=128, layers=6, guide_layers=5, recompute="full"),
    # Windows and softcaps recompute their scores by themselves, inside what is recomputed here.
    Case("gemma2-recompute-full", 1, "random", tied=True, family="gemma2", recompute="full"),
    Case("gemma2-recompute-selective", 1, "random", tied=True, family="gemma2", recompute="selective"),
    Case(
        "gemma2-recompute-modules",
        1,
        "random",
        tied=True,
        family="gemma2",
        recompute="selective",
        recompute_modules=["layernorm", "mlp"],
    ),
)


def _overlapping(name: str, processes: int, **options: Any) -> Case:
    """A run whose traffic of data ranks is overlapped.

    Eight of the pairs take two or three micro batches on each of two data ranks, now more and now fewer than the step
    before (four or two where they come in twos, for chunks).
    """
    defaults: dict[str, Any] = {"overlap": "both", "seq_length": 128, "global_pairs": 8}
    return Case(f"overlap-{name}", processes, "random", **{**defaults, **options})


# So that a stage has several buckets; one of megatron-core's own size holds a whole tiny model.
BUCKET_PARAMETERS = 10_000
OVERLAP_CASES = (
    _overlapping("dp2", 2),
    _overlapping("dp2-cached", 2, guidance="cached"),
    _overlapping("pp2-dp2-prefetch", 4, pipeline=2, guidance="prefetch", tied=True),
    _overlapping("vpp2-dp2", 4, pipeline=2, virtual=2),
    _overlapping("vpp2-dp2-tied-simpo", 4, pipeline=2, virtual=2, tied=True, method="simpo", overlap="grad_reduce"),
    _overlapping("cp2-dp2", 4, context=2),
    _overlapping("tp2-sp-dp2", 4, tensor=2, sequence_parallel=True),
)
# Every way to have the frozen models' log-probs, on every layout that has data ranks; with --full of tests/run.sh.
_LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "pp2-dp2": {"pipeline": 2},
    "vpp2-dp2": {"pipeline": 2, "virtual": 2},
    "cp2-dp2": {"context": 2},
    "cp2-pp2": {"context": 2, "pipeline": 2},
    "cp4": {"context": 4},
    "tp2-dp2": {"tensor": 2},
    "tp2-sp-dp2": {"tensor": 2, "sequence_parallel": True},
}
FULL_OVERLAP_CASES = tuple(
    _overlapping(f"{layout}-{kind}-{overlap}", 4, overlap=overlap, **options, **_LAYOUTS[layout])
    for layout in _LAYOUTS
    for kind, options in {
        "colocated": {"guidance": "colocated"},
        "cached": {"guidance": "cached", "tied": True},
        "prefetch": {"guidance": "prefetch", "tied": True},
        "dpo": {"method": "dpo", "family": "qwen3", "guidance": "cached"},
        "simpo": {"method": "simpo"},
        "sft": {"method": "sft", "recompute": "full"},
    }.items()
    for overlap in ("grad_reduce", "both")
    if not (kind == "prefetch" and (_LAYOUTS[layout].get("pipeline", 1) == 1 or "virtual" in _LAYOUTS[layout]))
)
# Families beyond the first; with --full on two layouts each, which between them cut all that a model has.
FAMILY_CASES = (
    Case("gemma3-cp2", 2, "random", tied=True, context=2, seq_length=256, family="gemma3_text"),
    Case("olmo3-tp2-sp", 2, "random", tensor=2, sequence_parallel=True, family="olmo3"),
    Case("phi3-pp2", 2, "random", pipeline=2, seq_length=128, family="phi3"),
    Case("youtu-cp2-tp2", 4, "random", context=2, tensor=2, seq_length=256, family="youtu"),
)
FULL_FAMILY_CASES = tuple(
    Case(f"{family}-{name}", 4, "random", tied=family in ("gemma3_text", "granite"), family=family, **layout)
    for family in MORE_FAMILY_OPTIONS
    for name, layout in {
        "tp2-pp2-sp": {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "seq_length": 128},
        "cp2-tp2": {"context": 2, "tensor": 2, "seq_length": 256},
    }.items()
)
# Context, tensor and pipeline ranks at once; eight processes on few cores take long.
FULL_CASES = (
    Case("cp2-tp2-pp2-sp", 8, "random", context=2, tensor=2, pipeline=2, sequence_parallel=True, seq_length=128),
)
# What other cases have between them: each names those.
COVERED_CASES = (
    # tp2-pp2-tied; smoothed-dpo-cp2 has the options of the loss.
    Case("tp2-pp2", 4, "random", tensor=2, pipeline=2),
    Case("smoothed-dpo-tp2-pp2", 4, "random", tensor=2, pipeline=2, method="smoothed-dpo"),
    # dp2-tp2-real, overlap-tp2-sp-dp2.
    Case("dp2-tp2", 4, "random", tensor=2),
    # The same with sequence parallelism; qwen2-tp4-tied, qwen3-tp4-tied.
    Case("gemma2-tp2-pp2", 4, "random", tied=True, tensor=2, pipeline=2, family="gemma2"),
    Case("qwen2-tp2-pp2", 4, "random", tensor=2, pipeline=2, family="qwen2"),
    Case("qwen3-tp2-pp2", 4, "random", tensor=2, pipeline=2, family="qwen3"),
    # cp2-tp2-sp, youtu-cp2-tp2.
    Case("cp2-tp2-tied", 4, "random", tied=True, context=2, tensor=2),
    # cp2-vpp2, cp2-pp2-gemma2.
    Case("cp2-pp2", 4, "random", context=2, pipeline=2, seq_length=128),
    # The means are over tokens: ipo-cp2; tensor ranks have them all, as in simpo-tp2-pp2.
    Case("ipo-cp2-tp2", 4, "random", context=2, tensor=2, seq_length=128, method="ipo"),
    # gemma2-recompute-selective, overlap-prefetch-tp2.
    Case("recompute-selective", 4, "random", tensor=2, pipeline=2, seq_length=128, recompute="selective"),
    # overlap-orpo-tp2-vpp2, dpo-cached-tp2-vpp2.
    Case("vpp2-tp2-sp", 4, "random", tensor=2, pipeline=2, virtual=2, sequence_parallel=True, seq_length=128),
    # overlap-pp2-dp2-prefetch, overlap-vpp2-dp2.
    _overlapping("pp2-dp2", 4, pipeline=2),
)
_SP = {"sequence_parallel": True}
# What no other case has together: see tests/unit/config/test_grid.py.
GRID_CASES = (
    _overlapping(
        "dpo-cached-cp2-dp2", 4, method="dpo", guidance="cached", context=2, shared_prompts=False, **_SP,
        overlap="grad_reduce", recompute="selective", recompute_modules=["layernorm", "mlp"], seq_length=256,
    ),
    _overlapping(
        "orpo-tp2-vpp2", 4, method="orpo", tensor=2, pipeline=2, virtual=2, shared_prompts=False, **_SP,
        overlap="grad_reduce", recompute="full", global_pairs=4,
    ),
    _overlapping(
        "dpo-prefetch-cp2", 4, method="dpo", guidance="prefetch", pipeline=2, context=2, shared_prompts=False, **_SP,
        recompute="full", seq_length=256,
    ),
    _overlapping(
        "sft-vpp2", 2, method="sft", pipeline=2, virtual=2, shared_prompts=False, **_SP, recompute="selective",
        recompute_modules=["core_attn", "layernorm", "mlp"],
    ),
    _overlapping("simpo-dp2", 2, method="simpo", shared_prompts=False, **_SP, recompute="full"),
    _overlapping(
        "prefetch-tp2", 4, guidance="prefetch", tensor=2, pipeline=2, overlap="grad_reduce", recompute="selective",
        recompute_modules=["mlp"],
    ),
    _overlapping("orpo-dp2", 2, method="orpo", recompute="selective"),
    Case("dpo-cached-tp2-vpp2", 4, "random", method="dpo", guidance="cached", tensor=2, pipeline=2, virtual=2,
         seq_length=128, recompute="full"),
    _overlapping("sft-full", 1, method="sft", overlap="grad_reduce", recompute="full"),
    Case("simpo-selective", 1, "random", method="simpo", recompute="selective"),
)  # fmt: skip
CASES += OVERLAP_CASES + FAMILY_CASES + GRID_CASES
CASES += COVERED_CASES + FULL_CASES + FULL_OVERLAP_CASES + FULL_FAMILY_CASES if FULL else ()

# Identities: each of these runs must repeat the losses and gradient norms of "tp1-dpo".
DPO_IN_DISGUISE = ("alpha-0", "guide-is-reference")


@dataclass(frozen=True)
class Inputs:
    """What all cases share: the directories."""

    root: Path

    def policy(self, case: Case) -> Path:
        return self.root / f"policy-{case.model}"

    def guide(self, case: Case) -> Path:
        return self.root / f"guide-{case.model}"

    def cache(self, case: Case) -> Path:
        return self.root / f"cache-{case.model}-{case.method}-{case.processes}"

    def config(self, case: Case) -> dict[str, Any]:
        real = case.data == "real"
        return {
            "model": {
                "policy": str(self.policy(case)),
                "guide": str(self.guide(case)) if case.loss["method"] == "tgdpo" else None,
            },
            "data": {
                "train": str(self.root / ("real.json" if real else "random.jsonl")),
                "validation": str(self.root / ("validation-real.json" if real else "validation-random.jsonl")),
                "max_length": 96 if real else 64,
                "shuffle": False,
                "workers": 1,
                "tokenizer": str(SHARED_DATA / "llama2_sentencepiece.model" if real else self.root / "tokenizer"),
            },
            "loss": case.loss,
            "parallel": {
                "tensor": case.tensor,
                "pipeline": case.pipeline,
                "sequence_parallel": case.sequence_parallel,
                "context": case.context,
                "virtual_pipeline": case.virtual,
                "pipeline_layers": case.pipeline_layers or {},
                "timeout_minutes": 15,
            },
            "guidance": {
                "mode": "cached" if case.cached else "colocated",
                "cache": str(self.cache(case)),
                "unit": "sentence" if case.method == "sentence" else "token",
                "prefetch": case.guidance == "prefetch",
            },
            "overlap": {
                "grad_reduce": case.overlap != "none",
                "param_gather": case.overlap == "both",
            },
            "batch": {
                "global_pairs": case.global_pairs,
                "tokens_per_micro_batch": case.seq_length,
                "shared_prompts": case.shared_prompts,
            },
            "optimizer": {
                "lr": SETTINGS.lr,
                "weight_decay": SETTINGS.weight_decay,
                "clip_grad": SETTINGS.clip_grad,
                "schedule": "constant",
                "warmup_ratio": 0.0,
            },
            "precision": {"dtype": "fp32"},
            "train": {
                "steps": SETTINGS.steps,
                "recompute": case.recompute,
                "recompute_modules": case.recompute_modules,
            },
            "checkpoint": {"every_steps": SETTINGS.steps},
            "output_dir": str(self.root / "runs" / case.name),
        }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    made = Inputs(tmp_path_factory.mktemp("equivalence"))
    for case in {case.model: case for case in CASES}.values():
        if case.data == "random":
            common: dict[str, Any] = {"vocab_size": VOCABULARY, "tied": case.tied}
            if case.family == "glm":
                # What is not rotated of a key's bias moves no softmax: Adam would make whole steps of its rounding.
                common["attention_bias"] = False
            make_model(made.policy(case), case.family, seed=1, layers=case.layers, **common)
            make_model(made.guide(case), case.family, seed=2, hidden_size=32, layers=case.guide_layers, **common)
        elif SHARED_DATA.is_dir():
            small = {"vocab_size": 32000, "hidden_size": 16, "heads": 2, "layers": 2}
            make_model(made.policy(case), case.family, seed=3, **small)
            make_model(made.guide(case), case.family, seed=4, **small)
    # Not the models' own, which are not those of the real data, and which transformers reads as byte pairs next to a
    # Qwen2 model: a run would refuse them.
    for file in made.root.glob("*/*token*.json"):
        file.unlink()
    make_tokenizer(VOCABULARY).save_pretrained(made.root / "tokenizer")
    write_pairs(made.root / "random.jsonl", PAIRS, VOCABULARY)
    lines = (made.root / "random.jsonl").read_text().splitlines(keepends=True)
    (made.root / "validation-random.jsonl").write_text("".join(lines[:VALIDATION]))
    if SHARED_DATA.is_dir():
        pairs = json.loads((SHARED_DATA / "preference_pairs_en_300.json").read_text())[:PAIRS]
        (made.root / "real.json").write_text(json.dumps(pairs))
        (made.root / "validation-real.json").write_text(json.dumps(pairs[:VALIDATION]))
    return made


class Runs:
    """Trains all chosen cases of a process count in one launch, the first time one of them is asked for."""

    def __init__(self, inputs: Inputs, chosen: set[str]) -> None:
        self.inputs = inputs
        self.chosen = chosen
        self._launched: set[int] = set()
        self._expected: dict[tuple[str, str, int], reference.Result] = {}

    def output(self, case: Case) -> Path:
        if case.processes not in self._launched:
            self._launched.add(case.processes)
            ours = [
                c
                for c in CASES
                if c.processes == case.processes
                and c.name in self.chosen
                and (c.data == "random" or SHARED_DATA.is_dir())
            ]
            caches = {self.inputs.cache(c): c for c in ours if c.cached}
            cases: list[dict[str, Any]] = [
                *({"config": self.inputs.config(c), "precompute": 8} for c in caches.values()),
                *(
                    {
                        "config": self.inputs.config(c),
                        "export": str(self.inputs.root / "runs" / c.name / "hf"),
                        "bucket_parameters": BUCKET_PARAMETERS if c.overlap != "none" else None,
                    }
                    for c in ours
                ),
            ]
            if case.processes == 1:
                cases += [{"config": self._disguised(name), "export": None} for name in DPO_IN_DISGUISE]
            file = self.inputs.root / f"cases{case.processes}.json"
            file.write_text(json.dumps(cases))
            # A rank that hangs ends its case long before, by the time-out of its process groups.
            patience = PATIENCE * len(cases)
            run_forked("tests.distributed.worker_train", [str(file)], processes=case.processes, timeout=patience)
        return self.inputs.root / "runs" / case.name

    def by_other_versions(self, case: Case) -> Path:
        """Trains the same cases with the other environment's Python, all of a process count in one launch."""
        output, root = self.output(case), self.inputs.root / "other-versions"
        file = self.inputs.root / f"cases{case.processes}.json"
        if not root.joinpath(file.name).exists():
            root.mkdir(exist_ok=True)
            cases = json.loads(file.read_text())
            for one in cases:
                one["config"]["output_dir"] = str(root / Path(one["config"]["output_dir"]).name)
                # The cache of the other versions is read: one written twice would not be.
                one["export"] = None
            cases = [one for one in cases if "precompute" not in one]
            root.joinpath(file.name).write_text(json.dumps(cases))
            run_module(
                "tests.distributed.worker_train",
                [str(root / file.name)],
                processes=case.processes,
                timeout=PATIENCE * len(cases),
                python=OTHER_PYTHON,
            )
        return root / output.name

    def _disguised(self, name: str) -> dict[str, Any]:
        config = self.inputs.config(Case(name, 1, "random"))
        if name == "alpha-0":
            config["loss"]["alpha"] = 0.0
        else:
            config["model"]["guide"] = config["model"]["policy"]
        return config

    def expected(self, case: Case) -> reference.Result:
        key = (case.model, case.method, case.global_pairs)
        if key not in self._expected:
            policy = self.inputs.policy(case)
            guide = self.inputs.guide(case) if case.loss["method"] == "tgdpo" else None
            self._expected[key] = reference.train(policy, policy, guide, self._pairs(case), case.settings, VALIDATION)
        return self._expected[key]

    def _pairs(self, case: Case) -> list[reference.Tokens]:
        if case.data == "random":
            tokenizer = AutoTokenizer.from_pretrained(self.inputs.root / "tokenizer")
            records = [json.loads(line) for line in (self.inputs.root / "random.jsonl").read_text().splitlines()]
            return [
                reference.Tokens(*(tokenizer(record[side])["input_ids"] + end for side, end in _SIDES))
                for record in records
            ]
        # Chat templates and truncation have tests of their own; here the ids are given.
        (prefix,) = {path.name.split(".")[0] for path in (self.output(case) / "data").glob("real-*")}
        dataset = PreferenceDataset(str(self.output(case) / "data" / prefix))
        pairs = [dataset[i] for i in range(len(dataset))]
        return [reference.Tokens(p.prompt.tolist(), p.chosen.tolist(), p.rejected.tolist()) for p in pairs]


_SIDES = (("prompt", []), ("chosen", [2]), ("rejected", [2]))  # 2 is </s>


@pytest.fixture(scope="module")
def runs(inputs: Inputs, request: pytest.FixtureRequest) -> Runs:
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    # Beside what was chosen on the command line, what others are compared with.
    return Runs(inputs, {"tp1-dpo", *(one["case"].name for one in params if isinstance(one.get("case"), Case))})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_equals_plain_pytorch(runs: Runs, case: Case) -> None:
    if case.data == "real" and not SHARED_DATA.is_dir():
        pytest.skip("the shared real data is not there")
    output = runs.output(case)
    expected = runs.expected(case)
    steps = read_metrics(output)
    assert [step["step"] for step in steps] == list(range(1, SETTINGS.steps + 1))
    if case.method in ("tgdpo", "dpo"):
        assert steps[0]["train/loss"] == pytest.approx(math.log(2), rel=LIMITS["loss"])
    assert [step["step"] for step in steps if "eval/loss" in step] == [SETTINGS.steps]
    assert abs(steps[-1]["train/loss"] - steps[0]["train/loss"]) > 0.01, "nothing was learned"
    exported = {}
    for file in (output / "hf").glob("*.safetensors"):
        exported |= load_file(file)
    assert exported.keys() == expected.weights.keys()
    differences = {
        "loss": [abs(s["train/loss"] / want - 1) for s, want in zip(steps, expected.losses, strict=True)],
        "validation loss": [abs(steps[-1]["eval/loss"] / expected.final_loss - 1)],
        "gradient norm": [
            abs(s["train/grad_norm"] / want - 1) for s, want in zip(steps, expected.grad_norms, strict=True)
        ],
        "weights": [float((exported[name] - want).norm() / want.norm()) for name, want in expected.weights.items()],
    }
    # Shown by pytest -rP.
    print(case.name, {what: f"{max(values):.1e}" for what, values in differences.items()})
    for what, limit in LIMITS.items():
        assert all(value < limit for value in differences[what]), f"{what}: {differences[what]}"


@pytest.mark.skipif(not OTHER_PYTHON, reason="TGDPO_OTHER_PYTHON names no environment (bash tests/run_newest.sh)")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_other_versions_train_alike(runs: Runs, case: Case) -> None:
    if case.data == "real" and not SHARED_DATA.is_dir():
        pytest.skip("the shared real data is not there")
    here, there = read_metrics(runs.output(case)), read_metrics(runs.by_other_versions(case))
    assert len(here) == len(there) == SETTINGS.steps
    differences = [abs(one["train/loss"] / other["train/loss"] - 1) for one, other in zip(here, there, strict=True)]
    print(case.name, f"{max(differences):.1e}")
    assert max(differences) < 1e-6


@pytest.mark.parametrize("name", DPO_IN_DISGUISE)
def test_without_guidance_training_is_dpo(runs: Runs, name: str) -> None:
    (dpo,) = [case for case in CASES if case.name == "tp1-dpo"]
    expected = read_metrics(runs.output(dpo))
    steps = read_metrics(runs.inputs.root / "runs" / name)
    assert len(steps) == len(expected) == SETTINGS.steps
    for step, want in zip(steps, expected, strict=True):
        for key, limit in (("train/loss", LIMITS["loss"]), ("train/grad_norm", LIMITS["gradient norm"])):
            assert step[key] == pytest.approx(want[key], rel=limit), f"{key} of step {step['step']}"
