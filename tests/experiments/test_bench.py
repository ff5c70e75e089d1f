"""Races, their records and figures; every benchmark at its smallest, and what the whole-step ones must find there."""

import argparse
import importlib
import json
import re
import sys
import types
from dataclasses import replace
from functools import cache

import pandas as pd
import pytest
import torch

from experiments.bench import command, headline, show, steps, subject
from experiments.bench.race import Goal, Race, race
from experiments.bench.stepwise import Stepwise
from experiments.study.paths import HERE
from experiments.training import hooks
from methods.errors import UserError

RACE = Race(
    title="a",
    against="plain",
    seconds={"plain": [2.0, 1.0, 4.0], "ours": [1.0, 0.75, 1.0]},
    goals=(Goal(runner="ours", limit=2, faster=True), Goal(runner="ours", limit=0.8)),
    facts={"entries": 3, "bytes_kept": {"ours": 2000}},
)


@cache
def small(name):
    return tuple(importlib.import_module(f"experiments.bench.{name}").measure(small=True, rounds=1))


def test_ratios_are_of_the_fastest_and_of_each_round():
    assert RACE.ratio_min("ours") == 0.75
    assert (
        RACE.ratio_median("ours") == 0.5
    )  # of 1/2, 0.75 and 1/4; the ratio of the medians is 0.5 too, that of the minima is not
    assert (
        replace(RACE, seconds={"plain": [1.0, 10.0, 2.0], "ours": [2.0, 10.0, 8.0]}).ratio_median("ours") == 2.0
    )  # medians: 8 / 2


def test_goals_are_judged_by_the_fastest():
    assert [(goal["text"], goal["met"]) for goal in RACE.record()["goals"]] == [
        ("at least 2 times faster", False),
        ("at most 0.8 times", True),
    ]
    assert Goal(runner="x", limit=2, faster=True).met(0.5) and not Goal(runner="x", limit=2).met(2.01)


def test_runners_take_turns_and_the_first_round_does_not_count():
    ran = []
    runners = {name: lambda name=name: ran.append(name) or float(len(ran)) for name in "abc"}
    found = race("t", runners, against="a", rounds=2, warm=1, own_clock=True)
    assert "".join(ran) == "abcbcacab"
    assert found.seconds == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}


