"""The tests of a study: what is compared with what, in which family, and what the page says of it."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from scipy.stats import t as student

from analysis.chosen import chosen
from analysis.load import load_cells
from analysis.measures import FORGETTING, ORDER
from analysis.roles import Roles
from analysis.sections.significance import is_significant, section
from analysis.statistics.comparison import comparison
from analysis.statistics.detectable import LEVEL, detectable, holm
from analysis.statistics.signs import FLIPS, exact, mcnemar, sign_flips
from analysis.statistics.tests import all_tests, paired_tests
from methods.errors import UserError
from tests.analysis.fixtures import write_results

SECTIONS = Path(__file__).parents[2] / "analysis/sections"
MODEL, DOMAIN = "smollm2-135m", "science"
PAIR = {"model": MODEL, "domain": DOMAIN}
FOUR = ("full", "lora", "ewc", "mofo")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Four methods, three seeds, made-up items: full forgets more than ewc."""
    root = tmp_path_factory.mktemp("results")
    return load_cells(root, write_results(root, methods=FOUR, seeds=(0, 1, 2)))


@pytest.fixture(scope="module")
def tests(loaded):
    return paired_tests(loaded, **PAIR)


def row(tests, measure, a, b):
    found = tests[(tests["measure"] == measure) & (tests["a"] == a) & (tests["b"] == b)]
    return found.iloc[0]


def test_families_are_those_of_the_rules_and_corrected_apart(tests):
    counts = tests.groupby(["measure", "family"]).size()
    for measure in ORDER:
        if measure != "general_kl":  # which the base does not have from itself
            assert counts[measure, "base"] == 4
        assert counts[measure, "full"] == 3 and counts[measure, "leaders"] == 3
    for _, family in tests.groupby(["measure", "family"]):
        assert family["p_holm"].to_numpy() == pytest.approx(holm(family["p"].to_numpy()))
    assert list(dict.fromkeys(tests["measure"])) == list(ORDER)


def test_the_interval_leaves_out_zero_if_and_only_if_p_is_small(tests):
    assert ((tests["p"] < LEVEL) == ((tests["low"] > 0) | (tests["high"] < 0))).all()
    assert {True, False} <= set(tests["p"] < LEVEL)


def test_the_statistic_is_the_reported_number(loaded, tests):
    cells, table = loaded.cells, comparison(loaded).set_index("method")
    for measure in ORDER:
        mean = cells.groupby("method")[measure].mean()
        one = row(tests, measure, "ewc", "full")
        assert one["difference"] == pytest.approx(mean["ewc"] - mean["full"]), measure
        if measure != "general_kl":
            alone = row(tests, measure, "full", "base")
            ends = [table.loc["full", f"{measure}_{end}"] for end in ("low", "high")]
            assert [alone["low"], alone["high"]] == pytest.approx(ends), measure  # the page has one interval of it
    assert is_significant(row(tests, "general_nll_lost", "full", "base")) and not tests["descriptive"].any()


def test_one_seed_is_described_and_not_tested(tmp_path):
    loaded = load_cells(tmp_path, write_results(tmp_path, methods=("full", "lora")))
    found = paired_tests(loaded, **PAIR)
    assert found["descriptive"].all() and found[["p", "p_holm", "detectable"]].isna().all(axis=None)
    assert (found["low"] < found["high"]).all() and found["p_run"].between(1 / (1 + FLIPS), 1).all()
    assert not found.apply(is_significant, axis=1).any()
    made = section(loaded, all_tests(loaded), **PAIR)
    for family in made["families"]:
        assert family["sentences"] == ["Nothing in this table is tested: there is one seed."]
        assert not any(cell["p"] for row in family["rows"] for cell in row["cells"])


def test_two_methods_are_compared_on_the_seeds_both_have(tmp_path):
    write_results(tmp_path, methods=("full", "lora", "ewc"), seeds=(0, 1, 2))
    cells = ("full/seed0", "full/seed1", "lora/seed1", "lora/seed2", "ewc/seed2")
    found = paired_tests(load_cells(tmp_path, [f"{MODEL}/{DOMAIN}/{cell}" for cell in cells]), **PAIR)
    assert row(found, "forgetting", "full", "base")["seeds"] == 2
    assert row(found, "forgetting", "lora", "full")["seeds"] == 1
    assert found[(found["a"] == "ewc") & (found["b"] == "full")].empty


