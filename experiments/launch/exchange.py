"""Machines without a shared disk: code goes there as an archive, inputs and outputs through the DVC remote.

A worker that does not see the project's folder works in a folder of its own (`HOLDFAST_TREE` on that machine, else
below its temporary folder), with the code of the driver. It fetches a stage's inputs by their md5, runs the command,
puts what DVC caches into the remote, and sends the small files of results/ back with its outcome. The driver takes both
over and commits the stage as any other. What was fetched or sent is compared with its md5.
"""

import base64
import contextlib
import fcntl
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from hashlib import md5 as new_md5
from pathlib import Path
from typing import Any

from experiments.launch import work
from experiments.study import md5
from experiments.study.screen import Screen
from methods.errors import UserError

LEFT_OUT = ("results/", "tests/", "docs/")


def remote(root: str) -> Any:
    """The store of DVC's default remote. Raises UserError where there is none."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(root, config={"core": {"no_scm": True}}) as repo:
            return repo.cloud.get_remote_odb()
    except DvcException as error:
        raise UserError(
            f"machines without a shared disk exchange files through a DVC remote, and there is none ({error}): `dvc "
            "remote add --default NAME URL`"
        ) from error


def send(store: Any, root: str, paths: Mapping[str, str]) -> None:
    """Put files and folders into the store under their md5.

    Raises UserError for one that has another md5 by now.
    """
    from dvc.fs import localfs

    for path, digest in paths.items():
        place = Path(root, path)
        if place.is_dir():
            listed = md5.listing(place)
            found = new_md5(md5.listing_text(listed)).hexdigest() + ".dir"
            files = {str(place / entry["relpath"]): entry["md5"] for entry in listed}
        else:
            found = md5.file_md5(place)
            files = {str(place): found}
        if found != digest:
            raise UserError(f"{path} was changed while it was sent: it has md5 {found}, and had {digest}")
        store.add(list(files), localfs, list(files.values()))
        if place.is_dir() and not store.exists(found):  # last, so that a list in the store is one of files in it
            store.add_bytes(found, md5.listing_text(listed))


def fetch(store: Any, root: str, paths: Mapping[str, str]) -> None:
    """Take files and folders out of the store by their md5; what is there already and is the same stays.

    Raises UserError where something is missing, or is not what its md5 says.
    """
    for path, digest in paths.items():
        place = Path(root, path)
        if _is_here(root, path, digest):
            continue
        if digest.endswith(".dir"):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            for entry in json.loads(store.fs.read_bytes(store.oid_to_path(digest))):
                file = (place / entry["relpath"]).resolve()
                if not file.is_relative_to(place.resolve()):
                    raise UserError(f"the DVC remote lists {entry['relpath']!r} in {path}, which lies outside of it")
                _fetch_file(store, entry["md5"], file)
        else:
            _fetch_file(store, digest, place)
        if md5.of(place) != digest:
            raise UserError(f"{path}: what the DVC remote has is not what its md5 {digest} says")


def _is_here(root: str, path: str, digest: str) -> bool:
    return Path(root, path).exists() and md5.of(Path(root, path)) == digest


def _fetch_file(store: Any, digest: str, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{place.name}.part")
    try:
        store.fs.get_file(store.oid_to_path(digest), str(part))
    except FileNotFoundError as error:
        raise UserError(f"the DVC remote does not have {place.name} with md5 {digest}") from error
    part.replace(place)


@contextlib.contextmanager
def fetched(store: Any, root: str, paths: Mapping[str, str], *, passing: Iterable[str]) -> Iterator[None]:
    """Have the files and folders here for a time; other stages on this machine may use the same ones meanwhile.

    passing  those that are removed when the last of these stages has ended: the others stay for the next ones
    """
    with contextlib.ExitStack() as held:
        locks = {}
        for path, digest in paths.items():
            file = Path(root, "work/local/launch/locks", new_md5(path.encode()).hexdigest())
            file.parent.mkdir(parents=True, exist_ok=True)
            locks[path] = lock = held.enter_context(file.open("w"))
            fcntl.flock(lock, fcntl.LOCK_SH)
            while not _is_here(root, path, digest):
                fcntl.flock(lock, fcntl.LOCK_EX)
                fetch(store, root, {path: digest})
                fcntl.flock(lock, fcntl.LOCK_SH)  # another stage may end, and remove it, between the two locks
        try:
            yield
        finally:
            for path in passing:
                with contextlib.suppress(BlockingIOError):  # another stage still uses it
                    fcntl.flock(locks[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(Path(root, path), ignore_errors=True)


def archive(root: Path) -> bytes:
    """The code and settings of the project: what git knows or does not ignore, without results, tests and docs."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
    data = io.BytesIO()
    # without the time: its hash names the folder on other machines, where an earlier launch has left checkpoints
    packed = gzip.GzipFile(fileobj=data, mode="wb", mtime=0)
    with packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name in sorted(filter(None, names)):
            if not name.startswith(LEFT_OUT) and (root / name).is_file():
                tar.add(root / name, arcname=name, recursive=False)
    return data.getvalue()


def main() -> int:
    """Run the job of a file in this folder, on this machine: what a worker starts that does not see the project."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    file, root = Path(sys.argv[1]), os.getcwd()
    asked = json.loads(file.read_text())
    job = work.Job(**asked["job"] | {"outs": tuple(asked["job"]["outs"])})
    try:
        store = remote(root)
        with fetched(store, root, job.deps, passing=asked["passing"]):
            outcome = work.run(job, root)
        print(outcome.tail, flush=True)
        sent = _answer(job, root, asked, store, well=outcome.status == 0)
    except UserError as error:
        print(f"error: {error}", flush=True)
        return 2
    work.write(Path(f"{file}.answer"), sent)
    return outcome.status


def _answer(job: work.Job, root: str, asked: Mapping, store: Any, *, well: bool) -> dict:
    """What goes back: md5 of what lies in the remote, and small files as they are; of a failure its record."""
    cached = {out: md5.of(Path(root, out)) for out in job.outs if out in asked["cached"]} if well else {}
    send(store, root, cached)
    small = [out for out in job.outs if out not in cached] if well else asked["records"]
    files = {name: Path(root, name) for name in small}
    for path in cached:  # they would fill the disk
        shutil.rmtree(Path(root, path), ignore_errors=True)
    return {
        "cached": cached,
        "files": {name: base64.b64encode(path.read_bytes()).decode() for name, path in files.items() if path.is_file()},
        "noted": _noted(Path(root, asked["ledger"]), asked["cell"]) if well else "",
    }


def _noted(ledger: Path, cell: str) -> str:
    """The last line about the cell in the list of what ran on this machine."""
    for line in reversed(ledger.read_text().splitlines() if ledger.is_file() and cell else []):
        with contextlib.suppress(ValueError):
            if json.loads(line).get("cell") == cell:
                return line
    return ""


def receive(store: Any, root: str, answer: Mapping, *, ledger: Path) -> None:
    """Put what a worker has made to its place on the driver's disk."""
    fetch(store, root, answer["cached"])
    for name, content in answer["files"].items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(base64.b64decode(content))
        part.replace(path)
    if answer["noted"]:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        with ledger.open("a") as file:
            file.write(f"\n{answer['noted']}\n")


if __name__ == "__main__":
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
    sys.exit(main())
