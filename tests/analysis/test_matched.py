from math import sqrt

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import style
from analysis.load import Loaded, load_cells
from analysis.sections.matched import matched_gain, section
from analysis.statistics.comparison import comparison
from analysis.statistics.matched import crossing, curve, gap, gaps, levels, matched, rows_behind, trajectories
from analysis.statistics.resample import resampled
from tests.analysis.fixtures import write_results
from tests.analysis.test_front import page

WHERE = {"model": "m", "domain": "d"}
FIXTURE = {"model": "smollm2-135m", "domain": "science"}
ROLES = {"d": "domain", "a": "retention", "b": "retention", "low": "retention", "school": "transfer"}


ROWS = 40  # scored rows a task, all right in the base


def study(runs, *, starts=(), tuning=None, columns=("d", "a", "b"), wrong=None):
    """A Loaded of runs {(method, seed): [[probe scores in percent, a row a step], ...]}, of 100 rows each.

    wrong  {(method, seed): {task: how many of its first ROWS scored rows are wrong}}; None for no items
    """
    cells, curves, base, tuned = [], [], [], []

    def item(task, k, score):
        return {"task": task, "doc_id": k, "doc_hash": f"{task}{k}", "score": float(score), "gold": 1.0}

    for task in ("a", "b") if wrong else ():
        base += [item(task, k, 1) for k in range(ROWS)]
        tuned += [
            item(task, k, k >= lost[task]) | {"cell": f"m/d/{m}/seed{s}"}
            for (m, s), lost in wrong.items()
            for k in range(ROWS)
        ]
    for (method, seed), scores in runs.items():
        name = f"m/d/{method}/seed{seed}"
        about = {task: {"role": role} for task, role in ROLES.items()}
        cells.append(
            {
                "cell": name,
                "model": "m",
                "domain": "d",
                "method": method,
                "seed": seed,
                "scores_by_task": about,
                "at_chance": ["low"],
                "domain_gain": None,
                "forgetting": None,
                "n": dict.fromkeys(("a", "b"), ROWS) if wrong else {},
            }
        )
        values = np.array(scores) / (1 if any(c.endswith("_nll") for c in columns) else 100)
        frame = pd.DataFrame(values, columns=[f"probe_{c}" for c in columns])
        curves.append(frame.assign(cell=name, step=range(len(frame)), tokens=range(len(frame))))
    return Loaded(
        cells=pd.DataFrame(cells).set_index("cell", drop=False),
        curves=pd.concat(curves, ignore_index=True),
        items=pd.DataFrame(tuned),
        failures=pd.DataFrame(),
        prepared={name: {"bytes_start": 5} for name in starts},
        tuning=tuning or {},
        base={"m": {"items": pd.DataFrame(base)}},
    )


def rows_at(table, level="matched", measure="forgetting"):
    return table[(table["level"] == level) & (table["measure"] == measure)].set_index("method")


def test_the_first_crossing_counts():
    assert crossing([0, 4, 8], 6) == (2, 0.5) and crossing([0, 4, 8], 4) == (1, 1.0)
    assert crossing([0, 8, 2, 10], 4) == (1, 0.5)  # that it falls back and rises again is later training
    assert crossing([5, 8], 4) == (0, 1.0) and crossing([0, 3], 4) is None


def test_rows_behind_shares():
    assert rows_behind([0.38, 0.36, 1.0]) == 50 and rows_behind([29 / 48, 30 / 48]) == 48
    assert rows_behind([0.5, 0.25]) == 4  # a divisor of what it may be: wider, never narrower
    assert rows_behind([2**0.5 / 2]) is None and rows_behind([1 / 9973, 1 / 9967]) is None


