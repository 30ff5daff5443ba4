"""Streams raw records out of JSON, JSONL, Parquet and Arrow files, one at a time: memory does not grow with the file.

JSON and JSONL files may be compressed; formats and compression are told by content.
"""

import codecs
import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from megatron_tgdpo.data.compression import CountedReads, compression_of, decompressed
from megatron_tgdpo.data.fields import RawRecord
from megatron_tgdpo.data.layouts import is_known_key
from megatron_tgdpo.data.parquet_and_arrow import KINDS as TABLE_KINDS
from megatron_tgdpo.data.parquet_and_arrow import read_rows, table_kind
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.files import read_error

CHUNK_BYTES = 1 << 20
# An error this close to the end of the buffer may only mean that the rest of the token has not been read yet;
# the longest token that the JSON scanner takes as one is an escaped surrogate pair, 12 characters.
TOKEN_MARGIN = 16
WHITESPACE = " \t\r\n"


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
                if number == 0 and (kind := table_kind(chunk)) is not None:
                    if compression is not None:
                        raise UserError(f"{path}: a {kind.capitalize()} file inside {compression}: decompress it")
                    return kind
                text = chunk.removeprefix(codecs.BOM_UTF8).lstrip()
                if text:
                    return _json_kind(path, text[:1])
    except OSError as error:
        raise read_error(path, error) from error
    raise UserError(f"{path}: the file is empty; give at least one preference pair")


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


def read_records(path: str, kind: str, columns: Collection[str] = ()) -> Iterator[RawRecord]:
    """Yields the records of one file in order.

    Args:
        path: the file.
        kind: what ``detect_format`` said.
        columns: of a Parquet file, those that are read besides the ones that layouts name.

    Raises:
        UserError: the file is malformed; names the line or record.
        StorageError: it cannot be read.
    """
    try:
        if kind in TABLE_KINDS:
            rows = read_rows(path, kind, lambda name: is_known_key(name) or name in columns)
            for number, (row, bytes_read) in enumerate(rows, start=1):
                yield RawRecord(number, row, bytes_read)
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
