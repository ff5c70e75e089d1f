"""One name, one owner: names that would stand for two things are refused, and scores of two things are not compared."""

import copy
import json

import pytest

from evaluation import harness
from experiments.commands import tune
from experiments.stages.collect import comparable
from experiments.stages.evaluate import merged
from experiments.study import cells, config
from experiments.study.cells import Cell
from experiments.study.paths import Paths
from methods.errors import UserError
from methods.tools.names import NAME
from tests.evaluation.conftest import COPA, TEXT, write_rows
from tests.experiments.test_config import load


def named(domains, tasks, *, grid=None, methods=("full",), models=("llama-tiny",), tune=None, **roles):
    """A change of the demo to these domains and tasks, `roles` those of the first domain."""

    def change(raw):
        domain, task = raw["domains"]["sums"], raw["tasks"]["colours"]
        raw["domains"] = {
            name: domain | {"retention": [tasks[0]], "probes": []} | (roles if name == domains[0] else {})
            for name in domains
        }
        raw["tasks"] = {name: copy.deepcopy(task) | {"test": 20 + number} for number, name in enumerate(tasks)}
        raw["models"] = dict.fromkeys(models, raw["models"]["llama-tiny"])
        raw["methods"] = {name: {} for name in methods}
        raw["grid"] = {"models": list(models), "domains": list(grid or domains), "methods": list(methods), "seeds": [0]}
        raw |= {"tune": {"methods": {"full": {"train.learning_rate": [0.1]}}}} if tune else {}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            named(["sums", "birds"], ["birds"]),
            "domains.birds and tasks.birds share their name.*domains.sums.retention.*rename.*tasks.birds_task",
        ),
        (named(["sums"], ["sums"]), "domains.sums and tasks.sums share their name, and both are scored"),
        (
            named(["sums"], ["birds", "sums"], probes=["sums"]),
            "domains.sums and tasks.sums share their name, and both have probe rows",
        ),
        (named(["general"], ["birds"]), "domains.general: general text is stored and scored under 'general'"),
        (named(["sums"], ["general_text"]), "tasks.general_text: .*rename the block"),
        (named(["sums"], ["birds", "perplexity"], probes=["perplexity"]), "tasks.perplexity: .*rename"),
        (named(["sums"], ["sums_nll"]), "tasks.sums_nll: a name ending in _nll"),
        (named(["sums"], ["seconds"], tune=True), "tasks.seconds: 'seconds' is a value that each trial"),
        (
            named(["sums"], ["birds"], transfer=["birds"]),
            "domains.sums.transfer lists 'birds', which is evaluated already",
        ),
        (named(["sums"], ["birds"], methods=["base"]), "grid.methods names 'base'"),
        (
            named(["sums"], ["birds"], models=["a", "a-b"], methods=["b-c", "c"]),
            "prepare@a-b-c: rename one of the blocks",
        ),
    ],
)
def test_names_of_two_things_are_refused_at_load(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, change)


def test_names_that_nothing_else_has_are_let_be(tmp_path):
    for change in (
        named(["sums", "birds"], ["fish"]),
        named(["sums", "birds"], ["birds"], grid=["sums"]),
        named(["sums"], ["seconds"]),
        named(["sums", "birds"], ["fish", "sums"], grid=["sums"]),
    ):
        assert cells.grid(load(tmp_path, change))


def test_one_task_under_two_names_is_refused(tmp_path):
    def change(raw):
        raw["tasks"]["colors"] = dict(raw["tasks"]["colours"])
        raw["domains"]["sums"]["transfer"] = ["colors"]

    with pytest.raises(
        UserError, match="domains.sums: tasks.colours and tasks.colors have the same rows, prompt and metric"
    ):
        load(tmp_path, change)


def test_no_study_writes_into_the_default_ones_folders(tmp_path):
    """Every folder that the default study has below results/ and work/, found from the paths themselves."""
    paths, cell = Paths(root=tmp_path), Cell("m", "d", "x", 0)
    own = [
        paths.model("m"),
        paths.data,
        paths.resolved,
        paths.prepared(model="m", method="x", seed=0),
        paths.weights(cell),
        paths.local,
        paths.summary,
        paths.prepare_costs(model="m", method="x", seed=0),
        paths.run(cell),
        paths.base("m"),
        paths.tuning("m", "d"),
        paths.failure(cell),
    ]
    names = {path.relative_to(tmp_path).parts[1] for path in own} | {
        "gpu",
        "bench",
        "downloads",
        "gpu-check",
        paths.resume.name,
    }
    assert all(NAME.fullmatch(name) for name in names)
    for name in names:
        with pytest.raises(UserError, match=f"a study cannot be called '{name}'"):
            config.load(name)


