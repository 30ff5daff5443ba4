"""What a model may be is the same in every key and option that takes one, and so is what is said of what is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from huggingface_hub import constants

from checkpoints_convert import hf_to_megatron, megatron_to_hf, verify
from checkpoints_convert.import_hf import import_hf
from megatron_tgdpo.checkpoints.best import Best, write_best
from megatron_tgdpo.checkpoints.find_model import find_model
from megatron_tgdpo.config.loading import load_config
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.ranks import RankEnvironment
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.setup.hub_inputs import PINS_FILE, Pins, as_recorded, pin_inputs, record_pins
from tests.tiny_models import make_llama
from tgdpo import build_preferences, evaluate, generate, plan, report

COMMIT = "c" * 40
KINDS = ("hf", "hub", "checkpoint", "run")
NEWEST = "step_00000002"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every form; newer than the newest complete checkpoint of its run are two that are not."""
    root = tmp_path_factory.mktemp("models")
    make_llama(root / "hf", layers=1)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    import_hf(root / "hf", root / "checkpoint", read_hf_config(root / "hf"))
    dist.destroy_process_group()
    steps = root / "run" / "checkpoints"
    for name in ("step_00000001", NEWEST, "step_00000003", "step_00000004.tmp"):
        shutil.copytree(root / "checkpoint", steps / name)
    (steps / "step_00000003" / "tgdpo.json").unlink()
    hub = root / "cache" / "models--owner--name"
    shutil.copytree(root / "hf", hub / "snapshots" / COMMIT)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(COMMIT)
    pairs = [{"prompt": f"w{k} w5", "chosen": f"w6 w{k}", "rejected": "w9"} for k in range(10, 14)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (root / "questions.jsonl").write_text('{"question_id": 1, "category": "writing", "turns": ["w5 w6"]}\n')
    return root


@pytest.fixture(autouse=True)
def _offline(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(models / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def named(models: Path, kind: str) -> str:
    return "owner/name" if kind == "hub" else str(models / kind)


def means(models: Path, kind: str) -> Path:
    """The directory that a kind's name stands for."""
    found = {"hub": models / "cache" / "models--owner--name" / "snapshots" / COMMIT,
             "run": models / "run" / "checkpoints" / NEWEST}  # fmt: skip
    return found.get(kind, models / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_text_means(models: Path, kind: str) -> None:
    assert find_model(named(models, kind), "--model") == means(models, kind)


def test_best_in_an_output_directory_is_its_best_checkpoint(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(models / "run", tmp_path / "run")
    with pytest.raises(UserError, match=r"^--model \S*/run/best: the run has no best checkpoint"):
        find_model(run / "best", "--model")
    write_best(run, Best("eval/loss", "min", 0.5, 1, "basis"))
    assert find_model(run / "best", "--model") == run / "checkpoints" / "step_00000001"
    assert find_model(run, "--model") == run / "checkpoints" / NEWEST
    # Never one of the Hub, nor a directory of that name.
    monkeypatch.chdir(tmp_path)
    (run / "best").mkdir()
    assert find_model("run/best", "--model") == Path("run/checkpoints/step_00000001")
    write_best(run, Best("eval/loss", "min", 0.5, 7, "basis"))
    with pytest.raises(UserError, match="the run has lost its best one, of step 7: name"):
        find_model("run/best", "--model")
    with pytest.raises(UserError, match="no such directory"):
        find_model(tmp_path / ("a" * 300), "--model")


def test_a_run_whose_checkpoints_are_all_damaged_says_what_is_wrong(models: Path, tmp_path: Path) -> None:
    run = shutil.copytree(models / "run", tmp_path / "run")
    found = sorted((run / "checkpoints").iterdir())
    for checkpoint in found:
        (checkpoint / "common.pt").unlink(missing_ok=True)
    left = "no undamaged checkpoint is left there: put one back, or name another model"
    with pytest.raises(UserError) as raised:
        find_model(run, "--model")
    damage = "step_00000003: not a complete Megatron checkpoint of this project: no tgdpo.json"
    assert str(raised.value) == f"--model {run}: {run}/checkpoints/{damage}: {left}"
    for checkpoint in found:
        checkpoint.rename(checkpoint.with_name(checkpoint.name + ".damaged"))
    with pytest.raises(UserError, match=rf"^--model {run}: {run}/checkpoints/[\w.]+\.damaged: set aside for its"):
        find_model(run, "--model")


def write_config(models: Path, out: Path, guide: str) -> Path:
    config = {
        "model": {"policy": str(models / "hf"), "guide": guide},
        "data": {"train": str(models / "pairs.jsonl"), "max_length": 32, "workers": 1},
        "batch": {"global_pairs": 2}, "optimizer": {"lr": 1e-4}, "precision": {"dtype": "fp32"}, "train": {"steps": 1},
        "output_dir": str(out / "tgdpo"),
    }  # fmt: skip
    (out / "config.yaml").write_text(json.dumps(config))
    return out / "config.yaml"


def longest_answer(prompt: object, answers: list[str]) -> list[float]:
    return [float(number) for number, _ in enumerate(answers)]


def run_generate(models: Path, model: str, out: Path) -> int:
    return generate.main([
        "--benchmark", "mt_bench", "--questions", str(models / "questions.jsonl"), "--model", model, "--name", "n",
        "--out", str(out / "n.jsonl"), "--max-new-tokens", "2",
    ])  # fmt: skip


def run_evaluate(models: Path, model: str, out: Path) -> int:
    pairs = ["--pairs", str(models / "pairs.jsonl"), "--out", str(out / "results.json"), "--prompts", "0"]
    return evaluate.main(["--reference", model, "--model", f"same={model}", "--guide", model, *pairs])


def run_build_preferences(models: Path, model: str, out: Path) -> int:
    return build_preferences.main([
        "--prompts", str(models / "pairs.jsonl"), "--model", model, "--score", f"{__name__}:longest_answer",
        "--out", str(out / "made.jsonl"), "--samples", "2", "--max-new-tokens", "2",
    ])  # fmt: skip


def run_report(models: Path, model: str, out: Path) -> int:
    config = write_config(models, out, model)
    others = ["--reference", model, "--policy", model]
    return report.main([str(config), "--out", str(out / "report.html"), "--pairs", "2", *others])


def run_report_of_config(models: Path, model: str, out: Path) -> int:
    return report.main([str(write_config(models, out, model)), "--out", str(out / "report.html"), "--pairs", "2"])


def run_plan(models: Path, model: str, out: Path) -> int:
    return plan.main(["--model", model, "--guide", model, "--tensor", "1", "--pipeline", "1"])


COMMANDS: dict[str, Callable[[Path, str, Path], int]] = {
    name.removeprefix("run_"): command for name, command in list(globals().items()) if name.startswith("run_")
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_every_kind(
    models: Path, tmp_path: Path, kind: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMANDS[command](models, named(models, kind), tmp_path) == 0, capsys.readouterr().err


CONVERSIONS = {
    # By the option, what is run, with the kinds that it takes and what it says of the others.
    "--hf": (hf_to_megatron.main, ("hf", "hub"), "a Megatron checkpoint: name an HF directory, or a model of the Hub"),
    "--megatron": (megatron_to_hf.main, ("checkpoint", "run"), "an HF model: name a Megatron checkpoint or a"),
}


@pytest.mark.parametrize("option", CONVERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_conversions_take_every_kind_of_their_side(
    models: Path, tmp_path: Path, kind: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, taken, otherwise = CONVERSIONS[option]
    monkeypatch.setattr("sys.argv", ["convert", option, named(models, kind), "--out", str(tmp_path / "out")])
    if kind not in taken:
        with pytest.raises(UserError, match=f"^{option} .*: {otherwise}"):
            main()
        return
    try:
        main()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert find_model(tmp_path / "out", "--model") == tmp_path / "out"


def test_verify_takes_what_conversions_take(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr("checkpoints_convert.compare_outputs.verify", lambda given: asked.update(vars(given)))
    monkeypatch.setattr("sys.argv", ["verify", "--hf", "owner/name", "--megatron", str(models / "run")])
    verify.main()
    from checkpoints_convert.command_line import find_checkpoint, find_hf

    assert find_hf(asked["hf"]) == means(models, "hub")
    assert find_checkpoint(asked["megatron"]) == means(models, "run")


def pinned(file: Path) -> tuple[Config, Pins]:
    return pin_inputs(load_config(file), RankEnvironment(0, 1, 0, None, None), dist.HashStore())


@pytest.mark.parametrize("kind", KINDS)
def test_training_takes_every_kind(models: Path, tmp_path: Path, kind: str) -> None:
    config, _ = pinned(write_config(models, tmp_path, named(models, kind)))
    assert Path(config.model_paths["guide"]) == means(models, kind)


def test_a_training_stays_with_the_checkpoint_that_it_began_with(models: Path, tmp_path: Path) -> None:
    run = tmp_path / "guide"
    shutil.copytree(models / "run", run)
    file = write_config(models, tmp_path, str(run))
    config, pins = pinned(file)
    out = Path(config.output_dir)
    out.mkdir()
    record_pins(out, pins)
    assert json.loads((out / PINS_FILE).read_text())["run"] == {str(run): str(run / "checkpoints" / NEWEST)}
    shutil.copytree(models / "checkpoint", run / "checkpoints" / "step_00000009")
    assert pinned(file)[0] == config == as_recorded(load_config(file))
    # One that is gone: the newest, whose weights are then compared with those that the run began with.
    shutil.rmtree(run / "checkpoints" / NEWEST)
    assert Path(str(pinned(file)[0].model.guide)).name == "step_00000009"


def bad(models: Path, tmp_path: Path) -> dict[str, str]:
    """Texts that mean no model, with what is said of each."""
    for folder in ("empty", "begun/checkpoints/step_00000001.tmp", "adapter"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    return {
        f"{models}/checkpiont": f"no such directory: did you mean {models}/checkpoint?",
        f"{tmp_path}/nowhere/at/all": "no such directory",
        f"{models}/pairs.jsonl": "a file: name the directory of the model",
        f"{tmp_path}/empty": "neither an HF directory (no config.json) nor a Megatron checkpoint nor a training output",
        f"{tmp_path}/begun": "a training output directory without a complete checkpoint: start its run again",
        f"{tmp_path}/adapter": "a LoRA adapter (adapter_config.json), not a whole model: in training it may be",
        f"{models}/run/checkpoints/step_00000003": "no tgdpo.json: name another checkpoint, or its run's output dir",
        f"{models}/run/checkpoints/step_00000004.tmp": "its save did not end: name another checkpoint",
        "owner/other": "HF_HUB_OFFLINE is set: fetch it where there is a network, with the same HF_HOME: hf download",
    }  # fmt: skip


def test_a_model_and_an_adapter_in_one_directory(models: Path, tmp_path: Path) -> None:
    """transformers would take the adapter and its base, whatever weights are there."""
    both = tmp_path / "both"
    shutil.copytree(models / "hf", both)
    (both / "adapter_config.json").write_text("{}")
    for adapter in (True, False):
        with pytest.raises(UserError, match=r"a whole model and a LoRA adapter \(.* in one directory"):
            find_model(both, "--model", adapter=adapter)
    # The base's config beside it makes no model of an adapter.
    for file in both.glob("model*.safetensors"):
        file.unlink()
    assert find_model(both, "--model", adapter=True) == both
    with pytest.raises(UserError, match="a LoRA adapter"):
        find_model(both, "--model")


def test_what_is_no_model_is_said_in_one_line_that_begins_with_the_key(models: Path, tmp_path: Path) -> None:
    for text, message in bad(models, tmp_path).items():
        for what in ("model.guide", "--model"):
            with pytest.raises(UserError) as error:
                find_model(text, what)
            assert str(error.value).startswith(what), error.value
            assert message in str(error.value)
        # A guide may be an adapter; what kind of one is seen with its base.
        if not text.endswith("/adapter"):
            with pytest.raises(UserError, match=r"^model\.guide"):
                pinned(write_config(models, tmp_path, text))


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "report_of_config"])
def test_every_command_names_its_option(
    models: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, message in bad(models, tmp_path).items():
        assert COMMANDS[command](models, text, tmp_path) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(("error: --model ", "error: --model: ", "error: --reference ", "error: --reference: "))
        # Where an adapter may be named, its base is looked for.
        assert message in line or (text.endswith("/adapter") and "an adapter of type None: only LORA" in line)
