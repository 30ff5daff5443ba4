import errno
import hashlib
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_tgdpo.data import preprocess as module
from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.data.manifest import DATA_SUFFIXES, MANIFEST_SUFFIX
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.preprocess import preprocess
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.errors import StorageError, UserError
from megatron_tgdpo.storage import atomic_file
from tests.unit.data.conftest import plain_record

SHARED = Path(__file__).parents[4] / "shared" / "data"
IDENTICAL = {"prompt": "Q", "chosen": "same", "rejected": "same"}


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_round_trip_of_three_formats(tmp_path, hf_directory, write_jsonl):
    """Every pair comes back with the ids of its text, from the file and record it was in."""
    records = [plain_record(index, length=1 + index % 5) for index in range(200)]
    lines = write_jsonl([*records[:70], IDENTICAL, *records[70:100]])
    (tmp_path / "pairs.json").write_text(json.dumps(records[100:150]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[150:]), tmp_path / "pairs.parquet")
    inputs = [lines, str(tmp_path / "pairs.json"), str(tmp_path / "pairs.parquet")]
    prefix = str(tmp_path / "out" / "pairs")
    manifest = preprocess(inputs, prefix, PreprocessOptions(hf_directory), progress=False)

    dataset = PreferenceDataset(prefix)
    tokenizer = load_tokenizer(hf_directory)
    assert len(dataset) == manifest["pairs"] == 200
    for index, record in enumerate(records):
        pair = dataset[index]
        assert pair.index == index
        assert pair.prompt.tolist() == tokenizer.encode(record["prompt"])
        assert pair.chosen.tolist() == [*tokenizer.encode(record["chosen"]), tokenizer.eos_id]
        assert pair.rejected.tolist() == [*tokenizer.encode(record["rejected"]), tokenizer.eos_id]
        assert {pair.prompt.dtype, pair.chosen.dtype, pair.rejected.dtype} == {np.dtype(np.int64)}
        assert dataset.lengths[index].tolist() == [len(pair.prompt), len(pair.chosen), len(pair.rejected)]
    sources = [dataset.source(index) for index in (0, 69, 70, 99, 100, 149, 150, 199)]
    assert sources == [
        *(f"{lines}:{number}" for number in (1, 70, 72, 101)),
        *(f"{inputs[1]} record {number}" for number in (1, 50)),
        *(f"{inputs[2]} record {number}" for number in (1, 50)),
    ]
    dataset.verify()


def test_megatron_reads_one_document_of_three_sequences_a_pair(tmp_path, hf_directory, write_jsonl):
    prefix = str(tmp_path / "pairs")
    preprocess(
        [write_jsonl([plain_record(index) for index in range(5)])],
        prefix,
        PreprocessOptions(hf_directory),
        progress=False,
    )
    indexed = IndexedDataset(prefix)
    assert indexed.document_indices.tolist() == [0, 3, 6, 9, 12, 15]
    assert indexed[0].dtype == np.int32


def test_manifest_says_what_is_in_the_files(tmp_path, hf_directory, write_jsonl):
    records = [plain_record(index, length=1 + 3 * index) for index in range(40)]
    source = write_jsonl([*records, IDENTICAL, IDENTICAL, {"prompt": "Q", "chosen": "", "rejected": "x"}])
    prefix = str(tmp_path / "pairs")
    options = PreprocessOptions(hf_directory, max_length=64, max_prompt_length=12)
    manifest = preprocess([source], prefix, options, progress=False)
    assert manifest == json.loads(Path(prefix + MANIFEST_SUFFIX).read_text())
    assert manifest["dropped"] == {"empty_response": 1, "identical": 2}
    for suffix in DATA_SUFFIXES:
        content = Path(prefix + suffix).read_bytes()
        assert manifest["files"][suffix] == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    raw = Path(source).read_bytes()
    assert manifest["sources"] == [
        {"path": source, "kind": "jsonl", "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    ]
    dataset = PreferenceDataset(prefix)
    pairs = [dataset[index] for index in range(len(dataset))]
    chosen = [len(pair.chosen) for pair in pairs]
    summary = manifest["lengths"]["chosen"]
    assert (summary["min"], summary["max"], summary["total"]) == (min(chosen), max(chosen), sum(chosen))
    assert summary["histogram"] == {
        str(bound): count for bound, count in sorted(Counter(2 ** math.ceil(math.log2(n)) for n in chosen).items())
    }
    row = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    assert manifest["lengths"]["pair"]["total"] == row
    assert max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs) == 64
    tokenizer = load_tokenizer(hf_directory)
    full = [len(tokenizer.encode(record["prompt"])) for record in records]
    assert manifest["truncated"]["prompt_by_max_prompt_length"] == sum(length > 12 for length in full)
    assert manifest["tokenizer"]["vocab_size"] == tokenizer.vocab_size
    assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    largest = max(int(ids.max()) for pair in pairs for ids in (pair.prompt, pair.chosen, pair.rejected))
    assert manifest["max_token_id"] == largest
    assert manifest["options"]["max_length"] == 64


def test_output_does_not_depend_on_workers(tmp_path, sp_model, write_jsonl, monkeypatch):
    monkeypatch.setattr(module, "WORKER_BYTES", 1)
    records = [plain_record(index, length=1 + index % 7) for index in range(700)]
    records[100] = records[555] = IDENTICAL
    source = write_jsonl(records)
    for workers in (1, 3):
        options = PreprocessOptions(sp_model, max_length=40, workers=workers)
        preprocess([source], str(tmp_path / f"w{workers}" / "pairs"), options, progress=False)
    assert len(files(tmp_path / "w1")) == 4
    assert files(tmp_path / "w1") == files(tmp_path / "w3")


@pytest.mark.parametrize("workers", [1, 2])
def test_error_in_a_worker_is_the_one_line_error(tmp_path, sp_model, write_jsonl, workers, monkeypatch):
    monkeypatch.setattr(module, "WORKER_BYTES", 1)
    records: list = [plain_record(index) for index in range(300)]
    records[210] = {"prompt": "Q", "chosen": "A"}
    source = write_jsonl(records)
    prefix = tmp_path / "out" / "pairs"
    with pytest.raises(UserError, match=r"pairs\.jsonl:211: key 'rejected' is missing") as error:
        preprocess([source], str(prefix), PreprocessOptions(sp_model, workers=workers), progress=False)
    assert "\n" not in str(error.value)
    assert list(prefix.parent.iterdir()) == []


def test_malformed_line_names_file_and_line(tmp_path, hf_directory, write_jsonl):
    source = Path(write_jsonl([plain_record(index) for index in range(30)]))
    lines = source.read_text().splitlines()
    lines[16] = lines[16][:-5]
    source.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"pairs\.jsonl:17: malformed JSON"):
        preprocess([str(source)], str(tmp_path / "out"), PreprocessOptions(hf_directory), progress=False)


