"""Exports of LoRA runs: the adapter alone, and base and adapter in one, beside what ``peft`` makes of the same."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints_convert.export_adapter import adapter_tensors, peft_config
from checkpoints_convert.merge import merged as merged_with
from checkpoints_convert.merge import merged_dtype, read_base_model
from checkpoints_convert.pieces import all_pieces
from megatron_tgdpo.checkpoints.adapter_directory import PREFIX, Lora, read_lora
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.mapping import parameter_count
from megatron_tgdpo.training.run import dry_run
from tests.distributed.common import assert_same_weights, make_problem, merged, read_weights
from tests.processes import run_forked
from tests.tiny_models import make_llama
from tgdpo.command_line import find_whole_model
from tgdpo.generation.models import fingerprint, hf_directory

peft = pytest.importorskip("peft")

CHECKPOINT = "step_00000002"
TO_HF = "checkpoints_convert.megatron_to_hf"


class Run:
    """A LoRA run of two steps that exports its adapter, and its base as a Megatron checkpoint."""

    def __init__(self, root: Path) -> None:
        self.root, self.output = root, root / "run"
        self.checkpoint, self.adapter = self.output / "checkpoints" / CHECKPOINT, self.output / "hf" / CHECKPOINT
        self.config: dict[str, Any] = merged(
            make_problem(root, layers=2),
            lora={"rank": 4, "targets": ["qkv", "o_proj", "up_proj", "down_proj"], "rslora": True},
            optimizer={"lr": 2e-2, "warmup_ratio": 0.0},
            train={"steps": 2},
            export={"hf": "end"},
            preflight={"enabled": False},
            loss={"method": "dpo"},
            model={"guide": None},
        )
        self.log = self.train("tp2", parallel={"tensor": 2}, processes=2)
        self.base = root / "megatron"
        run_forked("checkpoints_convert.hf_to_megatron", ["--hf", str(root / "policy"), "--out", str(self.base)])

    def train(self, name: str, processes: int = 1, **sections: Any) -> str:
        """What a start of the run says."""
        file = self.root / f"{name}.json"
        file.write_text(json.dumps(merged(self.config, **sections)))
        return run_forked("tgdpo.train", [str(file)], processes=processes).stderr

    def merge(self, name: str, *words: str, processes: int = 1) -> Path:
        out = self.root / name
        given = ["--megatron", str(self.output), "--out", str(out), "--merge", "--max-shard-size", "100KB", *words]
        run_forked(TO_HF, given, processes=processes)
        return out

    def refusal(self, *words: str, processes: int = 1) -> str:
        """What ``tgdpo convert to-hf`` says when it refuses, once; nothing is written."""
        out = self.root / "refused"
        done = run_forked(TO_HF, ["--out", str(out), *words], processes=processes, check=False)
        assert done.returncode == 1
        assert not out.exists()
        (line,) = {line for line in done.stderr.splitlines() if "error: " in line}
        return line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("lora-export"))


@pytest.fixture(scope="module")
def whole(run: Run) -> Path:
    """The run as a whole model, by one rank from the base in HF files."""
    return run.merge("merged")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(torch.arange(3, 43).reshape(2, 20)).logits
    return result


def base_model(run: Run) -> Any:
    return AutoModelForCausalLM.from_pretrained(run.root / "policy", dtype=torch.float32)


def test_a_merged_export_is_what_peft_merges(run: Run, whole: Path) -> None:
    adapted = peft.PeftModel.from_pretrained(base_model(run), run.adapter)
    ours = logits(AutoModelForCausalLM.from_pretrained(whole))
    torch.testing.assert_close(ours, logits(adapted), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, logits(base_model(run)), atol=1e-3), "the adapter does nothing"
    expected, found = adapted.merge_and_unload().state_dict(), read_weights(whole)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    # Linears without an adapter are as they were, to the bit.
    name = "model.layers.1.mlp.gate_proj.weight"
    assert torch.equal(found[name], read_weights(run.root / "policy")[name])
    assert len(list(whole.glob("*.safetensors"))) > 2


def test_a_base_in_either_format_gives_the_same_bits(run: Run) -> None:
    hf_config = read_hf_config(run.root / "policy")
    adapter = adapter_tensors(run.checkpoint, hf_config, torch.float32)
    lora = read_lora(run.checkpoint)
    of_hf, of_megatron = (
        merged_with(read_base_model(base, hf_config), adapter, lora, hf_config)
        for base in (run.root / "policy", run.base)
    )
    for piece in all_pieces(hf_config, 4):
        for ours, theirs in zip(of_hf(piece), of_megatron(piece), strict=True):
            assert ours[:2] == theirs[:2]
            assert torch.equal(ours[2], theirs[2]), ours[0]


def test_ranks_may_be_any_number(run: Run, whole: Path) -> None:
    two = run.merge("two-ranks", processes=2)
    files = sorted(file.name for file in whole.iterdir())
    assert files == sorted(file.name for file in two.iterdir())
    assert all((whole / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_another_base_is_refused(run: Run) -> None:
    other = make_llama(run.root / "other", seed=9, layers=2)
    said = run.refusal("--megatron", str(run.output), "--merge", "--base", str(other), processes=2)
    assert f"{other}: not the base model of {run.checkpoint}: the sha256 of its weights is " in said
    assert said.endswith("name the right one with --base")


def test_a_base_that_has_gone_is_named_with_base(run: Run, whole: Path) -> None:
    moved = (run.root / "policy").rename(run.root / "moved")
    try:
        said = run.refusal("--megatron", str(run.output), "--merge")
        found = run.merge("of-moved", "--base", str(moved))
    finally:
        moved.rename(run.root / "policy")
    assert f"model.policy {run.root / 'policy'}: no such directory" in said
    assert said.endswith(": name it with --base")
    assert_same_weights(found, whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--megatron", "{run}", "--base", "x"], "--base is of --merge"),
        (["--megatron", "{run}", "--hf-template", "x"], "is an adapter, without a config"),
        (["--megatron", "{megatron}", "--merge"], "is a whole model, not an adapter: leave it out"),
    ],
)
def test_options_that_do_not_go_together(run: Run, words: list[str], said: str) -> None:
    given = [word.format(run=run.output, megatron=run.base) for word in words]
    assert said in run.refusal(*given)


def test_a_run_exports_its_adapter_or_a_whole_model(run: Run, whole: Path) -> None:
    serve = f"as a server: vllm serve {run.root / 'policy'} --enable-lora --max-lora-rank 8 --lora-modules run="
    assert f"{serve}{run.adapter}" in run.log
    merge = f"a whole model of it: tgdpo convert to-hf --megatron {run.output} --out {run.adapter}-merged --merge"
    assert merge in run.log
    # The same adapter, by the command.
    out = run.root / "adapter"
    run_forked(TO_HF, ["--megatron", str(run.checkpoint), "--out", str(out)])
    assert_same_weights(out, run.adapter)
    adapter = run.adapter.rename(run.root / "kept")
    try:
        run.adapter.mkdir()
        (run.adapter / "adapter_config.json").write_text("{}")
        # The finished run once more: its adapter gives way to a whole model.
        log = run.train("merged-run", export={"merge": True})
        assert f"as a server: vllm serve {run.adapter}" in log
        assert "compare it: tgdpo evaluate --reference" in log
        assert not (run.adapter / "adapter_config.json").exists()
        assert_same_weights(run.adapter, whole)
    finally:
        run.adapter.rename(run.root / "whole-by-run")
        adapter.rename(run.adapter)


def test_tools_that_run_models_take_an_adapter_with_its_base(run: Run, whole: Path, tmp_path: Path) -> None:
    """``adapter_config.json`` names the base, which an adapter that was made elsewhere says nothing else of."""
    adapter = tmp_path / "adapter"
    shutil.copytree(run.adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert find_whole_model(adapter, "--model") == adapter
    with hf_directory(adapter, tmp_path) as merged_with_base:
        assert_same_weights(merged_with_base, whole)
    # A base in bf16 rounds nothing of an adapter in fp32 away.
    half = make_llama(tmp_path / "half", layers=2, dtype=torch.bfloat16)
    assert merged_dtype(adapter, half) == torch.float32
    tensors = {name: t.bfloat16() for name, t in load_file(adapter / "adapter_model.safetensors").items()}
    (tmp_path / "half-adapter").mkdir()
    save_file(tensors, tmp_path / "half-adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    assert merged_dtype(tmp_path / "half-adapter", half) == torch.bfloat16
    before = fingerprint(adapter)

    def refused(**changes: Any) -> str:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError) as error:
            find_whole_model(adapter, "--model")
        return str(error.value)

    fix = "base_model_name_or_path in its adapter_config.json"
    gone = refused(base_model_name_or_path=str(tmp_path / "gone"))
    assert gone.startswith(f"--model: {adapter}: its base: base_model_name_or_path {tmp_path}/gone: no such directory")
    assert gone.endswith(f": set {fix} to where that is")
    assert refused(base_model_name_or_path=None) == (
        f"--model: {adapter}: it does not say what its base model is: set {fix}"
    )
    with hf_directory(adapter, tmp_path, base=run.root / "policy") as given:
        assert_same_weights(given, whole)
    other = str(make_llama(tmp_path / "other", seed=9, layers=2))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": other}))
    assert fingerprint(adapter) != before
    with (
        pytest.raises(UserError, match=f"not the base model of .*: set {fix} to the right one"),
        hf_directory(adapter, tmp_path),
    ):
        pass


def test_an_export_is_verified_to_the_bit(run: Run, whole: Path, tmp_path: Path) -> None:
    def verify(path: Path) -> str:
        arguments = ["--hf", str(path), "--megatron", str(run.checkpoint)]
        done = run_forked("checkpoints_convert.verify", arguments, check=False)
        assert (done.returncode == 0) == ("error: " not in done.stderr)
        return done.stdout + done.stderr

    assert "adapter: all 24 tensors equal to the bit" in verify(run.adapter)
    assert "weights: all 21 tensors equal to the bit" in verify(whole)
    for source, file in ((run.adapter, "adapter_model.safetensors"), (whole, None)):
        changed = tmp_path / source.name
        shutil.copytree(source, changed)
        path = changed / (file or sorted(changed.glob("*.safetensors"))[0].name)
        tensors = load_file(path)
        name = sorted(tensors)[-1]
        tensors[name][0, -1] += 1e-6
        save_file(tensors, path, metadata={"format": "pt"})
        assert f"1 weights differ from {changed}, first {name.removeprefix(PREFIX)}" in verify(changed)
    config = json.loads((tmp_path / CHECKPOINT / "adapter_config.json").read_text())
    (tmp_path / CHECKPOINT / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 7}))
    assert re.search(
        r"error: .*its adapter is Lora\(rank=4, .* is Lora\(rank=4, alpha=7", verify(tmp_path / CHECKPOINT)
    )


def test_the_dry_run_counts_what_trains_and_the_base_once(run: Run) -> None:
    config = merged(run.config, output_dir=str(run.root / "new"))
    policy = parameter_count(read_hf_config(run.root / "policy"))
    text, _ = dry_run(config_from_dict(config), 1)
    (line,) = [line for line in text.splitlines() if line.startswith("fullest rank")]
    found = re.fullmatch(r".* policy ([\d,]+) \(of which ([\d,]+) train\), frozen ([\d,]+)", line)
    assert found is not None
    whole, trained, frozen = (int(number.replace(",", "")) for number in found.groups())
    assert frozen == 0
    # The vocabulary is padded.
    assert 0 <= whole - trained - policy < 2 * 64 * 128
    # gate_proj, beside up_proj, has zeros.
    adapter = sum(tensor.numel() for tensor in read_weights(run.adapter).values())
    assert trained - adapter == 2 * 4 * (64 + 96)


def test_an_adapter_names_its_base_as_peft_finds_it(run: Run) -> None:
    hf_config = read_hf_config(run.root / "policy")
    content = peft_config(Lora(4, 8.0), f"owner/name@{'0' * 40}", hf_config)
    assert (content["base_model_name_or_path"], content["revision"]) == ("owner/name", "0" * 40)
    assert peft_config(Lora(4, 8.0), "/a/path", hf_config)["revision"] is None
