"""The answer's three sentences: every number in them is recomputed here from the tables."""

import re
from dataclasses import replace

import pandas as pd
import pytest

from analysis import numbers
from analysis.chosen import chosen
from analysis.load import load_cells
from analysis.roles import Roles
from analysis.sections.answer import _remedies, _untold, reading, sentences, without_accuracy
from analysis.sections.tables import as_markdown
from analysis.sections.told import with_told
from analysis.statistics.comparison import comparison
from analysis.statistics.contrasts import redrawn
from analysis.statistics.matched import equal_gain
from analysis.statistics.tests import all_tests
from tests.analysis.fixtures import without_nats, write_results


def made(root, cells):
    loaded = load_cells(root, cells)
    return loaded, comparison(loaded), all_tests(loaded)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    root = tmp_path_factory.mktemp("several")
    return made(root, write_results(root, methods=("full", "lora", "ewc", "mofo"), seeds=(0, 1, 2)))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    return made(root, write_results(root, methods=("full", "lora", "ewc")))


def test_three_sentences_hold_the_numbers_of_the_table_and_the_tests(several):
    loaded, table, tests = several
    first, second, third = sentences(loaded, table, tests)
    rows = table.set_index("method")
    for key in ("domain_nll_gained", "general_nll_lost"):
        low, high = (numbers.nats(rows.at["full", f"{key}_{end}"]) for end in ("low", "high"))
        assert f"{numbers.nats(rows.at['full', key])} [{low}, {high}]" in first, key
    assert "3 seeds, p" in first
    own = tests[(tests["family"] == "full") & (tests["measure"] == "general_nll_lost")]
    less = own[(own["p_holm"] < 0.05) & (own["difference"] < 0)]
    told = f"{len(less)} of 3 remedies, at their chosen settings, lose significantly less than plain fine-tuning after"
    assert f"{told} Holm's correction" in second
    for name in less["a"]:
        lost, gained = (numbers.nats(rows.at[name, key]) for key in ("general_nll_lost", "domain_nll_gained"))
        assert f"{name} ({lost} at a gain of {gained})" in second
    pairs = tests[(tests["family"] == "leaders") & (tests["measure"] == "general_nll_lost")]
    assert f"{(pairs['p_holm'] < 0.05).sum()} of 3 pairs of leaders" in second
    assert (
        "n top of training on the domain's rows the methods read 0 to 40,000 tokens" in third
        and "2 min 52 s to 5 min 01 s" in third
    )
    assert "1.8 MB to 269 MB" in third


def test_what_could_not_be_told_apart_stands_with_what_could_have_been(several):
    loaded, table, tests = several
    assert "not told apart" not in sentences(loaded, table, tests)[2]
    own = (tests["family"] == "full") & (tests["measure"] == "general_nll_lost") & (tests["a"] != "ewc")
    unsure = tests.assign(p_holm=tests["p_holm"].where(~own, 0.2), detectable=tests["detectable"].where(~own, 0.031))
    _, second, third = sentences(loaded, table, unsure)
    assert second.startswith("1 of 3 remedies") and "ewc" in second
    assert "not told apart from plain fine-tuning: lora, mofo (a difference of 0.031 nats per token" in third
    shown = as_markdown(loaded, with_told(table, unsure))
    assert shown.count("| no, detects 0.031") == 2 and "detects" not in as_markdown(loaded, with_told(table, tests))
    pairs = unsure.assign(p_holm=unsure["p_holm"].where(unsure["family"] != "leaders", 0.5))
    assert re.search(
        r"0 of 3 pairs of leaders are told apart \(a difference of .* found\)", sentences(loaded, table, pairs)[1]
    )


def test_how_many_lose_less_at_equal_gain_is_counted(tmp_path):
    methods = [f"{name}{setting}" for name in ("full", "ewc", "mofo", "lora") for setting in ("", "-s1")]
    loaded, table, tests = made(tmp_path, write_results(tmp_path, methods=methods, seeds=(0, 1, 2)))
    drawn = redrawn(loaded, model="smollm2-135m", domain="science")
    found = [equal_gain(drawn, name, "full", key="general_nll_lost") for name in ("lora", "ewc", "mofo")]
    tested, sure = [one for one in found if not one.beyond], []
    for rank, one in enumerate(sorted(tested, key=lambda one: one.p)):  # Holm's steps, until the first that fails
        if one.p * (len(tested) - rank) >= 0.05:
            break
        sure.append(one)
    less, more = (sum(sign * one.difference > 0 for one in sure) for sign in (-1, 1))
    assert less and more
    text = f"; at equal gain {less} of {len(tested)} lose significantly less and {more} more; "
    assert text in sentences(loaded, table, tests)[1]


