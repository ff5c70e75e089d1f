import json

import pandas as pd
import pytest

from analysis.load import load_cells
from analysis.sections import costs
from tests.analysis.fixtures import METHODS, steps_race, write_bench, write_results

# the fixtures' seconds and tokens: full trains 54,000 tokens in 252.3 s and 60 steps
EWC = {
    "seconds_prepare": 96.4,
    "tokens_prepare": 40_000,
    "seconds_train": 268.0,
    "seconds_evaluate": 190.0,
    "steps": 60,
    "bytes_importance": 538_060_000,
    "bytes_anchor": 269_030_000,
    "bytes_start": 0,
    "bytes_weights_delta": 269_060_552,
    "peak_memory_prepare_bytes": 2e9,
    "peak_memory_train_bytes": 3.1e9,
}


def of(root, planned):
    loaded = load_cells(root, planned)
    return loaded, costs.costs(loaded).set_index("method", drop=False)


def change(root, cell, file="metrics.json", **keys):
    path = (
        root
        / ("prepared" if file == "prepare.json" else "runs")
        / (cell.replace("/science", "") if file == "prepare.json" else cell)
        / file
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_numbers_by_hand(tmp_path):
    _, table = of(tmp_path, write_results(tmp_path))
    assert list(table.index) == list(METHODS)
    ewc = table.loc["ewc"]
    for key, value in EWC.items():
        assert ewc[key] == value, key
    assert ewc["reference"] == "full" and ewc["prepare_token_equivalents"] == pytest.approx(96.4 / (252.3 / 54_000))
    assert ewc["seconds_per_step"] == pytest.approx(268.0 / 60) and ewc["step_ratio"] == pytest.approx(268.0 / 252.3)
    assert table.at["full", "step_ratio"] == 1 and table.at["full", "prepare_token_equivalents"] == 0
    assert table["step_ratio_same_run"].isna().all()
    assert costs.seconds_row(ewc) == [
        ("ewc", ""),
        ("1 min 36 s", "timed once"),
        ("20,600", "40,000 seen"),
        ("4 min 28 s", "54,000 tokens"),
        ("4.47 s", ""),
        ("×1.06", ""),
        ("–", ""),
        ("3 min 10 s", ""),
    ]
    assert [text for text, _ in costs.bytes_row(ewc)] == [
        "ewc",
        "2.0 GB",
        "3.1 GB",
        "1.1 GB",
        "269 MB",
        "538 MB",
        "–",
        "269 MB",
    ]
    assert "not measured" in " ".join(costs.formula(table))


def test_the_ratio_of_the_same_run_is_the_median_of_the_rounds(tmp_path):
    planned = write_results(tmp_path, methods=("full", "ewc", "mofo"))
    write_bench(tmp_path, "steps", races=[steps_race()], drawn=False)
    write_bench(tmp_path, "other", races=[steps_race()], drawn=False)
    assert costs.same_run(load_cells(tmp_path, planned), model="another", method="ewc") is None
    _, table = of(tmp_path, planned)
    assert table.at["ewc", "step_ratio_same_run"] == pytest.approx(1.2) and pd.isna(
        table.at["mofo", "step_ratio_same_run"]
    )
    assert "(smollm2-135m, science: a step, 3 rounds)" in " ".join(costs.formula(table))
    assert costs.seconds_row(table.loc["ewc"])[6] == ("×1.20", "")
    table.at["ewc", "same_run_rounds"] = 1
    assert costs.seconds_row(table.loc["ewc"])[6] == ("×1.20", "one round")


def test_without_full_the_tokens_are_of_the_method_itself(tmp_path):
    _, table = of(tmp_path, write_results(tmp_path, methods=("ewc", "mofo")))
    assert table.at["ewc", "reference"] == "ewc" and table.at["ewc", "prepare_token_equivalents"] == pytest.approx(
        96.4 / (268.0 / 54_000)
    )
    assert table["step_ratio"].isna().all() and "of the method itself" in costs.formula(table)[0]


def test_seconds_of_another_machine_are_not_set_against_each_other(tmp_path):
    planned = write_results(tmp_path, methods=("full", "ewc"))
    change(tmp_path, planned[1], hardware={"cpu": "another", "cores": 64, "gpu": None})
    _, table = of(tmp_path, planned)
    assert table.at["ewc", "reference"] == "ewc" and pd.isna(table.at["ewc", "step_ratio"])
    assert "for ewc of the method itself" in costs.formula(table)[0]


def test_unknown_costs_stay_unknown_and_scoring_is_known(tmp_path):
    planned = write_results(tmp_path, methods=("full", "mine"))
    change(tmp_path, planned[1], cost_known=False, seconds_train=None, tokens_trained=None)
    _, table = of(tmp_path, planned)
    mine = table.loc["mine"]
    assert (
        mine[[key for key in costs.MEASURED if key != "seconds_evaluate"]].isna().all()
        and mine["seconds_evaluate"] == 190
    )
    assert [text for text, _ in costs.seconds_row(mine)] == [
        "mine",
        "unknown",
        "–",
        "unknown",
        "unknown",
        "–",
        "–",
        "3 min 10 s",
    ]
    assert {text for text, _ in costs.bytes_row(mine)[1:]} == {"unknown"}


def test_seeds_are_averaged_and_a_stored_preparation_says_so(tmp_path):
    planned = write_results(tmp_path, methods=("full", "ewc"), seeds=(0, 1))
    change(tmp_path, planned[3], seconds_prepare=196.4)
    change(tmp_path, planned[3], "prepare.json", seconds_prepare=196.4, bytes_start=100)
    _, table = of(tmp_path, planned)
    assert table.at["ewc", "seconds_prepare"] == pytest.approx(146.4) and table.at["ewc", "bytes_start"] == 50
    assert costs.seconds_row(table.loc["ewc"])[1][1] == "timed 2 times" and "store" not in costs.formula(table)[-1]


def test_a_preparation_from_the_store_counts_once(tmp_path):
    """Two seeds share one of 60 s, to which each adds its own work before its first step; the third took 90 s."""
    planned = write_results(tmp_path, methods=("full", "ewc"), seeds=(0, 1, 2))
    for cell, (stored, own) in zip(planned[3:], ((60.0, 60.1), (60.0, 60.3), (90.0, 90.0))):
        change(tmp_path, cell, seconds_prepare=own)
        change(tmp_path, cell, "prepare.json", seconds_prepare=stored, reused=own == 60.3)
    _, table = of(tmp_path, planned)
    assert table.at["ewc", "seconds_prepare"] == pytest.approx((60.2 + 90.0) / 2)
    assert costs.seconds_row(table.loc["ewc"])[1][1] == "timed 2 times, from the store"
    assert "From the store" in costs.formula(table)[-1] and table.at["ewc", "timings_train"] == 3


def test_markdown_holds_both_tables_or_nothing(tmp_path):
    loaded, _ = of(tmp_path, write_results(tmp_path, methods=("full", "ewc")))
    text = costs.as_markdown(loaded)
    assert "| ewc | 1 min 36 s (timed once) | 20,600 (40,000 seen) |" in text and text.count("\n| ewc |") == 2
    assert costs.as_markdown(load_cells(tmp_path, ["m/d/full/seed0"])) == ""


def test_what_parts_add_stands_beside_the_tokens_of_the_domain(tmp_path):
    planned = write_results(tmp_path, methods=("full", "ewc"))
    change(tmp_path, planned[1], tokens_added=13_500, flops=4e12, flops_added=9e11)
    _, table = of(tmp_path, planned)
    assert costs.seconds_row(table.loc["ewc"])[3][1] == "54,000 tokens, 13,500 added by parts, +22% FLOPs"
    change(tmp_path, planned[1], flops_added=None)
    assert costs.seconds_row(of(tmp_path, planned)[1].loc["ewc"])[3][1] == "54,000 tokens, 13,500 added by parts"


def test_a_training_that_methods_share_is_shown_as_one(tmp_path):
    planned = write_results(tmp_path, methods=("full", "ewc"))
    assert "Shared" not in costs.as_markdown(of(tmp_path, planned)[0])
    change(tmp_path, planned[1], training_reused=True)  # of one seed
    loaded, table = of(tmp_path, planned)
    assert [costs.seconds_row(table.loc[name])[3][1] for name in ("full", "ewc")] == [
        "54,000 tokens",
        "54,000 tokens, shared",
    ]
    assert costs.as_markdown(loaded).count("Shared: one training") == 1


def test_carried_state_counts_as_start_in_new_records_as_in_earlier_ones(tmp_path):
    planned = write_results(tmp_path, methods=("full", "ewc"))
    for record in ({"bytes_start": 30}, {"bytes_start": 20, "bytes_carry": 10}):
        change(tmp_path, planned[1], "prepare.json", **record)
        assert of(tmp_path, planned)[1].at["ewc", "bytes_start"] == 30


def test_what_each_part_adds(tmp_path):
    root, planned = tmp_path, write_results(tmp_path)
    prepared = {"ewc": {"tokens": 40_000, "flops": 3e12, "seconds": 96.4, "bytes": 538_060_000}}
    trained = {"ewc": {"tokens": 0, "flops": 0, "left_out": 0, "seconds": 2.5, "bytes": 0}, "kl": {"tokens": 500}}
    for path in (root / "runs").rglob("ewc/*/metrics.json"):
        added = {"prepare": prepared, "train": trained}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"added": added, "flops": 6e12}))
    table = costs.added(load_cells(root, planned))
    assert table[["method", "part"]].values.tolist() == [["ewc", "ewc"], ["ewc", "kl"]]
    texts = [text for text, _ in costs.part_row(table.iloc[0])]
    assert texts == ["ewc", "ewc", "40,000", "50.0%", "1 min 36 s", "538 MB", "–", "–", "2.5 s", "–"]
    assert [text for text, _ in costs.part_row(table.iloc[1])][6] == "500"
