import json
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from analysis import style
from analysis.load import load_cells
from analysis.report.figures import forgetting_over_training, write_figures
from analysis.statistics.comparison import comparison
from tests.analysis.fixtures import METHODS, coefficients, write_results

NAMES = [
    "overview",
    "overview_phone",
    "nats_lost_by_task",
    "forgetting_by_task",
    "forgetting_over_training",
    "answers_lost_and_gained",
    "lost_in_common",
    "layer_coefficients",
    "cost",
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    loaded = load_cells(root, write_results(root))
    table = comparison(loaded)
    return (
        root,
        loaded,
        table,
        {figure.name: figure for figure in write_figures(loaded, table, folder=root / "figures")},
    )


def csv(figure):
    return pd.read_csv(figure.stem.with_suffix(".csv"))


def test_every_figure_is_there_in_three_forms(drawn):
    _, _, _, figures = drawn
    assert list(figures) == NAMES
    for figure in figures.values():
        where = "" if figure.name.startswith("overview") else "-smollm2-135m-science"
        assert figure.stem.name == figure.name + where
        assert figure.stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in figure.stem.with_suffix(".svg").read_text()
        assert len(csv(figure)) and figure.caption


def test_csv_holds_what_was_drawn(drawn):
    root, loaded, table, figures = drawn
    rows = table.set_index("method")
    points = csv(figures["overview"]).set_index("method").loc[list(METHODS)]
    for key, name in (("gain", "domain_nll_gained"), ("lost", "general_nll_lost")):
        for end in ("", "_low", "_high"):
            assert points[key + end].to_list() == pytest.approx([rows.at[m, name + end] for m in METHODS])
    lost = csv(figures["nats_lost_by_task"])
    own = lost[(lost["method"] == "full") & ~lost["at_chance"]]
    assert own["nats_lost"].mean() == pytest.approx(rows.at["full", "gold_nll_lost"]) and len(own) == 3
    by_task = csv(figures["forgetting_by_task"])
    assert len(by_task) == 4 * len(METHODS) and set(by_task[by_task.at_chance]["task"]) == {"copa"}
    metrics = json.loads((root / "runs/smollm2-135m/science/ewc/seed0/metrics.json").read_text())
    copa = metrics["scores_by_task"]["copa"]
    assert by_task[(by_task.task == "copa") & (by_task.method == "ewc")]["forgetting"].item() == pytest.approx(
        100 * (copa["base"] - copa["value"])
    )
    for task, lost in metrics["forgetting_by_task"].items():
        assert by_task[(by_task.task == task) & (by_task.method == "ewc")]["forgetting"].item() == pytest.approx(
            100 * lost
        )
    cost = csv(figures["cost"]).set_index("method")
    assert cost.at["ewc", "bytes_importance"] + cost.at["ewc", "bytes_anchor"] == rows.at["ewc", "bytes_stored"]
    assert cost.at["ewc", "peak_memory_prepare_bytes"] == 2_000_000_000 and cost.at["full", "step_ratio"] == 1
    probes, curve = (
        csv(figures["forgetting_over_training"]),
        pd.read_csv(root / "runs/smollm2-135m/science/lora/seed0/curve.csv"),
    )
    asked = [f"probe_{task}_nll" for task in ("hellaswag", "piqa", "lambada_openai", "copa")]
    expected = curve.dropna(subset=["probe_general_nll"])
    own = probes[probes.method == "lora"]
    assert own["general_nats"].to_list() == pytest.approx(expected["probe_general_nll"].to_list())
    assert own["retention_nats"].to_list() == pytest.approx(expected[asked].mean(axis=1).to_list())
    layers = csv(figures["layer_coefficients"])
    assert dict(zip(layers["group"], layers["coefficient"])) == pytest.approx(coefficients())


def test_two_probes_are_no_curve(drawn):
    """A run that was probed at its start and its end alone has no figure of its course."""
    _, loaded, table, _ = drawn
    probed = loaded.curves.dropna(subset=["probe_general_nll"]).groupby("cell")
    ends = replace(loaded, curves=pd.concat([probed.head(1), probed.tail(1)]))
    cells = loaded.cells
    figure, *_ = forgetting_over_training(loaded, table, cells)
    plt.close(figure)
    assert forgetting_over_training(ends, table, cells) is None


def test_the_same_data_give_the_same_bytes(drawn, tmp_path):
    _, loaded, table, figures = drawn
    for again in write_figures(loaded, table, folder=tmp_path):
        for suffix in (".svg", ".png", ".csv"):
            assert (
                again.stem.with_suffix(suffix).read_bytes() == figures[again.name].stem.with_suffix(suffix).read_bytes()
            ), again.name + suffix


def test_a_demo_is_marked_in_every_figure(tmp_path):
    planned = write_results(tmp_path, methods=("full", "hierarchical"), not_a_result=True)
    loaded = load_cells(tmp_path, planned)
    for figure in write_figures(loaded, comparison(loaded), folder=tmp_path / "figures"):
        assert style.RED in figure.stem.with_suffix(".svg").read_text(), figure.name
        assert csv(figure)["not_a_result"].all()


def test_without_items_and_curves_the_rest_is_still_drawn(tmp_path):
    planned = write_results(tmp_path, methods=("full", "lora"))
    for cell in planned:
        (tmp_path / "runs" / cell / "items.csv.gz").unlink()
        (tmp_path / "runs" / cell / "curve.csv").unlink()
    loaded = load_cells(tmp_path, planned)
    assert [figure.name for figure in write_figures(loaded, comparison(loaded), folder=tmp_path / "figures")] == [
        "overview",
        "overview_phone",
        "forgetting_by_task",
        "cost",
    ]


def test_block_coefficients_with_groups_outside_the_layers(tmp_path):
    planned = write_results(tmp_path, methods=("hierarchical",))
    path = tmp_path / "runs" / planned[0] / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["parts_report"]["hierarchical"]["coefficients"] = {
        "model.embed_tokens": 0.5,
        "model.layers.0": 1.5,
        "model.layers.1": 1.0,
        "model.norm": 1.0,
    }
    path.write_text(json.dumps(metrics))
    loaded = load_cells(tmp_path, planned)
    figures = write_figures(loaded, comparison(loaded), folder=tmp_path / "figures")
    found = csv(next(figure for figure in figures if figure.name == "layer_coefficients"))
    assert found["coefficient"].to_list() == [0.5, 1.5, 1.0, 1.0]
    assert found["layer"].isna().tolist() == [True, False, False, True]


def test_colours_are_fixed_and_stand_out_on_both_pages():
    def light(shade):
        parts = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(
            w * (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4)
            for w, p in zip((0.2126, 0.7152, 0.0722), parts)
        )

    def contrast(a, b):
        return (max(light(a), light(b)) + 0.05) / (min(light(a), light(b)) + 0.05)

    assert style.colour("ewc") == style.FIXED["ewc"] and style.colour("ewc-lora") == style.colour("ewc-lora")
    for shade in (*style.FIXED.values(), *style.OTHERS):
        assert contrast(shade, "#ffffff") >= 3 and contrast(shade, "#15181c") >= 3, shade


def test_spread_keeps_order_and_distance():
    placed = style.spread([0.5, 0.52, 0.51, 0.9], 0.1)
    assert placed[0] < placed[2] < placed[1] < placed[3]
    assert min(b - a for a, b in zip(sorted(placed), sorted(placed)[1:])) >= 0.1 - 1e-9
    assert placed[3] == pytest.approx(0.9)
    assert max(style.spread([0.99, 1.0, 1.0], 0.1)) <= 1 and min(style.spread([0.0, 0.01], 0.1)) >= 0
