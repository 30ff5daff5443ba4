"""The commands: what they share among ranks, convert, verify and refuse."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_tgdpo.checkpoints.manifest import read_metadata
from tests.distributed.common import assert_same_weights, read_weights
from tests.launch import run_module
from tests.processes import run_forked
from tests.tiny_models import make_llama


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF models and the Megatron checkpoints of two of them."""
    root = tmp_path_factory.mktemp("commands")
    make_llama(root / "hf" / "untied", llama3_rope=True, head_dim=32, max_shard_size="60KB", seed=1)
    make_llama(root / "hf" / "tied", tied=True, seed=2)
    make_llama(root / "hf" / "bf16-tied", tied=True, llama3_rope=True, dtype=torch.bfloat16, seed=3)
    for name in ("tied", "bf16-tied"):
        arguments = ["--hf", str(root / "hf" / name), "--out", str(root / "megatron" / name)]
        run_forked("checkpoints_convert.hf_to_megatron", arguments)
    return root


def test_processes_share_the_work(root: Path, tmp_path: Path) -> None:
    """Two processes make what one makes, and the commands say how it went."""
    hf = root / "hf" / "untied"
    arguments = ["--hf", str(hf), "--out", str(tmp_path / "megatron")]
    done = run_module("checkpoints_convert.hf_to_megatron", arguments, processes=2)
    assert "MB/s" in done.stdout
    assert done.stderr == ""
    sizes = [file.stat().st_size for file in sorted((tmp_path / "megatron").glob("*.distcp"))]
    assert len(sizes) == 2
    assert max(sizes) < 1.5 * min(sizes)
    for processes in (1, 2):
        out = tmp_path / f"hf{processes}"
        arguments = ["--megatron", str(tmp_path / "megatron"), "--out", str(out), "--max-shard-size", "100KB"]
        run_forked("checkpoints_convert.megatron_to_hf", arguments, processes=processes)
    assert_same_weights(tmp_path / "hf1", hf)
    names = sorted(path.name for path in (tmp_path / "hf1").iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 3
    assert names == sorted(path.name for path in (tmp_path / "hf2").iterdir())
    for name in names:
        assert (tmp_path / "hf1" / name).read_bytes() == (tmp_path / "hf2" / name).read_bytes(), name


def test_dtype_on_the_way(root: Path, tmp_path: Path) -> None:
    run_forked(
        "checkpoints_convert.hf_to_megatron",
        ["--hf", str(root / "hf" / "untied"), "--out", str(tmp_path / "bf16"), "--dtype", "bf16"],
    )
    run_forked(
        "checkpoints_convert.megatron_to_hf",
        ["--megatron", str(tmp_path / "bf16"), "--out", str(tmp_path / "hf"), "--dtype", "fp32"],
    )
    ours, source = read_weights(tmp_path / "hf"), read_weights(root / "hf" / "untied")
    for name, tensor in source.items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], tensor.bfloat16().float()), name
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    assert read_metadata(tmp_path / "bf16") == {
        "format_version": 1,
        "step": None,
        "dtype": "bf16",
        "parameters": sum(tensor.numel() for tensor in source.values()),
    }


def test_verify_accepts_the_same_model(root: Path) -> None:
    for processes, arguments in ((1, []), (2, ["--tensor", "2"])):
        pair = ["--hf", str(root / "hf" / "bf16-tied"), "--megatron", str(root / "megatron" / "bf16-tied")]
        done = run_forked("checkpoints_convert.verify", [*pair, *arguments], processes=processes)
        assert "equal to the bit in torch.bfloat16" in done.stdout
        assert "512 random tokens: logits" in done.stdout


def test_verify_refuses_one_changed_weight(root: Path, tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", tied=True, seed=2)
    model = AutoModelForCausalLM.from_pretrained(hf)
    with torch.no_grad():
        model.model.layers[3].self_attn.k_proj.weight[5, 6] += 1e-6
    model.save_pretrained(hf)
    arguments = ["--hf", str(hf), "--megatron", str(root / "megatron" / "tied")]
    done = run_forked("checkpoints_convert.verify", arguments, check=False)
    assert done.returncode == 1
    assert "1 weights differ" in done.stderr
    assert "model.layers.3.self_attn.k_proj.weight" in done.stderr


def test_verify_refuses_other_rotary_positions(root: Path, tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", tied=True, seed=2)
    config = json.loads((hf / "config.json").read_text())
    if "rope_parameters" in config:
        config["rope_parameters"]["rope_theta"] = 20000.0
    else:
        config["rope_theta"] = 20000.0
    (hf / "config.json").write_text(json.dumps(config))
    checkpoint = root / "megatron" / "tied"
    # Same weights, so only the logits can tell: ours are computed with the checkpoint's own config.
    done = run_forked("checkpoints_convert.verify", ["--hf", str(hf), "--megatron", str(checkpoint)], check=False)
    assert done.returncode == 1
    assert "computes something else" in done.stderr


def test_commands_end_with_one_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    for file in (root / "hf" / "tied").iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    weights_file = tmp_path / "hf" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    arguments = ["--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]
    done = run_module("checkpoints_convert.hf_to_megatron", arguments, check=False)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line] == [done.stderr.splitlines()[-1]]
    assert done.stderr.startswith(f"error: {weights_file}: ")
    assert "truncated, download it again" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