def test_forgetting_at_the_same_gain_by_hand():
    """full reaches 10, 20, 30 points, ewc 12, 24, idle 4: the level is 24, 40 % of full's way from 20 to 30."""
    found = trajectories(
        study(
            {
                ("full", 0): [[50, 60, 70], [60, 58, 70], [70, 50, 66], [80, 40, 56]],
                ("ewc", 0): [[50, 60, 70], [62, 60, 68], [74, 57, 65]],
                ("idle", 0): [[50, 60, 70], [54, 60, 70]],
            }
        ),
        **WHERE,
    )
    assert levels(found) == pytest.approx({"matched": 0.24, "25 %": 0.075, "50 %": 0.15, "75 %": 0.225})
    table = rows_at(matched(found))
    assert table.at["full", "value"] == pytest.approx(0.07 + 0.4 * (0.17 - 0.07)) and table.at[
        "ewc", "value"
    ] == pytest.approx(0.04)
    assert table.at["ewc", "difference"] == pytest.approx(0.04 - 0.11) and table.at["idle", "reached"] == 0
    assert (
        pd.isna(table.at["idle", "value"])
        and pd.isna(table.at["idle", "difference"])
        and pd.isna(table.at["full", "difference"])
    )
    assert rows_at(matched(found), "25 %").at["ewc", "early"] and not table.at["ewc", "early"]


def moved(*changes):
    """The variance of changes of each task's rows, with one more up and one more down, over 100 probe rows and T^2."""
    return sum(np.append(change, [1, -1]).var(ddof=1) / 100 for change in changes) / len(changes) ** 2


def lost(n):
    return -1.0 * (np.arange(ROWS) < n)


def test_one_seed_has_the_rows_part_from_the_scored_rows():
    runs = {("full", 0): [[50, 61, 71], [70, 41, 53]], ("ewc", 0): [[50, 61, 71], [70, 57, 69]]}
    found = trajectories(study(runs, wrong={("full", 0): {"a": 8, "b": 6}, ("ewc", 0): {"a": 3, "b": 0}}), **WHERE)
    assert found.rows == {"probe_a": 100, "probe_b": 100}
    table = rows_at(matched(found))
    assert table.at["full", "high"] - table.at["full", "value"] == pytest.approx(
        1.959964 * sqrt(moved(lost(8), lost(6))), rel=1e-6
    )
    between = moved(lost(3) - lost(8), lost(0) - lost(6))  # paired: what both methods lost does not count
    assert table.at["ewc", "difference_high"] - table.at["ewc", "difference"] == pytest.approx(
        1.959964 * sqrt(between), rel=1e-6
    )
    assert set(table["covers"]) == {"rows"}
    bare = rows_at(matched(trajectories(study(runs), **WHERE)))
    assert bare["low"].isna().all() and set(bare["covers"]) == {""}  # without items nothing says how much answers vary


def test_several_seeds_have_students_part_too_and_differences_are_paired():
    ends = {"full": [20, 26, 17], "ewc": [12, 17, 10]}
    runs = {
        (method, seed): [[50, 60, 70], [70, 60 - value, 70 - value]]
        for method, values in ends.items()
        for seed, value in enumerate(values)
    }
    table = rows_at(matched(trajectories(study(runs), **WHERE)))
    one = stats.ttest_1samp(np.array(ends["full"]) / 100, 0).confidence_interval(0.95)
    assert (table.at["full", "low"], table.at["full", "high"]) == pytest.approx((one.low, one.high)) and set(
        table["covers"]
    ) == {"seeds"}
    two = stats.ttest_rel(np.array(ends["ewc"]) / 100, np.array(ends["full"]) / 100).confidence_interval(0.95)
    assert (table.at["ewc", "difference_low"], table.at["ewc", "difference_high"]) == pytest.approx((two.low, two.high))
    wrong = {(method, seed): {"a": 8 if method == "full" else 3, "b": 0} for method, seed in runs}
    both = rows_at(matched(trajectories(study(runs, wrong=wrong), **WHERE)))
    half = sqrt((one.high - one.low) ** 2 / 4 + 1.959964**2 * moved(lost(8), lost(0)))
    assert both.at["full", "high"] - both.at["full", "value"] == pytest.approx(half, rel=1e-6) and set(
        both["covers"]
    ) == {"seeds and rows"}


