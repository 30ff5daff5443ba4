"""HF in, the same logits and gradients on every layout, and HF out to the bit."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.worker_conversion import LENGTHS, row_tokens, upstream_gradient
from tests.launch import run_module
from tests.tiny_models import FAMILY_OPTIONS, make_llama, make_model

WORKER = "tests.distributed.worker_conversion"
LAYOUTS = {
    1: ("tp1-pp1",),
    2: ("tp2-pp1", "tp2-pp1-sp", "tp1-pp2"),
    # Models have 2 or 4 key/value heads: tp4 splits some of them.
    4: ("tp2-pp2", "tp2-pp2-sp", "tp4-pp1", "tp4-pp1-sp", "tp1-pp4", "tp2-pp1"),
}
CASES = [(n, name) for n, names in LAYOUTS.items() for name in names]
# Each writes an HF directory. A head_dim other than hidden / heads; an original context shorter than the row.
MODELS: dict[str, Callable[[Path], Path]] = {
    "untied": lambda path: make_llama(path, llama3_rope=True, head_dim=32, max_shard_size="60KB", seed=1),
    "tied": lambda path: make_llama(path, tied=True, seed=2),
    "bf16-tied": lambda path: make_llama(path, tied=True, llama3_rope=True, dtype=torch.bfloat16, seed=3),
    "heads": lambda path: make_llama(path, vocab_size=128, heads=8, kv_heads=4, seed=4),
    "llama3-vocabulary": lambda path: make_llama(
        path, vocab_size=128_256, hidden_size=16, dtype=torch.bfloat16, seed=5
    ),
    **{family: partial(make_model, family=family, seed=6) for family in FAMILY_OPTIONS if family != "llama"},
    **{
        f"{family}-bf16-tied": partial(
            make_model, family=family, tied=True, vocab_size=256, dtype=torch.bfloat16, max_shard_size="60KB", seed=7
        )
        for family in FAMILY_OPTIONS
        if family != "llama"
    },
}
LOGIT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF models and their Megatron conversions by one rank, and nothing else yet."""
    root = tmp_path_factory.mktemp("conversion")
    for name, make in MODELS.items():
        make(root / "hf" / name)
    run_module(WORKER, [str(root), "single"])
    return root


@pytest.fixture(scope="module")
def ran(root: Path) -> Iterator[dict[int, Path]]:
    """Runs the worker once per number of processes, when first asked for."""

    class Runs(dict):
        def __missing__(self, processes: int) -> Path:
            here = root.with_name(f"{root.name}-{processes}")
            here.mkdir()
            for name in ("hf", "megatron"):
                (here / name).symlink_to(root / name)
            run_module(WORKER, [str(here), *LAYOUTS[processes]], processes=processes, timeout=300)
            self[processes] = here
            return here

    return Runs()


