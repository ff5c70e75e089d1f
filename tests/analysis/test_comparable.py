"""Cells made under other rules are taken out of the comparison, by name, with what differs."""

import json
import shutil

import pandas as pd
import pytest

from analysis import comparable
from analysis.load import load_cells
from analysis.sections.tables import as_text
from analysis.statistics.comparison import comparison
from tests.analysis.fixtures import write_json, write_results

METHODS = ("full", "lora", "ewc", "mofo")
CELL = "smollm2-135m/science/{}/seed{}"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_results(folder, methods=METHODS, seeds=(0, 1))
    return folder


@pytest.fixture
def root(tmp_path, written):
    return shutil.copytree(written, tmp_path / "results")


def changed(root, cell, change):
    path = root / "runs" / cell / "metrics.json"
    found = json.loads(path.read_text())
    change(found)
    write_json(path, found)


def loaded(root):
    return load_cells(root, [CELL.format(method, seed) for method in METHODS for seed in (0, 1)])


def test_equal_rules_leave_everything_as_it_is(root):
    found = loaded(root)
    assert comparable.guarded(found) is found
    kept, out = comparable.groups(found.cells, rows=comparable.rows_of(found.items))
    assert list(kept.index) == list(found.cells.index) and out == []


RULES = {
    "base_sha256": lambda m: m.update(base_sha256="f" * 64),
    "data_sha256": lambda m: m.update(data_sha256="f" * 64),
    "dtype": lambda m: m.update(dtype="float32"),
    "numerics": lambda m: m.update(numerics=99),
    "token budget": lambda m: m.update(tokens_trained=53_999),
    "scoring.scoring": lambda m: m["scoring"].update(scoring=99),
    "scoring.scorer": lambda m: m["scoring"].update(scorer="hflm"),
    "scoring.batch_size": lambda m: m["scoring"].update(batch_size=99),
    "scoring.limit": lambda m: m["scoring"].update(limit=99),
    "scoring.dtype": lambda m: m["scoring"].update(dtype="float32"),
    "scoring.new": lambda m: m["scoring"].update(new=1),
    "piqa.version": lambda m: m["scores_by_task"]["piqa"].update(version=99.0),
    "piqa.metric": lambda m: m["scores_by_task"]["piqa"].update(metric="f1"),
    "piqa.n": lambda m: m["scores_by_task"]["piqa"].update(n=99),
    "piqa.role": lambda m: m["scores_by_task"]["piqa"].update(role="transfer"),
    "piqa.base": lambda m: m["scores_by_task"]["piqa"].update(base=0.123),
    "piqa.prompt": lambda m: m["scores_by_task"]["piqa"].update(prompt="abc"),
    "tasks": lambda m: m["scores_by_task"].pop("copa"),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_takes_the_odd_cell_out_and_is_named(root, rule):
    odd = CELL.format("ewc", 1)
    before = loaded(root).cells.loc[odd]
    changed(root, odd, RULES[rule])
    found = comparable.guarded(loaded(root))
    assert odd not in found.cells.index and len(found.cells) == 7
    (failure,) = found.failures.itertuples()
    assert (
        (failure.cell, failure.kind) == (odd, "not comparable")
        and f"{rule} is " in failure.reason
        and "7 cells compared" in failure.reason
    )
    assert odd not in set(found.items["cell"]) | set(found.curves["cell"]) | set(found.prepared)
    if rule == "numerics":
        assert f"numerics is 99 here and {before['numerics']} there" in failure.reason
    assert odd in as_text(found, comparison(found))  # visible where results are read
    assert ("a study of their own" in failure.reason) == (rule == "token budget")  # no rerun makes another budget equal


def test_cells_that_a_rule_on_probes_ended_have_the_budget_of_their_last_step(root):
    stopped = {
        "rule": {"stop": {"general_nll": 0.1}, "keep": "best"},
        "stopped_at": 6,
        "kept_step": 4,
        "steps_planned": 12,
        "tokens_planned": 54_000,
    }
    for seed, end in ((0, 6), (1, None)):
        one = stopped | {"stopped_at": end}
        changed(root, CELL.format("ewc", seed), lambda m, one=one: m.update(tokens_trained=27_000, stopped=one))
    found = loaded(root)
    assert comparable.guarded(found) is found
    note = "* ewc: stops at general_nll +0.1: trained for 6, 12 of 12 steps; weights of step 4, 4."
    assert note in as_text(found, comparison(found))
    changed(root, CELL.format("ewc", 0), lambda m: m["stopped"].update(tokens_planned=99))
    assert CELL.format("ewc", 0) not in comparable.guarded(loaded(root)).cells.index


def test_the_message_counts_what_it_does_not_spell_out(root):
    odd = CELL.format("full", 0)
    changed(
        root,
        odd,
        lambda m: [RULES[rule](m) for rule in ("base_sha256", "dtype", "numerics", "scoring.limit", "token budget")],
    )
    ((_, reason),) = comparable.groups(loaded(root).cells)[1]
    assert (
        "base_sha256 is ffffffffffff here" in reason and reason.count(" there") == 3 and "and 2 more differ" in reason
    )


def test_the_largest_group_is_kept_and_of_two_the_newest(root):
    for method in ("full", "lora", "ewc"):
        for seed in (0, 1):
            changed(root, CELL.format(method, seed), lambda m: m.update(numerics=99))
    kept, out = comparable.groups(loaded(root).cells)
    assert set(kept["method"]) == {"full", "lora", "ewc"} and [cell for cell, _ in out] == [
        CELL.format("mofo", 0),
        CELL.format("mofo", 1),
    ]
    changed(root, CELL.format("ewc", 0), lambda m: m.update(numerics=1))
    changed(root, CELL.format("ewc", 1), lambda m: m.update(numerics=1))  # now four and four
    cells = loaded(root).cells
    for newest, methods in ((CELL.format("mofo", 1), {"ewc", "mofo"}), (CELL.format("lora", 0), {"full", "lora"})):
        dated = cells.assign(when=[f"2030-01-0{2 + (cell == newest)}" for cell in cells.index])
        assert set(comparable.groups(dated)[0]["method"]) == methods


def test_other_scored_rows_are_other_rules(root):
    odd = CELL.format("mofo", 0)
    path = root / "runs" / odd / "items.csv.gz"
    items = pd.read_csv(path)
    items.loc[items["task"] == "piqa", "doc_hash"] += "x"
    items.to_csv(path, index=False)
    found = comparable.guarded(loaded(root))
    assert "scored rows of piqa is " in found.failures.iloc[0]["reason"] and odd not in found.cells.index
    path.unlink()  # rows that are not there are not known, which is no difference
    assert odd in comparable.guarded(loaded(root)).cells.index


def test_an_unknown_budget_is_no_difference_and_leads_no_group(root):
    changed(root, CELL.format("full", 0), lambda m: m.update(tokens_trained=None, cost_known=False))
    changed(root, CELL.format("lora", 0), lambda m: m.update(tokens_trained=1))
    kept, out = comparable.groups(loaded(root).cells)
    assert CELL.format("full", 0) in kept.index and [cell for cell, _ in out] == [CELL.format("lora", 0)]
    pair = loaded(root).cells.loc[[CELL.format("full", 0), CELL.format("lora", 0), CELL.format("mofo", 0)]]
    assert len(comparable.groups(pair)[0]) == 2 and len(comparable.groups(pair)[1]) == 1


def test_tokens_that_make_room_for_replayed_ones_belong_to_the_budget(root):
    changed(root, CELL.format("lora", 0), lambda m: m.update(tokens_trained=50_000, tokens_left_out=4_000))
    assert comparable.groups(loaded(root).cells)[1] == []
    changed(root, CELL.format("lora", 0), lambda m: m.update(tokens_left_out=3_000))
    assert [cell for cell, _ in comparable.groups(loaded(root).cells)[1]] == [CELL.format("lora", 0)]


def test_shares_of_an_epoch_are_compared_by_settings(root):
    found = loaded(root).cells
    half = [{"epochs": 0.5, "length": 256, "batch": 8}] * len(found)
    cells = found.assign(settings=half, tokens_trained=[27_000 + 100 * seed for seed in found["seed"]])
    assert comparable.groups(cells)[1] == []
    cells["settings"] = [*half[1:], half[0] | {"epochs": 0.25}]
    assert "0.25 epochs of 256 tokens a row, 8 rows a step here and 0.5 epochs" in comparable.groups(cells)[1][0][1]


def test_nothing_to_compare():
    assert comparable.groups(pd.DataFrame())[1] == []
