"""faults: disturb a tiny study on purpose, run it again, and compare with the undisturbed run bit for bit.

    make faults                                              an hour, in results/faults.json
    python -m experiments faults --count 20 --kinds sigkill,cut
    python -m experiments faults --seed 3 --count 1 --first 17   the one fault that went wrong, again

It works on a copy of the checkout in a temporary folder, on a small disk of its own where the system lets it mount one:
as root, or as a user in a namespace. Nothing outside that folder is touched.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from methods.errors import UserError

DISK_MB = 96
COPIED = ("experiments", "methods", "evaluation", "analysis", "docs", "dvc.yaml", ".dvcignore", ".gitignore")
RESULT = Path("results/faults.json")
# mount the small disk in $0, copy the project there, and go on with the rest of the words in the copy
MOUNTED = 'mount -t tmpfs -o size="$1"m holdfast-faults "$0" && cp -a "$2/." "$0" && cd "$0" && shift 2 && exec "$@"'


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--minutes", type=float, default=60.0, help="begin no new fault after so long (default: 60)")
    command.add_argument("--count", type=int, metavar="N", help="faults (default: as many as the minutes allow)")
    command.add_argument("--seed", type=int, default=0, help="of what happens where (default: 0)")
    command.add_argument("--first", type=int, default=0, metavar="N", help="number of the first fault (default: 0)")
    command.add_argument("--kinds", default="", metavar="A,B,…", help="kinds of faults (default: all)")


def main(options: argparse.Namespace) -> int:
    if options.minutes <= 0 or options.first < 0 or (options.count is not None and options.count < 1):
        raise UserError("--minutes and --count must be above 0, and --first at least 0")
    with tempfile.TemporaryDirectory(prefix="holdfast-faults-") as folder:
        project, report = Path(folder) / "project", Path(folder) / "report.json"
        project_of(project)
        words = [sys.executable, "-m", "experiments.faults.driver", str(report), json.dumps(vars(options))]
        small = Path(folder) / "small"
        small.mkdir()
        if prefix := mounting(small):
            command = [*prefix, "sh", "-c", MOUNTED, str(small), str(DISK_MB), str(project), *words]
        else:
            print("no small disk: this system lets neither root nor a user mount one")
            command = words
        environment = os.environ | {"HOLDFAST_SMALL_DISK": str(int(bool(prefix)))}
        try:
            status = subprocess.run(command, cwd=project, env=environment).returncode
        finally:  # Ctrl-C, too: the report is of the faults until then
            if report.is_file():
                RESULT.parent.mkdir(exist_ok=True)
                shutil.copyfile(report, RESULT)
        if not report.is_file():
            raise UserError(f"the faults ended with status {status} before there was a report: see the lines above")
    return status


def project_of(folder: Path) -> None:
    """A copy of the checkout's code, whose default study is the tiny one that is disturbed."""
    folder.mkdir()
    for name in COPIED:
        if Path(name).is_dir():
            shutil.copytree(name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "dvc.lock"))
        else:
            shutil.copyfile(name, folder / name)
    shutil.copyfile("experiments/faults/params.yaml", folder / "params.yaml")
    (folder / ".dvc").mkdir()
    settings = Path(".dvc/config").read_text()
    (folder / ".dvc" / "config").write_text(settings.replace("[core]", "[core]\n    no_scm = true"))


def mounting(folder: Path) -> list[str]:
    """The words before a command that may then mount a disk of its own; none where the system allows no one that."""
    for prefix in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        try:
            trial = [*prefix, "mount", "-t", "tmpfs", "-o", "size=1m", "holdfast-faults", str(folder)]
            if subprocess.run(trial, capture_output=True).returncode == 0:
                return prefix
        except FileNotFoundError:  # a system without `unshare`
            return []
    return []
