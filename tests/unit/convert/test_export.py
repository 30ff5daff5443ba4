"""Megatron to HF without a model: what is written, and what is refused."""

import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import load_file, save_file

from checkpoints_convert import megatron_to_hf, pieces
from checkpoints_convert.export import export_hf
from checkpoints_convert.import_hf import import_hf
from megatron_tgdpo.checkpoints.reader import CheckpointReader
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.reader import HfCheckpoint
from tests.checkpoints import Payload, flip, save, without_manifest
from tests.distributed.common import assert_same_weights, read_weights
from tests.launch import ROOT, environment
from tests.tiny_models import make_llama

pytestmark = pytest.mark.usefixtures("one_rank")

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "hf", layers=2)


@pytest.fixture
def checkpoint(hf: Path, tmp_path: Path) -> Path:
    import_hf(hf, tmp_path / "megatron", read_hf_config(hf))
    return tmp_path / "megatron"


def export(checkpoint: Path, out: Path, dtype: torch.dtype = torch.float32, max_shard_bytes: int = 10**9) -> None:
    export_hf(checkpoint, out, template=checkpoint, stored=torch.float32, dtype=dtype, max_shard_bytes=max_shard_bytes)


def resave(checkpoint: Path, out: Path, change: Callable[[Tensors], object]) -> Path:
    """Saves the checkpoint's tensors again, changed."""
    reader = CheckpointReader(checkpoint)
    tensors = {}
    for key, info in reader.tensors.items():
        stacked = key.startswith("decoder.layers")
        layers = [reader.rows(key, i, 0, info.size[1]) for i in range(info.size[0])] if stacked else []
        tensors[key] = torch.stack(layers) if stacked else reader.rows(key, None, 0, info.size[0])
    change(tensors)
    state = {key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in tensors.items()}
    save(out, {"model": state}, checkpoint, {"dtype": "fp32", "step": 7})
    return out


def test_files_hold_what_fits(checkpoint: Path, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 7 * 64 * 4)
    export(checkpoint, tmp_path / "out", max_shard_bytes=60_000)
    assert_same_weights(tmp_path / "out", hf)
    assert HfCheckpoint(tmp_path / "out").tensors.keys() == HfCheckpoint(hf).tensors.keys()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_weights(hf)
    assert not (tmp_path / "out" / ".unfinished").exists()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 60_000
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_dtype(checkpoint: Path, hf: Path, tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    export(checkpoint, tmp_path / "out", dtype)
    for tensor_name, tensor in read_weights(tmp_path / "out").items():
        assert torch.equal(tensor, read_weights(hf)[tensor_name].to(dtype))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == name


def pad(tensors: Tensors) -> None:
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[key] = torch.cat([tensors[key], torch.zeros(128, 64)])


def test_vocabulary_padded_for_three_tensor_ranks(checkpoint: Path, hf: Path, tmp_path: Path) -> None:
    padded = resave(checkpoint, tmp_path / "padded", pad)  # 384 rows = 3 x 128
    export(padded, tmp_path / "out")
    assert_same_weights(tmp_path / "out", hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("output_layer.weight"), "output_layer.weight missing, config.json asks for it"),
        (lambda tensors: tensors.update({"new.weight": torch.zeros(3)}), "new.weight not expected"),
        (
            lambda tensors: tensors.update({"decoder.final_layernorm.weight": torch.zeros(65)}),
            r"final_layernorm.weight has shape \[65\], config.json asks for \[64\]",
        ),
        (
            lambda tensors: tensors.update({"output_layer.weight": torch.zeros(512, 64)}),
            r"output_layer.weight has shape \[512, 64\], config.json asks for \[256, 64\]",
        ),
        (
            lambda tensors: tensors.update({"decoder.final_layernorm.weight": torch.zeros(64).half()}),
            "stored as torch.float16, tgdpo.json says torch.float32",
        ),
    ],
)
def test_other_weights_than_the_config_says(
    checkpoint: Path, tmp_path: Path, change: Callable[[Tensors], object], message: str
) -> None:
    changed = resave(checkpoint, tmp_path / "changed", change)
    with pytest.raises(UserError, match=message):
        export(changed, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed", "hf", "megatron"]


def test_optimizer_state_is_not_in_the_way(checkpoint: Path, hf: Path, tmp_path: Path) -> None:
    trained = resave(
        checkpoint, tmp_path / "trained", lambda tensors: tensors.update({"optimizer.state.exp_avg.x": torch.ones(3)})
    )
    export(trained, tmp_path / "out")
    assert_same_weights(tmp_path / "out", hf)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 3, "config.json asks for"),
        ("vocab_size", 100, "config.json asks for"),
        ("vocab_size", 132, r"it has [\d,]+ parameters, config.json asks for"),
        ("intermediate_size", 128, r"linear_fc1.weight has shape \[2, 192, 64\], config.json asks for \[2, 256, 64\]"),
        ("tie_word_embeddings", True, "output_layer.weight not expected"),
    ],
)
def test_config_that_lies(checkpoint: Path, tmp_path: Path, key: str, value: object, message: str) -> None:
    file = without_manifest(checkpoint) / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=message):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_template_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", layers=2, vocab_size=132)
    with pytest.raises(UserError, match=r"lm_head.weight has shape \(131, 64\), .*other asks for \(132, 64\)"):
        export_hf(
            checkpoint,
            tmp_path / "out",
            template=other,
            stored=torch.float32,
            dtype=torch.float32,
            max_shard_bytes=10**9,
        )


