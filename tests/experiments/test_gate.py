"""The gate: exit statuses and the line of each cell."""

import json
import shutil

import pytest

from analysis.measures import ORDER
from experiments.__main__ import parser, run
from experiments.commands import gate
from experiments.study import config
from experiments.study.params_text import read_yaml
from experiments.study.paths import HERE
from methods.errors import UserError
from tests.analysis.fixtures import write_json, write_results

METHODS = ("full", "lora", "ewc", "mofo", "hierarchical")


@pytest.fixture
def study(tmp_path):
    """Another grid of the default study's blocks, over made-up results: nothing is a measurement."""
    raw = read_yaml(HERE / "params.yaml")
    raw["grid"] = {"models": ["smollm2-135m"], "domains": ["science"], "methods": list(METHODS), "seeds": [0]}
    del raw["controls"]
    (tmp_path / "params.yaml").write_text(json.dumps(raw))
    write_results(tmp_path / "results", methods=METHODS)
    return config.load(root=tmp_path)


def metrics(study, method):
    path = study.paths.results / "runs/smollm2-135m/science" / method / "seed0/metrics.json"
    return path, json.loads(path.read_text())


def judged(study, capsys, *patterns, **limits):
    status = gate.main(study, patterns=patterns, **limits)
    return status, capsys.readouterr().out.splitlines()


def test_every_cell_within_the_limit_passes(study, capsys):
    status, lines = judged(study, capsys, max_forgetting=0.5)
    assert status == 0 and len(lines) == 6
    assert [line.split()[:2] for line in lines[:5]] == [["pass", f"smollm2-135m/science/{m}/seed0"] for m in METHODS]
    assert lines[5] == "5 of 5 cells pass: forgetting at most +50 points"
    assert all(
        "n = 600" in line and "n = 300" in line and "[" in line for line in lines[:5]
    )  # retention rows above chance, domain rows


def test_the_limit_is_the_most_that_passes(study, capsys):
    _, found = metrics(study, "full")
    at = found["forgetting"]
    assert at > 0.02
    assert judged(study, capsys, "*/full/*", max_forgetting=at)[0] == 0
    status, lines = judged(study, capsys, "*/full/*", max_forgetting=at - 1e-6)
    assert (
        status == 1
        and lines[0].startswith("FAIL")
        and "forgetting: is above" in lines[0]
        and lines[1].startswith("0 of 1 cells pass")
    )


def test_a_tie_passes_however_a_mean_is_rounded_and_the_limit_is_said_in_full(study, capsys):
    path, found = metrics(study, "full")
    path.write_text(json.dumps(found | {"domain_gain": 0.16999999999999993, "forgetting": 0.00125 + 1e-17}))
    assert judged(study, capsys, "*/full/*", max_forgetting=0.00125, min_gain=0.17)[0] == 0
    status, lines = judged(study, capsys, "*/full/*", max_forgetting=0.00124, min_gain=0.17)
    assert (
        status == 1
        and "is above +0.124" in lines[0]
        and "gain at least +17 points, forgetting at most +0.124 points" in lines[1]
    )


def test_confidence_asks_for_the_upper_end_and_the_lower_end(study, capsys):
    from analysis.load import load_cells
    from analysis.statistics.comparison import item_intervals

    cell = "smollm2-135m/science/mofo/seed0"
    loaded = load_cells(study.paths.results, [cell])
    found = item_intervals(loaded, loaded.cells)
    value, high = found["forgetting"].value, found["forgetting"].high
    assert high > value
    between = (value + high) / 2
    assert judged(study, capsys, cell, max_forgetting=between)[0] == 0
    status, lines = judged(study, capsys, cell, max_forgetting=between, confidence=True)
    assert (
        status == 1
        and "the upper end of its interval is above" in lines[0]
        and "by the ends of the 95 % confidence intervals" in lines[1]
    )
    assert judged(study, capsys, cell, max_forgetting=high, confidence=True)[0] == 0
    gain = found["domain_gain"]
    least = (gain.value + gain.low) / 2
    assert judged(study, capsys, cell, max_forgetting=0.5, min_gain=least)[0] == 0
    status, lines = judged(study, capsys, cell, max_forgetting=0.5, min_gain=least, confidence=True)
    assert status == 1 and "gain: the lower end of its interval is below" in lines[0]


def test_general_text_has_a_limit_in_nats(study, capsys):
    from analysis.load import load_cells
    from analysis.statistics.comparison import item_intervals

    path, found = metrics(study, "full")
    cell, at = "smollm2-135m/science/full/seed0", found["general_nll_lost"]
    assert at > 0.05
    assert judged(study, capsys, cell, max_nll_lost=at)[0] == 0
    status, lines = judged(study, capsys, cell, max_nll_lost=0.05, max_forgetting=0.9)
    assert status == 1 and "general text lost: is above +0.05" in lines[0] and "n = 128" in lines[0]
    assert lines[1].endswith("general text lost at most +0.05 nats per token, forgetting at most +90 points")
    loaded = load_cells(study.paths.results, [cell])
    high = item_intervals(loaded, loaded.cells)["general_nll_lost"].high
    assert judged(study, capsys, cell, max_nll_lost=(at + high) / 2)[0] == 0
    assert judged(study, capsys, cell, max_nll_lost=(at + high) / 2, confidence=True)[0] == 1
    assert judged(study, capsys, cell, max_nll_lost=high, confidence=True)[0] == 0
    path.write_text(json.dumps(found | {"general_nll_lost": None}))  # the items know it too
    assert judged(study, capsys, cell, max_nll_lost=at + 1e-6)[0] == 0
    (path.parent / "items.csv.gz").unlink()
    status, lines = judged(study, capsys, cell, max_nll_lost=9.0)
    assert status == 1 and "no general text lost: it is not known of this cell" in lines[0]
    write_json(path, found | {"forgetting": None, "forgetting_by_task": {}})
    assert judged(study, capsys, cell, max_nll_lost=9.0)[0] == 0  # it needs no retention task


