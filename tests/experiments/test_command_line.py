"""The command line: help pages, mistakes without a traceback, the plan."""

import errno
import json
import os
import subprocess
import sys

import pytest

from experiments.paths import HERE


def call(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", *arguments], cwd=HERE, capture_output=True, text=True, env=os.environ | environment)


def test_help_names_every_command():
    shown = call("experiments", "--help").stdout
    for command in ("plan", "export", "tune", "track", "pipeline", "summary", "clean-cells", "train", "evaluate", "compare"):
        assert command in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("experiments", "train", "smollm2-135m/science/ewd/seed0"), "unknown method 'ewd'.*did you mean 'ewc'"),
        (("experiments", "train", "nonsense"), "must be written model/domain/method/seed0"),
        (("experiments", "model", "smolm2-135m"), "unknown model 'smolm2-135m': did you mean 'smollm2-135m'"),
        (("experiments", "export", "llama-tiny/sums/mofo/seed7", "x", "--study", "demo"), "has no weights here"),
        (("experiments", "plan", "--study", "dmo"), "params.yaml not found"),
        (("experiments", "pipeline", "--study", "demo/"), "--study 'demo/': a name is lower-case letters"),
        (("experiments", "prepare", "smollm2-135m", "ewc", "--", "-1"), "seed -1: it must be a whole number from 0"),
    ],
)  # fmt: skip
def test_mistakes_exit_2_without_a_traceback(arguments, message):
    done = call(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert __import__("re").search(message, done.stderr), done.stderr


def test_a_disk_that_refuses_is_named_without_a_traceback(monkeypatch, capsys):
    from experiments import __main__ as command

    def refuse(options):
        raise OSError(errno.EROFS, "Read-only file system", "results/summary/table.csv")

    monkeypatch.setattr(command, "run", refuse)
    monkeypatch.setattr(sys, "argv", ["experiments", "compare"])
    assert command.main() == 2 and "error: results/summary/table.csv: read-only file system; make it writable" in capsys.readouterr().err


def test_plan_prints_cells_and_estimates():
    plan = json.loads(call("experiments", "plan", "--json", "--study", "demo").stdout)
    assert [c["cell"] for c in plan["cells"]] == [f"llama-tiny/sums/{m}/seed0" for m in ("full", "lora", "ewc", "mofo", "hierarchical")]
    for cell in plan["cells"]:
        assert {"cached", "seconds", "memory_bytes", "disk_bytes", "tokens"} <= cell.keys()
        assert cell["memory_bytes"] > 0 and cell["disk_bytes"] > 0
    text = call("experiments", "plan", "--study", "demo").stdout
    assert "to run" in text and "estimated from" in text


def test_methods_lists_the_parts():
    shown = call("methods").stdout
    for part in ("ewc", "given", "hierarchical", "lora", "mofo"):
        assert part in shown
    assert "https://arxiv.org/abs/2407.20999" in shown
