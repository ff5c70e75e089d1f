"""The command line: help pages, mistakes without a traceback, the plan."""

import errno
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from experiments.study import environment
from experiments.study.paths import HERE, Paths
from methods.errors import UserError


def call(*arguments, option="-m", **environment):
    return subprocess.run(
        [sys.executable, option, *arguments], cwd=HERE, capture_output=True, text=True, env=os.environ | environment
    )


def test_help_names_every_command():
    shown = call("experiments", "--help").stdout
    for command in (
        "plan",
        "export",
        "tune",
        "track",
        "pipeline",
        "summary",
        "clean-cells",
        "train",
        "evaluate",
        "compare",
    ):
        assert command in shown


@pytest.fixture
def answer(monkeypatch, capsys):
    """What a command answers, in this process: (exit status, what it prints, its errors)."""
    from experiments import __main__ as command

    monkeypatch.setattr(command.allocator, "keep_memory", lambda: None)

    def ask(*arguments):
        monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
        status = command.main()
        said = capsys.readouterr()
        return status, said.out, said.err

    return ask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "smollm2-135m/science/ewd/seed0"), "unknown method 'ewd'.*did you mean 'ewc'"),
        (("train", "nonsense"), "must be written model/domain/method/seed0"),
        (("train", "smollm2-135m/science/ewc/seed²"), "must be written model/domain/method/seed0"),
        (("train", f"smollm2-135m/science/ewc/seed{'9' * 5000}"), "must be written model/domain/method/seed0"),
        (
            ("audit", "~no-user-of-this-name/model", "other"),
            "a path begins with ~ and a name that no user of this machine has",
        ),
        (("plan", "*/nonsense/*"), r"no cell of the grid matches \*/nonsense/\*"),
        (("check", "mofoo"), "unknown part .mofoo.: did you mean .mofo."),
        (("model", "smolm2-135m"), "unknown model 'smolm2-135m': did you mean 'smollm2-135m'"),
        (("export", "llama-tiny/sums/mofo/seed7", "x", "--study", "demo"), "has no weights here"),
        (("plan", "--study", "dmo"), "unknown study 'dmo': did you mean 'demo'?"),
        (("pipeline", "--study", "demo/"), "--study 'demo/': a name is lower-case letters"),
        (("prepare", "smollm2-135m", "ewc", "--", "-1"), "seed -1: it must be a whole number from 0"),
        (
            ("prepare", "smollm2-135m", "ewc", str(2**63)),
            "seed 9223372036854775808: it must be a whole number from 0 to 9223372036854775807",
        ),
    ],
)
def test_mistakes_exit_2_without_a_traceback(answer, arguments, message):
    status, _, said = answer(*arguments)
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert re.search(message, said), said


def test_a_disk_that_refuses_is_named_without_a_traceback(monkeypatch, answer):
    from experiments import __main__ as command

    def refuse(options):
        raise OSError(errno.EROFS, "Read-only file system", "results/summary/table.csv")

    monkeypatch.setattr(command, "run", refuse)
    status, _, said = answer("compare")
    assert (
        status == 2
        and "error: results/summary/table.csv: read-only file system; correct the path, make it writable" in said
    )


