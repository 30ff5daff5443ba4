"""Whatever text a file has, it is taken or refused in one line: never a traceback.

    TGDPO_FUZZ_EXAMPLES=3000 python -m pytest tests/unit/test_fuzz.py --hypothesis-seed=1

What it found: ``test_foreign_files.py``.
"""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from megatron_tgdpo.checkpoints.manifest import _own_digest, read_manifest
from megatron_tgdpo.checkpoints.model_directory import check_hf_files
from megatron_tgdpo.config.loading import config_from_dict, load_config, to_dict, to_yaml
from megatron_tgdpo.config.resume_compatibility import INPUTS, check_changes, find_changes
from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.preprocess import inspect_sources, preprocess, write_dataset
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.guidance.cache import GuidanceCache
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.reader import HfCheckpoint
from megatron_tgdpo.output import json_lines
from megatron_tgdpo.output.directory import is_done, recorded_run
from megatron_tgdpo.resilience.requeue import count_restart
from megatron_tgdpo.storage.files import FileDigest
from tests.fuzzing import fuzz, jsons, one_line_or_result, texts, to_bytes
from tests.published_configs import PUBLISHED
from tests.tiny_models import make_llama
from tests.unit.commands.test_import_config import ENTRY, REFERENCE
from tests.unit.config.test_loading import VALID
from tests.unit.data.conftest import hf_directory as tokenizer_directory
from tgdpo.llamafactory.conversion import convert, read_reference
from tgdpo.llamafactory.datasets import dataset_files
from tgdpo.llamafactory.templates import NAMES, chat_template

