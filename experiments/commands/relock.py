"""relock: rewrite dvc.lock for finished cells of the default study after a change of form, without running them again.

    python -m experiments relock           compare with the last commit that changed dvc.lock, and rewrite
    python -m experiments relock --show    print what is compared: settings of every stage, hashes of the golden weights

A stage becomes stale with the syntax tree of its parts (methods/tools/source_code.py), also when code is split or
renamed without a change of numbers. The command computes the settings and golden weights of the old commit and of the
working tree, and refuses unless the weights are equal bit for bit and all settings are equal; only hashes of source
files may differ. A setting that one of the two trees lacks counts as equal where the other has it at the value without
effect (`WITHOUT_EFFECT`).
Results are never changed, and docs/decisions.md has a line for each use.
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
WITHOUT_EFFECT = {  # (part, setting) → the value at which it is as if there were no such setting
    ("ewc", "density"): 1.0,
    ("ewc", "earlier"): "",
    ("ewc", "gamma"): 1.0,
    ("hierarchical", "density"): 1.0,
    ("hierarchical", "preset"): "",
    ("lora", "dora"): False,
}


def main(study, *, show: bool = False) -> None:
    """Rewrite dvc.lock, or with `show` print what is compared. Raises UserError if it differs."""
    if show:
        print(json.dumps(facts(study)))
        return
    root = study.paths.root
    commit = _git(root, "log", "-1", "--format=%H", "--", LOCK).strip()
    if not commit:
        raise UserError(f"{LOCK} has no commit yet: there is nothing to rewrite")
    before, after = _facts_at(commit, root), facts(study)
    refuse_unless_equal(before, after)
    yaml = YAML()
    lock = yaml.load(root / LOCK)
    changed = rewrite(lock["stages"], before=_texts(study, before), after=_texts(study, after))
    with open(root / LOCK, "w", encoding="utf-8") as file:
        yaml.dump(lock, file)
    print(
        f"{len(after['goldens'])} golden cells are equal bit for bit and the settings of {len(after['settings'])} "
        f"files are equal between {commit[:10]} and the working tree: {len(changed)} stages of {LOCK} were rewritten"
    )
    for name in changed:
        print(f"  {name}")
    print("next: `dvc repro` (runs `resolve`, and `compare` where its code changed), and a line in docs/decisions.md")


def facts(study) -> dict:
    """What is compared: {"settings": resolved files without source hashes, "resolved": with them, "goldens"}."""
    from tests import goldens

    contents = resolve.contents(study)
    hashes = {
        f"{architecture}/{method}": _sha256(goldens.final(architecture, blocks))
        for architecture in goldens.ARCHITECTURES
        for method, blocks in goldens.METHODS.items()
    }
    return {
        "settings": {name: without_sources(content) for name, content in contents.items()},
        "resolved": contents,
        "goldens": hashes,
    }


def without_sources(content):
    """A resolved file without the hashes of source files."""
    if isinstance(content, Mapping):
        return {key: without_sources(value) for key, value in content.items() if key != "sources"}
    return content


def with_effect(contents: Mapping) -> dict:
    """Resolved files without the settings in `WITHOUT_EFFECT` that have the value there."""

    def bare(part: str, settings: Mapping) -> dict:
        return {k: value for k, value in settings.items() if WITHOUT_EFFECT.get((part, k), ...) != value}

    contents = dict(contents)
    for name, content in contents.items():
        if isinstance(content, Mapping) and "parts" in content:
            parts = {k: part | {"settings": bare(k, part["settings"])} for k, part in content["parts"].items()}
            contents[name] = content | {"parts": parts}
    return contents


def refuse_unless_equal(before: Mapping, after: Mapping) -> None:
    """Raise UserError that names the golden cells or resolved files that differ between two trees."""
    for what, kind in (("goldens", "golden weights"), ("settings", "settings")):
        old, new = with_effect(before[what]), with_effect(json.loads(json.dumps(after[what])))
        differ = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if differ:
            raise UserError(
                f"the {kind} of {', '.join(differ[:5])}{' and others' if len(differ) > 5 else ''} differ: this is not "
                "a change of form, so no lock is rewritten; run `dvc repro` to compute the cells again"
            )


def rewrite(stages: Mapping, *, before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Replace the hash and size of each resolved file in the stages that depend on it, and return their names.

    before, after  path of a resolved file → its text; a stage with another text in its lock was stale and stays stale
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


def _texts(study, compared: Mapping) -> dict[str, str]:
    folder = study.paths.resolved.relative_to(study.paths.root)
    return {(folder / name).as_posix(): resolve.text(content) for name, content in compared["resolved"].items()}


def _facts_at(commit: str, root: Path) -> dict:
    """The output of `relock --show` in the tree of `commit`, run by this Python."""
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
            f"`python -m experiments relock --show` fails in the tree of {commit[:10]} "
            f"({(done.stderr.strip().splitlines() or ['no message'])[-1]}): run `dvc repro` instead"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _git(root: Path, *words: str, text: bool = True):
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=text)
    if done.returncode:
        raise UserError(f"`git {' '.join(words)}` failed in {root}: relock compares with a commit of a git repository")
    return done.stdout


def _sha256(tensors) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


def _md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()
