"""Forgetting in nats, by hand from the items: general text, right answers, the domain, and results without them."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from analysis import numbers
from analysis.compare import write_summary
from analysis.load import load_cells
from analysis.measures import GENERAL, GOLD, NATS
from analysis.sections.tables import as_markdown, as_text
from analysis.statistics.comparison import comparison
from analysis.statistics.nats import Changes
from analysis.statistics.tests import paired_tests as all_of
from tests.analysis.fixtures import with_a_text_domain, with_roles, without_nats, write_items, write_results

PAIR = {"model": "smollm2-135m", "domain": "science"}
CELL = "smollm2-135m/science/full/seed0"
KEPT = ("hellaswag", "piqa", "lambada_openai")


def items_of(root, cell=CELL):
    base = pd.read_csv(root / "base/smollm2-135m/items.csv.gz").set_index(["task", "doc_id"])
    return base, pd.read_csv(root / f"runs/{cell}/items.csv.gz").set_index(["task", "doc_id"])


def half_of(parts):
    """Half the 95 % interval of a mean of means, one array a task, by Satterthwaite's t."""
    each = np.array([part.var(ddof=1) / len(part) for part in parts])
    df = each.sum() ** 2 / sum(v**2 / (len(part) - 1) for v, part in zip(each, parts))
    return student.ppf(0.975, df) * np.sqrt(each.sum()) / len(parts)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_results(folder, methods=("full", "lora"))
    return folder


@pytest.fixture(scope="module")
def loaded(root):
    return load_cells(root, [CELL, CELL.replace("full", "lora")])


@pytest.fixture(scope="module")
def full(loaded):
    return comparison(loaded).set_index("method").loc["full"]


def test_general_text_by_hand(root, full):
    base, tuned = items_of(root)
    before, after = base.loc["general"], tuned.loc["general"]
    tokens = before["tokens"].to_numpy()
    for key, change in (
        ("general_nll_lost", (before["log_likelihood"] - after["log_likelihood"]).to_numpy()),
        ("general_kl", (after["kl"] * after["tokens"]).to_numpy()),
    ):
        ratio = change.sum() / tokens.sum()
        half = half_of([len(tokens) * (change - ratio * tokens) / tokens.sum()])
        assert full[key] == pytest.approx(ratio), key
        assert (full[f"{key}_low"], full[f"{key}_high"]) == pytest.approx((ratio - half, ratio + half)), key
    assert full["perplexity_ratio_high"] == pytest.approx(np.exp(full["general_nll_lost_high"]))


def test_right_answers_and_margins_by_hand(root, full):
    """The unweighted mean over the tasks above chance; lambada has no choices, and so no margin."""
    base, tuned = items_of(root)
    for key, column, tasks in (("gold_nll_lost", "log_likelihood", KEPT), ("margin_lost", "margin", KEPT[:2])):
        lost = [(base.loc[task, column] - tuned.loc[task, column]).to_numpy() for task in tasks]
        value, half = np.mean([one.mean() for one in lost]), half_of(lost)
        assert full[key] == pytest.approx(value), key
        assert (full[f"{key}_low"], full[f"{key}_high"]) == pytest.approx((value - half, value + half)), key


def test_the_domains_gain_in_nats_stands_beside_its_score(root, loaded, full):
    base, tuned = items_of(root)
    gained = (tuned.loc["science", "log_likelihood"] - base.loc["science", "log_likelihood"]).sum()
    assert full["domain_nll_gained"] == pytest.approx(gained / base.loc["science", "tokens"].sum())
    assert full["domain_nll_gained_low"] < full["domain_nll_gained"] < full["domain_nll_gained_high"]
    assert numbers.nats(full["domain_nll_gained"]) in as_markdown(loaded, comparison(loaded))


def test_forgetting_in_nats_comes_first(loaded):
    table = comparison(loaded)
    heads = [line for line in as_markdown(loaded, table).splitlines() if line.startswith("| method")][0]
    places = [heads.index(measure.head) for measure in NATS]
    assert places == sorted(places) and places[-1] < heads.index("forgetting, points")
    text = as_text(loaded, table)
    assert text.index("text lost, nats") < text.index("answers lost, nats") < text.index("forgetting, points")
    assert max(map(len, text.splitlines())) < 150


def test_a_change_that_is_not_known_of_every_item_is_not_known(root, loaded, tmp_path):
    changes = Changes(loaded, loaded.of(**PAIR))
    assert changes.tasks(GOLD, [CELL]) == list(KEPT)
    write_results(tmp_path, methods=("full",))
    path = tmp_path / f"runs/{CELL}/items.csv.gz"
    items = pd.read_csv(path)
    first = items.index[items["task"] == "piqa"][0]
    items.loc[first, "log_likelihood"] = -np.inf  # an answer that the model holds for impossible
    items = items.drop(items.index[items["task"] == "general"][0])
    write_items(path, items)
    some = load_cells(tmp_path, [CELL])
    changes = Changes(some, some.of(**PAIR))
    assert changes.tasks(GOLD, [CELL]) == ["hellaswag", "lambada_openai"] and changes.of(GENERAL, [CELL]) is None


