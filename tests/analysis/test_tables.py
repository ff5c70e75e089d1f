import io
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from analysis import numbers
from analysis.load import load_cells
from analysis.sections.tables import BANNER, as_csv, as_markdown, as_text, failure_lines
from analysis.statistics.comparison import comparison, mean_if_known
from tests.analysis.fixtures import METHODS, write_results


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_results(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(root):
    return load_cells(root, [f"smollm2-135m/science/{method}/seed0" for method in METHODS])


def test_numbers_are_those_of_the_metrics(root, loaded):
    table = comparison(loaded).set_index("method")
    assert list(table.index) == ["base", *METHODS]
    for method in METHODS:
        metrics = json.loads((root / f"runs/smollm2-135m/science/{method}/seed0/metrics.json").read_text())
        row = table.loc[method]
        for key in (
            "domain_score",
            "domain_gain",
            "forgetting",
            "seconds_prepare",
            "seconds_train",
            "bytes_weights_delta",
            "peak_memory_bytes",
            "general_bits_per_byte_lost",
            "gold_nll_lost",
        ):
            assert row[key] == metrics[key], key
        assert row["perplexity_ratio"] == metrics["general_perplexity"] / metrics["general_perplexity_base"]
        assert row["bytes_stored"] == metrics["bytes_importance"] + metrics["bytes_anchor"]
        assert (row["n_domain"], row["n_retention"]) == (300, 600)  # copa, 100 rows, is at chance and does not count


def test_intervals_by_hand_from_the_items(root, loaded):
    """full's forgetting and its interval from the items files, without the code under test."""
    base = pd.read_csv(root / "base/smollm2-135m/items.csv.gz")
    tuned = pd.read_csv(root / "runs/smollm2-135m/science/full/seed0/items.csv.gz")
    lost, parts = [], []
    for task in ("hellaswag", "piqa", "lambada_openai"):
        d = base[base.task == task].score.to_numpy() - tuned[tuned.task == task].score.to_numpy()
        lost.append(d.mean())
        parts.append(np.append(d, [1, -1]).var(ddof=1) / (len(d) + 2))  # two items more, one moved up and one down
    half = student.ppf(0.975, sum(parts) ** 2 / sum(v * v / 199 for v in parts)) * math.sqrt(sum(parts)) / 3
    row = comparison(loaded).set_index("method").loc["full"]
    assert row["forgetting"] == pytest.approx(sum(lost) / 3)
    assert row["forgetting_high"] - row["forgetting"] == pytest.approx(half, rel=1e-5)
    assert row["forgetting_low"] < row["forgetting"] < row["forgetting_high"]
    assert row["perplexity_ratio_low"] < row["perplexity_ratio"] < row["perplexity_ratio_high"]


def test_the_printed_table_says_what_the_numbers_are(loaded):
    table = comparison(loaded)
    text = as_text(loaded, table)
    full = table.set_index("method").loc["full"]
    for method in METHODS:
        assert any(line.startswith(method) for line in text.splitlines())
    assert numbers.points(full["forgetting"]) in text and "4 min 12 s" in text
    assert numbers.nats(full["general_nll_lost"]) in text and numbers.nats(full["gold_nll_lost"]) in text
    assert "this run, not this method" in text and BANNER not in text
    assert max(map(len, text.splitlines())) < 150
    assert as_markdown(loaded, table).count("\n| ") == 7  # head, base and five methods


def test_csv_round_trips_unrounded(loaded):
    table = comparison(loaded)
    back = pd.read_csv(io.StringIO(as_csv(loaded, table)))
    assert back["forgetting"].to_numpy() == pytest.approx(table["forgetting"].to_numpy(dtype=float), rel=1e-9)
    assert not back["not_a_result"].any()


def test_demo_is_marked_in_every_form(tmp_path):
    planned = write_results(tmp_path, methods=("full",), not_a_result=True)
    demo = load_cells(tmp_path, planned)
    table = comparison(demo)
    assert BANNER in as_text(demo, table) and BANNER in as_markdown(demo, table)
    assert pd.read_csv(io.StringIO(as_csv(demo, table)))["not_a_result"].all()


def test_failures_stand_in_every_form(tmp_path):
    planned = write_results(tmp_path, methods=("full", "mofo"), failed={"mofo": "loss is NaN at step 12"})
    some = load_cells(tmp_path, planned)
    table = comparison(some)
    for text in (as_text(some, table), as_markdown(some, table), as_csv(some, table)):
        assert "loss is NaN at step 12" in text


def test_no_cell_at_all(tmp_path):
    none = load_cells(tmp_path, ["m/d/full/seed0"])
    table = comparison(none)
    assert "No cell has finished" in as_text(none, table) and "m/d/full/seed0" in as_text(none, table)
    assert "not run" in as_csv(none, table)


def test_lines_of_the_answer_break_between_words_and_never_in_a_name(tmp_path):
    loaded = load_cells(tmp_path, write_results(tmp_path))
    name = "self-replay-wise-ft"
    lines = as_text(loaded, comparison(loaded), answer=[f"{name} " * 40]).splitlines()
    assert sum(line.split().count(name) for line in lines) == 40 and len(lines[0]) <= 140


def test_cells_that_nobody_has_begun_take_one_line(tmp_path):
    planned = write_results(
        tmp_path, methods=("full", "lora", "ewc"), seeds=(0, 1), failed={"ewc": "loss is NaN"}, missing=("lora",)
    )
    lines = failure_lines(load_cells(tmp_path, planned))
    model_domain = planned[0].rsplit("/", 2)[0]
    assert lines[-1] == f"{model_domain}: not run: 2 of its cells, by method and seed: lora 0, 1"
    assert [line.partition(": ")[0] for line in lines[:-1]] == [cell for cell in planned if "/ewc/" in cell]


def test_several_seeds_are_averaged_and_say_so(tmp_path):
    planned = write_results(tmp_path, methods=("full",), seeds=(0, 1))
    both = load_cells(tmp_path, planned)
    table = comparison(both)
    row = table.set_index("method").loc["full"]
    assert row["seeds"] == 2 and row["forgetting"] == pytest.approx(both.cells["forgetting"].mean())
    assert (
        row["forgetting_min"] == both.cells["forgetting"].min()
        and row["forgetting_max"] == both.cells["forgetting"].max()
    )
    assert "other seeds and other items" in as_text(both, table)


def test_unknown_cost_is_unknown_and_not_zero(tmp_path):
    planned = write_results(tmp_path, methods=("full",))
    path = tmp_path / "runs" / planned[0] / "metrics.json"
    metrics = (
        json.loads(path.read_text())
        | {"cost_known": False}
        | dict.fromkeys(("seconds_train", "seconds_prepare", "bytes_importance", "bytes_anchor", "peak_memory_bytes"))
    )
    path.write_text(json.dumps(metrics))
    given = load_cells(tmp_path, planned)
    text = as_text(given, comparison(given))
    assert "unknown" in text and "made elsewhere" in text


def test_a_batched_fisher_says_so(tmp_path):
    planned = write_results(tmp_path, methods=("ewc",))
    path = tmp_path / "runs" / planned[0] / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["parts"] = {"ewc": {"estimator": "batched"}}
    path.write_text(json.dumps(metrics))
    loaded = load_cells(tmp_path, planned)
    assert "batched Fisher" in as_text(loaded, comparison(loaded)) and "batched Fisher" in as_markdown(
        loaded, comparison(loaded)
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (999_600, "1.0 MB"),
        (269_060_552, "269 MB"),
        (None, "unknown"),
        (3.1e9, "3.1 GB"),
        (5e12, "5.0 TB"),
    ],
)
def test_sizes(value, text):
    assert numbers.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (1e-6, "0 s"),
        (0.0123, "12 ms"),
        (0.94, "940 ms"),
        (0.96, "1.0 s"),
        (4.25, "4.2 s"),
        (59.6, "1 min 00 s"),
        (252.3, "4 min 12 s"),
        (7260, "2 h 01 min"),
        (float("nan"), "unknown"),
    ],
)
def test_seconds(value, text):
    assert numbers.seconds(value) == text