def test_strict_names_the_pair(tmp_path, hf_directory, write_jsonl):
    source = write_jsonl([plain_record(0), IDENTICAL])
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: this pair would be dropped \(identical\)"):
        preprocess([source], str(tmp_path / "out"), PreprocessOptions(hf_directory, strict=True), progress=False)


def test_nothing_left(tmp_path, hf_directory, write_jsonl):
    with pytest.raises(UserError, match=r"no pair is left \(identical: 2\)"):
        preprocess([write_jsonl([IDENTICAL] * 2)], str(tmp_path / "o"), PreprocessOptions(hf_directory), progress=False)
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(UserError, match=r"empty\.json: no pair is left \(there was none\)"):
        preprocess([str(tmp_path / "empty.json")], str(tmp_path / "o"), PreprocessOptions(hf_directory), progress=False)


def test_existing_dataset_is_kept_unless_told(tmp_path, hf_directory, write_jsonl):
    prefix, options = str(tmp_path / "out" / "pairs"), PreprocessOptions(hf_directory)
    first = write_jsonl([plain_record(0)], "first.jsonl")
    second = write_jsonl([plain_record(1), plain_record(2)], "second.jsonl")
    preprocess([first], prefix, options, progress=False)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match="a dataset is there already"):
        preprocess([second], prefix, options, progress=False)
    # A failed overwrite leaves the old one whole.
    broken = write_jsonl([plain_record(3), {"prompt": 1, "chosen": "a", "rejected": "b"}], "broken.jsonl")
    with pytest.raises(UserError, match=r"broken\.jsonl:2"):
        preprocess([broken], prefix, options, overwrite=True, progress=False)
    assert files(tmp_path / "out") == before
    preprocess([second], prefix, options, overwrite=True, progress=False)
    assert len(PreferenceDataset(prefix)) == 2
    assert len(files(tmp_path / "out")) == 4


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failing_call", range(1, 5))
def test_full_disk_while_files_are_put_in_place(
    tmp_path, hf_directory, write_jsonl, monkeypatch, failing_call, overwrite
):
    """Whichever rename fails, there is no manifest, so what is there is not taken for a dataset."""
    prefix, options = str(tmp_path / "out" / "pairs"), PreprocessOptions(hf_directory)
    source = write_jsonl([plain_record(0)])
    if overwrite:
        preprocess([write_jsonl([plain_record(1)], "old.jsonl")], prefix, options, progress=False)
    calls = 0
    replace = os.replace

    def failing_replace(old, new):
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(os, "replace", failing_replace)
    with pytest.raises(StorageError, match=r"the dataset .*pairs: cannot be written: No space left on device"):
        preprocess([source], prefix, options, overwrite=overwrite, progress=False)
    monkeypatch.undo()
    assert not Path(prefix + MANIFEST_SUFFIX).exists()
    assert not list((tmp_path / "out").glob("*.tmp*"))
    with pytest.raises(UserError, match="incomplete"):
        PreferenceDataset(prefix)