def test_seeds_that_agree_on_the_same_rows_are_no_certainty():
    alike = {("full", seed): [[50, 60, 70], [70, 60, 69]] for seed in range(3)}
    row = rows_at(matched(trajectories(study(alike), **WHERE))).loc["full"]
    assert row["value"] == pytest.approx(0.005) and pd.isna(row["low"])
    row = rows_at(matched(trajectories(study(alike, wrong={run: {"a": 0, "b": 0} for run in alike}), **WHERE))).loc[
        "full"
    ]
    assert row["low"] < 0 < row["value"] < row["high"]


def test_a_seed_that_does_not_reach_the_gain_is_not_left_out():
    base, ends = (
        [50, 60, 70],
        {("full", 0): [80, 50, 60], ("full", 1): [80, 50, 60], ("ewc", 0): [80, 55, 65], ("ewc", 1): [60, 60, 70]},
    )
    loaded = study({run: [base, end] for run, end in ends.items()})
    table = rows_at(matched(trajectories(loaded, **WHERE)))
    assert table.at["full", "gain"] == pytest.approx(0.3)
    assert (table.at["ewc", "reached"], table.at["ewc", "seeds"]) == (1, 2) and pd.isna(table.at["ewc", "value"])
    html = page("matched", matched=section(loaded, **WHERE))
    assert "did not reach it<small>1 of 2 seeds did</small>" in html and "every method except ewc reaches" in html


def test_weights_of_a_preparation_are_set_against_the_bare_base():
    own = "m/d/hierarchical/seed0"
    loaded = study(
        {("hierarchical", 0): [[56, 64, 72], [70, 50, 60]], ("full", 0): [[50, 60, 70], [70, 50, 60]]}, starts=[own]
    )
    found = trajectories(loaded, **WHERE)
    first = found.points[found.points["cell"] == own].iloc[0]
    assert (
        first["gain"] == pytest.approx(0.06)
        and first["forgetting"] == pytest.approx(-0.03)
        and not found.from_own_start
    )
    early = rows_at(matched(found), "25 %").loc["hierarchical"]
    assert early["begins"] and early["value"] == pytest.approx(-0.03)
    alone = {("hierarchical", 0): [[56, 64, 72], [70, 50, 60]]}
    recorded = {("m", "d"): {"base": {"d": 0.5, "a": 0.6, "b": 0.7}}}
    assert trajectories(study(alone, starts=[own], tuning=recorded), **WHERE).points["gain"].iloc[0] == pytest.approx(
        0.06
    )
    unknown = trajectories(study(alone, starts=[own]), **WHERE)
    assert unknown.from_own_start == ("hierarchical",) and unknown.points["gain"].iloc[0] == 0


def test_only_retention_above_chance_counts():
    columns = ("d", "a", "low", "school")
    found = trajectories(study({("full", 0): [[50, 60, 50, 40], [70, 50, 20, 60]]}, columns=columns), **WHERE)
    assert found.right == ("probe_a",) and found.points["forgetting"].iloc[-1] == pytest.approx(0.1)
    assert trajectories(study({("full", 0): [[50, 60], [70, 50]]}, columns=("d", "school")), **WHERE) is None


def test_a_domain_without_accuracy_is_measured_in_nats():
    loaded = study(
        {("full", 0): [[2.0, 3.0], [1.2, 3.4]], ("ewc", 0): [[2.0, 3.0], [1.4, 3.1]]}, columns=("d_nll", "a_nll")
    )
    found = trajectories(loaded, **WHERE)
    assert (
        found.gain == "nats"
        and found.measures == ("forgetting_nats",)
        and levels(found)["matched"] == pytest.approx(0.6)
    )
    table = rows_at(matched(found), measure="forgetting_nats")
    assert table.at["full", "value"] == pytest.approx(0.3) and set(table["covers"]) == {""}
    texts = section(loaded, **WHERE)
    assert "+0.600 nats per token" in texts["sentences"][0] and "no interval" in texts["sentences"][1]


