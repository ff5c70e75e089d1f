import hashlib
import zipfile
from pathlib import Path

import pytest

from experiments.model import packages
from methods.errors import UserError


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its index, with one real wheel in it, and an empty download cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_rows-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_rows/a.jsonl", '{"x": 1}\n')
        archive.writestr("tiny_rows-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-rows\nVersion: 1.0\n")
        archive.writestr(
            "tiny_rows-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_rows-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_is_fetched_once_and_read(index):
    first = packages.fetch("tiny-rows==1.0", sha256=sha(index))
    assert first.parent == packages.cache_folder() and sha(first) == sha(index)
    digest = sha(index)
    index.unlink()  # from here on only the cache can answer
    assert packages.fetch("Tiny.Rows==1.0", sha256=digest) == first
    assert packages.read(first, "tiny_rows/a.jsonl") == b'{"x": 1}\n'
    assert packages.members(first, "tiny_rows") == ["tiny_rows/a.jsonl"]
    assert list(packages.cache_folder().iterdir()) == [first]


def test_other_bytes_are_refused_and_not_kept(index):
    with pytest.raises(UserError, match="checksum of tiny-rows==1.0 differs.*not kept"):
        packages.fetch("tiny-rows==1.0", sha256="0" * 64)
    assert not list(packages.cache_folder().iterdir())


def test_a_cached_wheel_is_verified_every_time(index):
    wheel = packages.fetch("tiny-rows==1.0", sha256=sha(index))
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(UserError, match=f"Delete {wheel} to download it again"):
        packages.fetch("tiny-rows==1.0", sha256=sha(index))


def test_what_takes_the_place_of_a_cached_wheel_is_never_read(index, tmp_path):
    wheel = packages.fetch("tiny-rows==1.0", sha256=sha(index))
    wheel.unlink()
    wheel.symlink_to(tmp_path / "nowhere")
    assert packages.fetch("tiny-rows==1.0", sha256=sha(index)) == wheel and not wheel.is_symlink()
    wheel.unlink()
    wheel.mkdir()
    with pytest.raises(UserError, match="cannot be stored in"):
        packages.fetch("tiny-rows==1.0", sha256=sha(index))


def test_a_package_that_is_not_there(index):
    with pytest.raises(UserError, match="tiny-rows==2.0 cannot be downloaded: .*Check the name and version"):
        packages.fetch("tiny-rows==2.0", sha256="0" * 64)


def test_no_network(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens on the discard port
    for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(UserError, match="not reachable"):
        packages.fetch("tiny-rows==1.0", sha256="0" * 64)


def test_what_is_asked_for_must_be_exact(index):
    with pytest.raises(UserError, match="NAME==VERSION"):
        packages.fetch("tiny-rows>=1.0", sha256="0" * 64)
    with pytest.raises(UserError, match="no checksum.*known: a==1"):
        packages.checksum({"a==1": "00"}, "b==1")
    with pytest.raises(UserError, match="has no file 'tiny_rows/b.jsonl'.*tiny_rows/a.jsonl"):
        packages.read(index, "tiny_rows/b.jsonl")


def test_downloads_lie_below_the_real_root_of_an_experiment(monkeypatch):
    monkeypatch.delenv("HOLDFAST_CACHE", raising=False)
    monkeypatch.setenv("DVC_ROOT", "/somewhere")
    assert packages.cache_folder() == Path("/somewhere", "work", "downloads")