def test_five_remedies_have_a_name_each(several):
    loaded, table, tests = several
    names = ["one", "two", "three", "four", "five"]
    rows = [table, *(table[table["method"] == "ewc"].assign(method=name) for name in names)]
    own = tests[(tests["family"] == "full") & (tests["measure"] == "general_nll_lost") & (tests["a"] == "ewc")]
    other = replace(loaded, roles=Roles(leaders=tuple(names)))
    for p, place in ((0.01, 1), (0.2, 2)):
        more = pd.concat([own.assign(a=name, p_holm=p) for name in names])
        with_names = [_remedies, _untold][place - 1](other, pd.concat(rows), more, where="")
        assert all(name in with_names for name in names) and "others" not in with_names


def test_a_setting_that_was_not_chosen_decides_nothing_in_the_answer(tmp_path):
    """Of ewc and mofo the second setting is chosen, of full the first: each counts once, and so does their pair."""
    cells = write_results(tmp_path, methods=("full", "full-s1", "ewc", "ewc-s1", "mofo", "mofo-s1"), seeds=(0, 1, 2))
    loaded = load_cells(tmp_path, cells)
    tests = all_tests(loaded)
    second = sentences(loaded, comparison(loaded), tests)[1]
    picked = {chosen(loaded, name, model="smollm2-135m", domain="science") for name in ("ewc", "mofo")}
    own = tests[(tests["measure"] == "general_nll_lost") & tests["a"].isin(picked)]
    against, pairs = (own[(own["family"] == name) & own["b"].isin({"full", *picked})] for name in ("full", "leaders"))
    assert len(against) == 2 and len(pairs) == 1 and "ewc-s1" in picked
    assert f"{(against['p_holm'] < 0.05).sum()} of 2 remedies" in second and "of 1 pair of leaders" in second


def test_a_composition_must_beat_every_single_method(several):
    loaded, table, tests = several
    row = tests.iloc[[0]].assign(measure="general_nll_lost", family="compositions", a="both", b="ewc", difference=-0.01)
    for p, text in (
        (0.01, "both (p\u00a0=\u00a00.010) loses less{} than every single method, controls included"),
        (0.2, "no composition loses significantly less{} than every single method (both not than ewc"),
    ):
        same = row.assign(p_holm=p)
        assert text.format(" at the same setting") in sentences(loaded, table, pd.concat([tests, same]))[1]
        equal = pd.concat([tests, same.assign(p_holm=0.5), same.assign(family="equal_gain")])  # the claim that counts
        assert text.format(" at equal gain") in sentences(loaded, table, equal)[1]
    beyond = sentences(loaded, table, pd.concat([tests, row.assign(family="equal_gain", p_holm=1.0, detectable=None)]))
    assert "both cannot be judged: another method gains at its first setting what it never does" in beyond[1]
    assert "both not than" not in beyond[1]


def test_a_method_that_trains_on_general_text_is_compared_with_its_control_alone(several):
    loaded = replace(several[0], roles=Roles(control_of={"ewc": "lora"}))
    _, second, third = sentences(loaded, *several[1:])
    assert second.startswith("2 of 2 remedies") and "ewc (" not in second and "ewc" not in third
    assert re.search(
        r"ewc also trains on general text and differs in loss from its control lora by −0\.\d+ \[.*\]", second
    )
    warm = several[1].assign(tokens_prepare=several[1]["tokens_prepare"].where(several[1]["method"] != "lora", 9.0))
    found = sentences(loaded, warm, several[2])[1]  # a control with the same preparation is no remedy
    assert found.startswith("1 of 1 remedies") and "mofo (" in found and "lora (" not in found
    row = with_told(*several[1:], mixed={"ewc"}).set_index("method").loc["ewc"]
    assert (row["told"], row["told_also"]) == ("less", "remedy and text together")