def test_every_measure_has_a_limit_in_its_order(study, capsys):
    _, found = metrics(study, "ewc")
    limits = {bound.option[2:].replace("-", "_"): found[key] for key, bound in gate.BOUNDS.items()}
    assert tuple(gate.BOUNDS) == ORDER and None not in limits.values()
    status, lines = judged(study, capsys, "*/ewc/*", **limits)
    names = [bound.name for bound in gate.BOUNDS.values()]
    assert status == 0 and [lines[0].index(f"{name} ") for name in names] == sorted(
        lines[0].index(f"{n} ") for n in names
    )
    for option, value in limits.items():
        worse = {option: value + (1e-6 if option.startswith("min") else -1e-6)}
        status, lines = judged(study, capsys, "*/ewc/*", **{"max_forgetting": 0.9} | worse)
        assert status == 1 and lines[0].count(": is ") == 1, option


def test_a_cell_that_learned_too_little_fails(study, capsys):
    _, found = metrics(study, "lora")
    status, lines = judged(study, capsys, "*/lora/*", max_forgetting=0.5, min_gain=found["domain_gain"] + 1e-6)
    assert status == 1 and "gain: is below" in lines[0]


def test_failed_and_missing_cells_fail_the_gate(study, capsys):
    cell = "smollm2-135m/science/ewc/seed0"
    failed = {
        "cell": cell,
        "stage": "train",
        "reason": "loss is NaN",
        "kind": "nan",
        "when": "2026-01-01T00:00:00+00:00",
    }
    write_json(study.paths.results / "failures" / f"{cell}.json", failed)
    shutil.rmtree(study.paths.results / "runs/smollm2-135m/science/mofo")
    status, lines = judged(study, capsys, max_forgetting=0.9)
    assert status == 1 and lines[-1].startswith("3 of 5")
    assert lines[2].split(maxsplit=2) == ["FAIL", cell, "nan in train: loss is NaN"]
    assert lines[3].startswith("FAIL") and lines[3].endswith("not run: has not been run")


def test_what_cannot_show_forgetting_does_not_pass(study, capsys):
    path, found = metrics(study, "full")
    write_json(path, found | {"forgetting": None, "forgetting_by_task": {}, "at_chance": ["copa", "piqa"]})
    status, lines = judged(study, capsys, "*/full/*", max_forgetting=0.9)
    assert status == 1 and "no forgetting: no retention task of science is above chance" in lines[0]


def test_without_items_only_the_values_can_be_judged(study, capsys):
    path, _ = metrics(study, "full")
    (path.parent / "items.csv.gz").unlink()
    status, lines = judged(study, capsys, "*/full/*", max_forgetting=0.9)
    assert status == 0 and "no interval: items are missing" in lines[0]
    status, lines = judged(study, capsys, "*/full/*", max_forgetting=0.9, confidence=True)
    assert status == 1 and "forgetting has no confidence interval" in lines[0]


@pytest.mark.parametrize(
    ("patterns", "limits", "message"),
    [
        (["*/full/*", "*/ewd/*"], {"max_forgetting": 0.1}, r"no cell of the grid matches \*/ewd/\*"),
        ([], {"max_forgetting": 2.0}, "--max-forgetting 2.0: it must be a share of 1; 0.02 is 2 points"),
        ([], {"max_forgetting": float("nan")}, "--max-forgetting nan"),
        ([], {"max_forgetting": 0.1, "min_gain": 5.0}, "--min-gain 5.0"),
        ([], {"max_nll_lost": float("inf")}, "--max-nll-lost inf: it must be a number of nats per token"),
        (
            [],
            {"min_gain": 0.1, "min_nll_gained": 0.1},
            "no limit of what may be forgotten is given: add --max-nll-lost 0.05",
        ),
    ],
)
def test_bad_input(study, patterns, limits, message):
    with pytest.raises(UserError, match=message):
        gate.main(study, patterns=patterns, **limits)


def test_random_weights_are_said_to_be_no_result(study, capsys):
    path, found = metrics(study, "full")
    write_json(path, found | {"not_a_result": True})
    assert judged(study, capsys, "*/full/*", max_forgetting=0.9)[1][0].startswith("NOT A RESULT")


def test_the_command_line_gives_the_exit_status(study, capsys, monkeypatch):
    monkeypatch.setattr(config, "load", lambda name: study)
    assert run(parser().parse_args(["gate", "--max-forgetting", "0.9", "*/full/*"])) == 0
    assert run(parser().parse_args(["gate", "--max-forgetting", "-0.9"])) == 1
