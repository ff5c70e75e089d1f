"""Rows from the files that people have: what is read from each, and what is said of what cannot be."""

import codecs
import gzip
import json

import datasets
import pytest

from experiments.data import local, rows
from experiments.study import schema
from methods.errors import UserError

ROWS = [{"q": "007", "a": "NA"}, {"q": "é, 1e5", "a": 'two\nlines and "quotes"'}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'q,a\r\n007,NA\r\n"é, 1e5","two\nlines and ""quotes"""\r\n'


def read(block, **more):
    written = schema.Rows.model_validate(block)
    return rows.read(written, packages={}, prefer="pypi", where="domains.d", **more)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "a.jsonl": JSONL,
        "a.NDJSON": JSONL.replace("\n", "\r\n\r\n"),
        "a.jsonl.gz": gzip.compress(JSONL.encode(), mtime=0),
        "bom.jsonl": codecs.BOM_UTF8 + JSONL.encode(),
        "utf16.jsonl": JSONL.encode("utf-16"),
        "unmarked.jsonl": JSONL.encode("utf-16-le"),
        "a.json": json.dumps(ROWS, indent=2),
        "list.jsonl": json.dumps(ROWS, indent=2),
        "data.json": json.dumps({"version": "1", "data": ROWS}),
        "lines.json": JSONL,
        "a.json.gz": gzip.compress(json.dumps(ROWS).encode(), mtime=0),
        "a.csv": CSV,
        "excel.csv": codecs.BOM_UTF8 + CSV.replace(",", ";").replace("é;", "é,").encode(),
        "told.csv": "sep=;\r\n" + CSV.replace(",", ";").replace("é;", "é,").replace("q;a", "q; a"),
        "utf16.csv": CSV.encode("utf-16"),
        "a.tsv": CSV.replace(",", "\t").replace("é\t", "é,"),
        "a.csv.gz": gzip.compress(CSV.encode(), mtime=0),
    }.items(),
)
def test_the_same_rows_from_every_kind_of_text(tmp_path, name, content):
    path = write(tmp_path / name, content)
    for block in (path, {"local": path}, {"local": {"path": path}}):
        loaded = read(block)
        assert [dict(row) for row in loaded.rows] == [{"q": r["q"], "a": r["a"]} for r in ROWS]
        assert loaded.source == f"local:{path}"
    assert loaded.rows[0].at.startswith(path)


def test_values_of_a_table_keep_their_types(tmp_path):
    saved = datasets.Dataset.from_list([{"n": 7, "x": 0.5, "t": "007", "m": [{"role": "user", "content": "a"}]}])
    saved.to_parquet(tmp_path / "a.parquet")
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved, "test": saved.select([])}).save_to_disk(tmp_path / "sets")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "one")
    for block in (
        str(tmp_path / "a.parquet"),
        str(tmp_path / "saved"),
        str(tmp_path / "one"),
        {"local": {"path": str(tmp_path / "sets"), "split": "train"}},
    ):
        assert [dict(row) for row in read(block).rows] == [dict(row) for row in saved]
    with pytest.raises(UserError, match="sets: it has several sets: write `split:` with one of train, test"):
        read(str(tmp_path / "sets"))
    with pytest.raises(UserError, match="saved holds one set, without splits"):
        read({"local": {"path": str(tmp_path / "saved"), "split": "train"}})


def test_a_folder_of_texts_is_a_document_a_file(tmp_path, capsys):
    for name, text in {"b.txt": "b", "a/é.md": "ä\r\nb\n", ".hidden/c.txt": "x", "d.pdf": "%PDF"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, text)
    assert [dict(row) for row in read(str(tmp_path)).rows] == [
        {"id": "a/é.md", "text": "ä\nb\n"},
        {"id": "b.txt", "text": "b"},
    ]
    assert "1 files are neither .txt nor .md and are not read, such as d.pdf" in capsys.readouterr().out


def test_another_encoding_is_named_or_refused_by_file_and_line(tmp_path):
    path = write(tmp_path / "a.csv", CSV.encode("cp1252"))
    assert read({"local": {"path": path, "encoding": "cp1252"}}).rows[1]["q"] == "é, 1e5"
    with pytest.raises(
        UserError, match=r"a.csv line 3 is not UTF-8 \(byte 0xe9, .*`rows: {local: {path: .*a.csv, encoding: cp1252}}`"
    ):
        read(path)
    with pytest.raises(UserError, match="there is no encoding 'cp12'"):
        read({"local": {"path": path, "encoding": "cp12"}})


def test_a_document_in_another_encoding_is_left_out_and_many_are_refused(tmp_path, capsys):
    for number in range(20):
        write(tmp_path / f"{number}.txt", f"ä {number}")
    old = write(tmp_path / "old.txt", "é".encode("latin-1"))
    assert len(read(str(tmp_path)).rows) == 20
    problem = "1 of 21 rows cannot be used: not UTF-8: save it as UTF-8, or name the encoding of all files"
    assert f"{problem} as `encoding` ({old})" in capsys.readouterr().out
    for number in range(20):
        write(tmp_path / f"{number}.txt", f"ä {number}".encode("latin-1"))
    with pytest.raises(UserError, match="21 of 21 rows cannot be used: not UTF-8"):
        read(str(tmp_path))
    assert read({"local": {"path": str(tmp_path), "encoding": "latin-1"}}).rows[0]["text"] == "ä 0"