def test_without_a_comparison_with_plain_fine_tuning_the_rest_is_said(several):
    """A method whose control is missing is not credited, and of several seeds no run is spoken of."""
    loaded = several[0]
    two = loaded.without([cell for cell in loaded.cells.index if cell.split("/")[2] in ("lora", "mofo")])
    two = replace(two, roles=Roles(control_of={"ewc": ""}))
    second = sentences(two, comparison(two), all_tests(two))[1]
    assert "this run" not in second and "ewc also trains on general text and has no control here" in second
    bare = loaded.without([cell for cell in loaded.cells.index if cell.split("/")[2] == "full"])
    assert "of 3 pairs of leaders" in sentences(bare, comparison(bare), all_tests(bare))[1]


def test_one_seed_orders_runs_and_says_nothing_of_methods(alone):
    loaded, table, tests = alone
    first, second, _ = sentences(loaded, table, tests)
    assert "(one seed)" in first and "p\u00a0" not in first + second and "significant" not in second
    names = re.findall("(full|lora|ewc) loses", second)
    rows = table.set_index("method")["general_nll_lost"].astype(float)
    assert names == list(rows[["lora", "ewc"]].sort_values().index) and "2 remedies, each run once" in second
    assert "not another run" in reading(loaded, table) and with_told(table, tests)["told"].isna().all()


def test_with_one_seed_a_control_is_no_remedy_and_its_method_stands_beside_it(alone):
    loaded = replace(alone[0], roles=Roles(controls={"ewc": "lora"}, control_of={"ewc": "lora"}))
    assert sentences(loaded, *alone[1:])[1].startswith(
        "No remedy here trains on the domain alone; ewc also trains on general text and differs in loss from its"
    )
    one = replace(loaded, roles=Roles(controls={"osf": "lora"}))
    assert sentences(one, *alone[1:])[1].startswith("In one run ewc loses ")


def test_one_method_without_plain_fine_tuning(tmp_path):
    loaded, table, tests = made(tmp_path, write_results(tmp_path, methods=("lora",)))
    first, second, third = sentences(loaded, table, tests)
    assert first.startswith("Lora on science gains") and "lora" in second and "2 min 52 s" in third


def test_results_without_nats_are_said_in_points(tmp_path):
    cells = write_results(tmp_path, methods=("full", "lora"))
    without_nats(tmp_path)
    first, second, _ = sentences(*made(tmp_path, cells))
    assert re.search(r"gains \+[\d.]+ \[.*\] points and loses", first) and "lora" in second


def test_several_models_and_domains_have_a_clause_each(alone, tmp_path):
    cells = write_results(tmp_path, methods=("full",))
    cells += write_results(tmp_path, methods=("full",), domain="code", model="llama-tiny")
    for sentence in sentences(*made(tmp_path, cells))[:2]:
        assert "on science (smollm2-135m)" in sentence.lower() and "on code (llama-tiny)" in sentence.lower()


def test_of_many_models_and_domains_there_are_ranges_and_counts(tmp_path):
    cells = [c for d in ("a", "b", "c") for c in write_results(tmp_path, methods=("full", "lora"), domain=d)]
    loaded, table, tests = made(tmp_path, cells)
    first, second, _ = sentences(loaded, table, tests)
    assert first.startswith("Over 3 pairs of model and domain plain fine-tuning gains") and len(first) < 200
    assert "no method is told apart" in second


def test_a_base_at_chance_is_named(alone):
    _, table, _ = alone
    assert without_accuracy(table) == []
    (line,) = without_accuracy(table.assign(forgetting=None))
    assert "right answers cannot show forgetting" in line


def test_roles_change_who_leads(several):
    loaded = replace(several[0], roles=Roles(leaders=("lora", "ewc")))
    second = sentences(loaded, several[1], all_tests(loaded))[1]
    assert "of 1 pair of leaders" in second and second.startswith("2 of 2 leaders")
    assert "; of the other methods mofo loses significantly less; 1 of 1 pair" in second  # as the tests say
    more = all_tests(loaded).assign(difference=lambda rows: rows["difference"].where(rows["a"] != "mofo", 0.1))
    assert "; of the other methods mofo loses significantly more; " in sentences(loaded, several[1], more)[1]
    unsure = all_tests(loaded).assign(p_holm=lambda rows: rows["p_holm"].where(rows["a"] != "mofo", 0.1))
    assert "other methods" not in sentences(loaded, several[1], unsure)[1]
