import bz2
import errno
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_tgdpo.data import records
from megatron_tgdpo.data.records import detect_format, parse_line, read_records, where
from megatron_tgdpo.errors import StorageError, UserError

RECORDS = [
    {"text": 'brackets ]}, quotes " and \\ and a newline\n', "n": 1},
    {"text": "é 漢字 \U0001f600", "nested": [{"a": [1, 2.5, -3e4, None, True]}]},
    {"text": "x" * 5000},
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_json_array_is_read_alike_whatever_the_chunk(tmp_path, monkeypatch, chunk, style):
    monkeypatch.setattr(records, "CHUNK_BYTES", chunk)
    path = tmp_path / "pairs.json"
    path.write_text("\n " + json.dumps(RECORDS, **style) + " \n", encoding="utf-8")
    assert detect_format(str(path)) == "json"
    read = list(read_records(str(path), "json"))
    assert [record.payload for record in read] == RECORDS
    assert [record.number for record in read] == [1, 2, 3]


def test_json_array_streams(tmp_path, monkeypatch):
    """The first record comes out before the file has been read."""
    monkeypatch.setattr(records, "CHUNK_BYTES", 256)
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"n": n, "text": "y" * 50} for n in range(5000)]))
    stream = read_records(str(path), "json")
    assert next(stream).bytes_read <= 256
    assert sum(1 for _ in stream) == 4999


def test_byte_order_mark_is_no_content(tmp_path):
    array, lines = tmp_path / "a.json", tmp_path / "b.json"
    array.write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    lines.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    assert (detect_format(str(array)), detect_format(str(lines))) == ("json", "jsonl")
    assert [record.payload for record in read_records(str(array), "json")] == [{"a": 1}]
    parsed = [parse_line(record.payload, "b") for record in read_records(str(lines), "jsonl")]
    assert parsed == [{"a": 1}, {"a": 2}]


def test_jsonl_counts_blank_lines_and_splits_at_newline_only(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes('{"a": "one\u2028line"}\n\n  \r\n{"a": 2}\r\n{"a": 3}'.encode())
    read = list(read_records(str(path), "jsonl"))
    assert [record.number for record in read] == [1, 4, 5]
    assert [parse_line(record.payload, "p")["a"] for record in read] == ["one\u2028line", 2, 3]
    assert read[-1].bytes_read == path.stat().st_size


def test_parquet_rows_and_only_known_columns(tmp_path):
    path = tmp_path / "pairs.parquet"
    table = pyarrow.table({"chosen": [f"c{n}" for n in range(600)], "score": list(range(600))})
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    assert detect_format(str(path)) == "parquet"
    read = list(read_records(str(path), "parquet"))
    assert [record.payload for record in read] == [{"chosen": f"c{n}"} for n in range(600)]
    assert [read[0].number, read[-1].number, read[-1].bytes_read] == [1, 600, path.stat().st_size]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a": }]', r"record 2 \(line 2\): malformed JSON, Expecting value"),
        ('[{"a": 1},\n\n{"a" 2}]', r"record 2 \(line 3\): malformed JSON"),
        ('[{"a": 1} {"a": 2}]', r"record 1 \(line 1\): expected ',' or '\]'"),
        ('[{"a": 1},\n{"a": "trunc', r"record 2 \(line 2\): malformed JSON, Unterminated"),
        ('[{"a": 1},', r"record 2 \(line 1\): the file ends inside the array"),
        ('[{"a": 1}', r"record 1 \(line 1\): .* the end of the file; is the file truncated"),
        ('[{"a": 1}, 3]', r"record 2 \(line 1\): expected a JSON object, found '3'"),
        ('[{"a": 1}]\n[{"a": 2}]', "text after the end of the top-level array"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_malformed_array_names_record_and_line(tmp_path, monkeypatch, content, message, chunk):
    monkeypatch.setattr(records, "CHUNK_BYTES", chunk)
    path = tmp_path / "pairs.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"pairs\.json .*" + message):
        list(read_records(str(path), "json"))


def test_malformed_array_is_reported_without_reading_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK_BYTES", 128)
    path = tmp_path / "pairs.json"
    path.write_text('[{"a": 1},{"a": oops},' + '{"a": 1},' * 100_000 + "{}]")
    with open(path, "rb") as stream:
        with pytest.raises(UserError, match="record 2"):
            list(records._read_json_array(str(path), stream))
        assert stream.tell() < 1024


def test_not_utf8_names_the_line_or_record(tmp_path):
    array = tmp_path / "a.json"
    array.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(UserError, match=r"a\.json record 1 .*not UTF-8"):
        list(read_records(str(array), "json"))
    with pytest.raises(UserError, match=r"^b\.jsonl:7: not UTF-8 \(byte 8 "):
        parse_line(b'{"a": "\xff"}', "b.jsonl:7")


def test_malformed_line_names_file_line_and_column():
    with pytest.raises(UserError, match=r"^data\.jsonl:17: malformed JSON, .* at column 7") as error:
        parse_line(b'{"a": }\n', where("data.jsonl", "jsonl", 17))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b" \n ", "is empty"), (b"a,b\n1,2", "not JSON")])