def test_times_and_counts():
    assert [numbers.times(v) for v in (1.183, 24.66, 123.4, 0.0411, None)] == ["×1.18", "×24.7", "×123", "×0.041", "–"]
    assert [numbers.count(v) for v in (71528.6, 0.0, 1_234_567, None)] == ["71,500", "0", "1,230,000", "–"]


def test_points():
    assert [numbers.points(v) for v in (0.0312, -0.0312, 0.0, -0.0001, None)] == [
        "+3.1",
        "\N{MINUS SIGN}3.1",
        "0.0",
        "0.0",
        "–",
    ]


def test_a_checkpoint_made_elsewhere_goes_all_the_way(tmp_path):
    """No cost, no curve, no retention task above chance: every form is still made."""
    from analysis.compare import write_summary
    from experiments.commands.tracked_runs import run_of

    planned = write_results(tmp_path, methods=("full", "mine"))
    folder = tmp_path / "runs" / planned[1]
    metrics = json.loads((folder / "metrics.json").read_text())
    unknown = [key for key in metrics if key.startswith(("seconds_", "bytes_", "tokens_", "peak_"))] + [
        "forgetting",
        "general_score",
    ]
    metrics |= dict.fromkeys(unknown) | {
        "cost_known": False,
        "forgetting_by_task": {},
        "at_chance": ["hellaswag", "piqa", "lambada_openai", "copa"],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "curve.csv").write_text("step,tokens,seconds,loss\n")
    (folder / "train.json").write_text(json.dumps(json.loads((folder / "train.json").read_text()) | {"steps": 0}))
    text = write_summary(results_root=tmp_path, summary_dir=tmp_path / "summary", cells=planned, title="t")
    assert "mine*" in text and "unknown" in text
    assert "tasks above chance" in text and "forgetting" not in {
        key for key, *_ in run_of(load_cells(tmp_path, planned), planned[1]).metrics
    }
    (tmp_path / "runs" / planned[0] / "metrics.json").unlink()
    alone = write_summary(results_root=tmp_path, summary_dir=tmp_path / "summary", cells=planned[1:], title="t")
    assert "mine*" in alone and "cannot show forgetting" in (tmp_path / "summary/report.html").read_text()


def test_gains_of_seeds_that_cancel_make_nothing():
    assert repr(mean_if_known(pd.Series([0.63 - 0.6, 0.6 - 0.63, -1e-17]))) == "0.0"
