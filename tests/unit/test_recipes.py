"""Every recipe is a valid config for the models it names, says what it is, and fits its GPUs on paper."""

import re
from pathlib import Path

import pytest

from megatron_tgdpo.config.loading import load_config
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.layout import ParallelLayout, make_layout
from megatron_tgdpo.loss.methods import METHODS
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.activations import Pack
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.layouts import Plan, make_plan
from megatron_tgdpo.planning.memory import FrozenSource, Sources
from megatron_tgdpo.setup.model_sources import trained_lora
from tests.published_configs import PUBLISHED, write_config

RECIPES = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.yaml"))
NAME = re.compile(
    r"(?P<method>tgdpo|dpo)-(?P<model>[a-z0-9.]+-\d+b)(?P<long>-32k)?(?P<lora>-lora)?-(?P<nodes>\d+)n(?P<gpus>\d+)g-tp(?P<tp>\d+)pp(?P<pp>\d+)dp(?P<dp>\d+)"
)
MODELS = {
    "llama3-8b": "Llama-3-8B",
    "llama3-70b": "Llama-3-70B",
    "llama3.2-3b": "Llama-3.2-3B",
    "gemma2-2b": "gemma-2-2b",
    "qwen3-30b": "Qwen3-30B-A3B",
}
LONG_MODELS = {"qwen3-8b": "Qwen3-8B"}  # with a guide's training, and no recipe of its own for that


def parts(recipe: Path) -> dict[str, str | None]:
    match = NAME.fullmatch(recipe.stem)
    assert match is not None
    return match.groupdict()


def layout_of(config: Config, world_size: int) -> ParallelLayout:
    parallel = config.parallel
    return make_layout(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        parallel.sequence_parallel,
        world_size,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
    )


def gigabytes(recipe: Path) -> int:
    """Of the GPUs that the recipe is for."""
    (memory,) = re.findall(r" (\d+) GB:", recipe.read_text().splitlines()[0])
    return int(memory)


def plan_of(recipe: Path, tmp_path: Path) -> Plan:
    config, said = load_config(recipe), parts(recipe)
    model = read_hf_config(write_config(tmp_path, PUBLISHED[(MODELS | LONG_MODELS)[str(said["model"])]]))
    frozen = (model,) if config.model.guide is None else (model, model)
    if config.guidance.mode == "cached":
        frozen = ()
    batch = Batch(config.batch.global_pairs, config.data.max_length, 0.5, shared_prompts=True)
    keep = config.train.keep_logits_mib * 2**20
    pack = Pack(config.seq_length, config.data.max_length, 2, batch.gathered_keys, keep)
    sources = Sources()
    if (lora := trained_lora(config)) is not None:
        sources = Sources(lora, (FrozenSource(None, True), FrozenSource(lora, True)))
    job = Job(model, frozen, pack, batch, sources=sources)
    cluster = Cluster(nodes=int(said["nodes"]), gpus_per_node=int(said["gpus"]), gpu_memory_gib=gigabytes(recipe))
    return make_plan(job, cluster, layout_of(config, cluster.gpus), config.train.recomputation)


def test_there_are_recipes_for_every_model_and_method() -> None:
    assert {(parts(recipe)["method"], parts(recipe)["model"]) for recipe in RECIPES} == {
        (method, model) for method in ("tgdpo", "dpo") for model in MODELS
    } | {("tgdpo", model) for model in LONG_MODELS}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_what_its_name_and_launch_line_say(recipe: Path) -> None:
    config, said, text = load_config(recipe), parts(recipe), recipe.read_text()
    layout = layout_of(config, int(said["nodes"]) * int(said["gpus"]))
    assert config.loss.method == said["method"]
    assert (layout.tensor, layout.pipeline, layout.data) == (int(said["tp"]), int(said["pp"]), int(said["dp"]))
    assert str(layout) in text.splitlines()[0]
    (launch,) = [line for line in text.splitlines() if re.match(r"#   (tgdpo train|sbatch) ", line)]
    assert launch.endswith(f" launch/recipes/{recipe.name}")
    if said["nodes"] == "1":
        assert f"tgdpo train --nproc {said['gpus']} " in launch
    else:
        assert f"--nodes={said['nodes']} launch/train.sbatch " in launch
        sbatch = (recipe.parents[1] / "train.sbatch").read_text()
        assert f"#SBATCH --ntasks-per-node={said['gpus']}\n" in sbatch


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_has_the_hyper_parameters_of_the_reference_code(recipe: Path) -> None:
    config = load_config(recipe)
    assert (config.loss.beta, config.loss.alpha) == (0.1, 0.5 if config.loss.method == "tgdpo" else None)
    told = {"beta": 0.1, **({"alpha": 0.5} if config.loss.method == "tgdpo" else {})}
    assert config.loss.options == {**METHODS[config.loss.method].options, **told}
    assert (config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup_ratio) == (
        7e-6 if parts(recipe)["lora"] else 7e-7,
        "cosine",
        0.1,
    )
    length = 32768 if parts(recipe)["long"] else 2048
    assert (config.batch.global_pairs, config.data.max_length, config.train.epochs) == (128, length, 1)
    assert config.precision.dtype == "bf16"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_fits_its_gpus_and_says_what_is_planned(recipe: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe, tmp_path)
    assert plan.fits
    # Whichever gigabyte is meant.
    assert plan.memory.total < gigabytes(recipe) * 1e9
    assert plan.warning == ""
    said = re.search(
        r"# Planned, not measured .*: ([\d.]+) GiB on the fullest GPU, ([\d.]+) s a step", recipe.read_text()
    )
    assert said is not None
    assert float(said[1]) == pytest.approx(plan.memory.total / 2**30, abs=0.06)
    assert float(said[2]) == pytest.approx(plan.time.total, abs=0.06)