def test_truncated_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"distcp: [\d,]+ bytes, [\d,]+ were written"):
        export(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


@pytest.mark.parametrize("name", ["hf/tokenizer.json", "hf/tokenizer_config.json", "__0_0.distcp", "metadata.json"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_file_is_named_and_nothing_exported(checkpoint: Path, tmp_path: Path, name: str, cut: bool) -> None:
    file = checkpoint / name
    if cut:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        flip(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=rf"{name}: .* written"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_of_another_checkpoint_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Same names, shapes and sizes, other values."""
    other = resave(checkpoint, tmp_path / "other", lambda tensors: tensors["output_layer.weight"].add_(1.0))
    ours = resave(checkpoint, tmp_path / "ours", lambda tensors: None)
    (file,) = ours.glob("*.distcp")
    assert file.stat().st_size == (other / file.name).stat().st_size
    file.write_bytes((other / file.name).read_bytes())
    with pytest.raises(UserError, match=r"__0_0\.distcp: its bytes are not those that were written"):
        export(ours, tmp_path / "out")


@pytest.mark.parametrize("kind", ["template", "source"])
def test_a_truncated_tokenizer_of_an_hf_directory_is_named(
    hf: Path, checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    """No manifest tells of it, but what ends in the middle of its JSON is not whole."""
    file = hf / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:100])

    def convert() -> None:
        if kind == "source":
            import_hf(hf, tmp_path / "again", read_hf_config(hf))
        else:
            options = {"stored": torch.float32, "dtype": torch.float32, "max_shard_bytes": 10**9}
            export_hf(checkpoint, tmp_path / "out", template=hf, **options)  # type: ignore[arg-type]

    with pytest.raises(UserError, match=r"hf/tokenizer\.json: not readable: .*get it again"):
        convert()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_checkpoint_cannot_run_code(checkpoint: Path, tmp_path: Path) -> None:
    (without_manifest(checkpoint) / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(UserError, match="does not belong into checkpoint metadata"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "executed").exists()


def test_existing_output_is_kept(checkpoint: Path, hf: Path) -> None:
    with pytest.raises(UserError, match="exists and is not empty"):
        export(checkpoint, hf)
    assert (hf / "config.json").exists()


def test_directory_that_only_looks_like_a_leftover_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "notes").write_text("mine")
    export(checkpoint, tmp_path / "out")
    assert (tmp_path / "out.tmp" / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    "patch",
    [
        mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1000)),
        mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")),
    ],
)
def test_full_disk_is_reported(checkpoint: Path, tmp_path: Path, patch: mock._patch) -> None:
    with (
        patch,
        pytest.raises(UserError, match=r"out: saving failed, .*No space left .* needs [\d,]+ bytes, [\d,]+ are free"),
    ):
        export(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


@contextmanager
def other_export(checkpoint: Path, out: Path, release: Path, host: str | None = None) -> Iterator[subprocess.Popen]:
    """Another process that exports to ``out`` and waits in the middle until ``release`` is there."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from checkpoints_convert import megatron_to_hf, safetensors_file\n"
        "from megatron_tgdpo.storage import atomic_file\n"
        "write, (release, host) = safetensors_file.start_writeback, sys.argv[1:3]\n"
        "def later(*arguments):\n"
        "    Path(release + '.reached').touch()\n"
        "    while not Path(release).exists(): time.sleep(0.02)\n"
        "    write(*arguments)\n"
        "safetensors_file.start_writeback = later\n"
        "if host: atomic_file._here = lambda: (host, '1')\n"
        "del sys.argv[1:3]\nmegatron_to_hf.run(megatron_to_hf.main)"
    )
    command = [sys.executable, "-c", code, str(release), host or "", "--megatron", str(checkpoint), "--out", str(out)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            while not release.with_name(f"{release.name}.reached").exists():
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def test_killed_in_the_middle(checkpoint: Path, hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with other_export(checkpoint, out, tmp_path / "release"):
        pass
    (left,) = tmp_path.glob("out.*.tmp")
    assert not out.exists()
    with pytest.raises(UserError, match=r"no config\.json there"):
        read_hf_config(left)
    export(checkpoint, out)
    assert not left.exists()
    assert_same_weights(out, hf)


def test_another_process_that_exports_to_the_same_directory_is_named(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with other_export(checkpoint, out, tmp_path / "release") as other:
        with pytest.raises(UserError, match=f"out: process {other.pid} is writing it"):
            export(checkpoint, out)
        (tmp_path / "release").touch()
        assert other.wait() == 0
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_of_two_exports_on_two_machines_one_is_whole_and_the_other_says_so(
    checkpoint: Path, hf: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with other_export(checkpoint, out, tmp_path / "release", host="elsewhere") as other:
        export(checkpoint, out)
        (tmp_path / "release").touch()
        _, errors = other.communicate()
        assert other.returncode == 1
    assert f"error: {out}: exists and is not empty" in errors
    assert_same_weights(out, hf)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_command_reports(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["command", "--megatron", str(checkpoint), "--out", str(out), "--dtype", "bf16"])
    megatron_to_hf.main()
    shown = capsys.readouterr()
    count = sum(tensor.numel() for tensor in read_weights(out).values())
    assert shown.out.startswith(f"{out}: written, {count:,} parameters in bf16, {2 * count / 1e6:,.1f} MB (")
    summary, use = shown.out.splitlines()
    assert summary.endswith(" MB/s)")
    assert use == f"in Python: AutoModelForCausalLM.from_pretrained('{out}'); as a server: vllm serve {out}"
    assert shown.err == ""


def test_values_that_are_not_finite_are_kept_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf = make_llama(tmp_path / "hf", layers=2)
    import_hf(hf, tmp_path / "sound", read_hf_config(hf))
    export(tmp_path / "sound", tmp_path / "sound-hf")
    assert "NaN" not in caplog.text
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    tensors["model.norm.weight"][0] = float("-inf")
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    import_hf(hf, tmp_path / "megatron", read_hf_config(hf))
    export(tmp_path / "megatron", tmp_path / "back")
    warnings = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert [message.partition(":")[0] for message in warnings] == [str(hf), str(tmp_path / "megatron")]
    assert all("model.layers.1.mlp.down_proj.weight and 1 other tensors" in message for message in warnings)
    assert load_file(tmp_path / "back" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].isnan().sum() == 1
