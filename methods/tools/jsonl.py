"""Rows of a JSONL file, one JSON object in each line, with the line that each was read from.

It reads UTF-8, UTF-16 and UTF-32 with or without a byte order mark, lines that end in LF, CR LF or CR, and files
compressed by gzip, bzip2 or xz, whatever their names. What is ambiguous or cannot be written again is refused with file
and line: text in another encoding, one half of a surrogate pair, NaN and infinities, the same name twice in an object.
"""

import bz2
import gzip
import io
import json
import lzma
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from methods.errors import UserError

_PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
OTHERS = {  # how files of other kinds begin
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"PAR1": "a Parquet file",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"ARROW1": "an Arrow file",
    b"SQLite": "an SQLite database",
    b"\x7fELF": "a program",
    b"%PDF": "a PDF file",
}
_ONE_A_LINE = "write one JSON object a line"
_HALF = re.compile("[\ud800-\udfff]")
_DEPTH = 100  # of nested lists and objects; Python's own reader allows about 1,000


class Row(dict):
    """The columns of a row, and in `at` the place it was read from, such as "rows.jsonl line 3"."""

    def __init__(self, columns: Any, *, at: str) -> None:
        super().__init__(columns)
        self.at = at


def place(row: dict, number: int) -> str:
    """The place a row was read from, or its number (from 1) where that is not known."""
    return getattr(row, "at", f"row {number}")


def read(path: Path | str) -> list[Row]:
    """All rows of a file. Raises UserError naming the file, line and column of what cannot be read."""
    path = Path(path)
    rows = []
    for number, line in _lines(path):
        line = line.removeprefix("\ufeff")  # within the file where files were concatenated
        if not line.strip():
            continue
        at = f"{path} line {number}"
        row = _parsed(line, at)
        if not isinstance(row, dict):
            script = "import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]"
            hint = f" (`python -c '{script}' < {path} > rows.jsonl`)" if isinstance(row, list) else ""
            raise UserError(f"{at} is a JSON {_kind(row)}, not an object: {_ONE_A_LINE}{hint}")
        rows.append(Row(row, at=at))
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of the file, numbered from 1, decompressed and decoded."""
    try:
        with open(path, "rb") as raw:
            start = raw.read(8)
        for magic, what in OTHERS.items():
            if start.startswith(magic):
                raise UserError(f"{path} is {what}, not JSONL: {_ONE_A_LINE}")
        opened = next((opened for magic, opened in _PACKED.items() if start.startswith(magic)), open)
        with opened(path, "rb") as file:
            encoding = json.detect_encoding(file.read(4))
        with opened(path, "rb") as file:
            # bytes that are not UTF-8 become halves of surrogate pairs, so that their line can be named
            errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
            lines = io.TextIOWrapper(file, encoding=encoding, errors=errors)
            for number, line in enumerate(lines, 1):
                if not line.isascii() and (half := _HALF.search(line)):
                    byte = ord(half.group()) - 0xDC00
                    raise UserError(
                        f"{path} line {number} is not UTF-8 (byte {byte:#x} at character {half.start() + 1}). If "
                        f"another program wrote it, such as Excel, it may be Windows-1252 (Latin-1): "
                        f"`iconv -f WINDOWS-1252 -t UTF-8 {path} > rows.jsonl` converts it"
                    )
                yield number, line
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} begins as {error.encoding.upper()} and is not in it further on ({error.reason}): save it as UTF-8"
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is packed, and damaged or cut off ({error}): fetch it or pack it again") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read ({reason.lower()}): correct the path, or who may read it") from error


def _parsed(line: str, at: str) -> Any:
    def constant(word: str) -> None:
        raise UserError(f"{at} holds {word}, which is no JSON number: write null, or a number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        columns = dict(pairs)
        if len(columns) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{at} has the name {twice!r} twice in one object: leave one of them out")
        return columns

    try:
        row = json.loads(line, parse_constant=constant, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{at} is not JSON ({error.msg.removesuffix(' at')} at character {error.colno}): {_ONE_A_LINE}"
        ) from error
    except RecursionError:
        raise UserError(f"{at} nests lists or objects more than {_DEPTH} deep: flatten it") from None
    except ValueError as error:  # a whole number of more than 4300 digits
        raise UserError(f"{at} holds a number that is too long: write it as text, in quotes") from error
    if isinstance(row, dict):
        refuse_unwritable(row, at)
    return row


def refuse_unwritable(row: dict[str, Any], at: str) -> None:
    """Raises UserError naming `at` and the column of a value that JSON or UTF-8 cannot represent."""
    for column, value in row.items():
        _writable(column, f"{at}, a column's name")
        _writable(value, f"{at}, column {column!r}")


def _writable(value: Any, where: str, depth: int = 0) -> None:
    if isinstance(value, str):
        if not value.isascii() and (half := _HALF.search(value)):
            raise UserError(
                f"{where}: character {half.start() + 1} is {half.group()!a:.8}, one half of a surrogate pair "
                "(half of an emoji, where a text was cut), which no text encoding can hold: remove it"
            )
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(
                f"{where}: a number is infinite, or too large for a floating-point number: write it as text, in quotes"
            )
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise UserError(f"{where}: {str(value)[:24]} needs more than 64 bits: write it as text, in quotes")
    elif isinstance(value, list | dict):
        if depth == _DEPTH:
            raise UserError(f"{where} nests lists or objects more than {_DEPTH} deep: flatten it")
        for inner in value if isinstance(value, list) else (*value, *value.values()):
            _writable(inner, where, depth + 1)


def _kind(value: Any) -> str:
    return {list: "list", str: "string", bool: "truth value", type(None): "null"}.get(type(value), "number")
