"""Rows: the objects of a JSON file, the lines of a table, the rows of parquet.

`rows_in` gives the whole rows of a file, each with its place in words for a message; `texts_in`
gives the text in each of them. Every format but parquet may be compressed.
"""

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from config.command import counted, shell_path
from text.formats import DROP_NUL, HEAD, not_utf8, open_unpacked, unpacked_name

Row = tuple[str, dict]  # "line 3", and what is there: name of a field -> value
# Characters in a cell of a table. A quote that is never closed makes one cell of all that follows.
LARGEST_CELL = 2**26


def row_suffix(path: Path) -> str | None:
    """The suffix in ROWS that tells how the rows of this file are read; None for a text."""
    suffix = Path(unpacked_name(path.name)).suffix.lower()
    return suffix if suffix in ROWS else None


def rows_in(path: Path, column: str | None = None) -> Iterator[Row]:
    """(place, fields) of each row of a file, which has a row_suffix.

    Where a `column` is all that is wanted, a parquet file that has it reads only this one. Raises
    ValueError with path and place for what is no row, and OSError for a file that cannot be read.
    """
    suffix = row_suffix(path)
    return parquet_rows(path, column) if suffix == ".parquet" else ROWS[suffix](path)


def texts_in(path: Path, field: str) -> Iterator[str]:
    """The text that each row of a file has in this field. ValueError for a row that has none."""
    for place, row in rows_in(path, field):
        try:
            text = text_in(row, field)
        except ValueError as error:
            raise ValueError(f"{path}: {place} {error}") from None
        except KeyError:
            talk = "; a conversation has 'messages', or 'prompt' and 'completion'"
            raise ValueError(
                f"{path}: {place} has {', '.join(map(repr, row)):.200}, but no {field!r}: name the "
                f"one with the text, as in python data/prepare.py {shell_path(path)} field=NAME"
                f"{talk if field == 'text' else ''}"
            ) from None
        yield text


def text_in(row: dict, field: str) -> str:
    """The text in a field of a row. KeyError if there is no such field; ValueError says what the
    row has instead of a text.
    """
    if not row:
        raise ValueError("is an empty object: mend or drop it")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"has {text!r:.40} as its {field!r}, not a string: mend or drop it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"has half a surrogate pair in its {field!r}: mend or drop it") from None
    return text


# JSON


def json_lines(path: Path) -> Iterator[Row]:
    """The object on each line of a file of JSON lines. Blank lines are skipped."""
    with open_unpacked(path) as file:
        for number, line in enumerate(file, 1):
            if not (line := line.rstrip()):
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"it is {row!r:.40}")
            except (ValueError, RecursionError) as error:
                reason = str(error)
                if isinstance(error, json.JSONDecodeError):  # which counts a line of its own
                    reason = f"{error.msg}, at character {error.pos + 1}"
                raise ValueError(
                    f"{path}: line {number} is not a JSON object ({reason}): mend or drop it"
                ) from None
            yield f"line {number}", row


def json_list(path: Path) -> Iterator[Row]:
    """Each object in the list that a .json file holds, which is read whole.

    Some programs give the name .json to a file of lines, so one that is not a list is read as such.
    """
    with open_unpacked(path) as file:
        is_list = file.read(HEAD).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    try:
        if is_list:
            yield from listed_objects(path)
        else:
            yield from json_lines(path)
    except (ValueError, RecursionError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(
            f"{path}: neither a JSON list of objects nor an object on each line ({reason})"
        ) from None


def listed_objects(path: Path) -> Iterator[Row]:
    with open_unpacked(path) as file:
        rows = json.loads(file.read())
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"item {number} is {row!r:.40}")
        yield f"item {number}", row


# Tables


def table_rows(path: Path) -> Iterator[Row]:
    """The rows of a .csv file, or of a .tsv file with tabs between its cells. Its first line has
    the names of the columns. Blank lines are skipped, and a cell in quotes may have newlines.
    """
    rows = table_cells(path)
    _, names = next(rows, (0, []))
    if twice := [name for name, number in Counter(names).items() if name and number > 1]:
        raise ValueError(f"{path}: two columns are called {twice[0]!r:.40}: rename one in line 1")
    for line, cells in rows:
        if len(cells) != len(names):
            raise ValueError(
                f"{path}: line {line} has {counted(len(cells), 'cell*')}, the first line has "
                f"{len(names)}: mend or drop it"
            )
        yield f"line {line}", dict(zip(names, cells, strict=True))


def table_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of each row of a table that is not blank."""
    csv.field_size_limit(LARGEST_CELL)
    comma = row_suffix(path) == ".csv"
    rows = csv.reader(table_lines(path), delimiter="," if comma else "\t", strict=True)
    line = 1
    try:
        for cells in rows:
            if cells:
                yield line, cells
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}: the row from line {line} on cannot be read ({error}): a cell that begins "
            'with " must end with it, and each " between must be doubled'
        ) from None


def table_lines(path: Path) -> Iterator[str]:
    """The lines of a table with their ends. ValueError if one is not UTF-8, or has a NUL."""
    with open_unpacked(path) as file:
        # A byte that is not UTF-8 becomes half of a surrogate pair, so its line can be told.
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        for number, line in enumerate(text, 1):
            try:
                line.encode()
            except UnicodeEncodeError as error:
                at = len(line[: error.start].encode())
                reason = not_utf8(line.encode(errors="surrogateescape"), at)
                raise ValueError(f"{path}: line {number}: byte {at} {reason}") from None
            if "\0" in line:
                raise ValueError(f"{path}: line {number} has a NUL, which no text has: {DROP_NUL}")
            yield line


# Parquet


def parquet_rows(path: Path, column: str | None = None) -> Iterator[Row]:
    """The rows of a .parquet file: of this column only, if there is such a one."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: reading it needs pyarrow; pip install pyarrow") from None
    numbers = count(1)
    try:
        with parquet.ParquetFile(path) as file:
            columns = [column] if column in file.schema_arrow.names else None
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                for row in batch.to_pylist():
                    yield f"row {next(numbers)}", row
    except (ArrowException, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a parquet file that can be read ({reason})") from None


ROWS: dict[str, Callable[[Path], Iterator[Row]]] = {
    **dict.fromkeys((".jsonl", ".jsonlines", ".jl", ".ndjson"), json_lines),
    ".json": json_list,
    **dict.fromkeys((".csv", ".tsv", ".tab"), table_rows),
    ".parquet": parquet_rows,
}
