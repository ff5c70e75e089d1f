import itertools
from pathlib import Path

import jinja2
import numpy as np
import pytest
from scipy.stats import binomtest, kstest

from analysis.load import load_cells
from analysis.measures import BY_KEY
from analysis.sections.significance import is_significant, section
from analysis.statistics import permutation
from analysis.statistics.intervals import paired
from analysis.statistics.permutation import FLIPS, LEVEL, could_find, exact, holm, mcnemar, sign_flip, sign_flips
from methods.errors import UserError
from tests.analysis.fixtures import write_results

SECTIONS = Path(__file__).parents[2] / "analysis/sections"
MODEL, DOMAIN = "smollm2-135m", "science"


def enumerated(tasks):
    """Two-sided p from every pattern of signs of every item."""
    values = np.concatenate([task / (len(tasks) * len(task)) for task in tasks])
    signs = np.array(list(itertools.product((-1, 1), repeat=len(values))))
    return np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-12)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Three methods, three seeds, made-up items: full forgets more than ewc."""
    root = tmp_path_factory.mktemp("results")
    return root, load_cells(root, write_results(root, methods=("full", "lora", "ewc"), seeds=(0, 1, 2)))


@pytest.fixture(scope="module")
def tests(seeds):
    return permutation.tests_of(seeds[1], model=MODEL, domain=DOMAIN).set_index(["kind", "a", "b"])


@pytest.mark.parametrize("case", range(4))
def test_few_items_agree_with_every_pattern_of_signs(case):
    draw = np.random.default_rng(case)
    thirds = [
        draw.integers(-3, 4, size=5) / 3,
        draw.integers(-3, 4, size=7) / 3,
    ]  # means of three seeds, with ties: exact
    assert sign_flip(thirds) == pytest.approx(enumerated(thirds), rel=1e-9)
    tasks = [thirds[0], draw.normal(0.4, 1, size=6)]  # no common unit: drawn
    truth = enumerated(tasks)
    assert sign_flip(tasks) == pytest.approx(truth, abs=4 * np.sqrt(truth * (1 - truth) / FLIPS) + 1 / FLIPS)


def test_many_tests_at_once_agree_with_every_pattern_of_signs():
    draw = np.random.default_rng(3)
    tasks = [draw.normal(0.4, 1, size=(5, 3)), draw.normal(0.2, 1, size=(6, 3))]
    for k, p in enumerate(sign_flips(tasks)):
        truth = enumerated([task[:, k] for task in tasks])
        assert p == pytest.approx(truth, abs=4 * np.sqrt(truth * (1 - truth) / FLIPS) + 1 / FLIPS)
    assert sign_flips(tasks, flips=1000, seed=1)[0] != sign_flips(tasks, flips=1000)[0]


def test_one_task_and_seed_is_mcnemars_exact_test():
    differences = np.repeat([-1.0, 1.0, 0.0], [9, 21, 70])
    assert exact(9, 21) == pytest.approx(binomtest(9, 30).pvalue)
    assert sign_flip([differences]) == pytest.approx(exact(9, 21), rel=1e-12)
    assert exact(0, 0) == 1.0 and sign_flip([np.zeros(10)]) == 1.0


def test_p_is_never_zero_and_the_same_again():
    assert sign_flip([np.ones(200)]) == pytest.approx(2 / 2**200)
    assert sign_flip([np.full(200, np.pi / 3)]) == 1 / (1 + FLIPS)
    tasks = [np.random.default_rng(1).normal(size=40)]
    assert sign_flip(tasks) == sign_flip(tasks) != sign_flip(tasks, seed=1)


def test_tasks_weigh_the_same_whatever_their_size():
    small, large = np.array([1.0] * 8 + [0.0] * 2), np.repeat([-1.0, 0.0], [20, 480])
    assert sign_flip([small, large]) == pytest.approx(
        2 / 2**8, abs=0.004
    )  # mean .8 and -.04: only the eight can turn it
    assert sign_flip([np.concatenate([small, large])]) == pytest.approx(
        exact(8, 20), rel=1e-12
    )  # as one task, 8 against 20


def test_many_rows_of_many_sizes_are_drawn_and_agree_with_the_exact_p(monkeypatch):
    """Rows of whole benchmarks have no small common unit; then the drawn p is the exact one up to its own noise."""
    draw = np.random.default_rng(7)
    tasks = [draw.choice([-1, -1 / 3, 0, 1 / 3, 1], p=[0.12, 0.1, 0.56, 0.1, 0.12], size=n) for n in (200, 100, 200)]
    whole = sign_flip(tasks)
    monkeypatch.setattr(permutation, "MOST_WORK", 0)
    drawn = sign_flip(tasks)
    assert drawn != whole and drawn == pytest.approx(whole, abs=4 * np.sqrt(whole * (1 - whole) / FLIPS))


def test_what_could_be_found_is_found_in_four_studies_of_five():
    """Of studies with a true difference of `could_find`, 80 in 100 have a p that stands the correction for 30 tests."""
    draw, n, changed, tests = np.random.default_rng(8), 400, 0.2, 30
    error = np.sqrt(changed / n)
    truth = could_find(items=error, whole=error, fewest=1 / n, tests=tests)

    def study():
        return draw.choice([1.0, -1.0, 0.0], p=[(changed + truth) / 2, (changed - truth) / 2, 1 - changed], size=n)

    assert np.mean([sign_flip([study()]) < LEVEL / tests for _ in range(1000)]) == pytest.approx(0.8, abs=0.06)
    assert could_find(items=0.0, whole=0.0, fewest=1 / n, tests=tests) == 11 / n  # 2 / 2^11 is the first below .05 / 30
    assert could_find(items=0.0, whole=0.0, fewest=1 / n, tests=1) == 6 / n


def test_p_is_uniform_where_nothing_differs():
    """Studies of two tasks, three seeds on the same items, and no mean difference: p is below x in x of them."""
    draw, p = np.random.default_rng(2), []
    for study in range(1500):
        tasks = [(draw.standard_normal(n) + draw.standard_normal((3, n))).mean(axis=0) for n in (30, 50)]
        p.append(sign_flip(tasks, flips=400, seed=study))
    assert kstest(p, "uniform").pvalue > 0.01
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.015)


def test_holm_by_hand():
    # sorted .01 .02 .03 .04: 4 * .01 = .04, 3 * .02 = .06, 2 * .03 = .06, 1 * .04 -> .06, for it cannot fall
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == pytest.approx([1, 1]) and len(holm([])) == 0


def test_families_are_corrected_apart(tests):
    rows = tests.reset_index()
    assert set(rows["kind"]) == {"gain", "forgetting", *BY_KEY}
    assert rows.groupby("kind").size()["general_kl"] == 3  # between methods only
    assert len(tests) == 3 * 2 + 3 * 2 + 3 * 3 + 4 * 3
    together = rows[rows["kind"].isin(("gain", "forgetting"))]
    families = [together[(together["b"] == "base") == with_base] for with_base in (True, False)]
    families += [own[own["b"] == "base"] for _, own in rows[rows["kind"].isin(BY_KEY)].groupby("kind")]
    families += [own[own["b"] != "base"] for _, own in rows[rows["kind"].isin(BY_KEY)].groupby("kind")]
    for family in filter(len, families):
        assert family["p_holm"].to_numpy() == pytest.approx(holm(family["p"]))
        assert family["p_holm"].max() >= family["p"].max() and (family["p_holm"] >= family["p"]).all()


def test_the_statistic_is_the_reported_number(seeds, tests):
    cells = seeds[1].cells

    def mean(method, key):
        return cells.loc[cells["method"] == method, key].mean()

    for method in ("full", "lora", "ewc"):
        assert tests.loc[("gain", method, "base"), "difference"] == pytest.approx(mean(method, "domain_gain"))
        assert tests.loc[("forgetting", method, "base"), "difference"] == pytest.approx(mean(method, "forgetting"))
    assert tests.loc[("forgetting", "full", "ewc"), "difference"] == pytest.approx(
        mean("full", "forgetting") - mean("ewc", "forgetting")
    )
    assert tests.loc[("gain", "full", "ewc"), "difference"] == pytest.approx(
        mean("full", "domain_gain") - mean("ewc", "domain_gain")
    )
    row = tests.loc[("forgetting", "full", "base")]
    assert (row["n"], row["seeds"], row["scope"]) == (600, 3, "method") and row["low"] < row["difference"] < row["high"]
    assert is_significant(row) and row["p"] < 1e-5
    for key in BY_KEY:
        of_pair = tests.loc[(key, "full", "ewc"), "difference"]
        assert of_pair == pytest.approx(mean("full", key) - mean("ewc", key)), key
    assert tests.loc[("gold_nll_lost", "full", "base"), "unit"] == "nats per item"


def test_items_that_differ_and_a_floor_for_what_can_be_detected(seeds, tests):
    loaded = seeds[1]
    base, tuned = loaded.base[MODEL]["items"], loaded.items[loaded.items["cell"].str.contains("/full/")]
    pairs = paired(base, tuned)
    own = pairs[pairs["task"] == DOMAIN]
    assert tests.loc[("gain", "full", "base"), "items_differing"] == int((own["tuned"] != own["base"]).sum())
    same = loaded.items.copy()
    lora, full = same["cell"].str.contains("/lora/"), same["cell"].str.contains("/full/")
    same.loc[lora, "score"] = same.loc[full, "score"].to_numpy()
    rows = permutation.tests_of(_with(loaded, items=same), model=MODEL, domain=DOMAIN).set_index(["kind", "a", "b"])
    equal = rows.loc[("gain", "full", "lora")]
    assert (equal["items_differing"], equal["p"], equal["difference"]) == (0, 1.0, 0.0)
    assert 0 < -equal["low"] == equal["high"] < 0.01  # that no item moved does not say that none can
    tested = sum(kind in ("gain", "forgetting") and b != "base" for kind, _, b in rows.index)
    assert equal["detectable"] == pytest.approx(
        np.ceil(np.log2(2 * tested / LEVEL)) / 300
    )  # fewer could not have been found


def test_mcnemar_counts_by_task_and_seed(seeds):
    loaded = seeds[1]
    table = mcnemar(loaded, model=MODEL, domain=DOMAIN)
    assert len(table) == 3 * 3 * 8 and set(table["task"]) == set(
        loaded.cells.iloc[0]["scores_by_task"]
    )  # general text is no right or wrong
    row = table[(table["method"] == "full") & (table["seed"] == 1) & (table["task"] == "lambada_openai")].iloc[0]
    base = loaded.base[MODEL]["items"].query("task == 'lambada_openai'")["score"].to_numpy()
    tuned = loaded.items.query("task == 'lambada_openai' and cell == 'smollm2-135m/science/full/seed1'")[
        "score"
    ].to_numpy()
    assert (row["lost"], row["gained"]) == (((base == 1) & (tuned == 0)).sum(), ((base == 0) & (tuned == 1)).sum())
    assert (
        row["p"] == pytest.approx(binomtest(row["lost"], row["lost"] + row["gained"]).pvalue)
        and row["role"] == "retention"
    )


def test_other_rows_than_the_bases_are_refused(seeds):
    loaded = seeds[1]
    drop = loaded.items[
        (loaded.items["cell"] == "smollm2-135m/science/ewc/seed2") & (loaded.items["task"] == "piqa")
    ].index[0]
    with pytest.raises(UserError, match="science/ewc/seed2.*1 are in one of them only"):
        permutation.tests_of(_with(loaded, items=loaded.items.drop(index=drop)), model=MODEL, domain=DOMAIN)


def test_two_methods_are_compared_on_the_seeds_both_have(tmp_path):
    write_results(tmp_path, methods=("full", "lora", "ewc"), seeds=(0, 1, 2))
    names = [
        f"{MODEL}/{DOMAIN}/{cell}" for cell in ("full/seed0", "full/seed1", "lora/seed1", "lora/seed2", "ewc/seed2")
    ]
    rows = permutation.tests_of(load_cells(tmp_path, names), model=MODEL, domain=DOMAIN).set_index(["kind", "a", "b"])
    assert rows.loc[("gain", "full", "base"), "seeds"] == 2
    assert (rows.loc[("gain", "full", "lora"), "seeds"], rows.loc[("gain", "full", "lora"), "scope"]) == (1, "run")
    assert ("gain", "full", "ewc") not in rows.index and ("gain", "lora", "ewc") in rows.index


def test_the_section_renders_with_its_numbers(seeds, tests):
    made = section(seeds[1], permutation.all_tests(seeds[1]), model=MODEL, domain=DOMAIN)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(SECTIONS), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("significance.html.j2").render(significance=made)
    row = tests.loc[("forgetting", "full", "base")]
    assert (
        f"{100 * row['difference']:+.1f}" in page
        and f"{100 * row['detectable']:.1f}" in page
        and "all patterns of signs" in page
    )
    assert page.count("<tr>") == 3 + 3 + 3 + 8 * 3 and "object at" not in page  # heads, methods, pairs, tasks by seed
    assert "p is about these runs on other items" in page


def test_a_cell_without_items_is_left_out_and_named(tmp_path):
    planned = write_results(tmp_path, methods=("full", "lora", "ewc"), seeds=(0, 1))
    (tmp_path / "runs" / f"{MODEL}/{DOMAIN}/lora/seed1" / "items.csv.gz").unlink()
    loaded = load_cells(tmp_path, planned)
    found = permutation.tests_of(loaded, model=MODEL, domain=DOMAIN)
    assert (
        len(found[found["kind"].isin(("gain", "forgetting"))]) == 12
        and set(found[(found["a"] == "lora") | (found["b"] == "lora")]["seeds"]) == {1}
        and found["seeds"].max() == 2
    )
    legend = section(loaded, permutation.all_tests(loaded), model=MODEL, domain=DOMAIN)["legend"]
    assert legend[-1] == f"Not tested, because their items.csv.gz is missing: {MODEL}/{DOMAIN}/lora/seed1."


def test_nothing_to_test_is_no_section(tmp_path):
    none = load_cells(tmp_path, [f"{MODEL}/{DOMAIN}/full/seed0"])
    assert (
        permutation.tests_of(none, model=MODEL, domain=DOMAIN).empty
        and section(none, permutation.all_tests(none), model=MODEL, domain=DOMAIN) is None
    )
    planned = write_results(tmp_path, methods=("full",))
    (tmp_path / "runs" / planned[0] / "items.csv.gz").unlink()
    bare = load_cells(tmp_path, planned)
    assert section(bare, permutation.all_tests(bare), model=MODEL, domain=DOMAIN) is None


def _with(loaded, **changed):
    return type(loaded)(**{name: getattr(loaded, name) for name in loaded.__dataclass_fields__} | changed)
