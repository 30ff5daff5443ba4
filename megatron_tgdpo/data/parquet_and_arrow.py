"""The rows of Parquet and Arrow files, a few at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from megatron_tgdpo.errors import UserError, one_line

ROWS = 256
_PARQUET_START = b"PAR1"
# Arrow's file format, and its stream format (what the datasets library writes) with the mark of the stream's end.
_ARROW_FILE_START = b"ARROW1"
_ARROW_STREAM_START = b"\xff\xff\xff\xff"
_ARROW_STREAM_END = _ARROW_STREAM_START + bytes(4)


def table_kind(head: bytes) -> str | None:
    """``parquet`` or ``arrow`` by how a file begins, None if it is neither."""
    if head.startswith(_PARQUET_START):
        return "parquet"
    return "arrow" if head.startswith((_ARROW_FILE_START, _ARROW_STREAM_START)) else None


def read_rows(path: str, kind: str, is_wanted: Callable[[str], bool]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields each row, of the columns that are wanted, with the bytes of the file read so far, for progress.

    Args:
        path: the file.
        kind: of `KINDS`.
        is_wanted: whether a column is read, by its name.

    Raises:
        UserError: the file is malformed, or has none of these columns; names the record.
        OSError: it cannot be read.
    """
    import pyarrow

    size = Path(path).stat().st_size
    number = 0
    try:
        table: _Table = KINDS[kind](path)
        columns = [name for name in table.schema.names if is_wanted(name)]
        if table.rows and not columns:
            raise UserError(f"{path}: no column of a known layout (columns: {', '.join(table.schema.names)})")
        decode = _decoder(table.schema, columns)
        for batch in table.batches(columns):
            for row in batch.to_pylist():
                number += 1
                yield decode(row) if decode else row, size * number // table.rows
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{path} record {number + 1}: cannot read the {kind.capitalize()} file: {one_line(error)}"
        ) from error


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
        result: Iterator[Any] = self._file.iter_batches(batch_size=ROWS, columns=columns)
        return result


class _ArrowTable:
    """Arrow's stream format has no count of its rows, so they are counted first, without reading their text."""

    def __init__(self, path: str) -> None:
        import pyarrow

        source = pyarrow.memory_map(path)
        size, head = source.size(), source.read(len(_ARROW_FILE_START))
        self._source, self._is_file = source, head == _ARROW_FILE_START
        if not self._is_file:
            # A stream that was cut between two batches would read well.
            source.seek(max(size - len(_ARROW_STREAM_END), 0))
            if source.read() != _ARROW_STREAM_END:
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
            for start in range(0, chosen.num_rows, ROWS):
                yield chosen.slice(start, ROWS)


KINDS: dict[str, type] = {"parquet": _ParquetTable, "arrow": _ArrowTable}


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
