"""Lost and gained answers: counts by hand, chance by enumeration, figures and section."""

from dataclasses import replace
from itertools import combinations, product

import jinja2
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from analysis import style
from analysis.load import Loaded, load_cells
from analysis.sections import flips as section
from analysis.statistics import flips
from tests.analysis.fixtures import digest, write_results

ROLES = {"sums": "domain", "poems": "retention", "maps": "retention", "coins": "retention", "words": "transfer"}


def frame(scores: dict[str, str]) -> pd.DataFrame:
    """Items from a word of 0 and 1 a task."""
    rows = [
        (task, i, digest(f"{task} {i}"), float(score), 0, 0, -1.0)
        for task, word in scores.items()
        for i, score in enumerate(word)
    ]
    return pd.DataFrame(rows, columns=["task", "doc_id", "doc_hash", "score", "choice", "gold", "log_likelihood"])


def study(base: dict[str, str], runs: dict[str, dict[str, str]], *, at_chance=("coins",)) -> Loaded:
    """`runs`: method/seed -> scores by task; tasks that are not given are as in the base."""
    rows, items = [], []
    roles = {task: ROLES[task] for task in base}
    for name, scores in runs.items():
        method, seed = name.split("/")
        cell = f"m/sums/{method}/{seed}"
        rows.append(
            {
                "cell": cell,
                "model": "m",
                "domain": "sums",
                "method": method,
                "seed": int(seed.removeprefix("seed")),
                "not_a_result": False,
                "scores_by_task": {t: {"role": role} for t, role in roles.items()},
                "at_chance": list(at_chance),
                "forgetting_by_task": {
                    t: 0.0 for t, role in roles.items() if role == "retention" and t not in at_chance
                },
            }
        )
        items.append(frame(base | scores).assign(cell=cell))
    text = pd.DataFrame([("general", 0, "x", 300.0, None, 100, -300.0)], columns=items[0].columns.drop("cell"))
    return Loaded(
        cells=pd.DataFrame(rows, index=[row["cell"] for row in rows]),
        curves=pd.DataFrame(),
        failures=pd.DataFrame(),
        items=pd.concat([*items, text.assign(cell=rows[0]["cell"])], ignore_index=True),
        base={"m": {"items": pd.concat([frame(base), text], ignore_index=True)}},
    )


BASE = {"sums": "1100", "poems": "11110000", "maps": "110", "coins": "10", "words": "10"}


def test_lost_gained_net_and_churn_by_hand():
    full = {"full/seed0": {"sums": "1111", "poems": "00111000", "maps": "011"}, "full/seed1": {"poems": "01111100"}}
    loaded = study(BASE, full | {"ewc/seed0": {"coins": "01"}})
    found = flips.by_task(flips.flips(loaded, model="m", domain="sums")).set_index(["task", "method"])
    columns = ["n", "right", "lost", "gained", "net", "churn"]
    assert found.loc[("poems", "full"), columns].to_list() == [8, 4, 1.5, 1.5, 0, 3]  # lost 2 and 1, gained 1 and 2
    assert found.loc[("maps", "full"), columns].to_list() == [3, 2, 0.5, 0.5, 0, 1]
    assert found.loc[("sums", "full"), columns].to_list() == [4, 2, 0, 1, 1, 1]
    assert found.loc[("coins", "ewc"), columns].to_list() == [2, 1, 1, 1, 0, 2]
    assert found["counts"].groupby("task").first().to_dict() == {
        "sums": False,
        "poems": True,
        "maps": True,
        "coins": False,
        "words": False,
    }
    assert "general" not in found.index.get_level_values("task")


def test_without_items_there_is_nothing():
    loaded = study(BASE, {"full/seed0": {}})
    bare = replace(loaded, base={})
    assert flips.flips(bare, model="m", domain="sums").empty and section.section(bare, model="m", domain="sums") is None
    assert (
        section.answers_lost_and_gained(bare, None, bare.cells) is None
        and section.lost_in_common(bare, None, bare.cells) is None
    )


def test_chance_is_that_of_all_independent_draws():
    right, lost = {"poems": 5, "maps": 4}, {"a": {"poems": 2, "maps": 1}, "b": {"poems": 3, "maps": 2}}
    base = {task: "1" * n for task, n in right.items()}

    def choose(who):
        return [list(combinations(range(right[task]), lost[who][task])) for task in right]

    shared = [
        sum(len(set(x) & set(y)) for x, y in zip(first, second))
        for first in product(*choose("a"))
        for second in product(*choose("b"))
    ]

    def run(who):  # the first of the draws
        return {task: "".join("0" if i < lost[who][task] else "1" for i in range(n)) for task, n in right.items()}

    found = flips.pairs(
        flips.flips(study({"sums": "1"} | base, {"a/seed0": run("a"), "b/seed0": run("b")}), model="m", domain="sums")
    )
    (row,) = found.to_dict("records")
    assert (row["lost_a"], row["lost_b"], row["both"], row["union"]) == (3, 5, 3, 5)
    assert row["expected"] == pytest.approx(np.mean(shared)) and row["variance"] == pytest.approx(np.var(shared))
    (joint,) = flips.overlap(found, ["a", "b"]).to_dict("records")
    assert joint["jaccard"] == pytest.approx(3 / 5) and joint["ratio"] == pytest.approx(3 / np.mean(shared))
    assert joint["by_chance"] == pytest.approx(np.mean(shared) / (8 - np.mean(shared)))
    assert joint["deviations"] == pytest.approx((3 - np.mean(shared)) / np.std(shared))


