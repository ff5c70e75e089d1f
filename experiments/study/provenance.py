"""Record where a number comes from: the versions of the packages and the commit of the code."""

import json
import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "lm_eval", "datasets", "safetensors", "tokenizers", "numpy")
# "dirty" is about code and settings only: a rewritten result does not change the code
CODE = (
    "experiments",
    "methods",
    "evaluation",
    "analysis",
    "params.yaml",
    "dvc.yaml",
    ":(exclude)experiments/studies/*/dvc.lock",
)


def versions() -> dict[str, str]:
    """Version of Python and of each installed package that can change a score."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def git(root: Path) -> dict:
    """The commit, whether code or settings differ from it (None outside a repository), and the `experiment` of DVC.

    On a machine to which `launch` sent the code they are those of the repository that it was sent from.
    """
    if sent := os.environ.get("HOLDFAST_GIT"):
        return json.loads(sent)
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", *CODE)
    facts = {"commit": commit, "dirty": None if changed is None else bool(changed)}
    name = os.environ.get("DVC_EXP_NAME")  # `dvc exp run` sets it for its stages
    return facts | ({"experiment": name} if name else {})


def _git(root: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
