import errno
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from megatron_tgdpo.data import preprocess as preprocess_module
from megatron_tgdpo.data.dataset import PreferenceDataset, open_or_preprocess
from megatron_tgdpo.data.manifest import MANIFEST_SUFFIX
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.preprocess import preprocess
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.errors import StorageError, UserError
from tests.unit.data.conftest import plain_record


@pytest.fixture
def prefix(tmp_path, hf_directory, write_jsonl) -> str:
    source = write_jsonl([plain_record(index, length=1 + index % 4) for index in range(20)])
    prefix = str(tmp_path / "data" / "pairs")
    preprocess([source], prefix, PreprocessOptions(hf_directory), progress=False)
    return prefix


def edit_manifest(prefix: str, **changes) -> None:
    path = Path(prefix + MANIFEST_SUFFIX)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".source.npy"])
def test_truncated_or_missing_file(prefix, suffix):
    path = Path(prefix + suffix)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=rf"pairs{suffix} has \d+ bytes and the manifest says \d+: truncated"):
        PreferenceDataset(prefix)
    path.unlink()
    with pytest.raises(UserError, match=rf"pairs{suffix} is missing"):
        PreferenceDataset(prefix)


def test_incomplete_dataset_is_none(prefix):
    Path(prefix + MANIFEST_SUFFIX).unlink()
    with pytest.raises(UserError, match=r"pairs\.manifest\.json is missing: .* incomplete"):
        PreferenceDataset(prefix)


def test_damaged_manifest(prefix):
    path = Path(prefix + MANIFEST_SUFFIX)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(UserError, match=r"pairs\.manifest\.json: cannot read the manifest"):
        PreferenceDataset(prefix)
    path.write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="not a version 1 manifest"):
        PreferenceDataset(prefix)
    path.write_text('{"format_version": 1}')
    with pytest.raises(UserError, match="lacks 'files'"):
        PreferenceDataset(prefix)


def test_damaged_index(prefix):
    path = Path(prefix + ".idx")
    path.write_bytes(b"X" + path.read_bytes()[1:])
    with pytest.raises(UserError, match="the index is damaged"):
        PreferenceDataset(prefix)


def test_pairs_of_index_and_manifest_must_agree(prefix):
    edit_manifest(prefix, pairs=19)
    with pytest.raises(UserError, match="the index does not hold the manifest's 19 pairs"):
        PreferenceDataset(prefix)


@pytest.mark.parametrize("damage", [10**6, -1])
def test_token_outside_the_vocabulary(prefix, damage):
    with open(prefix + ".bin", "r+b") as stream:
        stream.seek(8)
        stream.write(np.int32(damage).tobytes())
    dataset = PreferenceDataset(prefix)
    with pytest.raises(UserError, match=r"the pair .*pairs\.jsonl:1 holds a token id outside the vocabulary"):
        dataset[0]
    assert dataset[1].index == 1
    with pytest.raises(UserError, match=r"pairs\.bin is damaged"):
        dataset.verify()
    edit_manifest(prefix, max_token_id=10**6)
    with pytest.raises(UserError, match="holds token id 1000000"):
        PreferenceDataset(prefix)


def test_index_out_of_range(prefix):
    dataset = PreferenceDataset(prefix)
    for index in (20, -1):
        with pytest.raises(IndexError):
            dataset[index]


