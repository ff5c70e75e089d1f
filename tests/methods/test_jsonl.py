"""Rows as people's tools write them are read; what cannot be read is refused with file, line and column."""

import bz2
import gzip
import json
import lzma

import pytest

from methods.errors import UserError
from methods.tools import jsonl

ROWS = [{"q": "\u00e9 \U0001f600", "n": 1}, {"q": "b\u2028c\x85d", "n": [1, 2.5, None, {"x": True}]}]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_encodings_and_compressions(tmp_path, encoding, pack):
    (tmp_path / "rows").write_bytes(pack(TEXT.encode(encoding)))
    actual = jsonl.read(tmp_path / "rows")
    assert actual == ROWS and [row.at for row in actual] == [f"{tmp_path}/rows line {n}" for n in (1, 2)]


def test_line_endings_blank_lines_and_marks_between_files_that_were_joined(tmp_path):
    file = tmp_path / "rows.jsonl"
    for end in ("\n", "\r\n", "\r"):
        file.write_bytes(f'{end}{{"a": 1}}{end}  {end}\ufeff{{"a": 2}}'.encode())
        assert [(row["a"], row.at) for row in jsonl.read(file)] == [(1, f"{file} line 2"), (2, f"{file} line 4")]
    file.write_bytes(b"")
    assert jsonl.read(file) == []


def test_a_giant_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "word " * 2_000_000}))
    assert len(jsonl.read(tmp_path / "rows.jsonl")[0]["text"]) == 10_000_000


BAD = [
    (TEXT.encode("latin-1", "replace"), "line 1 is not UTF-8 .byte 0xe9 at character 8.*Windows-1252.*iconv"),
    (TEXT.encode() + b'{"q": "caf\xe9"}', "line 3 is not UTF-8 .byte 0xe9 at character 11"),
    (TEXT.encode("utf-16")[:-1], "begins as UTF-16-LE and is not in it further on"),
    (gzip.compress(TEXT.encode() * 99)[:-20], "is packed, and damaged or cut off"),
    (b"\x1f\x8bnot gzip", "is packed, and damaged or cut off"),
    (lzma.compress(TEXT.encode() * 99)[:-20], "is packed, and damaged or cut off"),
    (b"PK\x03\x04 ...", "is a zip archive or a spreadsheet"),
    (b"PAR1 ...", "is a Parquet file"),
    (b'{"a": 1}\n{"a": "x\\ud83d"}', "line 2, column 'a': character 2 is .*ud83d.*half of an emoji"),
    (b'{"a": [{"b": "\\udc00"}]}', "line 1, column 'a': character 1 is"),
    (b'{"a\\ud83d": 1}', "line 1, a column's name: character 2"),
    (b'{"a": NaN}', "line 1 holds NaN, which is no JSON number"),
    (b'{"a": [-Infinity]}', "line 1 holds -Infinity"),
    (b'{"a": 1e999}', "line 1, column 'a': a number is infinite, or too large"),
    (
        b'{"a": 9223372036854775808}',
        "line 1, column 'a': 9223372036854775808 needs more than 64 bits: write it as text",
    ),
    (b'{"a": ' + b"9" * 5000 + b"}", "line 1 holds a number that is too long"),
    (b'{"a": ' + b"[" * 9000 + b"]" * 9000 + b"}", "line 1 nests lists or objects more than 100 deep"),
    (b'{"a": ' + b'{"b": ' * 200 + b"1" + b"}" * 201, "line 1, column 'a' nests"),
    (b'{"a": 1, "b": 2, "a": 3}', "line 1 has the name 'a' twice"),
    (b'[{"a": 1}, {"a": 2}]', "line 1 is a JSON list, not an object: write one JSON object a line .`python -c"),
    (b'"text"', "line 1 is a JSON string, not an object"),
    (b'{\n  "a": 1\n}', "line 1 is not JSON .*: write one JSON object a line"),
    (b"question,answer\nx,y\n", "line 1 is not JSON"),
    (b'{"a": "x\ty"}', "line 1 is not JSON .Invalid control character at character 9"),
    (b"\x00\x00\x00\x00\x00", "begins as UTF-32-BE and is not in it further on"),
]


@pytest.mark.parametrize("content, message", BAD, ids=range(len(BAD)))
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{file}.*{message}"):
        jsonl.read(file)


def test_what_is_no_file(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("", "none.jsonl", "n" * 300, "zero\0byte", "loop", "loop/inside"):
        with pytest.raises(UserError, match="cannot be read"):
            jsonl.read(tmp_path / name)


def test_every_cut_and_every_changed_byte_is_read_or_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    for whole in (
        TEXT.encode(),
        TEXT.encode("utf-16"),
        gzip.compress(TEXT.encode(), mtime=0),
        lzma.compress(TEXT.encode()),
    ):
        for at in range(0, len(whole), 3):
            for content in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x84]) + whole[at + 1 :]):
                file.write_bytes(content)
                try:
                    jsonl.read(file)
                except UserError as error:
                    assert str(file) in str(error)