def test_a_tokenizer_that_fails_is_named_without_a_traceback(monkeypatch, answer):
    """The library's Rust code raises plain Exceptions, and where it panics an error that is none."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from experiments import __main__ as command

    lacking = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    strip = decoders.Strip(content="a", left=0, right=5).decode
    for fail in (lambda options: PreTrainedTokenizerFast(tokenizer_object=lacking)("b"), lambda options: strip(["a"])):
        monkeypatch.setattr(command, "run", fail)
        status, _, said = answer("compare")
        assert status == 2 and "error: a tokenizer fails (" in said and "its tokenizer.json is damaged" in said


def test_away_from_the_root_the_way_back_is_told(monkeypatch, answer, tmp_path):
    """The paths of params.yaml begin in the root."""
    monkeypatch.chdir(tmp_path)
    status, _, said = answer("plan", "--study", "demo")
    assert (
        status == 2
        and said
        == f"error: {tmp_path} is not the project's root, to which the paths in params.yaml are relative: "
        f"run `cd {HERE}` first\n"
    )


@pytest.mark.parametrize("module", ("experiments", "methods"))
def test_without_the_environment_what_to_do_is_told(module):
    """-S: a Python without any package, such as the system's. Help needs none."""
    told = subprocess.run(
        [sys.executable, "-S", "-m", module, *(["plan"] if module == "experiments" else [])],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 2 and re.fullmatch(
        r"error: the package \w+ is not installed for .*`source \.venv/bin/activate`.*\n", told.stderr
    ), told.stderr
    if module == "experiments":
        shown = subprocess.run([sys.executable, "-S", "-m", module, "--help"], cwd=HERE, capture_output=True, text=True)
        assert shown.returncode == 0 and "clean-cells" in shown.stdout


@pytest.mark.parametrize(
    ("path", "owner"),
    [
        ("work/demo/data", "demo"),
        ("results/demo/base/m/scores.json", "demo"),
        ("work/data", ""),
        ("results/runs/m/d/full/seed0/train.json", ""),
        ("experiments/studies/demo/x", "demo"),
    ],
)
def test_beside_a_dvc_at_work_on_the_same_study_its_files_are_left_alone(tmp_path, path, owner):
    """The lock is DVC's own."""
    from dvc.fs import localfs
    from dvc.rwlock import rwlock

    for name in ("demo", "other"):
        (tmp_path / "experiments" / "studies" / name).mkdir(parents=True)
    folder = tmp_path / ".dvc" / "tmp"
    folder.mkdir(parents=True)

    def study(name):
        return SimpleNamespace(name=name, paths=Paths(study=name, root=tmp_path))

    with rwlock(str(folder), localfs, "repro", [str(tmp_path / "params.yaml")], [str(tmp_path / path)], False):
        for name in {"demo", "other", ""} - {owner}:
            environment.alone(study(name))
        with pytest.raises(UserError, match=f"process {os.getpid()} .* is running this study: wait"):
            environment.alone(study(owner))
        held = (folder / "rwlock").read_text()
    environment.alone(study(owner))
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    for text in (held.replace(str(os.getpid()), str(ended.pid)), "", "[]", '{"write": 3}', '{"read": {}}'):
        (folder / "rwlock").write_text(text)
        environment.alone(study(owner))


def test_plan_prints_cells_and_estimates(answer):
    plan = json.loads(answer("plan", "--json", "--study", "demo")[1])
    assert [c["cell"] for c in plan["cells"]] == [
        f"llama-tiny/sums/{m}/seed0" for m in ("full", "lora", "ewc", "mofo", "hierarchical")
    ]
    for cell in plan["cells"]:
        assert {"cached", "seconds", "memory_bytes", "disk_bytes", "tokens"} <= cell.keys()
        assert cell["memory_bytes"] > 0 and cell["disk_bytes"] > 0
    text = answer("plan", "--study", "demo")[1]
    assert "to run" in text and "estimated from" in text


def test_methods_lists_the_parts():
    listed = [line.split()[0] for line in call("methods").stdout.splitlines()]
    assert {"ewc", "given", "hierarchical", "lora", "mofo"} <= set(listed)
    assert "https://arxiv.org/abs/2407.20999" in call("methods", "mofo").stdout


def test_stages_without_a_model_do_not_wait_for_the_import_of_transformers_models():
    """`collect`, `compare` and a preparation of nothing begin for every cell; that import takes them seconds."""
    stages = "from experiments.stages import collect, compare, prepare, resolve; from experiments.study import config; "
    settings = "resolve.contents(config.load('demo')); import sys; "
    done = call(stages + settings + "print('transformers.modeling_utils' in sys.modules)", option="-c")
    assert done.stdout == "False\n", done.stderr