def guessing(draw, *, c: np.ndarray, known: float, forgotten: float, learned: float, anew: float):
    """The choices of base and tuned, of which 0 is right, and how many items guessing alone lost.

    The base knows a share `known`, of which the tuned model forgets some; of the others it learns some. Where both
    guess, a share `anew` of the items is guessed again.
    """
    n = len(c)
    knows = draw.random(n) < known
    still = np.where(knows, draw.random(n) >= forgotten, draw.random(n) < learned)
    guess, again = draw.integers(0, c), draw.integers(0, c)
    before = np.where(knows, 0, guess)
    unknown = ~knows & ~still
    after = np.where(still, 0, np.where(unknown & (draw.random(n) >= anew), guess, again))
    return before, after, int((unknown & (before == 0) & (after != 0)).sum())


@pytest.mark.parametrize("anew", (0.05, 0.5, 1.0))
@pytest.mark.parametrize("listed", (True, False))
def test_what_guessing_loses_is_seen_whatever_the_share_that_is_guessed_anew(anew, listed):
    """20,000 items a task of simulated knowledge: what is lost by guessing is found to a few per cent."""
    draw, n = np.random.default_rng([4, int(100 * anew)]), 20_000
    sizes = {"poems": draw.integers(3, 6, n) if listed else np.full(n, 4), "maps": np.full(n, 2)}
    loaded = study({"sums": "10", "poems": "1" * n, "maps": "1" * n}, {"a/seed0": {}})
    base, tuned, truth = loaded.base["m"]["items"].copy(), loaded.items.copy(), {}
    for task, c in sizes.items():
        before, after, truth[task] = guessing(draw, c=c, known=0.4, forgotten=0.1, learned=0.05, anew=anew)
        for items, choice in ((base, before), (tuned, after)):
            items.loc[items["task"] == task, "choice"] = choice
            items.loc[items["task"] == task, "score"] = (choice == 0) * 1.0
        if listed:
            base.loc[base["task"] == task, "choices"] = [";".join(["-1"] * k) for k in c]
        loaded.cells.iloc[0]["scores_by_task"][task]["chance"] = 0.5 if task == "maps" else 0.25
    whole = flips.flips(replace(loaded, items=tuned, base={"m": {"items": base}}), model="m", domain="sums")
    found = flips.by_task(whole).set_index("task")
    for task in sizes:
        assert found.at[task, "by_guess"] == pytest.approx(truth[task], rel=0.08 if anew > 0.1 else 0.16), task
        row = found.loc[task]
        assert row["lost_known"] == row["lost"] - row["by_guess"] and row["gained_known"] < row["gained"]
        assert row["gained_known"] - row["lost_known"] == pytest.approx(row["net"])
    assert flips.total(flips.by_task(whole)).loc["a", "by_guess"] == found.loc[list(sizes), "by_guess"].sum()


def test_guessing_loses_nothing_without_choices_and_is_unknown_without_three_of_them():
    def chance(loaded, **known):
        for task, value in known.items():
            loaded.cells.iloc[0]["scores_by_task"][task]["chance"] = value
        return flips.by_task(flips.flips(loaded, model="m", domain="sums")).set_index("task")

    runs = {"a/seed0": {"poems": "00111000", "maps": "011"}}
    found = chance(study(BASE, runs), poems=0.0, maps=0.5)
    assert found.at["poems", "by_guess"] == 0 and found.at["poems", "lost_known"] == found.at["poems", "lost"] == 2
    assert np.isnan(found.at["maps", "by_guess"]) and np.isnan(found.at["sums", "lost_known"])  # no chance is known
    assert found.at["maps", "lost"] == 1
    text = section.section(study(BASE, runs), model="m", domain="sums")
    assert text["rows"][0]["cells"][1] == ("–", "") and text["rows"][0]["cells"][0][0] == "3"


def test_an_answer_of_a_group_is_right_if_it_counts_at_all():
    """In a group that weighs its subtasks equally an item's score is its part in the mean, here 0.4 or 1.6."""
    loaded = study({"sums": "10", "poems": "1111"}, {"a/seed0": {"poems": "0111"}})
    loaded.cells.iloc[0]["scores_by_task"]["poems"]["subtasks"] = {"long": {"n": 2}, "short": {"n": 2}}
    parts = [0.4, 0.4, 1.6, 1.6]
    for items in (loaded.base["m"]["items"], loaded.items):
        own = items["task"] == "poems"
        items.loc[own, "score"] = items.loc[own, "score"] * parts
    found = flips.by_task(flips.flips(loaded, model="m", domain="sums")).set_index("task")
    assert found.loc["poems", ["n", "right", "lost", "gained"]].to_list() == [4, 4, 1, 0]


