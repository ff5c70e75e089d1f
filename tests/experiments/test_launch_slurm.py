"""Array jobs: what is filled into the user's template, which stages share a task, and what sbatch is asked."""

import pytest

from experiments.launch import array, slurm, work
from experiments.launch.schedule import Needs, Task
from experiments.study import config
from experiments.study.cells import Cell
from experiments.study.paths import Paths
from methods.errors import UserError

TEMPLATE = (
    "#!/bin/bash\n#SBATCH --array={{array}} --mem={{memory}} -c {{cores}} --gpus={{gpus}} -o {{log}}\n{{command}}\n"
)
SMALL, LARGE = Needs(cores=2, memory=2**32), Needs(cores=3.5, gpus=0.5, memory=2**34)


@pytest.fixture
def study(tmp_path):
    return config.load("demo").model_copy(update={"paths": Paths(study="demo", root=tmp_path)})


def cell_of(name: str) -> Cell:
    return Cell("m", "d", name.partition("@")[2], 0)


def tasks() -> tuple[list[Task], dict[str, work.Job]]:
    made = [
        Task(name="base@m", needs=SMALL),
        Task(name="prepare@a", needs=SMALL, once="fisher"),
        Task(name="prepare@b", needs=SMALL, once="fisher"),
    ]
    for cell, needs in (("a", SMALL), ("b", SMALL), ("large", LARGE), ("c", SMALL)):
        once = "training" if cell in "ac" else ""
        made += [Task(name=f"{kind}@{cell}", needs=needs) for kind in ("drift", "evaluate")]
        made += [Task(name=f"train@{cell}", needs=needs, once=once), Task(name=f"collect@{cell}")]
    jobs = {
        task.name: work.Job(name=task.name, address=task.name, command="true", deps={}, outs=(), folder="f")
        for task in made
    }
    return made, jobs


def names(found: dict) -> dict:
    return {
        key: [[[job.name for job in chain] for chain in array.read(line)] for line in lines]
        for key, lines in found.items()
    }


def test_a_cell_is_a_task_and_what_is_shared_is_in_one_task_one_after_another():
    chain = [f"{kind}@{{}}" for kind in ("train", "evaluate", "drift")]
    made = names(slurm.lines(*tasks(), cell_of=cell_of))
    own = {cell: [name.format(cell) for name in chain] for cell in ("a", "b", "c", "large")}
    assert made == {
        (1, SMALL): [[["base@m"]], [["prepare@a"], ["prepare@b"]]],
        (2, SMALL): [[own["a"], own["c"]], [own["b"]]],
        (2, LARGE): [[own["large"]]],
    }


def test_the_template_is_filled_in_and_a_wrong_one_is_refused(study, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "LONGEST", 1)
    template, folder = tmp_path / "job.sh", tmp_path / "jobs"
    template.write_text(TEMPLATE)
    found = slurm.lines(*tasks(), cell_of=cell_of)
    scripts = slurm.write(study, template=template, folder=folder, found=found)
    assert [(script.phase, script.tasks) for script in scripts] == [(1, 1), (1, 1), (2, 1), (2, 1), (2, 1), (3, 1)]
    texts = [script.path.read_text() for script in scripts]
    large = next(text for text in texts if "--mem=16384 -c 4 --gpus=1" in text)
    assert "--array=0-0" in large and f"cd {tmp_path} && " in large and "-m experiments.launch.array" in large
    assert "launch --gather --study demo" in texts[-1] and not [text for text in texts if "{{" in text]
    for text, told in (("{{command}}", "lacks {{array}}"), ("{{command}} {{array}} {{gpu}}", "has {{gpu}}")):
        template.write_text(text)
        with pytest.raises(UserError, match=told.replace("{", r"\{")):
            slurm.write(study, template=template, folder=folder, found=found)
    with pytest.raises(UserError, match="give the path of a template"):
        slurm.write(study, template=tmp_path / "none", folder=folder, found=found)
    template.write_bytes(b"\xff")
    with pytest.raises(UserError, match="it is not utf-8 text: give the path of a template"):
        slurm.write(study, template=template, folder=folder, found=found)


def test_each_phase_waits_for_those_before_it(study, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "$@" >> asked\necho Submitted batch job 7$(wc -l < asked)\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    scripts = [slurm.Script(path=tmp_path / name, phase=phase, tasks=1) for name, phase in zip("abcd", (1, 1, 2, 3))]
    with monkeypatch.context() as empty:
        empty.setenv("PATH", str(tmp_path / "nowhere"))
        with pytest.raises(UserError, match="sbatch is not on this machine"):
            slurm.submit(scripts)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm.submit(scripts) == ["71", "72", "73", "74"]
    asked = (tmp_path / "asked").read_text().replace(f"{tmp_path}/", "").splitlines()
    assert asked == ["a", "b", "--dependency=afterany:71:72 c", "--dependency=afterany:71:72:73 d"]


def test_an_array_task_runs_its_chains_once_more_where_they_fail_and_leaves_the_rest_of_one_that_fails(tmp_path):
    def job(name: str, command: str, deps=(), outs=()) -> work.Job:
        return work.Job(
            name=name, address=name, command=command, deps=dict.fromkeys(deps, ""), outs=tuple(outs), folder="log"
        )

    once = job("once", "sh -c 'test -e seen || { touch seen; exit 1; }; touch a'", outs=["a"])
    behind, broken = job("behind", "touch b", deps=["a"], outs=["b"]), job("broken", "false", outs=["c"])
    after = job("after", "touch d", outs=["d"])
    chains = array.read(array.line([[broken, after], [once, behind], [job("missing", "touch e", deps=["c"])]]))
    assert not array.run_line(chains, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "log", "seen"}
    stamp = (tmp_path / "b").stat().st_mtime_ns
    assert array.run_line([[once, behind]], str(tmp_path)) and (tmp_path / "b").stat().st_mtime_ns == stamp
