"""What DVC cannot see is refused before a stage runs, with a command that helps and names the study's own file."""

import json
import re
import shlex

import pytest

from experiments.__main__ import parser
from experiments.stages import resolve
from experiments.study import config, pipeline, stale
from experiments.study.advice import of_study
from experiments.study.paths import HERE
from methods.errors import UserError
from methods.tools.files import write_json

CELL = {"model": "llama-tiny", "domain": "sums", "method": "ewc"}
DEMO = (HERE / "experiments" / "studies" / "demo" / "params.yaml").read_text()


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The demo's study as a default study below tmp_path, resolved, seen from within DVC."""
    (tmp_path / "params.yaml").write_text(DEMO)
    (tmp_path / "dvc.yaml").write_text((HERE / "dvc.yaml").read_text())
    study = config.load(root=tmp_path)
    pipeline.main(study)
    written(study)
    monkeypatch.setenv("DVC_STAGE", "train@llama-tiny-sums-ewc-0")
    return study


def written(study):
    """What the stage `resolve` writes, without its look ahead."""
    for path, content in resolve.contents(study).items():
        write_json(study.paths.resolved / path, content)


def upgrade(monkeypatch, package, to="99.0"):
    monkeypatch.setattr("evaluation.version", lambda name, real=resolve.version: to if name == package else real(name))


def test_nothing_is_refused_where_nothing_changed(study):
    for stage in stale.FILES:
        stale.refuse(study, stage, **CELL)
    assert stale.forget(study) == "" and study.paths.resolved.is_dir()


@pytest.mark.parametrize("stage", ["base", "prepare", "train", "evaluate"])
def test_an_upgraded_package_is_refused_before_the_work(study, monkeypatch, stage):
    upgrade(monkeypatch, "transformers")
    with pytest.raises(UserError) as refused:
        stale.refuse(study, stage, **CELL)
    assert re.match(
        r"train@llama-tiny-sums-ewc-0: versions.transformers is '99.0' now, and was '5.*' when "
        rf"work/resolved/{'base' if stage == 'base' else 'evaluate'}/llama-tiny.json "
        r"was written; .*`python -m experiments pipeline` and then the same `dvc repro` again",
        str(refused.value),
    )
    stale.refuse(study, "collect", **CELL)  # joins what is there
    monkeypatch.delenv("DVC_STAGE")
    stale.refuse(study, stage, **CELL)  # by hand


def test_following_the_advice_has_dvc_resolve_again(study, monkeypatch, capsys):
    upgrade(monkeypatch, "transformers")
    capsys.readouterr()
    pipeline.main(study)
    assert "versions.transformers is '99.0' now" in capsys.readouterr().out
    assert (
        not study.paths.resolved.exists()
    )  # DVC runs a stage whose out is gone; `persist` keeps it from taking an older one
    written(study)
    stale.refuse(study, "train", **CELL)
    pipeline.main(study)
    assert study.paths.resolved.is_dir()


def test_settings_edited_while_dvc_is_at_work_are_refused_where_they_count(study):
    edited = DEMO.replace("strength: 100.0", "strength: 7.0")
    (study.paths.root / "params.yaml").write_text(edited)
    study = config.load(root=study.paths.root)
    with pytest.raises(UserError, match=r"parts.ewc.settings.strength is 7.0 now, and was 100.0"):
        stale.refuse(study, "train", **CELL)
    stale.refuse(study, "prepare", **CELL)
    stale.refuse(study, "train", **CELL | {"method": "full"})


def test_resolved_files_are_what_the_pipeline_says_stages_depend_on():
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load(HERE / "dvc.yaml")["stages"]
    names = {name: "${item." + name + "}" for name in ("model", "domain", "method")}
    for stage, file in stale.FILES.items():
        assert f"work/resolved/{file.format(**names)}" in stages[stage]["deps"]
    read = {d for stage in stages.values() for d in stage.get("deps", []) if d.startswith("work/resolved/")}
    assert len(read) == len(set(stale.FILES.values()))
    assert stages["resolve"]["outs"] == [{"work/resolved": {"persist": True}}]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("run `dvc repro` to make it", "run `dvc repro experiments/studies/demo/dvc.yaml` to make it"),
        ("`dvc repro train@a-b-c-0` first", "`dvc repro experiments/studies/demo/dvc.yaml:train@a-b-c-0` first"),
        (
            "`dvc repro --force --single-item base@a evaluate@b`",
            "`dvc repro --force --single-item experiments/studies/demo/dvc.yaml:base@a "
            "experiments/studies/demo/dvc.yaml:evaluate@b`",
        ),
        ("`dvc repro -k experiments/studies/demo/dvc.yaml`", "`dvc repro -k experiments/studies/demo/dvc.yaml`"),
        ("`dvc checkout --force`, `dvc reproduce`", "`dvc checkout --force`, `dvc reproduce`"),
    ],
)
def test_commands_name_the_study(said, meant):
    assert of_study(said, "demo") == meant
    assert of_study(meant, "demo") == meant
    assert of_study(said, "") == said


def test_every_command_that_a_message_prints_is_one():
    """Of our own command line and of DVC's, in the text of every module; what is filled in is left out."""
    found = 0
    for path in [
        *HERE.glob("experiments/**/*.py"),
        *HERE.glob("methods/*.py"),
        *HERE.glob("evaluation/*.py"),
        *HERE.glob("analysis/*.py"),
    ]:
        if path.name == "advice.py":  # which holds patterns of commands
            continue
        for command in re.findall(r"`((?:dvc|python -m experiments) [^`{]*)`", path.read_text()):
            words = shlex.split(command.replace('"', ""))
            found += 1
            if words[0] == "dvc":
                stages = [
                    w.partition("@")[0]
                    for w in words[2:]
                    if not w.startswith("-") and w.isascii() and "dvc.yaml" not in w
                ]
                assert words[1] in ("repro", "status", "checkout", "exp", "plots", "metrics", "queue", "remote"), (
                    path,
                    command,
                )
                assert words[1] != "repro" or set(stages) <= {"resolve", "compare", *stale.FILES, "drift"}, (
                    path,
                    command,
                )
            elif words[3] not in ("ARGUMENTS", "COMMAND"):
                assert words[3] in parser()._subparsers._group_actions[0].choices, (path, command)
    assert found > 20


def test_a_message_names_the_study_it_is_of(capsys, monkeypatch):
    from experiments import __main__

    monkeypatch.setattr(
        "sys.argv", ["experiments", "export", "llama-tiny/sums/full/seed0", "nowhere", "--study", "demo"]
    )
    monkeypatch.setattr(__main__.environment, "busy", lambda *_: None, raising=False)
    if (HERE / "work" / "demo" / "cells" / "llama-tiny/sums/full/seed0").exists():
        pytest.skip("the demo was run here")
    assert __main__.main() == 2
    assert "`dvc repro experiments/studies/demo/dvc.yaml:train@llama-tiny-sums-full-0` first" in capsys.readouterr().err


def test_a_folder_of_versions_is_json(study):
    assert json.loads((study.paths.resolved / "evaluate" / "llama-tiny.json").read_text())["versions"].keys() == {
        "lm_eval",
        "tokenizers",
        "torch",
        "transformers",
    }