def test_pairs_look_only_at_what_the_base_had_right_in_tasks_that_count():
    runs = {
        "a/seed0": {"poems": "00111111", "coins": "00", "words": "00"},
        "b/seed0": {"poems": "00110000", "coins": "00", "words": "00"},
    }
    (row,) = flips.pairs(flips.flips(study(BASE, runs), model="m", domain="sums")).to_dict("records")
    assert (row["lost_a"], row["lost_b"], row["both"], row["expected"]) == (2, 2, 2, 1.0)


def test_seeds_are_added_up_by_method_and_compared_within_it():
    runs = {
        "a/seed0": {"poems": "01110000"},
        "b/seed0": {"poems": "01110000"},
        "a/seed1": {"poems": "10110000"},
        "b/seed1": {"poems": "10110000"},
    }
    found = flips.overlap(flips.pairs(flips.flips(study(BASE, runs), model="m", domain="sums")), ["a", "b"]).set_index(
        ["method_a", "method_b"]
    )
    assert found["pairs"].to_dict() == {("a", "b"): 4, ("a", "a"): 1, ("b", "b"): 1}
    assert found.loc[("a", "b"), "jaccard"] == pytest.approx(
        2 / 6
    )  # two of four pairs share their one item of one, two none of two
    assert found.loc[("a", "b"), "ratio"] == pytest.approx(2 / (4 * 1 / 4)) and found.loc[("a", "a"), "ratio"] == 0


def test_who_loses_nothing_has_no_ratio():
    found = flips.overlap(
        flips.pairs(flips.flips(study(BASE, {"a/seed0": {}, "b/seed0": {}}), model="m", domain="sums")), ["a", "b"]
    )
    assert found[["jaccard", "by_chance", "ratio", "deviations"]].isna().all(axis=None)
    loaded = study(BASE, {"a/seed0": {}})
    assert section.lost_in_common(loaded, None, loaded.cells) is None
    assert section.section(loaded, model="m", domain="sums")["sentences"] == []


def test_most_forgotten_are_lost_by_most():
    runs = {
        "a/seed0": {"poems": "00110000", "maps": "010"},
        "a/seed1": {"poems": "01110000"},
        "b/seed0": {"poems": "00111111", "coins": "00"},
    }
    items = flips.flips(study(BASE, runs), model="m", domain="sums")
    found = flips.most_forgotten(items)
    assert found[["task", "doc_hash", "lost_by", "of"]].values.tolist() == [
        ["poems", digest("poems 0"), 3, 3],
        ["poems", digest("poems 1"), 2, 3],
    ]
    assert found.at[0, "methods"] == ["a", "b"] and len(flips.most_forgotten(items, top=1)) == 1
    single = flips.flips(study(BASE, {"a/seed0": {"maps": "010"}}), model="m", domain="sums")
    assert flips.most_forgotten(single)["doc_hash"].to_list() == [digest("maps 0")]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    return load_cells(root, write_results(root, seeds=(0, 1)))


def test_section_shows_hashes_and_how_to_read_them(loaded):
    found = section.section(loaded, model="smollm2-135m", domain="science")
    assert (
        found["tasks"] == ["hellaswag", "piqa", "lambada_openai"]
        and found["seeds"] == 2
        and len(found["worst"]) == flips.LISTED
    )
    row = next(row for row in found["rows"] if row["method"] == "full")
    items = flips.flips(loaded, model="smollm2-135m", domain="science")
    own = items[(items["method"] == "full") & items["task"].isin(found["tasks"])]
    assert row["cells"][0][0] == f"{own['lost'].sum() / 2:.1f}" and row["cells"][5][1] == "of 600"
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader("analysis/sections"),
    )
    page = environment.get_template("flips.html.j2").render(flips=found)
    assert (
        found["worst"][0]["hash"] in page
        and "flips &#39;smollm2-135m/science/*&#39;" in page
        and "means over the seeds" in page
    )
    assert any("times as many lost answers" in sentence for sentence in found["sentences"])


def test_figures_show_the_numbers_and_come_out_equal(loaded, tmp_path):
    cells = loaded.of("smollm2-135m", "science")
    for draw in section.FIGURES:
        files = []
        for name in ("one", "two"):
            with style.house():
                figure, data, title, caption = draw(loaded, None, cells)
                texts = {text.get_text() for axes in figure.axes for text in axes.texts}
                style.save(figure, data, stem=tmp_path / name / draw.__name__, not_a_result=False)
            files.append(
                [
                    (tmp_path / name / draw.__name__).with_suffix(suffix).read_bytes()
                    for suffix in (".png", ".svg", ".csv")
                ]
            )
        assert files[0] == files[1] and title and caption
        shown = (
            data["lost"].map(lambda v: f"{v:.3g}")
            if "lost" in data
            else data["jaccard"].map(lambda v: f"{100 * v:.0f} %")
        )
        assert set(shown) <= texts
    assert set(zip(data["method_a"], data["method_b"])) >= {
        ("full", "full"),
        ("full", "lora"),
    }  # the diagonal: seeds of one method
    assert plt.get_fignums() == []
