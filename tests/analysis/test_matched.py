"""What is lost at the same gain: curves through settings by hand and by brute force, redraws, and trajectories."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.load import Loaded, load_cells
from analysis.measures import ACCURACY, BY_KEY, GENERAL, GOLD
from analysis.roles import Roles
from analysis.sections.matched import _compared, _rule, _verdict, section
from analysis.statistics.comparison import comparison
from analysis.statistics.matched import curve, curves, equal_gain, level, matched
from analysis.statistics.nats import DOMAIN
from analysis.statistics.resample import Resampled, resampled, reversed_p
from analysis.statistics.trajectories import along, crossing, trajectories
from tests.analysis.fixtures import write_results
from tests.analysis.test_front import WHERE, page

KEY = GENERAL.key


def drawn(methods, *, noise=0.0, draws=400, seed=0, shared=True):
    """A Resampled of {method: (gain, lost)}, redrawn with normal `noise`, of which half is shared by all."""
    rng, values = np.random.default_rng(seed), np.array(list(methods.values()), dtype=float).T

    def again(point):
        common = rng.normal(size=(draws, 1)) if shared else 0.0
        return point + noise * (common + rng.normal(size=(draws, len(point)))) / np.sqrt(2)

    keys = (DOMAIN, KEY)
    return Resampled(
        methods=tuple(methods),
        values=dict(zip(keys, values)),
        draws={key: again(point) for key, point in zip(keys, values)},
        seeds=dict.fromkeys(methods, 3),
    )


def test_a_curve_by_hand():
    """The setting at 0.15 is beaten by the one at 0.2, which gains more for less."""
    found = curve(np.array([0.3, 0.1, 0.2, 0.15]), np.array([0.08, 0.0, 0.02, 0.06]))
    at = [float(found.at(gain)) for gain in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.31)]
    assert at == pytest.approx([np.nan, 0.0, 0.01, 0.02, 0.05, 0.08, np.nan], nan_ok=True)
    assert (float(found.least), float(found.last)) == (0.1, 0.3)
    assert float(found.at(0.05, bound=True)) == 0.0 and np.isnan(found.at(0.31, bound=True))
    too_harsh = curve(np.array([0.19, 0.27]), np.array([0.154, 0.031]))  # at the higher rate less is gained
    at = [float(too_harsh.at(gain)) for gain in (0.18, 0.19, 0.22, 0.27, 0.28)]  # below 0.27 the lower rate does better
    assert at == pytest.approx([np.nan, 0.031, 0.031, 0.031, np.nan], nan_ok=True)
    assert float(too_harsh.least) == 0.19 and float(too_harsh.at(0.1, bound=True)) == 0.031


def test_curves_of_many_draws_are_those_of_each_by_brute_force():
    rng = np.random.default_rng(1)
    gain, lost = rng.integers(0, 6, (300, 4)) / 4, rng.integers(-2, 6, (300, 4)) / 4  # coarse, so that ties occur
    levels = rng.uniform(-0.2, 1.4, 300)
    made = curve(gain, lost).at(levels)
    for g, f, at, value in zip(gain, lost, levels, made):
        kept = {(x, y) for x, y in zip(g, f) if not any(a >= x and b <= y and (a, b) != (x, y) for a, b in zip(g, f))}
        x, y = map(np.array, zip(*sorted(kept)))
        expected = np.interp(at, x, y) if min(g) <= at <= x[-1] else np.nan  # interp holds y[0] before x[0]
        assert value == pytest.approx(expected, nan_ok=True)


def test_methods_are_compared_where_all_that_learned_gain_as_much():
    made = drawn(
        {"full": (0.3, 0.1), "full-s1": (0.1, 0.02), "ewc": (0.24, 0.03), "ewc-s1": (0.4, 0.2), "idle": (0.04, 0.0)}
        | {"late": (0.28, 0.01)},
        noise=0.0,
    )
    at, again = level(made)
    assert at == 0.28 and (again == 0.28).all()
    table = matched(made).set_index("family")
    assert table.at["full", "value"] == pytest.approx(0.02 + 0.9 * 0.08)
    assert table.at["ewc", "value"] == pytest.approx(0.03 + 0.25 * 0.17) and table.at["late", "value"] == 0.01
    assert table.at["idle", "why"] == "gains at most +0.040" and pd.isna(table.at["idle", "value"])
    assert table.at["full", "low"] == pytest.approx(table.at["full", "value"])
    far = drawn({"full": (0.3, 0.1), "mofo": (0.2, 0.05)})
    assert matched(far).set_index("family").at["full", "why"] == "gains more at its first setting (+0.300)"
    assert level(drawn({"full": (-0.1, 0.0)})) is None and matched(drawn({"full": (-0.1, 0.0)})).empty


def test_leaders_that_are_named_decide_at_which_gain_methods_are_compared():
    """A control that gains less does not put the level before the first setting of every other method."""
    made = drawn({"full": (0.2, 0.02), "full-s1": (0.3, 0.1), "ewc": (0.25, 0.03), "lora": (0.16, 0.05)})
    assert level(made)[0] == 0.16 and matched(made).set_index("family").at["full", "why"].startswith("gains more")
    deciding = Roles(leaders=("ewc",), compositions=("lora",)).setting_levels(made.families)
    assert Roles(compositions=("lora",)).setting_levels(made.families) == ["full", "ewc"]
    assert deciding == ["full", "ewc"] and Roles().setting_levels(made.families) == ["full", "ewc", "lora"]
    table = matched(made, deciding).set_index("family")
    assert level(made, deciding)[0] == 0.25 and table.at["full", "value"] == pytest.approx(0.06)
    assert table.at["lora", "why"] == "gains at most +0.160" and level(made, []) is None
    assert "every one of full, ewc reaches" in _rule(made, 0.25, deciding)
    runs = {
        ("full", 0): [BASE, [1.8, 3.0, 4.1], [1.4, 3.2, 4.2]],
        ("lora", 0): [BASE, [1.9, 3.0, 4.0], [1.7, 3.0, 4.0]],
    }
    during = trajectories(study(runs), **D)
    assert along(during)["gain"].iloc[0] == pytest.approx(0.3)
    found = along(during, deciding).set_index("method")
    assert found["gain"].iloc[0] == pytest.approx(0.6) and found.loc["lora", "why"].iloc[0] == "gains at most +0.300"


def test_two_methods_at_the_most_that_both_gain():
    made = drawn({"full": (0.2, 0.05), "full-s1": (0.3, 0.15), "ewc": (0.25, 0.04), "both": (0.4, 0.01)}, noise=0.005)
    one = equal_gain(made, "ewc", "full", key=KEY)
    assert (one.gain, one.beyond) == (0.25, "") and one.difference == pytest.approx(0.04 - 0.10)
    assert one.low < one.difference < one.high < 0 and one.p < 0.01 and one.less
    other = equal_gain(made, "full", "ewc", key=KEY)
    assert other.difference == -one.difference and other.low == pytest.approx(-one.high) and not other.less
    # a composition that gains more than the remedy ever does, and loses less: its loss there can only be smaller
    more = equal_gain(made, "both", "full", key=KEY)
    assert (more.gain, more.beyond) == (0.3, "both") and more.difference == pytest.approx(0.01 - 0.15) and more.less
    # the other way round, nothing is known of what it would lose at the remedy's gain
    worse = equal_gain(drawn({"full": (0.3, 0.02), "both": (0.2, 0.01)}, noise=1e-4), "both", "full", key=KEY)
    assert worse.beyond == "full" and worse.difference == pytest.approx(-0.01) and worse.p < 0.01 and not worse.less
    assert equal_gain(made, "ewc", "none", key=KEY) is None and equal_gain(made, "ewc", "full", key=GOLD.key) is None


def test_p_is_the_level_at_which_the_interval_begins_to_include_zero():
    draws = np.random.default_rng(0).normal(1.0, 0.5, size=100_000)
    assert reversed_p(1.0, draws) == pytest.approx(2 * stats.norm.sf(2), rel=0.05)
    assert reversed_p(0.0, draws - 1.0) == pytest.approx(1.0, abs=0.02) and reversed_p(1.0, np.array([np.nan])) is None


def test_a_difference_at_equal_gain_covers_the_truth_and_is_seldom_found_where_there_is_none():
    """Two methods of two settings with the same curve, whose settings lie at other places of it."""
    rng, studies, found, covered = np.random.default_rng(5), 300, 0, 0
    gain = {"full": 0.2, "full-s1": 0.3, "ewc": 0.18, "ewc-s1": 0.28}
    for number in range(studies):
        point = {m: (g + rng.normal(0, 0.01), 0.5 * g + rng.normal(0, 0.008)) for m, g in gain.items()}
        one = equal_gain(
            _redrawn(point, errors=(0.01, 0.008), rng=np.random.default_rng(number)), "ewc", "full", key=KEY
        )
        found += one.p < 0.05
        covered += one.low <= 0 <= one.high
    assert found / studies < 0.09 and covered / studies > 0.91


def _redrawn(point, *, errors, rng, draws=300):
    values = np.array(list(point.values())).T
    keys = (DOMAIN, KEY)
    again = {key: v + e * rng.normal(size=(draws, len(v))) for key, v, e in zip(keys, values, errors)}
    return Resampled(methods=tuple(point), values=dict(zip(keys, values)), draws=again, seeds=dict.fromkeys(point, 5))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    methods = ("full", "lora", "ewc-s1", "ewc-s2", "mofo-s1", "mofo-s2", "mofo-s3")
    return load_cells(root, write_results(root, methods=methods, seeds=(0, 1, 2)))


def test_redraws_have_the_values_and_errors_of_the_reported_numbers(tmp_path):
    loaded = load_cells(tmp_path, write_results(tmp_path, methods=("full", "lora")))
    found, rows = resampled(loaded, **WHERE), comparison(loaded).set_index("method")
    assert found.seeds == {"full": 1, "lora": 1} and found.losses == (*BY_KEY, ACCURACY)
    for column, method in enumerate(found.methods):
        for key in (DOMAIN, *BY_KEY, ACCURACY):
            value, again = found.values[key][column], found.draws[key][:, column]
            half = (rows.at[method, f"{key}_high"] - rows.at[method, f"{key}_low"]) / 2
            assert value == pytest.approx(rows.at[method, key]) and again.mean() == pytest.approx(value, abs=half / 10)
            assert 1.97 * again.std() == pytest.approx(half, rel=0.1)
    again = resampled(loaded, **WHERE)
    assert all((again.draws[key] == found.draws[key]).all() for key in found.draws)


def test_one_redraw_serves_every_method_and_measure(tmp_path):
    loaded = load_cells(tmp_path, write_results(tmp_path, methods=("full", "lora")))
    own = loaded.items[loaded.items["cell"].str.contains("/full/")]
    twin = own.assign(cell="smollm2-135m/science/lora/seed0").sample(frac=1, random_state=0)
    found = resampled(replace(loaded, items=pd.concat([own, twin], ignore_index=True)), **WHERE)
    for key in (DOMAIN, *BY_KEY, ACCURACY):
        assert np.allclose(found.draws[key][:, 0], found.draws[key][:, 1])


def test_seeds_come_in_with_the_tails_of_student_or_those_of_a_moderated_variance(tmp_path):
    swept = load_cells(tmp_path, write_results(tmp_path, methods=("full",), seeds=(0, 1, 2)))
    whole = resampled(swept, **WHERE, draws=8000)
    by_seed = swept.of(**WHERE).query("method == 'full'").sort_values("seed")[KEY].to_numpy()
    less = resampled(swept, **WHERE, draws=8000, moderate=lambda key, method, variance, df: (0.0, df))
    part = whole.draws[KEY] - less.draws[KEY]  # the same items: what is left are the seeds
    expected = stats.t.ppf(0.975, 2) * by_seed.std(ddof=1) / np.sqrt(3)
    assert np.quantile(part[:, 0], 0.975) == pytest.approx(expected, rel=0.1)
    pooled = resampled(swept, **WHERE, draws=8000, moderate=lambda key, method, variance, df: (4 * variance, 20.0))
    part = pooled.draws[KEY] - less.draws[KEY]
    expected = stats.t.ppf(0.975, 20) * 2 * by_seed.std(ddof=1) / np.sqrt(3)
    assert np.quantile(part[:, 0], 0.975) == pytest.approx(expected, rel=0.1)


def test_the_section_says_a_number_or_why_there_is_none(swept):
    made = resampled(swept, **WHERE)
    html = page("matched", matched=section(swept, **WHERE))
    assert html.count("<tr>") == 1 + len(made.families) and "redrawn items and seeds" in html
    assert all(name in curves(made, KEY) for name in made.families)
    assert f"{level(made)[0]:.3f} nats per token on the domain" in html and "against full" in html
    missing = matched(made)["why"]
    assert missing[missing != ""].str.contains("gains").all()


def test_methods_of_several_seeds_are_judged_after_holms_correction_and_runs_of_one_are_not():
    points = {"full": (0.2, 0.05), "full-s1": (0.3, 0.15), "ewc": (0.25, 0.04), "lora": (0.25, 0.101)}
    made = drawn(points, noise=0.005)
    against = {name: equal_gain(made, name, "full", key=KEY) for name in ("ewc", "lora")}
    (verdict,) = _verdict(made, against, KEY)
    assert "these lose less than full: ewc (" in verdict and "lora" not in verdict
    assert re.search(r"the others' loss does not differ .* \(a difference of 0\.0\d+ nats per token would", verdict)
    nearly = {name: replace(one, p=0.03) for name, one in against.items()}  # two at .03 are none after the correction
    (verdict,) = _verdict(made, nearly, KEY)
    assert "no method's loss differs significantly" in verdict
    assert _verdict(replace(made, seeds=dict.fromkeys(points, 1)), against, KEY) == []


def test_a_gain_that_is_passed_before_the_first_setting_has_a_reason_and_no_number():
    made = drawn({"full": (0.2, 0.05), "both": (0.4, 0.01)}, noise=0.005)
    value, why = _compared(equal_gain(made, "both", "full", key=KEY), key=KEY)
    assert (value, why) == ("–", "both gains more at its first setting than the other ever does")


def test_without_items_there_is_no_section(tmp_path):
    planned = write_results(tmp_path, methods=("full",))
    (tmp_path / "runs" / planned[0] / "items.csv.gz").unlink()
    assert section(load_cells(tmp_path, planned), **WHERE) is None


# along training


def study(runs, *, finished=None, starts=(), tuning=None, columns=("d", "general", "a")):
    """A Loaded of runs {(method, seed): [[nats per token of the probes], ...]}, probed after 0, 1, 2, 4, … steps."""
    cells, curves = [], []
    for method, seed in runs:
        name = f"m/d/{method}/seed{seed}"
        tasks = {"d": {"role": "domain"}, "a": {"role": "retention"}, "low": {"role": "retention"}}
        about = {"cell": name, "model": "m", "domain": "d", "method": method, "seed": seed, "scores_by_task": tasks}
        known = {} if finished is False else {"finished": (finished or {}).get(method)}
        cells.append(about | {"at_chance": ["low"]} | known)
        frame = pd.DataFrame(runs[method, seed], columns=[f"probe_{column}_nll" for column in columns])
        steps = [0, *(2**k for k in range(len(frame) - 1))]
        curves.append(frame.assign(cell=name, step=steps, tokens=steps))
    return Loaded(
        cells=pd.DataFrame(cells).set_index("cell", drop=False),
        curves=pd.concat(curves, ignore_index=True),
        items=pd.DataFrame(),
        failures=pd.DataFrame(),
        prepared={f"m/d/{method}/seed0": {"bytes_start": 5} for method in starts},
        tuning=tuning or {},
    )


D = {"model": "m", "domain": "d"}
BASE = [2.0, 3.0, 4.0]


def test_the_first_crossing_counts():
    assert crossing([0, 4, 8], 6) == (2, 0.5) and crossing([0, 4, 8], 4) == (1, 1.0)
    assert crossing([0, 8, 2, 10], 4) == (1, 0.5)  # that it falls back and rises again is later training
    assert crossing([5, 8], 4) == (0, 1.0) and crossing([0, 3], 4) is None


def test_losses_along_training_by_hand():
    """full gains 0.2, 0.4, 0.6, ewc 0.1, 0.5, idle 0.1: the level is 0.5, half of full's way from 0.4 to 0.6."""
    runs = trajectories(
        study(
            {
                ("full", 0): [BASE, [1.8, 3.0, 4.1], [1.6, 3.1, 4.2], [1.4, 3.3, 4.6]],
                ("ewc", 0): [BASE, [1.9, 3.0, 4.0], [1.5, 3.1, 4.0]],
                ("idle", 0): [BASE, [1.9, 3.0, 4.0]],
                ("fast", 0): [BASE, [1.2, 3.2, 4.0]],
            }
        ),
        **D,
    )
    table = along(runs).set_index(["measure", "method"])
    assert table["gain"].to_list() == pytest.approx([0.5] * len(table))
    assert table.at[(KEY, "full"), "value"] == pytest.approx(0.2) and table.at[(KEY, "ewc"), "value"] == pytest.approx(
        0.1
    )
    assert table.at[(GOLD.key, "full"), "value"] == pytest.approx(0.4)
    assert table.at[(KEY, "idle"), "why"] == "gains at most +0.100"
    assert table.at[(KEY, "fast"), "why"] == "passed it before its first probe (step 1)"
    assert table["low"].isna().all()  # one seed
    ends = trajectories(study({("full", 0): [BASE, [2.1, 3.0, 4.0]]}), **D)
    assert along(ends).empty and runs.between and not ends.between