def test_a_runner_takes_what_the_clock_says(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("experiments.bench.race.perf_counter", lambda: now[0])

    def takes(seconds):
        now[0] += seconds

    found = race("t", {"a": lambda: takes(1.0), "b": lambda: takes(3.0)}, against="a", rounds=2)
    assert found.seconds == {"a": [1.0, 1.0], "b": [3.0, 3.0]}


@pytest.mark.parametrize("wrong", [{"against": "c"}, {"against": "a", "goals": [Goal(runner="c", limit=1)]}])
def test_a_race_against_nobody_is_refused(wrong):
    with pytest.raises(ValueError, match="'c' is no runner of 't': a"):
        race("t", {"a": int}, **wrong)


def test_stepwise_work_goes_on_only_when_asked():
    done = []

    def work(name, pause):
        for step in range(2):
            done.append((name, step))
            pause()
        return name

    a, b = (Stepwise(lambda pause, name=name: work(name, pause)) for name in "ab")
    for each in (a, b, b, a, b):
        each.go()
    assert done == [("a", 0), ("b", 0), ("b", 1), ("a", 1)] and (a.result, b.result) == (None, "b")


def test_what_stepwise_work_raises_reaches_the_caller():
    def work(pause):
        pause()
        raise UserError("too large")

    run = Stepwise(work)
    run.go()
    with pytest.raises(UserError, match="too large"):
        run.go()


@pytest.fixture
def made_up(monkeypatch):
    """A benchmark `made_up` with one round of RACE; returns the options it was asked with."""
    asked = []
    module = types.ModuleType("experiments.bench.made_up", "Text\nof it.")
    module.TITLE, module.measure = "A title", lambda **options: asked.append(options) or [RACE]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(command, "names", lambda: ["made_up"])
    return asked


def run(*arguments):
    options = argparse.ArgumentParser()
    command.add_options(options)
    return command.main(options.parse_args(arguments))


def test_the_command_keeps_a_record_and_a_figure(made_up, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "FOLDER", tmp_path / "bench")
    assert run("--small") == 0 and not (tmp_path / "bench").exists()
    assert run("made_up", "--rounds", "4") == 0 and made_up == [
        {"small": True, "rounds": 0},
        {"small": False, "rounds": 4},
    ]
    record = json.loads((tmp_path / "bench/made_up.json").read_text())
    assert record["title"] == "A title" and record["text"] == "Text of it."
    assert record["races"] == json.loads(json.dumps([RACE.record()]))
    assert record["hardware"]["cpu"] and record["versions"]["torch"] and "when" in record
    assert all((tmp_path / f"bench/made_up.{kind}").stat().st_size for kind in ("png", "svg", "csv"))
    drawn = pd.read_csv(tmp_path / "bench/made_up.csv")
    assert drawn[["runner", "ratio_min", "ratio_median"]].values.tolist() == [["plain", 1, 1], ["ours", 0.75, 0.5]]
    said = capsys.readouterr().out
    assert "at least 2 times faster: MISSED" in said and "at most 0.8 times: met" in said and "1 goal missed" in said
    assert re.search(r"kept: ours:? 2.0 kB", said)


def test_wrong_options_are_named(made_up):
    with pytest.raises(UserError, match="'other' is unknown: choose among made_up"):
        run("other")
    with pytest.raises(UserError, match="--rounds is -1"):
        run("--rounds", "-1")


def test_benchmarks_are_found_without_helpers():
    assert {"steps", "headline", "trainer"} <= set(command.names())
    assert not {"race", "show", "command", "subject", "stepwise", "__init__"} & set(command.names())


THOROUGH = {"growth": pytest.mark.thorough}  # seconds of new processes, whose commands other tests run, too


@pytest.mark.parametrize("name", [pytest.param(name, marks=THOROUGH.get(name, ())) for name in command.names()])
def test_every_benchmark_gives_a_record_that_can_be_shown(name, tmp_path):
    module = importlib.import_module(f"experiments.bench.{name}")
    races = [race.record() for race in small(name)]
    assert races and module.TITLE and module.__doc__
    record = json.loads(json.dumps({"races": races}, allow_nan=False))
    text = show.as_text(record)
    assert all(row["runner"] in text and row["seconds_min"] > 0 for race in races for row in race["rows"])
    show.draw(record, stem=tmp_path / name)
    assert len(pd.read_csv(tmp_path / f"{name}.csv")) == sum(len(race["rows"]) for race in races)


def test_the_batch_is_a_usual_one():
    on = subject.find(small=True)
    on = replace(on, domain=[{"input_ids": torch.zeros(n)} for n in (1, 1, 5, 5, 9, 9)])
    assert [len(example["input_ids"]) for example in on.batch(2)] == [5, 5]


def test_steps_of_every_method_are_against_full_and_hold_what_they_must():
    whole, adapters, *field = small("steps")
    on = subject.find(small=True)
    assert whole.against == steps.PLAIN and set(whole.seconds) == {*on.study.grid.methods, "ewc-lora"}
    assert (
        adapters.against == "lora"
        and adapters.seconds["hierarchical"] == whole.seconds["hierarchical"]
        and "ewc" not in adapters.seconds
    )
    entries = whole.facts["weights"]
    assert entries == sum(p.numel() for p in on.make().parameters())
    full, ewc = (whole.facts[f"bytes_held by {name}"] for name in ("full", "ewc"))
    assert full["gradients"] == full["weights"] == 4 * entries and "anchor" not in full and "importance" not in full
    assert ewc["anchor"] == 4 * entries and ewc["importance"] == entries
    assert whole.facts["ms of a step, ewc"].keys() == steps.PHASES.keys()
    raced = {part.key for race in (whole, *field) for name in race.seconds for part in on.study.methods[name].parts}
    assert {part.key for method in on.study.methods.values() for part in hooks.trainers(method.parts)} <= raced


def test_the_engine_and_the_trainer_learn_the_same():
    (found,) = small("trainer")
    ours, theirs = (torch.tensor(losses) for losses in found.facts["loss of each step"].values())
    assert (ours - theirs).abs().max() < 2e-5 and ours[0] - ours[-1] > 0.05


def test_the_claims_contestants_read_the_same_and_keep_what_they_say():
    (found,) = small("headline")
    model = subject.find(small=True).make()
    everything = sum(p.numel() for p in model.parameters())
    adapted = sum(p.numel() for name, p in model.named_parameters() if "q_proj" in name or "v_proj" in name)
    facts = found.facts
    assert len(set(facts["tokens read"].values())) == 1
    assert facts["entries"] == {headline.OURS: adapted, headline.SAME: adapted} | dict.fromkeys(
        headline.PUBLISHED.values(), everything
    )
    assert (
        4 * everything < facts[f"bytes_stored by {headline.PUBLISHED[1]}"]["importance"] < 4 * everything + 5000
    )  # its header
    assert facts["share of EWC-LoRA's entries"] == pytest.approx(adapted / everything, rel=0.01)
    assert facts["sentence"].startswith("On the same 6 documents")


FOUND = headline.Findings(
    documents=9, tokens=1234, times={8: 1.2, 1: 2.1}, times_same=0.8, storage=0.03, storage_same=1.02, entries=0.12
)


def test_the_arithmetic_is_of_documents():
    assert FOUND.by_arithmetic() == {8: pytest.approx(1.2 * 5000 / 10000), 1: pytest.approx(2.1 * 20000 / 10000)}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "it 4.2 times at most (arithmetic): what is left of the claim comes neither"),
        (
            {"times": {8: 1.0, 1: 6.0}},
            "would make it 12 times (arithmetic): with them, most of the claim is accounted for",
        ),
        ({"times": {8: 1.0, 1: 18.0}}, "So work per token accounts for most of the claim"),
        ({}, "a Fisher gives importance of the same matrices in less time"),
        (
            {},
            "takes 3 % of the published baseline's storage, where the paper claims 10 % to 15 %: 12 % because only the "
            "adapted",
        ),
        ({"storage": 0.12}, "the adapted matrices are 12 % of the weights"),
        ({}, "takes as much (102 %): the saving comes from what is kept"),
        ({"storage_same": 0.5}, "Fisher of the same matrices, kept in the same way, it takes 50 %."),
    ],
)
def test_the_sentence_follows_the_numbers(changed, says):
    assert says in replace(FOUND, **changed).sentence()


def test_the_sentence_claims_no_more_than_was_found():
    slower = replace(FOUND, times={8: 1.0, 1: 18.0}, times_same=1.5, storage_same=0.5).sentence()
    assert "less time" not in slower and "arithmetic" not in slower and "not from the kind" not in slower


@pytest.mark.parametrize("name", command.names())
def test_the_page_names_it(name):
    assert f"| `{name}` |" in (HERE / "docs/bench.md").read_text()
