"""Streams raw records out of JSON, JSONL, Parquet and Arrow files, one at a time: memory does not grow with the file.

JSON and JSONL files may be compressed; formats and compression are told by content.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from megatron_tgdpo.data.compression import CountedReads, compression_of, decompressed
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.files import read_error

CHUNK_BYTES = 1 << 20
TABLE_ROWS = 256
# An error this close to the end of the buffer may only mean that the rest of the token has not been read yet;
# the longest token that the JSON scanner takes as one is an escaped surrogate pair, 12 characters.
TOKEN_MARGIN = 16
WHITESPACE = " \t\r\n"
PARQUET_START = b"PAR1"
# Arrow's file format, and its stream format (what the datasets library writes) with the mark of the stream's end.
ARROW_FILE_START = b"ARROW1"
ARROW_STREAM_START = b"\xff\xff\xff\xff"
ARROW_STREAM_END = ARROW_STREAM_START + bytes(4)


@dataclass(frozen=True)
class RawRecord:
    """One record as read.

    Attributes:
        number: line in a JSONL file, else the record's place in the file; both count from 1.
        payload: the undecoded line of a JSONL file (parsed by the worker), else the decoded object.
        bytes_read: bytes of the file read when this record was complete; for progress only.
    """

    number: int
    payload: Any
    bytes_read: int


def detect_format(path: str) -> str:
    """Tells ``json`` (top-level array), ``jsonl``, ``parquet`` and ``arrow`` apart by content, not by name.

    Raises:
        UserError: no such file, an empty file, or something else altogether.
        StorageError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            compression = compression_of(file)
            stream = file if compression is None else decompressed(path, file, compression)
            for number, chunk in enumerate(iter(lambda: stream.read(CHUNK_BYTES), b"")):
                if number == 0 and (kind := _table_kind(chunk)) is not None:
                    if compression is not None:
                        raise UserError(f"{path}: a {kind.capitalize()} file inside {compression}: decompress it")
                    return kind
                text = chunk.removeprefix(codecs.BOM_UTF8).lstrip()
                if text:
                    return _json_kind(path, text[:1])
    except OSError as error:
        raise read_error(path, error) from error
    raise UserError(f"{path}: the file is empty; give at least one preference pair")


def _table_kind(head: bytes) -> str | None:
    if head.startswith(PARQUET_START):
        return "parquet"
    return "arrow" if head.startswith((ARROW_FILE_START, ARROW_STREAM_START)) else None


def _json_kind(path: str, first: bytes) -> str:
    if first == b"[":
        return "json"
    if first == b"{":
        return "jsonl"
    raise UserError(
        f"{path}: not JSON, JSONL, Parquet or Arrow (starts with {first!r}); "
        "give a top-level JSON array, one JSON object a line, or a Parquet or Arrow file"
    )


def where(path: str, kind: str, number: int) -> str:
    """Names a record for people: ``pairs.jsonl:17``, or ``pairs.json record 17``."""
    return f"{path}:{number}" if kind == "jsonl" else f"{path} record {number}"


def read_records(path: str, kind: str) -> Iterator[RawRecord]:
    """Yields the records of one file in order.

    Args:
        path: the file.
        kind: what ``detect_format`` said.

    Raises:
        UserError: the file is malformed; names the line or record.
        StorageError: it cannot be read.
    """
    try:
        if kind in _TABLES:
            yield from _read_table(path, kind)
            return
        with open(path, "rb") as file:
            compression = compression_of(file)
            if compression is None:
                yield from _read_json(path, kind, file)
                return
            # Progress is measured in bytes of the file, whatever they become.
            counted = CountedReads(file)
            for record in _read_json(path, kind, decompressed(path, counted, compression)):
                yield replace(record, bytes_read=counted.count)
    except OSError as error:
        raise read_error(path, error) from error


def _read_json(path: str, kind: str, stream: BinaryIO) -> Iterator[RawRecord]:
    return _read_jsonl(stream) if kind == "jsonl" else _read_json_array(path, stream)


def parse_line(line: bytes, place: str) -> Any:
    """Decodes one JSONL line.

    Raises:
        UserError: not UTF-8 or not JSON; starts with ``place``.
    """
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: malformed JSON, {error.msg} at column {error.colno}; each line must hold one whole JSON object"
        ) from error
    except RecursionError as error:
        raise UserError(f"{place}: JSON nested too deeply") from error


def _read_jsonl(stream: BinaryIO) -> Iterator[RawRecord]:
    bytes_read = 0
    # Iterating over bytes splits at \n only, as JSONL defines lines; text mode would also split at \r.
    for number, line in enumerate(stream, start=1):
        bytes_read += len(line)
        if line.strip():
            yield RawRecord(number, line, bytes_read)


class _ArrayBuffer:
    """The undecoded part of a JSON array file, and how far it has been read."""

    def __init__(self, path: str, stream: BinaryIO) -> None:
        self.path = path
        self.stream = stream
        self.utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.at_end = False
        self.bytes_read = 0
        self.line = 1
        self.record = 1

    def error(self, message: str, position: int = 0) -> UserError:
        line = self.line + self.text.count("\n", 0, position)
        return UserError(f"{where(self.path, 'json', self.record)} (line {line}): {message}")

    def fill(self) -> None:
        # Reading as much as is waiting keeps a record larger than the chunk from being scanned a quadratic number
        # of times.
        data = self.stream.read(max(CHUNK_BYTES, len(self.text)))
        self.at_end = not data
        self.bytes_read += len(data)
        try:
            self.text += self.utf8.decode(data, final=self.at_end)
        except UnicodeDecodeError as error:
            raise self.error("not UTF-8") from error

    def drop(self, count: int) -> None:
        self.line += self.text.count("\n", 0, count)
        self.text = self.text[count:]

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            self.drop(len(self.text) - len(self.text.lstrip(WHITESPACE)))
            if self.text or self.at_end:
                return self.text[:1]
            self.fill()


