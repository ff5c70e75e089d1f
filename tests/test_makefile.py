"""Which Python `make` takes, and how it refuses another one."""

import os
import shutil
import subprocess
import sys

import pytest

from experiments.study.paths import HERE

# A stand-in that answers as an interpreter of another version would.
OTHER = """#!/bin/sh
exec {python} -c 'import platform, sys; sys.version_info = {version}; platform.python_version = lambda: "{name}"
exec(sys.argv[1])' "$2"
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(HERE / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    return tmp_path


def interpreter(folder, name, text):
    path = folder / "bin" / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def make(folder, *words):
    path = f"{folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, env=os.environ | {"PATH": path})


def test_the_newest_python_that_runs_is_taken(folder):
    interpreter(folder, "python3.13", "#!/bin/sh\necho 'no such version is set' >&2\nexit 127\n")  # a version manager's
    for version in ("3.12", "3.11"):
        interpreter(folder, f"python{version}", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    assert "python3.12 -m venv" in make(folder, "-n", "setup").stdout


@pytest.mark.parametrize("version, accepted", [((3, 10, 2), False), ((3, 14, 0), False), ((3, 13, 1), True)])
def test_another_version_is_refused_by_name(folder, version, accepted):
    name = ".".join(map(str, version))
    python = interpreter(folder, "other", OTHER.format(python=sys.executable, version=version, name=name))
    done = make(folder, "setup", f"PYTHON={python}", f"BIN={folder}/none")
    refusal = f"error: {python} is Python {name}: Holdfast needs 3.11, 3.12 or 3.13"
    assert (refusal in done.stdout + done.stderr) != accepted
    assert accepted or (done.returncode == 2 and not (folder / ".venv").exists())


def test_a_python_that_is_not_there_is_named(folder):
    done = make(folder, "setup", "PYTHON=python9")
    assert (
        done.returncode == 2
        and "error: python9 does not run: install Python 3.11, 3.12 or 3.13" in done.stdout + done.stderr
    )