def test_a_composition_must_forget_less_than_every_single_remedy(loaded):
    """Its p is the largest of those against the single methods, and 1 where it forgets more than one of them."""
    composed = paired_tests(replace(loaded, roles=Roles(compositions=("ewc",))), **PAIR)
    own = composed[composed["family"] == "compositions"]
    assert list(own["measure"]) == list(FORGETTING) and set(own["a"]) == {"ewc"}
    plain = paired_tests(replace(loaded, roles=Roles(leaders=FOUR)), **PAIR)
    for _, test in own.iterrows():
        pairs = plain[(plain["measure"] == test["measure"]) & (plain["family"] == "leaders")]
        sign = np.where(pairs["b"] == "ewc", -1, 1)
        pairs = pairs.assign(lower=sign * pairs["difference"] < 0)[(pairs["a"] == "ewc") | (pairs["b"] == "ewc")]
        assert test["p"] == pytest.approx(pairs["p"].where(pairs["lower"], 1.0).max()), test["measure"]
    equal = composed[composed["family"] == "equal_gain"].set_index("measure")
    assert list(equal.index) == list(FORGETTING) and (equal["low"] < equal["high"]).all()
    assert equal.loc["general_nll_lost", "p"] == 1.0  # some gain more at once than it ever does
    assert np.isnan(equal.loc["general_nll_lost", "detectable"])  # so that no difference could have been found
    harsh = paired_tests(replace(loaded, roles=Roles(compositions=("full",))), **PAIR)
    assert (harsh.loc[harsh["family"] == "compositions", "p"] == 1).all()
    assert "ewc" not in set(composed.loc[composed["family"] == "leaders", ["a", "b"]].to_numpy().ravel())


def test_chosen_settings_are_compared_with_chosen_ones_and_others_at_the_same(tmp_path):
    """Of ewc the second setting is chosen, of full the first, so that both of ewc are compared with that of full."""
    methods = ("full", "full-s1", "ewc", "ewc-s1", "mofo", "mofo-s1", "lora")
    loaded = load_cells(tmp_path, write_results(tmp_path, methods=methods, seeds=(0, 1)))
    best = {name: chosen(loaded, name, **PAIR) for name in ("full", "ewc", "mofo")}
    assert best == {"full": "full", "ewc": "ewc-s1", "mofo": "mofo"}
    found = paired_tests(loaded, **PAIR)
    own = dict(list(found[found["measure"] == "forgetting"].groupby("family")))
    full = list(zip(own["full"]["a"], own["full"]["b"]))
    assert len(full) == 5 and dict(full) == dict.fromkeys(("ewc", "ewc-s1", "mofo", "lora"), "full") | {
        "mofo-s1": "full-s1"
    }
    pairs = {frozenset(pair) for pair in zip(own["leaders"]["a"], own["leaders"]["b"])}
    assert len(pairs) == len(own["leaders"]) and frozenset(("ewc", "ewc-s1")) not in pairs
    chosen_ones = {frozenset(pair) for pair in (("ewc-s1", "mofo"), ("ewc-s1", "lora"), ("mofo", "lora"))}
    assert chosen_ones | {frozenset(("ewc", "mofo")), frozenset(("ewc-s1", "mofo-s1"))} < pairs


def test_what_did_not_train_or_shares_a_training_is_not_pooled(tmp_path):
    """A copy of full, a reused training and one that trains nothing leave the others' tests as they were."""
    names = write_results(tmp_path, methods=(*FOUR, "still", "wise", "copy"), seeds=(0, 1, 2))
    few = [name for name in names if name.split("/")[2] in FOUR]
    for name in names:
        path = tmp_path / "runs" / name / "metrics.json"
        metrics, method = json.loads(path.read_text()), name.split("/")[2]
        if method == "still":
            metrics["weights_sha256"] = metrics["base_sha256"]
        elif method == "wise":
            metrics["training_reused"] = True
        elif method == "copy":
            full = tmp_path / "runs" / name.replace("copy", "full") / "metrics.json"
            metrics["weights_sha256"] = json.loads(full.read_text())["weights_sha256"]
        path.write_text(json.dumps(metrics))
        train = path.with_name("train.json")
        train.write_text(json.dumps(json.loads(train.read_text()) | {"weights_sha256": metrics["weights_sha256"]}))
    alone, all_of = (paired_tests(load_cells(tmp_path, cells), **PAIR) for cells in (few, names))
    merged = alone.merge(all_of, on=["measure", "a", "b", "family"], suffixes=("", "_all"))
    assert len(merged) == len(alone)
    for key in ("low", "high", "p", "df"):
        assert merged[key].to_numpy() == pytest.approx(merged[f"{key}_all"].to_numpy()), key


def test_other_rows_than_the_bases_are_refused(loaded):
    cell = loaded.items["cell"] == f"{MODEL}/{DOMAIN}/ewc/seed2"
    one = loaded.items[cell & (loaded.items["task"] == "piqa")].index[0]
    with pytest.raises(UserError, match="science/ewc/seed2.*1 are in one of them only"):
        paired_tests(replace(loaded, items=loaded.items.drop(index=one)), **PAIR)
    again = pd.concat([loaded.items, loaded.items.loc[[one]]])
    with pytest.raises(UserError, match="science/ewc/seed2.*scored twice"):
        paired_tests(replace(loaded, items=again), **PAIR)