def test_several_seeds_have_students_interval():
    ends = [3.2, 3.26, 3.17]
    runs = {("full", seed): [BASE, [1.9, 3.0, 4.0], [1.5, end, 4.0]] for seed, end in enumerate(ends)}
    row = along(trajectories(study(runs), **D)).iloc[0]
    expected = stats.ttest_1samp(np.array(ends) - 3.0, 0).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high)) and row["seeds"] == 3


def test_a_method_whose_weights_are_changed_after_training_has_no_trajectory():
    run = [BASE, [1.9, 3.0, 4.0], [1.5, 3.2, 4.0]]
    loaded = study(
        {("full", 0): run, ("half", 0): run, ("warm", 0): [[1.7, 2.9, 4.0], [1.4, 3.2, 4.0]]},
        finished={"half": {"parts": ["wise_ft"], "probe": {}}},
        starts=("warm",),
    )
    runs = trajectories(loaded, **D)
    assert runs.without == {"half": "wise_ft changes the weights after training"}
    table = along(runs)
    assert list(dict.fromkeys(table["method"])) == ["full", "warm"]
    assert trajectories(study({("full", 0): run}, finished=False), **D) is None
    assert runs.points.groupby("method")["gain"].first().to_dict() == pytest.approx({"full": 0.0, "warm": 0.3})


def test_the_base_of_runs_that_start_elsewhere_is_the_tunings():
    run = {("warm", 0): [[1.7, 2.9, 4.0], [1.4, 3.2, 4.0]]}
    recorded = {("m", "d"): {"base": {"d_nll": 2.0, "general_nll": 3.0, "a_nll": 4.0}}}
    assert trajectories(study(run, starts=["warm"], tuning=recorded), **D).points["gain"].iloc[0] == pytest.approx(0.3)
    assert trajectories(study(run, starts=["warm"]), **D) is None


def test_only_retention_above_chance_counts():
    columns = ("d", "general", "a", "low", "school")
    run = {("full", 0): [[2.0, 3.0, 4.0, 5.0, 6.0], [1.5, 3.1, 4.4, 9.0, 9.0]]}
    runs = trajectories(study(run, columns=columns), **D)
    assert runs.points[GOLD.key].iloc[-1] == pytest.approx(0.4)
    none = trajectories(study({("full", 0): [[2.0, 3.0], [1.5, 3.1]]}, columns=("d", "general")), **D)
    assert none.losses == [KEY]
    assert trajectories(study({("full", 0): [[2.0], [1.5]]}, columns=("d",)), **D) is None
