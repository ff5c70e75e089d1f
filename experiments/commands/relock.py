"""relock: after a change of form, the locks of the default study's finished cells are rewritten instead of the cells.

    python -m experiments relock           compare with the commit that dvc.lock was last changed in, and rewrite
    python -m experiments relock --show    print what is compared: settings of every stage and hashes of the golden weights

A stage is stale when the code of its parts says something else (methods/tools/source_code.py), and moving, splitting or renaming
code does that without changing a number. The command asks the old commit and the working tree the same question and refuses
unless the golden weights are equal bit for bit and all settings are equal; what may differ are the hashes of source files.
Settings that no longer exist count as equal where they had the value at which they did nothing (`REMOVED`).
It never touches results, and a line in docs/decisions.md says each time that it was used.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ruamel.yaml import YAML

from experiments.stages import resolve
from methods.errors import UserError

LOCK = "dvc.lock"
REMOVED = {  # (part, setting) → the value at which it did nothing
    ("ewc", "density"): 1.0,
    ("hierarchical", "density"): 1.0,
    ("hierarchical", "preset"): "",
}


def main(study, *, show: bool = False) -> None:
    """Rewrite dvc.lock, or with `show` print the facts that are compared. Raises UserError where they differ."""
    if show:
        print(json.dumps(facts(study)))
        return
    root = study.paths.root
    commit = _git(root, "log", "-1", "--format=%H", "--", LOCK).strip()
    if not commit:
        raise UserError(f"{LOCK} is in no commit yet: there is nothing to rewrite")
    before, after = _facts_at(commit, root), facts(study)
    refuse_unless_equal(before, after)
    yaml = YAML()
    lock = yaml.load(root / LOCK)
    changed = rewrite(lock["stages"], before=_texts(study, before), after=_texts(study, after))
    with open(root / LOCK, "w", encoding="utf-8") as file:
        yaml.dump(lock, file)
    print(
        f"{len(after['goldens'])} golden cells are equal bit for bit and the settings of {len(after['settings'])} files are equal "
        f"between {commit[:10]} and the working tree: {len(changed)} stages of {LOCK} were rewritten"
    )
    for name in changed:
        print(f"  {name}")
    print(
        "next: `dvc repro` (it runs `resolve`, and `compare` where its code changed), and a line in docs/decisions.md"
    )


def facts(study) -> dict:
    """{"settings": resolved files of the study without their source hashes, "resolved": the same with them, "goldens": {cell: sha256}}."""
    from tests import goldens

    contents = resolve.contents(study)
    found = {
        f"{architecture}/{method}": _sha256(goldens.final(architecture, blocks))
        for architecture in goldens.ARCHITECTURES
        for method, blocks in goldens.METHODS.items()
    }
    return {
        "settings": {name: without_sources(content) for name, content in contents.items()},
        "resolved": contents,
        "goldens": found,
    }


def without_sources(content):
    """A resolved file without the hashes of code."""
    if isinstance(content, Mapping):
        return {key: without_sources(value) for key, value in content.items() if key != "sources"}
    return content


def without_removed(contents: Mapping) -> dict:
    """Resolved files without the settings in `REMOVED`, where these had the value at which they did nothing."""

    def bare(part: str, settings: Mapping) -> dict:
        return {k: value for k, value in settings.items() if (part, k) not in REMOVED or REMOVED[part, k] != value}

    return {
        name: content
        | {"parts": {k: part | {"settings": bare(k, part["settings"])} for k, part in content["parts"].items()}}
        if isinstance(content, Mapping) and "parts" in content
        else content
        for name, content in contents.items()
    }


def refuse_unless_equal(before: Mapping, after: Mapping) -> None:
    """Raises UserError naming the golden cells and the resolved files that differ between two trees."""
    for what, kind in (("goldens", "golden weights"), ("settings", "settings")):
        old, new = without_removed(before[what]), json.loads(json.dumps(after[what]))
        differ = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if differ:
            raise UserError(
                f"the {kind} of {', '.join(differ[:5])}{' and others' if len(differ) > 5 else ''} differ: this is no change "
                "of form, so no lock is rewritten; run `dvc repro` to compute the cells again"
            )


def rewrite(stages: Mapping, *, before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Put the hash and size of each resolved file as it is now into the stages that had it as it was; returns their names.

    before, after  path of a resolved file → its text. A stage whose lock names another text was stale before and stays so.
    """
    changed = []
    for name, stage in stages.items():
        for dependency in stage.get("deps", []):
            old, new = before.get(dependency["path"]), after.get(dependency["path"])
            if old is None or new is None or old == new or dependency["md5"] != _md5(old):
                continue
            dependency["md5"], dependency["size"] = _md5(new), len(new.encode())
            changed.append(name)
    return changed


def _texts(study, found: Mapping) -> dict[str, str]:
    folder = study.paths.resolved.relative_to(study.paths.root)
    return {(folder / name).as_posix(): resolve.text(content) for name, content in found["resolved"].items()}


def _facts_at(commit: str, root: Path) -> dict:
    """What `relock --show` of the tree at `commit` prints, run by this Python."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(_git(root, "archive", commit, text=False))) as tree:
            tree.extractall(folder, filter="data")
        print(f"computing the golden weights of {commit[:10]} and of the working tree (about a minute)", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "experiments", "relock", "--show"],
            cwd=folder,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": folder},
        )
    if done.returncode:
        raise UserError(
            f"the tree of {commit[:10]} cannot be asked (`python -m experiments relock --show` there said: "
            f"{(done.stderr.strip().splitlines() or ['nothing'])[-1]}): run `dvc repro` instead"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _git(root: Path, *words: str, text: bool = True):
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=text)
    if done.returncode:
        raise UserError(
            f"`git {' '.join(words)}` failed in {root}: relock compares with a commit and needs a git repository"
        )
    return done.stdout


def _sha256(tensors) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


def _md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()
