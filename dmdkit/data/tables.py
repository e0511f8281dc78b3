"""Tables with a row for each prompt or image: JSON lines, CSV and Parquet files."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dmdkit._checked import describe
from dmdkit.data.texts import encode
from dmdkit.extras import require_extra

SUFFIXES = (".jsonl", ".csv", ".parquet")


class Row(NamedTuple):
    """A row, and where it stands, for messages: "prompts.jsonl, line 3".

    Attributes:
        where: File, and line or row, counted from 1.
        values: The values of the columns that were asked for; None if missing.
    """

    where: str
    values: dict[str, Any]

    def text(self, column: str) -> str:
        """Gives a text without white space around it; "" for none at all.

        Raises:
            ValueError: If the value is no text, or none that UTF-8 can hold.
        """
        value = self.values[column]
        if value is None:
            return ""
        if not isinstance(value, str):
            raise ValueError(
                f"{self.where}: {column!r} is {describe(value)}, expected text."
            )
        encode(value, f"{self.where}: {column!r}")
        return value.strip()

    def number(self, column: str) -> float | None:
        """Gives a number, that of a text too; None for none at all and for NaN.

        Raises:
            ValueError: If the value is no number.
        """
        value = self.values[column]
        if value is None or value == "":
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"{self.where}: {column!r} is {describe(value)}, expected a number."
            ) from None
        return None if math.isnan(number) else number


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Reads some columns of a table row by row.

    Args:
        path: A .jsonl file (an object a line; blank lines are passed over), a .csv file
            (with a header) or a .parquet file; text in UTF-8.
        columns: Names of columns.

    Yields:
        The rows in the file's order.

    Raises:
        ValueError: If there is no such file, its name ends otherwise, it is not
            understood, or a column is missing.
        ImportError: If it is a .parquet file and pyarrow is not installed.
    """
    readers = dict(zip(SUFFIXES, (_json_lines, _csv, _parquet), strict=True))
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"path: {path} is none of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise ValueError(f"path: there is no file {path}.")
    try:
        yield from readers[suffix](path, columns)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"path: {path} cannot be read: {reason}.") from error


def _json_lines(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} is no JSON object.")
            _require_columns(where, columns, list(row))
            yield Row(where, {name: row[name] for name in columns})


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        _require_columns(str(path), columns, list(rows.fieldnames or []))
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            yield Row(where, {name: row[name] for name in columns})


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    require_extra("train", "pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_columns(str(path), columns, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=list(columns)):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", values)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


def _require_columns(where: str, columns: Sequence[str], found: list[str]) -> None:
    for name in columns:
        if name not in found:
            listed = ", ".join(map(repr, found)) or "none"
            raise ValueError(f"{where}: there is no column {name!r}; it has {listed}.")
