"""Hostile archives and packed files are refused before they do harm."""

import bz2
import gzip
import io
import json
import lzma
import stat
import zipfile

import pyarrow
import pytest
from pyarrow import parquet

from experiments.data import rows
from experiments.model import archives, packages
from experiments.study import schema
from methods.errors import UserError

ZEROS = bytes(archives.LARGE + 1)


def wheel(path, members, **kept):
    """A wheel with members by name; a ZipInfo stands for its own name and kind."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content, **kept)
    return path


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../../evil.py", "leads out of its folder"),
        ("rows/../../evil.py", "leads out of its folder"),
        ("/etc/cron.d/evil", "leads out of its folder"),
        ("C:/Windows/evil.dll", "leads out of its folder"),
        ("c:evil", "leads out of its folder"),
        ("rows\\..\\evil.py", "leads out of its folder"),
        ("\\\\host\\share\\evil", "leads out of its folder"),
        (link("rows/link"), "is a link"),
    ],
)
def test_an_archive_that_points_elsewhere_is_not_read_at_all(tmp_path, name, why):
    hostile = wheel(tmp_path / "hostile-1-py3-none-any.whl", [("rows/a.jsonl", "{}\n"), (name, "../../../etc/passwd")])
    for read in (lambda: packages.read(hostile, "rows/a.jsonl"), lambda: packages.members(hostile, "rows")):
        with pytest.raises(UserError, match=f"its member .* {why}.*do not use it"):
            read()
    assert [path.name for path in tmp_path.iterdir()] == [hostile.name]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice_is_refused(tmp_path):
    hostile = wheel(tmp_path / "hostile.whl", [("rows/a.jsonl", "{}\n"), ("rows/a.jsonl", '{"other": 1}\n')])
    with pytest.raises(UserError, match="'rows/a.jsonl' is there twice"):
        packages.read(hostile, "rows/a.jsonl")


def test_names_with_dots_are_names(tmp_path):
    kept = [("a..b/c...d", "x"), ("..a/.b", "y"), ("rows/", "")]
    whole = wheel(tmp_path / "honest.whl", kept)
    assert [packages.read(whole, name) for name, _ in kept] == [b"x", b"y", b""]


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_would_become_huge_is_not_unpacked(tmp_path, kind):
    hostile = wheel(tmp_path / "bomb.whl", [("rows/a.jsonl", ZEROS), ("b", "small")], compress_type=kind)
    assert hostile.stat().st_size < 200_000
    with pytest.raises(UserError, match=r"bomb.whl: rows/a.jsonl: [\d,]+ bytes would become more than"):
        packages.read(hostile, "rows/a.jsonl")
    assert packages.read(hostile, "b") == b"small"


def test_a_member_is_never_longer_than_it_states(tmp_path):
    """A directory of the archive that lies about sizes: the content is cut off there, and its checksum differs."""
    whole = wheel(tmp_path / "lying.whl", [("a", ZEROS)]).read_bytes()
    stated, small = len(ZEROS).to_bytes(4, "little"), (100).to_bytes(4, "little")
    assert whole.count(stated) == 2
    (tmp_path / "lying.whl").write_bytes(whole.replace(stated, small))
    with pytest.raises(UserError, match="is not a readable wheel"):
        packages.read(tmp_path / "lying.whl", "a")


def read(**block):
    return rows.read(schema.Rows.model_validate(block), packages={}, prefer="pypi", where="tasks.own")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("source", ["local", "jsonl"])
def test_a_packed_file_of_rows_that_would_become_huge_is_refused(tmp_path, pack, source):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(pack(b'{"a": "' + ZEROS))
    assert file.stat().st_size < 200_000
    with pytest.raises(UserError, match=r"rows.jsonl: [\d,]+ bytes would become more than"):
        read(**{source: str(file)})
    file.write_bytes(pack(json.dumps({"a": "b" * 2_000_000}).encode()))  # packed as tightly, and small
    assert len(read(**{source: str(file)}).rows[0]["a"]) == 2_000_000


def test_request_files_and_tables_that_would_become_huge_are_refused(tmp_path):
    with pytest.raises(UserError, match="requests.gz: [0-9,]+ bytes would become more than"):
        rows._documents(gzip.compress(b'{"doc": {"a": "' + ZEROS), "requests.gz")
    table = pyarrow.table({"a": pyarrow.nulls(archives.LARGE + 1)})
    out = io.BytesIO()
    parquet.write_table(table, out)
    (tmp_path / "rows.parquet").write_bytes(out.getvalue())
    with pytest.raises(UserError, match="rows.parquet: [0-9,]+ bytes would become more than"):
        read(local=str(tmp_path / "rows.parquet"))