def test_format_errors(tmp_path, content, message):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        detect_format(str(path))


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        detect_format(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="Is a directory"):
        detect_format(str(tmp_path))


def test_truncated_parquet(tmp_path):
    path = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"chosen": ["a"] * 100}), path)
    Path(path).write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"pairs\.parquet record 1: cannot read the Parquet file"):
        list(read_records(str(path), detect_format(str(path))))


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zstd}
LINES = "".join(json.dumps({"n": n, "text": f"é {n}" * 30}) + "\n" for n in range(3000)).encode()


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files_are_read_as_what_is_in_them(tmp_path, ending):
    path, compress = tmp_path / "pairs.any", COMPRESS[ending]
    # Two members, of which the second begins inside a record.
    path.write_bytes(compress(LINES[:100]) + compress(LINES[100:]))
    assert detect_format(str(path)) == "jsonl"
    read = list(read_records(str(path), "jsonl"))
    assert b"".join(record.payload for record in read) == LINES
    assert read[-1].number == 3000
    assert read[-1].bytes_read == path.stat().st_size
    path.write_bytes(compress(json.dumps(RECORDS).encode()))
    assert detect_format(str(path)) == "json"
    assert [record.payload for record in read_records(str(path), "json")] == RECORDS


@pytest.mark.parametrize("ending", COMPRESS)
def test_truncated_compressed_file_is_named(tmp_path, ending):
    path = tmp_path / "pairs.jsonl.any"
    whole = COMPRESS[ending](LINES)
    for kept in (len(whole) - 3, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match=r"pairs\.jsonl\.any: cannot be decompressed .* is the file truncated\?"):
            list(read_records(str(path), "jsonl"))


def test_compressed_nothing_and_compressed_tables(tmp_path):
    path = tmp_path / "pairs.gz"
    path.write_bytes(gzip.compress(b" \n"))
    with pytest.raises(UserError, match="is empty"):
        detect_format(str(path))
    path.write_bytes(gzip.compress(b"PAR1..."))
    with pytest.raises(UserError, match="a Parquet file inside gzip: decompress it"):
        detect_format(str(path))


@pytest.mark.parametrize("ending", ["jsonl", "gz"])
def test_storage_that_fails_is_no_bad_file(tmp_path, monkeypatch, ending):
    path = tmp_path / "pairs"
    path.write_bytes(LINES if ending == "jsonl" else gzip.compress(LINES))

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(records, "_read_json", broken)
    with pytest.raises(StorageError, match="pairs: cannot be read: Input/output error"):
        list(read_records(str(path), "jsonl"))


@pytest.mark.parametrize("style", ["stream", "file"])
def test_arrow_rows(tmp_path, style):
    path = tmp_path / "data.arrow"
    table = pyarrow.table({"chosen": [f"c{n}" for n in range(600)], "score": list(range(600))})
    opened = {"stream": pyarrow.ipc.new_stream, "file": pyarrow.ipc.new_file}[style]
    with open(path, "wb") as file, opened(file, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=400):
            between = file.tell()
            writer.write_batch(batch)
    assert detect_format(str(path)) == "arrow"
    read = list(read_records(str(path), "arrow"))
    assert [record.payload for record in read] == [{"chosen": f"c{n}"} for n in range(600)]
    assert [read[0].number, read[-1].number, read[-1].bytes_read] == [1, 600, path.stat().st_size]
    # Between two batches, and inside one.
    content = path.read_bytes()
    for kept in (between, len(content) // 2):
        path.write_bytes(content[:kept])
        with pytest.raises(UserError, match=r"data\.arrow"):
            list(read_records(str(path), "arrow"))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_objects_that_the_datasets_library_stores_as_text(tmp_path, kind):
    answers = [[{"role": "assistant", "content": "c", "args": {"n": 1}}], [{"role": "assistant", "args": {"n": "one"}}]]
    table = datasets.Dataset.from_dict({"chosen": answers}, on_mixed_types="use_json")
    if kind == "parquet":
        path = tmp_path / "data.parquet"
        table.to_parquet(path)
    else:
        table.save_to_disk(tmp_path / "saved")
        path = tmp_path / "saved" / "data-00000-of-00001.arrow"
    read = [record.payload["chosen"][0]["args"] for record in read_records(str(path), kind)]
    assert read == [{"n": 1}, {"n": "one"}]


def test_where():
    assert where("d/p.jsonl", "jsonl", 17) == "d/p.jsonl:17"
    assert where("d/p.json", "json", 17) == "d/p.json record 17"