def test_nothing_learned_is_said():
    loaded = study({("full", 0): [[50, 60, 70], [48, 60, 70]]})
    assert levels(trajectories(loaded, **WHERE)) == {} and matched(trajectories(loaded, **WHERE)).empty
    assert "No method gained" in page("matched", matched=section(loaded, **WHERE))


def test_curve_of_a_family():
    gain, forgetting = (
        np.array([0.3, 0.1, 0.2, 0.15]),
        np.array([0.08, 0.0, 0.02, 0.06]),
    )  # the block at 0.15 is worse than the one at 0.2
    at = np.array([0.05, 0.1, 0.125, 0.15, 0.25, 0.3, 0.31])
    assert curve(gain, forgetting, at) == pytest.approx([np.nan, 0.0, 0.01, 0.02, 0.05, 0.08, np.nan], nan_ok=True)


def test_gap_is_the_mean_distance_over_shared_gains():
    rising, flat = (np.array([0.0, 0.4]), np.array([0.0, 0.4])), (np.array([0.1, 0.5]), np.array([0.1, 0.1]))
    value, low, high = gap(rising, flat)
    assert (value, low, high) == pytest.approx((0.25 - 0.1, 0.1, 0.4))
    point = (np.array([0.2]), np.array([0.5]))
    assert gap(point, rising)[0] == pytest.approx(0.3) and np.isnan(gap((np.array([0.7]), np.array([0.1])), rising)[0])
    stacked = gap(*[tuple(np.stack([part, part]) for part in one) for one in (rising, flat)])[0]
    assert stacked == pytest.approx([0.15, 0.15])


def test_sweeps_are_compared_on_the_scored_rows(tmp_path):
    methods = ("full", "lora", "ewc-s1", "ewc-s2", "mofo-s1", "mofo-s2", "mofo-s3")
    loaded = load_cells(tmp_path, write_results(tmp_path, methods=methods))
    table = gaps(resampled(loaded, **FIXTURE))
    assert set(zip(table["a"], table["b"])) == {
        ("full", "ewc"),
        ("lora", "ewc"),
        ("full", "mofo"),
        ("lora", "mofo"),
        ("ewc", "mofo"),
    }
    bounded = table.dropna(subset=["low"])
    assert (
        (bounded["low"] < bounded["difference"]).all()
        and (bounded["difference"] < bounded["high"]).all()
        and (bounded["shared"] >= 0.95).all()
    )
    assert table.loc[table["difference"].isna(), "shared"].eq(0).all() and table["difference"].notna().any()
    html = page("matched", matched=section(loaded, **FIXTURE))
    assert "ewc (2) − mofo (3)" in html and "full − lora" not in html


def test_figure_and_section(tmp_path):
    loaded = load_cells(tmp_path, write_results(tmp_path, seeds=(0, 1, 2)))
    table = comparison(loaded)
    with style.house():
        figure, data, title, caption = matched_gain(loaded, table[table["method"] != "base"], loaded.of(**FIXTURE))
        style.save(figure, data, stem=tmp_path / "matched", not_a_result=False)
    found, kept = trajectories(loaded, **FIXTURE), pd.read_csv(tmp_path / "matched.csv")
    assert kept["gain"].to_list() == pytest.approx((100 * found.points["gain"]).to_list()) and len(kept) == 5 * 3 * 6
    assert (
        kept["matched_gain"].iloc[0] == pytest.approx(100 * levels(found)["matched"])
        and "vertical dashed line" in caption
        and title
    )
    html = page("matched", matched=section(loaded, **FIXTURE))
    assert (
        html.count("<tr>") == 6
        and "over seeds and probe rows" in html
        and "over seeds alone (Student" in html
        and "copa" not in found.right
    )


def test_without_curves_there_is_nothing(tmp_path):
    planned = write_results(tmp_path, methods=("full",))
    (tmp_path / "runs" / planned[0] / "curve.csv").unlink()
    loaded = load_cells(tmp_path, planned)
    assert section(loaded, **FIXTURE) is None and matched_gain(loaded, comparison(loaded), loaded.of(**FIXTURE)) is None