def write_tasks(folder, rows=COPA, **change):
    folder.mkdir(exist_ok=True)
    entry = {
        "name": "copa",
        "role": "retention",
        "task": "copa",
        "metric": "acc",
        "chance": 0.5,
        "file": "copa.jsonl",
    } | change
    text = {
        "name": "general",
        "role": "perplexity",
        "task": "general_text",
        "metric": "perplexity",
        "chance": None,
        "file": "general.jsonl",
    }
    write_rows(folder / "copa.jsonl", rows)
    write_rows(folder / "general.jsonl", TEXT[:2])
    (folder / "tasks.json").write_text(json.dumps([entry, text]))
    return folder


OTHER = [COPA[0] | {"choice1": "He tripped."}, *COPA[1:]]


def test_the_base_scores_one_thing_a_name(tmp_path):
    one, other = write_tasks(tmp_path / "one"), write_tasks(tmp_path / "other", role="transfer")
    assert [entry["name"] for entry in merged([one, other])] == ["copa", "general"]
    for change, what in (
        ({"rows": OTHER}, "rows"),
        ({"chance": 0.4}, "chance"),
        ({"metric": "acc_norm"}, "metric"),
        ({"task": {"include": "copa"}}, "task"),
    ):
        with pytest.raises(
            UserError, match=f"copa names two things: .*one/copa.jsonl and .*other/copa.jsonl differ in {what}"
        ):
            merged([one, write_tasks(tmp_path / "other", **change)])


def test_scores_of_two_things_are_not_compared(tmp_path, tiny_llama, byte_tokenizer):
    def scored(**change):
        folder = write_tasks(tmp_path / "scored", **change)
        return harness.score(model=tiny_llama, tokenizer=byte_tokenizer, tasks_dir=folder, weights_sha256="w")[0]

    cell, train, base = Cell("m", "d", "x", 0), {"base_sha256": "w", "weights_sha256": "w"}, scored()

    def check(scores, **other):
        return comparable(cell, scores=scores, base=base, train=train | other, study="trial")

    check(scored(role="transfer"))  # another domain's task for transfer is the same thing
    choices = {"include": "copa", "doc_to_choice": "{{[choice1, choice2]}}", "doc_to_target": "label"}
    for change, what in (
        ({"rows": OTHER}, "digest of rows and prompts of task copa"),
        ({"rows": COPA[:3]}, "number of rows of task copa is 3 for the cell and 4"),
        ({"chance": 0.4}, "chance of task copa is 0.4"),
        ({"task": choices}, "digest of rows and prompts of task copa"),
        ({"task": choices | {"target_delimiter": ": "}}, "digest of rows and prompts of task copa"),
        ({"name": "other"}, "the score of task other"),
    ):
        with pytest.raises(
            UserError,
            match=f"m/d/x/seed0: .*{what}.*`python -m experiments base m --study trial`.*"
            "evaluate m/d/x/seed0 --study trial",
        ):
            check(scored(**change))
    with pytest.raises(UserError, match="the hash of the base's weights is 'v' for the cell and 'w' for its base"):
        check(base, base_sha256="v")
    with pytest.raises(UserError, match="the digest of the general text"):
        check(base | {"general": base["general"] | {"prompt": "0"}})
    with pytest.raises(UserError, match="`batch_size` of scoring is 4"):
        check(base | {"scoring": base["scoring"] | {"batch_size": 4}})


def test_trials_of_other_rows_or_another_base_are_put_aside(tmp_path, capsys):
    path, now = tmp_path / "sums.json", {"base_sha256": "a", "data_sha256": "b"}
    record = {"trials": [{"method": "full"}], "base": {"sums": 0.5}, "judged_on": now}
    path.write_text(json.dumps(record))
    assert tune.earlier(path, dict(now)) == record and tune.earlier(tmp_path / "none.json", now) == {"trials": []}
    for other in ({"base_sha256": "c", "data_sha256": "b"}, {"base_sha256": "a", "data_sha256": "c"}):
        path.write_text(json.dumps(record))
        assert tune.earlier(path, other) == {"trials": []} and not path.exists()
        (aside,) = tmp_path.glob("sums.*.old")
        assert json.loads(aside.read_text()) == record  # nothing that was worked out is lost
        assert "its 1 trials are of other rows or of another base, and are now in sums." in capsys.readouterr().out
    path.write_text(json.dumps({"trials": [1]}))  # made before this was recorded
    assert tune.earlier(path, now)["trials"] == [1]