def test_what_a_killed_run_left_is_removed_and_a_live_one_is_named(tmp_path, hf_directory, write_jsonl):
    source = write_jsonl([plain_record(index) for index in range(4)])
    prefix, options = tmp_path / "out" / "pairs", PreprocessOptions(hf_directory)
    prefix.parent.mkdir()
    host, namespace = atomic_file._here()
    live = prefix.with_name(
        f"pairs.{host}-{namespace}-{os.getppid()}-{atomic_file._started(os.getppid())}-00c0ffee.tmp.bin"
    )
    dead = [prefix.with_name(f"pairs.{host}-{namespace}-{os.getpid()}-1-00c0ffee.tmp{end}") for end in (".bin", ".idx")]
    for file in (live, *dead):
        file.touch()
    with pytest.raises(UserError, match=rf"pairs: process {os.getppid()} is writing it"):
        preprocess([source], str(prefix), options, progress=False)
    live.unlink()
    preprocess([source], str(prefix), options, progress=False)
    names = {"pairs.bin", "pairs.idx", "pairs.manifest.json", "pairs.source.npy"}
    assert {file.name for file in prefix.parent.iterdir()} == names


@pytest.mark.parametrize("mixed_at", [3, 4])
def test_files_of_two_runs_are_never_taken_for_one_dataset(tmp_path, hf_directory, write_jsonl, monkeypatch, mixed_at):
    """The other one puts a file in place while this one does; with its last rename, or after it."""
    source = write_jsonl([plain_record(index) for index in range(4)])
    prefix, replace, calls = str(tmp_path / "out" / "pairs"), os.replace, []

    def meanwhile(old, new):
        replace(old, new)
        calls.append(new)
        if len(calls) == mixed_at:
            (tmp_path / "theirs").write_bytes(Path(prefix + ".idx").read_bytes())
            replace(tmp_path / "theirs", prefix + ".idx")

    monkeypatch.setattr(os, "replace", meanwhile)
    with pytest.raises(UserError, match=r"pairs\.idx: another process writes the same dataset"):
        preprocess([source], prefix, PreprocessOptions(hf_directory), progress=False)


def test_interrupt_leaves_nothing(tmp_path, hf_directory, write_jsonl, monkeypatch):
    source = write_jsonl([plain_record(index) for index in range(200)])
    encode = module.encode_batch
    calls = 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(module, "encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preprocess([source], str(tmp_path / "out" / "pairs"), PreprocessOptions(hf_directory), progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_records_in_flight_are_bounded(tmp_path, sp_model, write_jsonl, monkeypatch):
    """The reader runs ahead of the writer by a fixed number of batches, however long the file."""
    source = write_jsonl([plain_record(index, length=1) for index in range(64 * 30)])
    read = written = ahead = 0
    batches, oldest = module._batches, module._oldest

    def counting_batches(*arguments):
        nonlocal read, ahead
        for batch in batches(*arguments):
            read += 1
            ahead = max(ahead, read - written)
            yield batch

    def counting_oldest(*arguments):
        nonlocal written
        written += 1
        return oldest(*arguments)

    monkeypatch.setattr(module, "_batches", counting_batches)
    monkeypatch.setattr(module, "_oldest", counting_oldest)
    monkeypatch.setattr(module, "WORKER_BYTES", 1)
    options = PreprocessOptions(sp_model, workers=2)
    preprocess([source], str(tmp_path / "out"), options, progress=False)
    assert read == written == 30
    assert ahead <= 2 * module.BATCHES_IN_FLIGHT


@pytest.mark.skipif(
    not (SHARED / "llama2_sentencepiece.model").exists(),
    reason="the real data (../shared/data beside the repository) is not on this machine",
)
def test_real_pairs_with_a_real_sentencepiece_model(tmp_path):
    import sentencepiece

    model, source = str(SHARED / "llama2_sentencepiece.model"), SHARED / "preference_pairs_en_300.json"
    prefix = str(tmp_path / "pairs")
    manifest = preprocess([str(source)], prefix, PreprocessOptions(model, max_length=8192), progress=False)
    assert (manifest["pairs"], manifest["dropped"], manifest["truncated"]) == (300, {}, {})
    pieces = sentencepiece.SentencePieceProcessor(model_file=model)
    dataset = PreferenceDataset(prefix)
    names = {"human": "Human", "gpt": "Assistant", "system": "System"}
    for index, record in enumerate(json.loads(source.read_text())):
        pair = dataset[index]
        turns = "".join(
            f"{names[turn['from']]}: {turn['value']}\n" + ("\0" if turn["from"] == "gpt" else "")
            for turn in record["conversations"]
        )
        # An EOS follows each earlier answer, before its newline.
        expected = turns.replace("\n\0", "</s>\n") + "Assistant:"
        assert pair.prompt[0] == 1
        decoded = "</s>".join(
            pieces.decode(part.tolist()) for part in np.split(pair.prompt[1:], _ends(pair.prompt[1:]))
        )
        assert decoded == expected
        for ids, side in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
            assert ids[-1] == 2
            assert pieces.decode([*pieces.encode("x"), *ids[:-1].tolist()]) == f"x {record[side]['value']}"


def _ends(ids: np.ndarray) -> list[int]:
    return np.flatnonzero(ids == 2).tolist()
