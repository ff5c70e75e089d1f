"""A small Hugging Face hub on this machine: what the clients ask of the real one to find and fetch a repository's
files.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from experiments.study.paths import HERE

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".parquet")  # kept beside git, known by their sha256


def digest(file: Path) -> str:
    """The name of a file's bytes on the hub: sha256 for large files, git's blob hash for others."""
    content = file.read_bytes()
    return (
        hashlib.sha256(content).hexdigest()
        if file.suffix in LARGE
        else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    )


def fill_cache(cache: Path, name: str, folder: Path, *, commit: str = COMMIT, ref: str = "main") -> Path:
    """`folder` as the hub's cache holds it after a download: blobs, links to them by name, and the ref. Returns the
    snapshot.
    """
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    for part in (home / "blobs", home / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (home / "refs" / ref).write_text(commit)
    for file in folder.iterdir():
        (home / "blobs" / digest(file)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", digest(file)))
    return snapshot


def run_python(code: str, cache: Path, *arguments: str, **environment: str) -> str:
    """What a fresh Python prints that runs `code`: the hub's clients read their settings when they are imported."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    given = (
        kept
        | {"HOME": str(cache), "HF_HOME": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
        | environment
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=HERE, text=True, capture_output=True, timeout=240, env=given
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@dataclass
class Hub:
    """Repositories by kind ("models", "datasets") and name, each of one commit, and what goes wrong with which."""

    folders: dict[tuple[str, str], Path] = field(default_factory=dict)
    faults: dict[str, tuple[int, str, str]] = field(
        default_factory=dict
    )  # name: HTTP status, X-Error-Code, X-Error-Message
    gated: set[str] = field(default_factory=set)  # names whose files are refused, but not what is said of them
    renamed: dict[str, str] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)  # file: how many times it ends halfway
    sizes: dict[str, int] = field(default_factory=dict)  # file: bytes it is said to have
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        found = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path)
        if found:
            kind, name, what, revision, inside = found.groups()
        else:
            data_set, name, revision, inside = re.fullmatch(
                r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path
            ).groups()
            kind, what = ("datasets" if data_set else "models"), "resolve"
        if name in self.state.renamed:
            self._answer(307, headers={"Location": self.path.replace(name, self.state.renamed[name])})
        elif name in self.state.faults:
            status, code, message = self.state.faults[name]
            self._answer(status, headers={"X-Error-Code": code, "X-Error-Message": message})
        elif what == "resolve" and name in self.state.gated:
            self._answer(403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif (kind, name) not in self.state.folders:
            self._answer(401, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif revision not in (None, "main", COMMIT):
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            folder = self.state.folders[kind, name]
            getattr(self, f"_{what or 'revision'}")(folder, name, inside or "")

    do_HEAD = do_GET

    def _revision(self, folder: Path, name: str, _: str) -> None:
        self._answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": [], "tags": []}).encode())

    def _tree(self, folder: Path, _: str, __: str) -> None:
        self._answer(
            200,
            json.dumps([self._entry(file, folder) for file in sorted(folder.rglob("*")) if file.is_file()]).encode(),
        )

    def _resolve(self, folder: Path, _: str, inside: str) -> None:
        file = folder / inside
        if not file.is_file():
            self._answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        content, headers = (
            file.read_bytes(),
            {"ETag": f'"{digest(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"},
        )
        if inside in self.state.sizes:
            headers["X-Linked-Size"] = str(self.state.sizes[inside])
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
        cut = self.command == "GET" and self.state.cut.get(inside, 0) > 0
        if cut:
            self.state.cut[inside] -= 1
        self._answer(206 if start else 200, content[int(start[1]) if start else 0 :], headers=headers, cut=cut)

    def _entry(self, file: Path, folder: Path) -> dict:
        size, name = file.stat().st_size, digest(file)
        large = {"lfs": {"oid": name, "size": size, "pointerSize": 130}} if file.suffix in LARGE else {}
        return {"type": "file", "path": str(file.relative_to(folder)), "size": size, "oid": name[:40]} | large

    def _answer(
        self, status: int, content: bytes = b"", *, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
