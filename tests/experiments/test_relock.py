"""Locks are rewritten after a change of form and for nothing else."""

import hashlib
import shutil
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from experiments.commands import relock
from experiments.stages import resolve
from experiments.study import config
from experiments.study.paths import HERE
from methods.errors import UserError

OLD, NEW = {"work/resolved/train/m/d/mofo.json": "old"}, {"work/resolved/train/m/d/mofo.json": "newer"}


def stage(text):
    return {
        "deps": [
            {"path": "work/data", "md5": "1"},
            {"path": "work/resolved/train/m/d/mofo.json", "md5": relock._md5(text), "size": len(text)},
        ]
    }


def test_only_what_was_up_to_date_is_rewritten():
    stages = {"train@a": stage("old"), "train@b": stage("older still"), "compare": {"cmd": "x"}}
    assert relock.rewrite(stages, before=OLD, after=NEW) == ["train@a"]
    (_, changed), (_, stale) = stages["train@a"]["deps"], stages["train@b"]["deps"]
    assert changed["md5"] == hashlib.md5(b"newer").hexdigest() and changed["size"] == 5
    assert stale["md5"] == hashlib.md5(b"older still").hexdigest()


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"goldens": {"llama/full": "1"}}, "the golden weights of llama/full differ"),
        ({"settings": {"train/a.json": {"train": {"batch": 4}}}}, "the settings of train/a.json differ"),
        ({"settings": {}}, "the settings of train/a.json differ"),
    ],
)
def test_a_change_of_numbers_or_settings_is_refused(changed, said):
    before = {"goldens": {"llama/full": "0"}, "settings": {"train/a.json": {"train": {"batch": 8}}}}
    relock.refuse_unless_equal(before, before)
    with pytest.raises(UserError, match=said):
        relock.refuse_unless_equal(before, before | changed)


def test_a_setting_that_one_tree_lacks_counts_as_equal_only_where_it_does_nothing():
    def facts(part, **settings):
        return {"goldens": {}, "settings": {"train/a.json": {"parts": {part: {"settings": settings}}}}}

    old, new = facts("lora", rank=8), facts("lora", rank=8, dora=False)
    relock.refuse_unless_equal(old, new)
    with pytest.raises(UserError, match="the settings of train/a.json differ"):
        relock.refuse_unless_equal(old, facts("lora", rank=8, dora=True))
    now = facts("hierarchical", samples=8)
    relock.refuse_unless_equal(facts("hierarchical", samples=8, density=1.0, preset=""), now)
    for part, settings in (
        ("hierarchical", {"samples": 8, "density": 0.2, "preset": ""}),
        ("hierarchical", {"samples": 8, "preset": "official"}),
        ("hierarchical", {"samples": 9, "density": 1.0}),
        ("ewc", {"samples": 8, "preset": ""}),
    ):
        with pytest.raises(UserError, match="the settings of train/a.json differ"):
            relock.refuse_unless_equal(facts(part, **settings), now)


def test_hashes_of_sources_are_all_that_may_differ():
    for name, content in resolve.contents(config.load()).items():
        bare = relock.without_sources(content)
        assert "sources" not in str(bare)
        for key, part in content.get("parts", {}).items():
            assert bare["parts"][key]["settings"] == part["settings"], name


@pytest.mark.thorough
def test_the_command_in_a_checkout_of_its_own(tmp_path):
    """A renamed local variable: rewritten. Another constant: refused, and the lock is left alone."""
    root = tmp_path / "project"
    files = subprocess.run(
        ["git", "ls-files", "experiments", "methods", "evaluation", "analysis", "tests", "params.yaml", "dvc.yaml"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / name, root / name)
    study = config.load(root=root)
    path = "train/smollm2-135m/science/mofo.json"
    text = resolve.text(resolve.contents(study)[path])
    lock = {
        "schema": "2.0",
        "stages": {
            "train@x": {
                "cmd": "x",
                "deps": [{"path": f"work/resolved/{path}", "hash": "md5", "md5": relock._md5(text), "size": len(text)}],
            }
        },
    }
    YAML().dump(lock, root / "dvc.lock")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], cwd=root, check=True)

    def run():
        return subprocess.run([sys.executable, "-m", "experiments", "relock"], cwd=root, capture_output=True, text=True)

    mofo = root / "methods" / "mofo.py"
    code = mofo.read_text()
    mofo.write_text(code + "\n_UNUSED = 1\n")
    done = run()
    assert done.returncode == 0 and "1 stages of dvc.lock were rewritten" in done.stdout, done.stderr
    rewritten = (root / "dvc.lock").read_text()
    assert relock._md5(text) not in rewritten
    subprocess.run([*git, "commit", "-qam", "y"], cwd=root, check=True)
    params = root / "params.yaml"
    params.write_text(params.read_text().replace("mofo: {fraction: 0.1}", "mofo: {fraction: 0.2}"))
    done = run()
    assert done.returncode == 2 and "settings of" in done.stderr and (root / "dvc.lock").read_text() == rewritten
