"""Drift in the report: what cells' drift.json say, as table, figures and section."""

import copy
from dataclasses import replace

import jinja2
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from analysis import numbers, style
from analysis.load import load_cells
from analysis.sections import drift
from tests.analysis.fixtures import write_results

KINDS = {"q_proj": 40, "down_proj": 60, "norm": 2}
REFERENCE = {"method": "ewc", "part": "ewc", "entries": 1000, "mean": 0.01}


def measures(*, distance, base_norm, rank=None, overlap=None):
    return {
        "entries": 50,
        "matrices": int(rank is not None),
        "distance": distance,
        "base_norm": base_norm,
        "relative": distance / base_norm,
        "changed": 0.5 if distance else 0.0,
        "effective_rank": rank,
        "overlap": overlap,
        "overlap_within": overlap and overlap / 2,
        "top_share": overlap and overlap / 10,
    }


def record(*, scale, moved=tuple(KINDS), overlap=None, reference=REFERENCE):
    """A drift.json of three blocks, an embedding and a norm; block k moves by scale·(k + 1) in each kind that moved."""
    groups = [
        {"group": "embedding", "kind": "embed_tokens"}
        | measures(distance=scale if len(moved) == 3 else 0.0, base_norm=50.0, overlap=overlap)
    ]
    for block in range(3):
        for kind, norm in KINDS.items():
            distance = scale * (block + 1) if kind in moved else 0.0
            rank = 10.0 + block if distance and kind != "norm" else None
            groups.append(
                {"group": f"block.{block}", "kind": kind}
                | measures(distance=distance, base_norm=float(norm), rank=rank, overlap=overlap)
            )
    groups.append(
        {"group": "final_norm", "kind": "norm"}
        | measures(distance=scale if len(moved) == 3 else 0.0, base_norm=1.0, overlap=overlap)
    )
    distance = float(np.sqrt(sum(g["distance"] ** 2 for g in groups)))
    return {
        "reference": reference,
        "groups": groups,
        "rank_skipped": [],
        "rank_limit": 4096,
        "top": 0.1,
        "overall": measures(distance=distance, base_norm=100.0, rank=11.0 if distance else None, overlap=overlap),
    }


@pytest.fixture
def loaded(tmp_path):
    planned = write_results(tmp_path, methods=("full", "lora", "ewc"), seeds=(0, 1))
    records = {
        "full": [record(scale=0.1, overlap=1.5), record(scale=0.3, overlap=1.7)],
        "lora": [record(scale=0.4, moved=("q_proj",), overlap=1.02), record(scale=0.4, moved=("q_proj",), overlap=1.0)],
        "ewc": [record(scale=0.1, overlap=0.5)],  # its second seed has none
    }
    found = {
        f"smollm2-135m/science/{m}/seed{seed}": r for m, several in records.items() for seed, r in enumerate(several)
    }
    return replace(load_cells(tmp_path, planned), drift=found)


def cells(loaded):
    return loaded.of("smollm2-135m", "science")


def test_table_is_the_mean_over_seeds(loaded):
    found = drift.table(loaded, cells(loaded)).set_index("method")
    assert found["seeds"].to_dict() == {"full": 2, "lora": 2, "ewc": 1}
    one, two = (loaded.drift[f"smollm2-135m/science/full/seed{s}"]["overall"]["distance"] for s in (0, 1))
    assert found.at["full", "distance"] == pytest.approx((one + two) / 2) and found.at[
        "full", "overlap"
    ] == pytest.approx(1.6)
    assert found.at["ewc", "overlap"] == 0.5


def test_layers_add_up_their_kinds(loaded):
    with style.house():
        figure, data, title, caption = drift.movement_by_layer(loaded, None, cells(loaded))
    data = data.set_index(["method", "group"])
    for block in range(3):
        moved = 0.2 * (block + 1) * np.sqrt(3)  # the mean of both seeds in each of three kinds
        assert data.at[("full", f"block.{block}"), "relative"] == pytest.approx(
            100 * moved / np.sqrt(40**2 + 60**2 + 2**2)
        )
    assert data.at[("lora", "embedding"), "relative"] == 0 and data.at[
        ("full", "final_norm"), "relative"
    ] == pytest.approx(20)
    axes = figure.axes[0]
    lines = {line.get_color(): line for line in axes.lines if len(line.get_xdata()) == 3}
    assert lines[style.colour("lora")].get_ydata().tolist() == pytest.approx(
        [data.at[("lora", f"block.{b}"), "relative"] for b in range(3)]
    )
    assert {text.get_text() for text in axes.texts} == {"full", "lora", "ewc"} and "logarithmic" in caption
    plt.close(figure)