def _read_json_array(path: str, stream: BinaryIO) -> Iterator[RawRecord]:
    buffer = _ArrayBuffer(path, stream)
    buffer.peek()
    buffer.drop(1)
    if buffer.peek() == "]":
        buffer.drop(1)
    else:
        closed = False
        while not closed:
            payload = _decode_object(buffer)
            yield RawRecord(buffer.record, payload, buffer.bytes_read)
            separator = buffer.peek()
            if separator not in (",", "]"):
                found = repr(separator) if separator else "the end of the file"
                raise buffer.error(f"expected ',' or ']' after this record, found {found}; is the file truncated?")
            buffer.drop(1)
            buffer.record += 1
            closed = separator == "]"
    if buffer.peek():
        raise buffer.error("text after the end of the top-level array; for several arrays, give several files")


def _decode_object(buffer: _ArrayBuffer) -> Any:
    decoder = json.JSONDecoder()
    first = buffer.peek()
    if first != "{":
        raise buffer.error(f"expected a JSON object, found {first!r}" if first else "the file ends inside the array")
    while True:
        try:
            payload, end = decoder.raw_decode(buffer.text)
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated string") or error.pos > len(buffer.text) - TOKEN_MARGIN
            if buffer.at_end or not unfinished:
                raise buffer.error(f"malformed JSON, {error.msg}", error.pos) from error
            buffer.fill()
        except RecursionError as error:
            raise buffer.error("JSON nested too deeply") from error
        else:
            buffer.drop(end)
            return payload


class _Table(Protocol):
    """A Parquet or Arrow file, open: its rows, the names of its columns, and its rows in batches of some columns."""

    rows: int
    schema: Any

    def batches(self, columns: list[str]) -> Iterator[Any]: ...


class _ParquetTable:
    def __init__(self, path: str) -> None:
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(path)
        self.rows = self._file.metadata.num_rows
        self.schema = self._file.schema_arrow

    def batches(self, columns: list[str]) -> Iterator[Any]:
        return self._file.iter_batches(batch_size=TABLE_ROWS, columns=columns)


class _ArrowTable:
    """Arrow's stream format has no count of its rows, so they are counted first, without reading their text."""

    def __init__(self, path: str) -> None:
        import pyarrow

        source = pyarrow.memory_map(path)
        size, head = source.size(), source.read(len(ARROW_FILE_START))
        self._source, self._is_file = source, head == ARROW_FILE_START
        if not self._is_file:
            # A stream that was cut between two batches would read well.
            source.seek(max(size - len(ARROW_STREAM_END), 0))
            if source.read() != ARROW_STREAM_END:
                raise UserError(f"{path}: the Arrow stream has no end mark: the file is truncated, write it again")
        reader = self._open()
        self.schema = reader.schema
        self.rows = sum(batch.num_rows for batch in self._raw_batches())

    def _open(self) -> Any:
        import pyarrow

        self._source.seek(0)
        return pyarrow.ipc.open_file(self._source) if self._is_file else pyarrow.ipc.open_stream(self._source)

    def _raw_batches(self) -> Iterator[Any]:
        reader = self._open()
        return map(reader.get_batch, range(reader.num_record_batches)) if self._is_file else iter(reader)

    def batches(self, columns: list[str]) -> Iterator[Any]:
        for batch in self._raw_batches():
            chosen = batch.select(columns)
            for start in range(0, chosen.num_rows, TABLE_ROWS):
                yield chosen.slice(start, TABLE_ROWS)


_TABLES: dict[str, type] = {"parquet": _ParquetTable, "arrow": _ArrowTable}


def _read_table(path: str, kind: str) -> Iterator[RawRecord]:
    import pyarrow

    from megatron_tgdpo.data.layouts import KEYS

    size = Path(path).stat().st_size
    number = 0
    try:
        table: _Table = _TABLES[kind](path)
        columns = [name for name in table.schema.names if name in KEYS]
        if table.rows and not columns:
            raise UserError(f"{path}: no column of a known layout (columns: {', '.join(table.schema.names)})")
        decode = _decoder(table.schema, columns)
        for batch in table.batches(columns):
            for row in batch.to_pylist():
                number += 1
                yield RawRecord(number, decode(row) if decode else row, size * number // table.rows)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{where(path, kind, number + 1)}: cannot read the {kind.capitalize()} file: {reason}"
        ) from error


def _decoder(schema: Any, columns: list[str]) -> Any:
    """What turns a row into the objects that the datasets library had stored in it; None where it is them already.

    It stores objects of varying keys, such as a tool's arguments, as JSON text, and says so in the schema.
    """
    if b"huggingface" not in (schema.metadata or {}):
        return None
    from datasets import Features
    from datasets.features.features import require_decoding

    features = Features.from_arrow_schema(schema)
    features = Features({name: features[name] for name in columns})
    return features.decode_example if any(map(require_decoding, features.values())) else None