def hf_model(path: Path) -> torch.nn.Module:
    """fp32 computation with the stored weights; buffers (rotary frequencies) in fp32 too."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def weights(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("processes", "layout"), CASES)
def test_logits_equal_hf(ran: dict[int, Path], processes: int, layout: str, model: str) -> None:
    root = ran[processes]
    logits = load_file(root / "out" / layout / model / "logits.safetensors")["logits"]
    reference = hf_model(root / "hf" / model)
    tokens, start = row_tokens(), 0
    for length in LENGTHS:
        with torch.no_grad():
            wanted = reference(tokens[None, start : start + length]).logits[0]
        assert logits.shape[1] == wanted.shape[1]
        difference = (logits[start : start + length] - wanted).abs().max() / wanted.abs().max()
        assert difference < LOGIT_TOLERANCE
        start += length


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("processes", "layout"), [case for case in CASES if "pp1" in case[1]])
def test_gradients_equal_hf(ran: dict[int, Path], processes: int, layout: str, model: str) -> None:
    root = ran[processes]
    gradients = load_file(root / "out" / layout / model / "gradients.safetensors")
    reference = hf_model(root / "hf" / model)
    tokens, start = row_tokens(), 0
    upstream = upstream_gradient(reference.config.hidden_size)
    for length in LENGTHS:
        hidden = reference.model(tokens[None, start : start + length]).last_hidden_state[0]
        (hidden * upstream[start : start + length]).sum().backward()
        start += length
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        assert (gradients[name] - gradient).norm() / gradient.norm() < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("processes", "layout"), CASES)
def test_weights_come_back_to_the_bit(ran: dict[int, Path], processes: int, layout: str, model: str) -> None:
    out = ran[processes] / "out" / layout / model
    assert_same_weights(out / "exported", ran[processes] / "hf" / model)
    assert_same_weights(out / "resharded", ran[processes] / "hf" / model)


@pytest.mark.parametrize(("processes", "model"), [(2, "untied"), (4, "bf16-tied")])
def test_training_checkpoint_exports_alone(ran: dict[int, Path], tmp_path: Path, processes: int, model: str) -> None:
    layout = LAYOUTS[processes][0]
    run = ran[processes] / "out" / layout / model  # laid out like a training output directory
    run_module("checkpoints_convert.megatron_to_hf", ["--megatron", str(run), "--out", str(tmp_path / "hf")])
    source = ran[processes] / "hf" / model
    assert_same_weights(tmp_path / "hf", source)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    text = "w5 w7 w11"
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(text) == AutoTokenizer.from_pretrained(source)(text)
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()


def test_exports_load_without_a_flag_or_a_warning(ran: dict[int, Path]) -> None:
    exports = [ran[2] / "out" / "tp2-pp1" / model / "exported" for model in MODELS]
    script = (
        "import sys, transformers as t\n"
        "t.utils.logging.disable_progress_bar()\n"
        "for path in sys.argv[1:]:\n"
        "    model = t.AutoModelForCausalLM.from_pretrained(path)\n"
        "    assert model.generation_config.temperature == 0.7, path\n"
        "    assert 'role' in t.AutoTokenizer.from_pretrained(path).chat_template, path\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::FutureWarning", "-c", script]
    done = subprocess.run([*command, *map(str, exports)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_shards_have_a_true_index(ran: dict[int, Path]) -> None:
    exported = ran[2] / "out" / "tp1-pp2" / "untied" / "exported"
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    tensors = weights(exported)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for name, file in index["weight_map"].items():
        assert name in load_file(exported / file)
    assert len(set(index["weight_map"].values())) > 2
    AutoModelForCausalLM.from_pretrained(exported)
    assert not list(exported.parent.glob("*.tmp*"))


@pytest.mark.parametrize("model", MODELS)
def test_imports_what_megatron_core_would_save(root: Path, model: str) -> None:
    ours, theirs = (stored_metadata(root / folder / model) for folder in ("megatron", "live"))
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for key, info in theirs.state_dict_metadata.items():
        assert type(ours.state_dict_metadata[key]) is type(info), key
        if isinstance(info, TensorStorageMetadata):
            assert ours.state_dict_metadata[key].size == info.size, key
            assert ours.state_dict_metadata[key].properties == info.properties, key
    assert ours.planner_data == theirs.planner_data
    for name in ("tgdpo.json", "metadata.json", "common.pt", "hf/config.json"):
        one, other = (root / folder / model / name for folder in ("megatron", "live"))
        assert one.read_bytes() == other.read_bytes(), name


def stored_metadata(path: Path) -> Metadata:
    with (path / ".metadata").open("rb") as stream:
        return pickle.load(stream)


def test_processes_share_the_work(root: Path, tmp_path: Path) -> None:
    """Two processes make what one makes, and the commands say how it went."""
    hf = root / "hf" / "untied"
    arguments = ["--hf", str(hf), "--out", str(tmp_path / "megatron")]
    done = run_module("checkpoints_convert.hf_to_megatron", arguments, processes=2)
    assert "MB/s" in done.stdout
    assert "HF to Megatron (rank 0's share of 2)" in done.stderr
    sizes = [file.stat().st_size for file in sorted((tmp_path / "megatron").glob("*.distcp"))]
    assert len(sizes) == 2
    assert max(sizes) < 1.5 * min(sizes)
    for processes in (1, 2):
        out = tmp_path / f"hf{processes}"
        arguments = ["--megatron", str(tmp_path / "megatron"), "--out", str(out), "--max-shard-size", "100KB"]
        done = run_module("checkpoints_convert.megatron_to_hf", arguments, processes=processes)
    assert_same_weights(tmp_path / "hf1", hf)
    names = sorted(path.name for path in (tmp_path / "hf1").iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 3
    assert names == sorted(path.name for path in (tmp_path / "hf2").iterdir())
    for name in names:
        assert (tmp_path / "hf1" / name).read_bytes() == (tmp_path / "hf2" / name).read_bytes(), name


def test_dtype_on_the_way(root: Path, tmp_path: Path) -> None:
    run_module(
        "checkpoints_convert.hf_to_megatron",
        ["--hf", str(root / "hf" / "untied"), "--out", str(tmp_path / "bf16"), "--dtype", "bf16"],
    )
    run_module(
        "checkpoints_convert.megatron_to_hf",
        ["--megatron", str(tmp_path / "bf16"), "--out", str(tmp_path / "hf"), "--dtype", "fp32"],
    )
    ours, source = weights(tmp_path / "hf"), weights(root / "hf" / "untied")
    for name, tensor in source.items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], tensor.bfloat16().float()), name
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    metadata = json.loads((tmp_path / "bf16" / "tgdpo.json").read_text())
    assert metadata == {
        "format_version": 1,
        "step": None,
        "dtype": "bf16",
        "parameters": sum(tensor.numel() for tensor in source.values()),
    }


def test_verify_accepts_the_same_model(root: Path) -> None:
    for processes, arguments in ((1, []), (2, ["--tensor", "2"])):
        pair = ["--hf", str(root / "hf" / "bf16-tied"), "--megatron", str(root / "megatron" / "bf16-tied")]
        done = run_module("checkpoints_convert.verify", [*pair, *arguments], processes=processes)
        assert "equal to the bit in torch.bfloat16" in done.stdout
        assert "512 random tokens: logits" in done.stdout


def test_verify_refuses_one_changed_weight(root: Path, tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", tied=True, seed=2)
    model = AutoModelForCausalLM.from_pretrained(hf)
    with torch.no_grad():
        model.model.layers[3].self_attn.k_proj.weight[5, 6] += 1e-6
    model.save_pretrained(hf)
    arguments = ["--hf", str(hf), "--megatron", str(root / "megatron" / "tied")]
    done = run_module("checkpoints_convert.verify", arguments, check=False)
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
    done = run_module("checkpoints_convert.verify", ["--hf", str(hf), "--megatron", str(checkpoint)], check=False)
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


def test_full_disk_fails_on_all_ranks_and_leaves_nothing(root: Path) -> None:
    run_module(WORKER, [str(root), "faults"], processes=2, timeout=300)
    reports = [json.loads((root / f"faults-{rank}.json").read_text()) for rank in range(2)]
    assert reports[0] == reports[1]
    assert len(reports[0]) == 13
    for fault, message in reports[0].items():
        assert str(root / "faults" / fault) in message
        assert "nothing was changed" in message
        assert "are free" in message, message
        assert "\n" not in message
        if "limit" in fault:
            assert "File too large" in message
        if fault.endswith("rank1"):
            assert "rank 1" in message
    left = sorted(path.name for path in (root / "faults").iterdir())
    assert left == [f"{name}-works-afterwards" for name in ("export", "import", "save")]