def test_kinds_have_a_panel_each_and_leave_out_who_did_not_move_them(loaded):
    with style.house():
        figure, data, _, _ = drift.movement_by_kind(loaded, None, cells(loaded))
    panels = {
        axes.get_title(loc="left"): {text.get_text() for text in axes.texts}
        for axes in figure.axes
        if axes.get_title(loc="left")
    }
    assert panels == {"q_proj": {"full", "lora", "ewc"}, "down_proj": {"full", "ewc"}, "norm": {"full", "ewc"}}
    row = data[(data.method == "full") & (data.kind == "down_proj") & (data.layer == 2)].iloc[0]
    assert row["relative"] == pytest.approx(100 * 0.6 / 60) and row["effective_rank"] == 12
    plt.close(figure)


def test_section_says_who_avoided_important_weights(loaded):
    found = drift.section(loaded, model="smollm2-135m", domain="science")
    assert "ewc (×0.50) moved the weights that general text depends on less than chance would." in found["sentences"]
    assert "full (×1.60) moved them more than chance would." in found["sentences"]
    assert "lora (×1.01) moved them as if importance did not matter." in found["sentences"]
    assert found["sentences"][0].startswith("lora moved the weights farthest, by 1.50 % of their norm, ewc least")
    assert found["missing"] == ["smollm2-135m/science/ewc/seed1"]
    page = rendered(found)
    assert (
        "smollm2-135m/science/ewc/seed1" in page
        and "×0.50" in page
        and "5.0 % in the top 10 %" in page
        and "means over the seeds" in page
    )


def test_overlaps_with_importance_of_different_settings_are_named(loaded):
    assert "different settings" not in str(drift.section(loaded, model="smollm2-135m", domain="science")["notes"])
    found = {cell: copy.deepcopy(kept) for cell, kept in loaded.drift.items()}
    for name, kept in zip("ab", found.values()):
        kept["reference"]["settings_sha256"] = name
    notes = drift.section(replace(loaded, drift=found), model="smollm2-135m", domain="science")["notes"]
    assert any(note.startswith("Importance was prepared with different settings") for note in notes)


def test_without_importance_ranks_or_records(loaded):
    plain = record(scale=0.2, reference=None) | {"rank_skipped": ["a", "b"]}
    one = replace(loaded, drift={"smollm2-135m/science/full/seed0": plain})
    found = drift.section(one, model="smollm2-135m", domain="science")
    assert len(found["rows"]) == 1 and found["rows"][0]["cells"][4] == ("–", "")
    text = " ".join(found["notes"])
    assert "not compared" in text and "2 matrices whose smaller side exceeds 4,096" in text and "Overlap is" not in text
    assert rendered(found)
    still = record(scale=0.0, reference=None)
    one = replace(loaded, drift={"smollm2-135m/science/full/seed0": still})
    assert drift.section(one, model="smollm2-135m", domain="science")["sentences"] == ["No method moved any weight."]
    assert (
        drift.movement_by_layer(one, None, cells(one)) is None and drift.movement_by_kind(one, None, cells(one)) is None
    )
    none = replace(loaded, drift={})
    assert drift.section(none, model="smollm2-135m", domain="science") is None
    assert drift.movement_by_layer(none, None, cells(none)) is None and drift.table(none, cells(none)).empty


def rendered(found):
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader("analysis/sections"),
    )
    return environment.get_template("drift.html.j2").render(drift=found)


def test_by_group_numbers_blocks_and_nothing_else(loaded):
    found = drift.by_group(loaded, cells(loaded))
    assert (
        found[found["group"] == "block.2"]["layer"].eq(2).all()
        and found[found["group"] == "embedding"]["layer"].isna().all()
    )
    assert isinstance(found, pd.DataFrame) and len(found) == 3 * (3 * len(KINDS) + 2)


@pytest.mark.parametrize(
    ("share", "text"), [(1.951, "195"), (0.1, "10.0"), (0.00012345, "0.0123"), (0.0, "0"), (None, "–")]
)
def test_a_share_in_percent_has_three_digits(share, text):
    assert numbers.fine_percent(share) == text