def test_a_cell_without_items_is_left_out_and_named(tmp_path):
    planned = write_results(tmp_path, methods=("full", "lora", "ewc"), seeds=(0, 1))
    (tmp_path / "runs" / f"{MODEL}/{DOMAIN}/lora/seed1" / "items.csv.gz").unlink()
    loaded = load_cells(tmp_path, planned)
    found = paired_tests(loaded, **PAIR)
    assert set(found[(found["a"] == "lora") | (found["b"] == "lora")]["seeds"]) == {1} and found["seeds"].max() == 2
    legend = section(loaded, all_tests(loaded), **PAIR)["legend"]
    assert legend[-1] == f"Not tested, because their items.csv.gz is missing: {MODEL}/{DOMAIN}/lora/seed1."


def test_nothing_to_test_is_no_section(tmp_path):
    none = load_cells(tmp_path, [f"{MODEL}/{DOMAIN}/full/seed0"])
    assert all_tests(none).empty and section(none, all_tests(none), **PAIR) is None
    planned = write_results(tmp_path, methods=("full",))
    (tmp_path / "runs" / planned[0] / "items.csv.gz").unlink()
    bare = load_cells(tmp_path, planned)
    assert section(bare, all_tests(bare), **PAIR) is None


def test_the_section_renders_with_its_numbers(loaded, tests):
    made = section(loaded, all_tests(loaded), **PAIR)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(SECTIONS), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("significance.html.j2").render(significance=made)
    unsure = tests[(tests["measure"] == "forgetting") & (tests["p_holm"] > LEVEL)].iloc[0]
    assert f"detects {100 * unsure['detectable']:.1f}" in page and "object at" not in page
    assert f"{100 * row(tests, 'forgetting', 'full', 'base')['difference']:+.1f}" in page
    assert [family["title"][:7] for family in made["families"]] == ["Against", "Against", "Leaders"]
    assert sum(len(family["rows"]) for family in made["families"]) == 4 + 3 + 3


@pytest.mark.parametrize("df, tests", [(2.5, 1), (4, 20), (60, 8)])
def test_what_could_be_found_is_found_in_four_studies_of_five(df, tests):
    draw, studies = np.random.default_rng(8), 4000
    truth = float(detectable(1.0, df, tests=tests))
    statistic = (truth + draw.standard_normal(studies)) / np.sqrt(draw.chisquare(df, studies) / df)
    assert np.mean(statistic > student.ppf(1 - LEVEL / (2 * tests), df)) == pytest.approx(0.8, abs=0.025)
    assert detectable([1.0, 2.0], [df, df], tests=tests) == pytest.approx([truth, 2 * truth])


def test_holm_by_hand():
    # sorted .01 .02 .03 .04: 4 * .01 = .04, 3 * .02 = .06, 2 * .03 = .06, 1 * .04 -> .06, for it cannot fall
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == pytest.approx([1, 1]) and len(holm([])) == 0


def test_sign_flips_agree_with_every_pattern_of_signs():
    draw = np.random.default_rng(3)
    tasks = [draw.normal(0.4, 1, size=(5, 3)), draw.normal(0.2, 1, size=(6, 3))]
    signs = np.array(list(itertools.product((-1, 1), repeat=11)))
    for k, p in enumerate(sign_flips(tasks)):
        values = np.concatenate([task[:, k] / len(task) for task in tasks])
        truth = np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-12)
        assert p == pytest.approx(truth, abs=4 * np.sqrt(truth * (1 - truth) / FLIPS) + 1 / FLIPS)


def test_mcnemar_counts_by_task_and_seed(loaded):
    table = mcnemar(loaded, **PAIR)
    assert len(table) == 4 * 3 * 8 and set(table["task"]) == set(loaded.cells.iloc[0]["scores_by_task"])
    one = table[(table["method"] == "full") & (table["seed"] == 1) & (table["task"] == "lambada_openai")].iloc[0]
    base = loaded.base[MODEL]["items"].query("task == 'lambada_openai'")["score"].to_numpy()
    own = loaded.items.query("task == 'lambada_openai' and cell == 'smollm2-135m/science/full/seed1'")
    tuned = own["score"].to_numpy()
    assert (one["lost"], one["gained"]) == (((base == 1) & (tuned == 0)).sum(), ((base == 0) & (tuned == 1)).sum())
    assert one["p"] == pytest.approx(binomtest(one["lost"], one["lost"] + one["gained"]).pvalue)
    assert one["role"] == "retention" and exact(0, 0) == 1.0