def test_earlier_results_are_compared_as_before(root, loaded, tmp_path):
    """Their items know the nats of general text and of right answers; what they do not know is said and left out."""
    names = write_results(tmp_path / "results", methods=("full", "lora"))
    without_nats(tmp_path / "results")
    old, new = comparison(load_cells(tmp_path / "results", names)), comparison(loaded)
    same = ["domain_score", "domain_gain", "forgetting", "perplexity", "perplexity_ratio", "general_score"]
    same += ["general_nll_lost", "gold_nll_lost"]
    for key in same:
        for end in ("", "_low", "_high"):
            if f"{key}{end}" in new:
                assert old[f"{key}{end}"].tolist() == pytest.approx(new[f"{key}{end}"].tolist(), nan_ok=True), key
    methods = old["method"] != "base"
    assert old.loc[methods, ["general_kl", "margin_lost", "domain_nll_gained"]].isna().all(axis=None)
    earlier = load_cells(tmp_path / "results", names)
    text = as_text(earlier, old)
    assert "Not known of results that were scored before it was recorded: KL, margin lost." in text
    assert "KL" not in text.splitlines()[1]
    assert set(all_of(earlier, **PAIR)["measure"]) == {"general_nll_lost", "gold_nll_lost", "forgetting", "domain_gain"}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A domain of conversations whose own score is nats per token, with arc_easy as a second score."""
    root = tmp_path_factory.mktemp("chats") / "results"
    names = write_results(root, methods=("full", "lora"), seeds=(0, 1))
    with_a_text_domain(root)
    with_roles(root, arc_easy="score")
    return root, names


def test_a_domain_of_text_is_compared_per_token_and_told_in_nats_and_bits(chats):
    root, names = chats
    loaded = load_cells(root, names)
    row = comparison(loaded).set_index("method").loc["full"]
    gains = []
    for seed in (0, 1):
        base, tuned = items_of(root, CELL.replace("seed0", f"seed{seed}"))
        change = tuned.loc["science", "log_likelihood"] - base.loc["science", "log_likelihood"]
        gains.append(change.sum() / base.loc["science", "tokens"].sum())
    assert row["domain_gain"] == pytest.approx(np.mean(gains)) == row["domain_nll_gained"]
    assert row["domain_gain_low"] < row["domain_gain"] < row["domain_gain_high"] and row["unit"] == "nats"
    tests = all_of(loaded, **PAIR)
    gain = tests[(tests["measure"] == "domain_gain") & (tests["a"] == "full") & (tests["b"] == "base")].iloc[0]
    assert gain["difference"] == pytest.approx(np.mean(gains)) and gain["p"] < 0.01
    assert (gain["low"], gain["high"]) == pytest.approx((row["domain_gain_low"], row["domain_gain_high"]))
    text = as_text(loaded, comparison(loaded))
    head, line = text.splitlines()[1], next(line for line in text.splitlines() if line.startswith("full"))
    assert re.search("gain, nats/token .* nats/token", head)
    assert f"{row['domain_score']:.4g}" in line and f"{numbers.nats(row['domain_gain'])} [" in line
    assert "the gain of science in nats per token of its test rows" in text
    markdown = as_markdown(loaded, comparison(loaded))
    assert "bits/byte" in markdown and f"| {row['domain_bits_per_byte']:.3f} |" in markdown


def test_a_task_that_scores_the_domain_is_a_gain_beside_it(chats):
    root, names = chats
    loaded = load_cells(root, names)
    row = comparison(loaded).set_index("method").loc["full"]
    changes = []
    for seed in (0, 1):
        base, tuned = items_of(root, CELL.replace("seed0", f"seed{seed}"))
        changes.append((tuned.loc["arc_easy", "score"] - base.loc["arc_easy", "score"]).mean())
    assert row["gain_arc_easy"] == pytest.approx(np.mean(changes))
    assert row["gain_arc_easy_low"] < row["gain_arc_easy"] < row["gain_arc_easy_high"]
    text = as_text(loaded, comparison(loaded))
    assert "arc_easy: gain" in text and max(map(len, text.splitlines())) < 165
    low, high = (numbers.points(row[f"gain_arc_easy_{end}"]) for end in ("low", "high"))
    markdown = as_markdown(loaded, comparison(loaded))
    assert "arc_easy: gain, points" in markdown
    assert f"| {numbers.points(row['gain_arc_easy'])} [{low}, {high}] |" in markdown


def test_the_whole_report_of_a_domain_of_text(chats, tmp_path):
    root, names = chats
    for name in names:  # hellaswag as a group of two subtasks of equal weight
        path = root / f"runs/{name}/metrics.json"
        metrics = json.loads(path.read_text())
        metrics["scores_by_task"]["hellaswag"]["subtasks"] = {"films": {"n": 150}, "howtos": {"n": 50}}
        path.write_text(json.dumps(metrics))
    write_summary(results_root=root, summary_dir=tmp_path, cells=names, title="Conversations")
    page = (tmp_path / "report.html").read_text()
    assert "hellaswag (200 rows in 2 subtasks)" in page and "films 150, howtos 50" in page
    assert "arc_easy: gain" in page and "nats_per_token" not in page
    data = pd.read_csv(tmp_path / "figures/overview.csv").set_index("method")
    row = comparison(load_cells(root, names)).set_index("method").loc["full"]
    assert data.at["full", "gain"] == pytest.approx(row["domain_gain"])  # nats, not hundredths of them