@pytest.mark.parametrize(("name", "head", "line"), [("a.jsonl", "", '{{"q": "{}"}}\n'), ("a.csv", "q\n", "{}\n")])
def test_a_line_in_another_encoding_is_left_out_of_a_file_in_utf_8(tmp_path, capsys, name, head, line):
    lines = [line.format(f"ü {number}").encode() for number in range(20)]
    path = write(tmp_path / name, head.encode() + b"".join([*lines, line.format("é").encode("cp1252"), *lines]))
    loaded = read(path)
    number = 21 + bool(head)
    assert [row["q"] for row in loaded.rows] == [f"ü {number}" for number in range(20)] * 2
    problem = f"1 of 41 rows cannot be used: not UTF-8, as other lines of the file are ({path} line {number})"
    assert problem in capsys.readouterr().out


def test_a_few_broken_lines_are_left_out_and_named_and_many_are_refused(tmp_path, capsys):
    good = ['{"q": 1}'] * 40
    bad = ["{", "[1]", '{"q": NaN}', '{"q": "\\ud83d"}']
    path = write(tmp_path / "a.jsonl", "\n".join(good[:20] + bad + good[20:]))
    loaded = read(path)
    assert len(loaded.rows) == 40 and loaded.rows[20].at == f"{path} line 25"
    said = capsys.readouterr().out
    assert "warning: domains.d: 4 of 44 rows cannot be used: 1: not JSON (" in said and f"{path} line 22" in said
    assert loaded.left_out.facts()["left_out"]["not JSON"] == {"n": 1, "rows": [f"{path} line 21"]}
    assert all(f"{path} line {number}" in said for number in range(21, 25))
    with pytest.raises(UserError, match="domains.d: 12 of 32 rows .* more than one in ten: correct the file"):
        read(write(tmp_path / "b.jsonl", "\n".join(good[:20] + bad * 3)))
    table = ["q,a"] + ["1,2"] * 30 + ["1,2,3", "1", '"x\ny",2']
    loaded = read(write(tmp_path / "a.csv", "\n".join(table)))
    assert len(loaded.rows) == 31 and loaded.rows[-1].at.endswith("a.csv line 34")
    assert set(loaded.left_out.places) == {f"{kind} cells than the header has" for kind in ("more", "fewer")}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"PK", "rows are read from .jsonl, .json, .csv, .* not from .xlsx files"),
        ("a.txt", "x", "a text file is one document: put it into a folder"),
        ("rows", "x", "not from '' files"),
        ("a.csv", b"PK\x03\x04\xff", "a.csv is a zip archive or a spreadsheet, whatever its name: save its rows as"),
        ("a.jsonl", b"PAR1", "a.jsonl is a Parquet file, whatever its name"),
        ("a.csv.gz", b"\x1f\x8bxx", "a.csv.gz is packed, and damaged or cut off"),
        ("a.json", '{"a": [1], "b": [2]}', r"is an object with 2 lists \(a, b\)"),
        ("a.json", "7", "holds neither a list of rows nor an object with one"),
        ("a.json", "[{]", "a.json: not JSON: correct it"),
        ("a.csv", "a,a\n1,2\n", "a.csv line 1 names the column 'a' twice"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "a.csv line 2: the row that begins there is not CSV"),
        ("a.parquet", b"PAR1", "a.parquet is not a readable Parquet file"),
        ("a.jsonl", "", "holds no rows"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, name, content, message):
    with pytest.raises(UserError, match=f"^domains.d: .*{message}"):
        read(write(tmp_path / name, content))


def test_paths_that_are_not_there_and_folders_without_rows(tmp_path):
    with pytest.raises(UserError, match="there is no file or folder"):
        read(str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match="is neither a folder of text files"):
        read(str(tmp_path))
    with pytest.raises(UserError, match="names both `jsonl` and `local`"):
        read({"jsonl": "a.jsonl", "local": "b.csv"})
    assert local.size(tmp_path) == 0


def test_columns_are_renamed_in_the_block_of_the_source_too(tmp_path):
    path = write(tmp_path / "a.csv", CSV)
    block = {"local": {"path": path, "set": {"q": "Q: {{q}}"}, "columns": {"prompt": "q"}}}
    assert dict(read(block).rows[0]) == {"a": "NA", "prompt": "Q: 007"}
    nested = write(tmp_path / "a.jsonl", json.dumps({"data": {"q": [1]}, "a.b": 2}))
    block = {"local": {"path": nested, "columns": {"prompt": "data.q", "c": "a.b"}}}
    assert dict(read(block).rows[0]) == {"data": {"q": [1]}, "prompt": [1], "c": 2}
    block["local"]["columns"] = {"prompt": "data.r"}
    with pytest.raises(UserError, match=r"a.jsonl line 1 has no column 'data.r' \(it has data, a.b\)"):
        read(block)
