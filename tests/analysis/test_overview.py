"""The first page's figure and table."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pytest

from analysis import style
from analysis.also import beside
from analysis.load import load_cells
from analysis.roles import Roles
from analysis.sections import overview
from analysis.statistics.comparison import comparison
from tests.analysis.fixtures import write_results


@pytest.fixture(scope="module")
def track(tmp_path_factory):
    """Two methods at two settings and two seeds; a screen with one seed, of one at other settings, and of another."""
    root = tmp_path_factory.mktemp("track")
    cells = write_results(root / "own", methods=("full", "full-s1", "ewc", "ewc-s1", "lora"), seeds=(0, 1))
    screen = write_results(root / "screen", methods=("ewc", "ewc-s2", "mofo", "mofo-s1"))
    loaded = load_cells(root / "own", cells)
    loaded = replace(loaded, roles=Roles(leaders=("ewc",)), also=beside(loaded, {"screen": (root / "screen", screen)}))
    return loaded, comparison(loaded), overview.also(loaded)


def test_the_table_has_at_most_ten_columns_and_mutes_what_is_not_tested(track):
    loaded, table, there = track
    heads, (group, *rows) = overview.table(loaded, table, there.assign(tokens_prepare=12_977))
    assert len(heads) <= 10 and group == {"title": "smollm2-135m on science"}
    names = [row["name"] for row in rows]
    assert names[:5] == ["full", "full-s1", "ewc", "ewc-s1", "lora"] and len(names) == 6  # mofo at its chosen setting
    assert rows[2]["note"] == "+40,000 tokens" and rows[5]["class"] == "aside"
    assert rows[5]["note"] == "screen, +12,977 tokens, 1 seed"
    assert {len(row["cells"]) for row in rows} == {len(heads) - 1}
    muted = [row["class"] == "aside" for row in rows[:4]]
    assert muted[0] != muted[1] and muted[2] != muted[3]  # of a method with two settings the one that was not chosen


def test_a_method_with_fewer_seeds_than_others_says_so(track):
    loaded, _, _ = track
    less = loaded.without([cell for cell in loaded.cells.index if cell.endswith(("/ewc/seed1", "/lora/seed1"))])
    _, (_, *rows) = overview.table(less, comparison(less), comparison(less)[:0])
    notes = {row["name"]: row["note"] for row in rows}
    assert notes == {"full": "", "full-s1": "", "ewc": "+40,000 tokens, 1 seed", "ewc-s1": "", "lora": "1 seed"}


def test_points_of_other_studies_stand_apart_and_keep_their_numbers(track):
    loaded, table, there = track
    data = overview.points(loaded, table, there)
    assert data.groupby("study").size().to_dict() == {"": 5, "screen": 4}
    own = data[data["study"] == ""].set_index("method")
    for row in table[table["method"] != "base"].itertuples():
        assert (own.at[row.method, "gain"], own.at[row.method, "lost"]) == (row.domain_nll_gained, row.general_nll_lost)


@pytest.mark.parametrize("phone", [False, True])
def test_leaders_and_plain_fine_tuning_are_named_and_the_rest_is_grey(track, phone):
    loaded, table, there = track
    with style.house():
        figure, data, _, caption = overview.figure(loaded, overview.points(loaded, table, there), phone=phone)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["full", "ewc"] and "screen" in caption
    grey = [line for line in axes.lines if line.get_color() == style.FAINT]
    assert sorted(len(line.get_xdata()) for line in grey) == [1, 2, 2]  # lora, the screen's ewc, and its mofo
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    named = data[(data["study"] == "") & data["family"].isin(["full", "ewc"])]
    assert named["gain"].between(left, right).all() and named["lost"].between(bottom, top).all()
    assert right - left < 2 * (data["gain"].max() - data["gain"].min())  # the axes are cut to the data
    plt.close(figure)


def test_bars_wider_than_their_axis_are_left_out_and_the_caption_says_how_wide(track):
    loaded, table, there = track
    data = overview.points(loaded, table, there)
    for reach, drawn in ((0.001, True), (5.0, False)):
        near = data.assign(gain_low=data["gain"] - reach, gain_high=data["gain"] + reach)
        with style.house():
            figure, _, _, caption = overview.figure(loaded, near)
        (axes,) = figure.axes
        left, right = axes.get_xlim()
        level = [tuple(line.get_xdata()) for line in axes.lines if line.get_alpha() == 0.35 and _is_level(line)]
        assert bool(level) is drawn and all(left <= low <= high <= right for low, high in level)
        assert ("of up to 10 nats per token (gain)" in caption) is not drawn
        plt.close(figure)


def _is_level(line):
    return line.get_ydata()[0] == line.get_ydata()[1]