def test_fingerprint_is_of_content(tmp_path, hf_directory, write_jsonl):
    prints = []
    for name, changed in (("a", 0), ("b", 0), ("c", 1)):
        source = write_jsonl([plain_record(index + changed) for index in range(3)], f"{name}.jsonl")
        preprocess([source], str(tmp_path / name), PreprocessOptions(hf_directory), progress=False)
        prints.append(PreferenceDataset(str(tmp_path / name)).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_travels_to_another_process(prefix):
    dataset = PreferenceDataset(prefix)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[7].chosen.tolist() == dataset[7].chosen.tolist()
    assert copy.source(7) == dataset.source(7)


def test_open_by_prefix_or_manifest(prefix, tmp_path, hf_directory):
    options = PreprocessOptions(hf_directory)
    for path in (prefix, prefix + MANIFEST_SUFFIX, [prefix]):
        assert open_or_preprocess(path, options, str(tmp_path / "cache")).prefix == prefix
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_length": 1024}, "made with max_length=2048 and training asks for 1024"),
        ({"max_prompt_length": 9}, "made with max_prompt_length=None and training asks for 9"),
        ({"chat_template": "template.jinja"}, "made with another chat template"),
    ],
)
def test_open_refuses_other_options(prefix, tmp_path, hf_directory, monkeypatch, asked, message):
    monkeypatch.chdir(tmp_path)
    Path("template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match=message):
        open_or_preprocess(prefix, PreprocessOptions(hf_directory, **asked), "cache")


def test_open_refuses_another_tokenizer_and_raw_files_beside(prefix, tmp_path, sp_model, hf_directory, write_jsonl):
    with pytest.raises(UserError, match=r"made with another tokenizer .* preprocess again"):
        open_or_preprocess(prefix, PreprocessOptions(sp_model), str(tmp_path))
    with pytest.raises(UserError, match="is a preprocessed dataset: give it alone"):
        open_or_preprocess([prefix, write_jsonl([])], PreprocessOptions(hf_directory), str(tmp_path))


def test_workers_and_unused_rules_do_not_matter(prefix, tmp_path, hf_directory):
    options = PreprocessOptions(hf_directory, workers=7, overlong_prompt="drop")
    assert len(open_or_preprocess(prefix, options, str(tmp_path))) == 20


def test_missing_path(tmp_path, hf_directory):
    with pytest.raises(UserError, match=r"nothing: cannot be read: No such file"):
        open_or_preprocess(str(tmp_path / "nothing"), PreprocessOptions(hf_directory), str(tmp_path))


def test_leftover_of_an_interrupted_run_is_no_dataset(prefix, tmp_path, hf_directory):
    Path(prefix + MANIFEST_SUFFIX).unlink()
    with pytest.raises(UserError, match="incomplete"):
        open_or_preprocess(prefix, PreprocessOptions(hf_directory), str(tmp_path))


def test_raw_file_is_preprocessed_once(tmp_path, hf_directory, llama_like_directory, write_jsonl, monkeypatch):
    cache, options = str(tmp_path / "cache"), PreprocessOptions(hf_directory)
    runs = []
    encode = preprocess_module.encode_batch

    def counted(*arguments):
        runs.append(1)
        return encode(*arguments)

    monkeypatch.setattr(preprocess_module, "encode_batch", counted)
    source = write_jsonl([plain_record(index) for index in range(10)])
    first = open_or_preprocess(source, options, cache, progress=False)
    again = open_or_preprocess(source, PreprocessOptions(hf_directory, workers=3), cache, progress=False)
    assert (len(runs), first.prefix, len(first)) == (1, again.prefix, 10)

    open_or_preprocess(source, PreprocessOptions(hf_directory, max_length=64), cache, progress=False)
    assert len(runs) == 2
    Path(source).write_text(Path(source).read_text().replace("one", "two"))
    changed = open_or_preprocess(source, options, cache, progress=False)
    assert len(runs) == 3
    assert changed.fingerprint != first.fingerprint

    # A damaged one is made again.
    Path(first.prefix + ".bin").write_bytes(b"")
    Path(source).write_text(Path(source).read_text().replace("two", "one"))
    assert open_or_preprocess(source, options, cache, progress=False).fingerprint == first.fingerprint
    assert len(runs) == 4

    # The same file under another tokenizer is another dataset.
    assert len(open_or_preprocess(source, PreprocessOptions(llama_like_directory), cache, progress=False)) == 10
    assert len(runs) == 5


def test_a_cached_dataset_that_cannot_be_read_is_not_made_again(tmp_path, hf_directory, write_jsonl, monkeypatch):
    source, options = write_jsonl([plain_record(index) for index in range(3)]), PreprocessOptions(hf_directory)
    first = open_or_preprocess(source, options, str(tmp_path / "cache"), progress=False)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    read_text = Path.read_text

    def failing(path, *arguments, **keywords):
        if path.name.endswith(MANIFEST_SUFFIX):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_text(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", failing)
    with pytest.raises(StorageError, match=r"manifest\.json: cannot be read: Input/output error"):
        open_or_preprocess(source, options, str(tmp_path / "cache"), progress=False)
    monkeypatch.undo()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == before
    assert open_or_preprocess(source, options, str(tmp_path / "cache"), progress=False).prefix == first.prefix


def as_before_reading_versions(prefix: str) -> None:
    """Turns a dataset's manifest into one of when there was no ``reading_version``."""
    path = Path(prefix + MANIFEST_SUFFIX)
    content = json.loads(path.read_text())
    assert content.pop("reading_version") > 1
    path.write_text(json.dumps(content))


def test_what_an_older_version_made_of_a_raw_file_is_made_anew(tmp_path, hf_directory, write_jsonl):
    """It lies where it was put by name of content, tokenizer and options alone, and may hold other tokens."""
    options, cache = PreprocessOptions(hf_directory), str(tmp_path / "cache")
    source, other = (write_jsonl([plain_record(index)], f"{name}.jsonl") for index, name in enumerate("ab"))
    content = Path(source).read_bytes()
    tokenizer = load_tokenizer(hf_directory)
    key = {
        "format_version": 1,
        "sources": [(source, len(content), hashlib.sha256(content).hexdigest())],
        "tokenizer": [tokenizer.fingerprint, tokenizer.template_fingerprint],
        "options": options.length_rules(),
    }
    old = f"{cache}/a-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    preprocess([other], old, options, progress=False)
    as_before_reading_versions(old)
    preprocess([source], str(tmp_path / "right"), options, progress=False)
    opened = open_or_preprocess(source, options, cache, progress=False)
    assert opened.fingerprint == PreferenceDataset(str(tmp_path / "right")).fingerprint
    assert opened.fingerprint != PreferenceDataset(old).fingerprint


def test_a_dataset_of_an_older_version_is_taken_with_a_warning(prefix, tmp_path, hf_directory, caplog):
    options = PreprocessOptions(hf_directory)
    open_or_preprocess(prefix, options, str(tmp_path / "cache"))
    assert not caplog.messages
    as_before_reading_versions(prefix)
    assert len(open_or_preprocess(prefix, options, str(tmp_path / "cache"))) == 20
    assert [message.split(":")[0] for message in caplog.messages] == [
        f"{prefix} was made by another version, which reads some records otherwise"
    ]


def test_strict_also_holds_for_a_dataset_made_before(tmp_path, hf_directory, write_jsonl):
    source = write_jsonl([plain_record(0), {"prompt": "Q", "chosen": "same", "rejected": "same"}])
    cache = str(tmp_path / "cache")
    prefix = open_or_preprocess(source, PreprocessOptions(hf_directory), cache, progress=False).prefix
    for path in (source, prefix):
        with pytest.raises(UserError, match=r"dropping pairs \(identical: 1\) and strict is on"):
            open_or_preprocess(path, PreprocessOptions(hf_directory, strict=True), cache, progress=False)
