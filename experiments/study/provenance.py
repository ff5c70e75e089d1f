"""Where a number comes from: versions of what computed it and the commit of the code."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "lm_eval", "datasets", "safetensors", "tokenizers", "numpy")
# "dirty" asks about the code and knobs alone: a rewritten result does not make the code another one
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
    """Version of Python and of each package that can move a score; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git(root: Path) -> dict:
    """Commit of the checkout, and whether code or knobs differ from it (None outside a repository); `experiment` within `dvc exp run`."""
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", *CODE)
    within = (
        {"experiment": name} if (name := os.environ.get("DVC_EXP_NAME")) else {}
    )  # DVC sets it for its stages alone
    return {"commit": commit, "dirty": None if changed is None else bool(changed), **within}


def _git(root: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