ROOT = Path(__file__).parents[2]
CONFIGS = [
    yaml.safe_dump(VALID),
    to_yaml(config_from_dict(VALID)),
    *(path.read_text() for path in sorted((ROOT / "launch" / "recipes").glob("tgdpo-*.yaml"))),
]
KEYS = [
    f"{section}.{key}"
    for section, values in to_dict(config_from_dict(VALID)).items()
    if isinstance(values, dict)
    for key in values
]
MESSAGES = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]
OTHER = [MESSAGES[0], {"role": "assistant", "content": "Green."}]
TURNS = [{"from": "human", "value": "Name a colour."}]
RECORDS = [
    {"instruction": "Name", "input": "a colour", "chosen": "Blue.", "rejected": "Green.", "history": [["a", "b"]]},
    {"conversations": TURNS, "chosen": {"from": "gpt", "value": "Blue."}, "rejected": {"from": "gpt", "value": "No."}},
    {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Green.", "system": "Be kind."},
    {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": OTHER[1:]},
    {"chosen": MESSAGES, "rejected": OTHER},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz(
    text=texts(CONFIGS), overrides=st.lists(st.tuples(st.sampled_from(KEYS), texts(["1", "off", "a # b"])), max_size=2)
)
def test_configs(place: Path, text: str, overrides: list[tuple[str, str]]) -> None:
    file = place / "config.yaml"
    file.write_bytes(to_bytes(text))
    config = one_line_or_result(lambda: load_config(file, [f"{key}={value}" for key, value in overrides]))
    if config is not None:
        file.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(file) == config


@fuzz(override=texts([f"{key}=1" for key in KEYS]))
def test_overrides(place: Path, override: str) -> None:
    (place / "valid.yaml").write_text(yaml.safe_dump(VALID))
    one_line_or_result(lambda: load_config(place / "valid.yaml", [override]))


@fuzz(text=texts([yaml.safe_dump(REFERENCE)]))
def test_reference_configs(place: Path, text: str) -> None:
    (place / "lf.yaml").write_bytes(to_bytes(text))
    one_line_or_result(
        lambda: config_from_dict(convert(read_reference(place / "lf.yaml"), 8, "pairs", None), "lf.yaml")
    )


@fuzz(
    info=jsons([{"name": ENTRY}, {"name": {**ENTRY, "formatting": "alpaca", "columns": None}}]), pairs=jsons([RECORDS])
)
def test_dataset_infos(place: Path, info: str, pairs: str) -> None:
    (place / "dataset_info.json").write_bytes(to_bytes(info))
    (place / "pairs.json").write_bytes(to_bytes(pairs))
    one_line_or_result(lambda: dataset_files(place / "dataset_info.json", {"dataset": "name"}))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = Path(tokenizer_directory.__wrapped__(tmp_path_factory))  # type: ignore[attr-defined]
    (directory / "chat_template.jinja").write_text(chat_template("chatml"))
    return str(directory)


@fuzz(
    text=jsons([RECORDS, *RECORDS])
    | st.lists(jsons(RECORDS), max_size=3).map("\n".join)
    | texts(["\n".join(map(json.dumps, RECORDS[:1] * 2))])
)
def test_data_files(place: Path, tokenizer: str, text: str) -> None:
    file = place / "pairs.jsonl"
    file.write_bytes(to_bytes(text))
    options = PreprocessOptions(tokenizer, max_length=64)
    opened = load_tokenizer(tokenizer, None)
    one_line_or_result(
        lambda: write_dataset(inspect_sources([str(file)]), str(place / "data" / "pairs"), options, opened, False)
    )


@fuzz(text=texts([chat_template(name) for name in NAMES]))
def test_chat_templates(place: Path, tokenizer: str, text: str) -> None:
    (place / "records.jsonl").write_text("\n".join(map(json.dumps, RECORDS[-2:-1])))
    (place / "template.jinja").write_bytes(to_bytes(text))
    options = PreprocessOptions(tokenizer, str(place / "template.jinja"), max_length=64)
    one_line_or_result(
        lambda: preprocess(
            [str(place / "records.jsonl")], str(place / "templated"), options, overwrite=True, progress=False
        )
    )


DIGEST = {"size": 3, "sha256": "0" * 64}
CONFIG = config_from_dict({**VALID, "output_dir": "run"})
METADATA: dict[str, Any] = {
    "format_version": 1, "step": 4, "config": to_dict(CONFIG), "inputs": dict.fromkeys(INPUTS, "0" * 64),
    "consumed_pairs": 32, "changes": [{"after_step": 2, "key": "optimizer.lr", "was": 1, "now": 2}], "dtype": "bf16",
}  # fmt: skip


def _with_its_digest(text: str) -> str:
    """Behind the checksum: as somebody could write it on purpose."""
    try:
        content = json.loads(text)
        files = {name: FileDigest(**entry) for name, entry in content.pop("files").items()}
        content.pop("sha256", None)
        own = _own_digest(content, files)
        return json.dumps({**content, "files": {name: vars(entry) for name, entry in files.items()}, "sha256": own})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return text


@fuzz(
    text=jsons([METADATA, {**METADATA, "files": {"hf/config.json": DIGEST, ".metadata": DIGEST}, "sha256": "0"}]),
    right_digest=st.booleans(),
)
def test_checkpoint_manifests(place: Path, text: str, right_digest: bool) -> None:
    checkpoint = place / "run" / "checkpoints" / "step_00000004"
    (checkpoint / "hf").mkdir(parents=True, exist_ok=True)
    for name in (".metadata", "common.pt", "hf/config.json"):
        (checkpoint / name).write_text("{}")
    formats = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (checkpoint / "metadata.json").write_text(
        json.dumps({**formats, "common_backend": "torch", "common_backend_version": 1})
    )
    (checkpoint / "tgdpo.json").write_bytes(to_bytes(_with_its_digest(text) if right_digest else text))

    def compare() -> None:
        recorded = recorded_run(place / "run")
        if recorded is not None:
            check_changes(
                recorded, find_changes(recorded, CONFIG, dict.fromkeys(INPUTS)), CONFIG.output_dir, asked=True
            )

    one_line_or_result(lambda: read_manifest(checkpoint))
    one_line_or_result(lambda: check_hf_files(checkpoint))
    one_line_or_result(lambda: count_restart(place / "run", "7", 10**9))
    one_line_or_result(compare)


@fuzz(
    config=texts([to_yaml(CONFIG)]),
    inputs=jsons([dict.fromkeys(INPUTS, "0" * 64)]),
    log=jsons([{"step": 3}]),
    restarts=jsons([{"job": "7", "step": 0, "without_progress": 1}]),
)
def test_what_a_run_left(place: Path, config: str, inputs: str, log: str, restarts: str) -> None:
    left = place / "left"
    left.mkdir(exist_ok=True)
    for name, text in (("config.yaml", config), ("inputs.json", inputs), ("restarts.json", restarts), ("DONE", "")):
        (left / name).write_bytes(to_bytes(text))
    (left / "metrics.jsonl").write_bytes(to_bytes('{"step": 1}\n' + log + "\n"))
    mine = config_from_dict({**VALID, "output_dir": str(left)})

    def compare() -> None:
        recorded = recorded_run(left)
        assert recorded is not None
        check_changes(recorded, find_changes(recorded, mine, dict.fromkeys(INPUTS)), mine.output_dir, asked=True)

    one_line_or_result(compare)
    one_line_or_result(lambda: is_done(mine))
    one_line_or_result(lambda: count_restart(left, "7", 10**9))
    one_line_or_result(lambda: json_lines._end_of(left / "metrics.jsonl", 2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), layers=1)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


@fuzz(
    header=jsons([HEADER]),
    stated=st.none() | st.integers(0, 2**64 - 1),
    index=st.none() | jsons([{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}]),
)
def test_safetensors_headers(place: Path, header: str, stated: int | None, index: str | None) -> None:
    directory = place / ("sharded" if index else "single")
    directory.mkdir(exist_ok=True)
    raw = to_bytes(header)
    content = struct.pack("<Q", len(raw) if stated is None else stated) + raw + bytes(24)
    (directory / ("x.safetensors" if index else "model.safetensors")).write_bytes(content)
    if index:
        (directory / "model.safetensors.index.json").write_bytes(to_bytes(index))
    opened = one_line_or_result(lambda: HfCheckpoint(directory))
    if opened is not None:
        for name in opened.tensors:
            one_line_or_result(lambda name=name: opened.whole(name))


@fuzz(text=jsons([PUBLISHED["Llama-3-8B"], *(config for name, config in PUBLISHED.items() if name != "Llama-3-8B")]))
def test_hf_configs(place: Path, text: str) -> None:
    (place / "config.json").write_bytes(to_bytes(text))
    one_line_or_result(lambda: read_hf_config(place))


@pytest.fixture(scope="module")
def dataset(place: Path, tokenizer: str) -> tuple[str, dict[str, Any]]:
    (place / "whole.jsonl").write_text("\n".join(map(json.dumps, RECORDS[:1] * 3)))
    prefix = str(place / "whole")
    return prefix, preprocess([str(place / "whole.jsonl")], prefix, PreprocessOptions(tokenizer), progress=False)


@fuzz(data=st.data())
def test_dataset_manifests(dataset: tuple[str, dict[str, Any]], data: st.DataObject) -> None:
    prefix, manifest = dataset
    Path(f"{prefix}.manifest.json").write_bytes(to_bytes(data.draw(jsons([manifest]))))
    opened = one_line_or_result(lambda: PreferenceDataset(prefix))
    if opened is not None:
        one_line_or_result(opened.require_pairs)
        one_line_or_result(opened.verify)
        one_line_or_result(lambda: opened[0])
        one_line_or_result(lambda: opened.source(0))


KEY = dict.fromkeys(("data", "tokenizer", "template", "reference", "guide", "dtype"), "x")


@fuzz(text=jsons([{"format_version": 1, "key": KEY, "pairs": 3, "block_pairs": 2, "shards": ["a", "b"]}]))
def test_cache_manifests(place: Path, text: str) -> None:
    import numpy as np

    from megatron_tgdpo.guidance.cache import MANIFEST_FILE, GuidanceKey

    (place / "cache").mkdir(exist_ok=True)
    (place / "cache" / MANIFEST_FILE).write_bytes(to_bytes(text))
    cache = one_line_or_result(lambda: GuidanceCache(place / "cache", np.ones((3, 3), np.int64), use_guide=True))
    if cache is not None:
        one_line_or_result(lambda: cache.check_key(GuidanceKey(**KEY)))
        one_line_or_result(cache.check_content)


@fuzz(text=st.data())
def test_tokenizer_files(place: Path, tokenizer: str, text: st.DataObject) -> None:
    directory = place / "tokenizer"
    directory.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        original = json.loads((Path(tokenizer) / name).read_text())
        (directory / name).write_bytes(to_bytes(text.draw(jsons([original]))))
    one_line_or_result(lambda: load_tokenizer(str(directory), None))
