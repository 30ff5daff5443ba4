"""The planner's memory and traffic beside what engines really allocate and send, over layouts, families and dtypes."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.adapter_directory import Lora
from megatron_tgdpo.distributed.layout import ParallelLayout, make_layout
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.activations import LayerWidths, Pack
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.memory import FrozenSource, RankMemory, Sources, stage_memory
from megatron_tgdpo.planning.recomputation import recompute_keys
from megatron_tgdpo.planning.traffic import data_bytes, pipeline_bytes, ring, tensor_bytes
from tests.distributed.common import merged
from tests.processes import run_forked
from tests.tiny_models import make_model

STATIC_LIMIT = 0.02
KEPT_LIMIT = 0.05
# A plan may be too large rather than too small; here Gloo's threads may also hold what they sent for a while.
PEAK_LIMITS = (-0.2, 0.1)
# What several tensor ranks have one of them saves; and there are descriptions of the tensors.
SAVE_LIMITS = (-0.05, 0.1)
SHAPE: dict[str, Any] = {"hidden_size": 128, "mlp_size": 320, "heads": 8, "kv_heads": 4, "vocab_size": 500}
LENGTH = 128


LORA = Lora(8, 16.0, ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


def case(family: str, dtype: str, recompute: str = "none", lora: bool = False, **parallel: Any) -> dict[str, Any]:
    return {"family": family, "dtype": dtype, "recompute": recompute, "lora": lora, "parallel": parallel}


CASES = {
    1: {
        "llama-fp32": case("llama", "fp32"),
        "llama-bf16": case("llama", "bf16"),
        "llama-full": case("llama", "bf16", "full"),
        "llama-selective": case("llama", "bf16", "selective"),
        "gemma2": case("gemma2", "bf16"),
        "gemma2-selective": case("gemma2", "bf16", "selective"),
        "qwen3": case("qwen3", "bf16"),
        "mistral-full": case("mistral", "fp32", "full"),
        "llama-lora": case("llama", "bf16", lora=True),
        "llama-mlp": case("llama", "bf16", "mlp"),
        "llama-norms-mlp": case("llama", "bf16", "layernorm,mlp"),
        "llama-norms": case("llama", "fp32", "core_attn,layernorm"),
        "gemma2-norms-mlp": case("gemma2", "bf16", "mlp,layernorm"),
        "youtu": case("youtu", "bf16"),
        "youtu-lora": case("youtu", "fp32", lora=True),
        "llama-norms-mlp-lora": case("llama", "bf16", "layernorm,mlp", lora=True),
    },
    4: {
        "llama-tp2-pp2-sp": case("llama", "bf16", tensor=2, pipeline=2, sequence_parallel=True),
        "llama-tp2-pp2-full": case("llama", "bf16", "full", tensor=2, pipeline=2),
        "gemma2-pp4": case("gemma2", "bf16", pipeline=4),
        "qwen2-tp2-dp2": case("qwen2", "bf16", tensor=2),
        "llama-dp4-fp32": case("llama", "fp32"),
        "llama-tp2-pp2-sp-lora": case("llama", "bf16", lora=True, tensor=2, pipeline=2, sequence_parallel=True),
        "llama-tp2-pp2-sp-mlp": case("llama", "bf16", "mlp", tensor=2, pipeline=2, sequence_parallel=True),
        "gemma2-tp2-dp2-lora": case("gemma2", "fp32", lora=True, tensor=2),
    },
}
# Whose traffic is counted, too.
TRAFFIC = ("llama-tp2-pp2-sp-mlp", "llama-tp2-pp2-sp", "llama-tp2-pp2-full", "qwen2-tp2-dp2", "llama-tp2-pp2-sp-lora")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("memory")
    families = {values["family"] for cases in CASES.values() for values in cases.values()}
    for family in families:
        options = {"sliding_window": 64} if family in ("gemma2", "mistral") else {}
        if family == "youtu":
            options = {"num_key_value_heads": SHAPE["heads"]}
        make_model(made / family, family, tied=family == "gemma2", **SHAPE, **options)
        make_model(made / f"{family}-guide", family, tied=False, **{**SHAPE, "hidden_size": 64}, **options)
    return made


def config_of(root: Path, values: dict[str, Any]) -> dict[str, Any]:
    base = {
        "model": {"policy": str(root / values["family"]), "guide": str(root / f"{values['family']}-guide")},
        "data": {"train": "unused", "max_length": LENGTH},
        "batch": {"global_pairs": 8, "tokens_per_micro_batch": 4 * LENGTH},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1},
        "output_dir": str(root / "run"),
    }
    return merged(
        base,
        parallel=values["parallel"],
        precision={"dtype": values["dtype"]},
        train=recompute_keys(values["recompute"]),
        lora={"rank": LORA.rank, "targets": list(LORA.targets)} if values["lora"] else {},
    )


def sources_of(values: dict[str, Any]) -> Sources:
    """With LoRA the reference is the policy's base; the guide is a model of its own."""
    return Sources(LORA, (FrozenSource(shared=True), FrozenSource())) if values["lora"] else Sources()


