"""HF in, the same logits and gradients on every layout, and HF out to the bit."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_tgdpo.checkpoints.manifest import read_metadata
from tests.distributed.common import assert_same_weights, read_weights
from tests.distributed.worker_conversion import LENGTHS, converts, pack_tokens, upstream_gradient
from tests.launch import PATIENCE
from tests.processes import run_forked
from tests.tiny_models import FAMILY_OPTIONS, make_llama, make_model

WORKER = "tests.distributed.worker_conversion"
LAYOUTS = {
    1: ("tp1-pp1",),
    2: ("tp2-pp1", "tp2-pp1-sp", "tp1-pp2"),
    # Models have 2 or 4 key/value heads: tp4 splits some of them.
    4: ("tp2-pp2", "tp2-pp2-sp", "tp4-pp1", "tp4-pp1-sp", "tp1-pp4", "tp2-pp1"),
}
CASES = [(n, name) for n, names in LAYOUTS.items() for name in names]
# Each writes an HF directory. A head_dim other than hidden / heads; an original context shorter than the pack.
MODELS: dict[str, Callable[[Path], Path]] = {
    "untied": lambda path: make_llama(path, llama3_rope=True, head_dim=32, max_shard_size="60KB", seed=1),
    "tied": lambda path: make_llama(path, tied=True, seed=2),
    "bf16-tied": lambda path: make_llama(path, tied=True, llama3_rope=True, dtype=torch.bfloat16, seed=3),
    "linear-rope": lambda path: make_llama(path, rope={"rope_type": "linear", "factor": 3.0}, layers=4, seed=8),
    "yarn": partial(
        make_model,
        family="qwen2",
        rope={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
        seed=9,
    ),
    "gemma2-yarn": partial(
        make_model,
        family="gemma2",
        rope={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
        seed=10,
    ),
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
    run_forked(WORKER, [str(root), "single"])
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
            run_forked(WORKER, [str(here), *LAYOUTS[processes]], processes=processes)
            self[processes] = here
            return here

    return Runs()


def hf_model(path: Path) -> torch.nn.Module:
    """fp32 computation with the stored weights; buffers (rotary frequencies) in fp32 too."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@dataclass(frozen=True)
class Outputs:
    """What transformers computes: logits [S, V] of the pack's sequences, and the gradients of all weights by name."""

    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]


class Reference(dict[str, Outputs]):
    """Outputs by model, computed when first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def __missing__(self, model: str) -> Outputs:
        reference = hf_model(self._root / "hf" / model)
        sequences = pack_tokens()[: sum(LENGTHS)].split(LENGTHS)
        upstream = upstream_gradient(reference.config.hidden_size)[: sum(LENGTHS)].split(LENGTHS)
        with torch.no_grad():
            logits = torch.cat([reference(tokens[None]).logits[0] for tokens in sequences])
        for tokens, gradient in zip(sequences, upstream, strict=True):
            (reference.model(tokens[None]).last_hidden_state[0] * gradient).sum().backward()
        gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
        self[model] = Outputs(logits, gradients)
        return self[model]


@pytest.fixture(scope="module")
def reference(root: Path) -> Reference:
    return Reference(root)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("processes", "layout"), CASES)
def test_logits_equal_hf(ran: dict[int, Path], reference: Reference, processes: int, layout: str, model: str) -> None:
    logits = load_file(ran[processes] / "out" / layout / model / "logits.safetensors")["logits"][: sum(LENGTHS)]
    wanted = reference[model].logits
    assert logits.shape == wanted.shape
    for ours, theirs in zip(logits.split(LENGTHS), wanted.split(LENGTHS), strict=True):
        assert (ours - theirs).abs().max() / theirs.abs().max() < LOGIT_TOLERANCE


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("processes", "layout"), [case for case in CASES if "pp1" in case[1]])
def test_gradients_equal_hf(
    ran: dict[int, Path], reference: Reference, processes: int, layout: str, model: str
) -> None:
    gradients = load_file(ran[processes] / "out" / layout / model / "gradients.safetensors")
    wanted = reference[model].gradients
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        assert (gradients[name] - gradient).norm() / gradient.norm() < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize(
    ("processes", "layout", "model"), [(*case, model) for case in CASES for model in MODELS if converts(case[1], model)]
)
def test_weights_come_back_to_the_bit(ran: dict[int, Path], processes: int, layout: str, model: str) -> None:
    out = ran[processes] / "out" / layout / model
    assert_same_weights(out / "exported", ran[processes] / "hf" / model)
    assert [json.loads((out / f"different-{rank}.json").read_text()) for rank in range(processes)] == [[]] * processes


@pytest.mark.parametrize(("processes", "model"), [(2, "untied"), (4, "bf16-tied")])
def test_training_checkpoint_exports_alone(ran: dict[int, Path], tmp_path: Path, processes: int, model: str) -> None:
    layout = LAYOUTS[processes][0]
    run = ran[processes] / "out" / layout / model  # laid out like a training output directory
    run_forked("checkpoints_convert.megatron_to_hf", ["--megatron", str(run), "--out", str(tmp_path / "hf")])
    source = ran[processes] / "hf" / model
    assert_same_weights(tmp_path / "hf", source)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    text = "w5 w7 w11"
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(text) == AutoTokenizer.from_pretrained(source)(text)
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()


def test_exports_load_without_a_flag_or_a_warning(ran: dict[int, Path]) -> None:
    exports = [ran[2] / "out" / "tp2-pp1" / model / "exported" for model in MODELS if converts("tp2-pp1", model)]
    script = (
        "import sys, transformers as t\n"
        "t.utils.logging.disable_progress_bar()\n"
        "for path in sys.argv[1:]:\n"
        "    model = t.AutoModelForCausalLM.from_pretrained(path)\n"
        "    assert model.generation_config.temperature == 0.7, path\n"
        "    assert 'role' in t.AutoTokenizer.from_pretrained(path).chat_template, path\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::FutureWarning", "-c", script]
    done = subprocess.run([*command, *map(str, exports)], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_shards_have_a_true_index(ran: dict[int, Path]) -> None:
    exported = ran[2] / "out" / "tp1-pp2" / "untied" / "exported"
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    tensors = read_weights(exported)
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
    assert read_metadata(root / "megatron" / model) == read_metadata(root / "live" / model)
    for name in ("metadata.json", "common.pt", "hf/config.json"):
        one, other = (root / folder / model / name for folder in ("megatron", "live"))
        assert one.read_bytes() == other.read_bytes(), name


def stored_metadata(path: Path) -> Metadata:
    with (path / ".metadata").open("rb") as stream:
        return pickle.load(stream)


def test_full_disk_fails_on_all_ranks_and_leaves_nothing(root: Path) -> None:
    run_forked(WORKER, [str(root), "faults"], processes=2)
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