class Measured:
    """Measures all cases of a process count in one launch, the first time one of them is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._facts: dict[int, list[dict[str, Any]]] = {}

    def ranks(self, processes: int, name: str) -> list[dict[str, int]]:
        if processes not in self._facts:
            file = self.root / f"configs{processes}.json"
            file.write_text(json.dumps({n: config_of(self.root, values) for n, values in CASES[processes].items()}))
            done = run_forked("tests.distributed.worker_plan", [str(file), *TRAFFIC], processes=processes)
            (line,) = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
            self._facts[processes] = json.loads(line.removeprefix("FACTS "))
        return [rank[name] for rank in self._facts[processes]]


@pytest.fixture(scope="module")
def measured(root: Path) -> Measured:
    return Measured(root)


def planned_inputs(
    root: Path, processes: int, values: dict[str, Any]
) -> tuple[list[PretrainedConfig], ParallelLayout, Pack]:
    """Policy, reference and guide; the layout; the pack."""
    policy, guide = (read_hf_config(root / f"{values['family']}{suffix}") for suffix in ("", "-guide"))
    parallel = {"tensor": 1, "pipeline": 1, "sequence_parallel": False, **values["parallel"]}
    layout = make_layout(parallel["tensor"], parallel["pipeline"], 1, parallel["sequence_parallel"], processes)
    return [policy, policy, guide], layout, Pack(4 * LENGTH, LENGTH, 4 if values["dtype"] == "fp32" else 2, 0.0, 2**30)


def step_bytes(
    policy: PretrainedConfig, layout: ParallelLayout, pack: Pack, values: dict[str, Any], plan: RankMemory
) -> tuple[float, float]:
    """The plan's bytes kept by the policy's forward alone, and its peak of a step."""
    last, in_flight = plan.stage == layout.pipeline - 1, layout.pipeline - plan.stage
    hidden = pack.tokens * LayerWidths.of(policy, layout).hidden * pack.dtype_bytes
    kept = plan.activations / in_flight + hidden
    if last:  # what the log-probs keep, which a forward alone does not make
        kept -= pack.tokens * policy.hidden_size * pack.dtype_bytes
    if layout.sequence_parallel and not values["lora"]:  # megatron-core's buffer, for inputs of linears that train
        kept += pack.tokens * policy.hidden_size * pack.dtype_bytes
    return kept, plan.activations + plan.carried + plan.workspace


@pytest.mark.parametrize(("processes", "name"), [(processes, name) for processes in CASES for name in CASES[processes]])
def test_memory_is_what_is_allocated(root: Path, measured: Measured, processes: int, name: str) -> None:
    values = CASES[processes][name]
    (policy, *frozen), layout, pack = planned_inputs(root, processes, values)
    for facts in measured.ranks(processes, name):
        plan = stage_memory(
            policy, frozen, layout, pack, values["recompute"], facts["stage"], sources=sources_of(values)
        )
        kept, peak = step_bytes(policy, layout, pack, values, plan)
        kinds = ("weights", "frozen", "gradients", "optimizer")
        static = {kind: facts[kind] / getattr(plan, kind) - 1 for kind in kinds}
        step = {"kept": facts["kept"] / kept - 1, "peak": facts["step_peak"] / peak - 1}
        # Shown by pytest -rP: measured beside planned.
        print(f"{name} stage {plan.stage}", {kind: f"{value:+.1%}" for kind, value in (static | step).items()})
        assert all(abs(value) < STATIC_LIMIT for value in static.values()), static
        assert abs(step["kept"]) < KEPT_LIMIT
        assert PEAK_LIMITS[0] < step["peak"] < PEAK_LIMITS[1]
        if values["lora"] and facts["tensor"]:
            continue  # half of an adapter is the same on all tensor ranks, and the first saves it
        save = {name: facts[name] / plan.save - 1 for name in ("save", "save_peak")}
        print(f"{name} stage {plan.stage}", {kind: f"{value:+.1%}" for kind, value in save.items()})
        assert SAVE_LIMITS[0] < save["save"] <= save["save_peak"] < SAVE_LIMITS[1]


def ends(job: Job, layout: ParallelLayout, stage: int, responses: int) -> float:
    """Bytes of tensor traffic per row that the plan leaves out: at the embedding and at the log-probs."""
    passes = 1 if layout.sequence_parallel else 2
    sizes = [ring(layout.tensor) * model.hidden_size * job.pack.dtype_bytes for model in job.models]
    sent = 0.0
    if stage == 0:
        # Beside adapters no gradient goes back to the embedding, nor to the input of the first layer's first linear.
        backward = -1 if job.sources.trained else 1
        sent += job.pack.tokens * (passes * sum(sizes) + layout.sequence_parallel * backward * sizes[0])
    if stage == layout.pipeline - 1:
        gathered = job.pack.tokens * (sum(sizes) + sizes[0])
        sent += gathered if layout.sequence_parallel else passes * responses * sizes[0]
    return sent


@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic_is_what_is_sent(root: Path, measured: Measured, name: str) -> None:
    values = CASES[4][name]
    models, layout, pack = planned_inputs(root, 4, values)
    job = Job(models[0], tuple(models[1:]), pack, Batch(8, 2 * LENGTH, 1.0, False), sources=sources_of(values))
    packs, responses, ranks = 2 * layout.pipeline, 4 * (LENGTH - 1), measured.ranks(4, name)
    for facts in ranks:
        stage = facts["stage"]
        tensor = sum(tensor_bytes(job, layout, values["recompute"], stage)) + ends(job, layout, stage, responses)
        assert facts["sent_bf16"] == pytest.approx(packs * tensor)
        if layout.pipeline == 1:
            # Three floats a response token and model go into the log-probs' all-reduces.
            logprobs = 2 * ring(layout.tensor) * 3 * 4 * responses * len(models) * packs
            reduced = data_bytes(job, layout) * 4 / (4 + pack.dtype_bytes)  # without the gathering of new weights
            assert facts["sent_fp32"] == pytest.approx(reduced + logprobs)
    # Stage 0 sends forwards only, stage 1 backwards only: together what a middle stage sends.
    assert sum(facts["sent_stages"] for facts in ranks[:: layout.tensor * layout.data]) == packs * pipeline_bytes(
        job, layout
    )
