"""A study of many methods: what the report leaves out, shortens and turns round."""

import warnings

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from analysis import style
from analysis.compare import write_summary
from analysis.sections.significance import PAIRS
from analysis.words import few
from tests.analysis.fixtures import METHODS, write_results


def test_a_sentence_names_few():
    assert few(["a", "b"]) == "a, b" and few("abcdef") == "a, b, c, d, e, f"
    assert few("abcdefg") == "a, b, c and 4 others"


@pytest.mark.parametrize("heights", [[0.5] * 12, [0.97] * 8 + [0.7] * 4, [0.0] * 6 + [0.05, 0.9] + [1.0] * 4])
def test_labels_of_a_full_column_do_not_overlap(heights):
    gap = 1 / len(heights)
    placed = sorted(style.spread(heights, gap))
    assert min(b - a for a, b in zip(placed, placed[1:])) >= gap - 1e-9
    assert placed[0] >= -1e-9 and placed[-1] <= 1 + 1e-9


def test_points_are_labelled_where_there_is_room():
    with style.house():
        figure, axes = style.new(3, 3)
        axes.set_xlim(-1, 11)
        axes.set_ylim(-1, 11)
        crowd = [(5 + 0.02 * k, 5, f"number {k}", style.INK) for k in range(40)]
        figure.draw_without_rendering()
        without = style.label_points(axes, [(1, 1, "alone", style.INK), *crowd], always=2)
        written = [text.get_text() for text in axes.texts]
        plt.close(figure)
    assert written[:2] == ["alone", "number 0"] and len(without) > 20
    assert {*written, *without} == {"alone", *(text for _, _, text, _ in crowd)} and len(written + without) == 41


def test_a_label_is_nearest_to_its_own_point_or_joined_to_it():
    points = [
        (4, 2.5, "lora", "C0"),
        (4.6, 2.4, "hierarchical", "C1"),
        (5.2, 3, "lora-warm", "C2"),
        (5.5, 1, "ewc", "C3"),
    ]
    with style.house():
        figure, axes = style.new(3.75, 3)
        axes.set(xlim=(3, 10), ylim=(0, 9))
        figure.draw_without_rendering()
        style.label_points(axes, points, size=8)
        figure.canvas.draw()
        pixels = {text: axes.transData.transform((x, y)) for x, y, text, _ in points}
        boxes = {note.get_text(): note.get_window_extent() for note in axes.texts}
        joined = {line.get_gid() for line in axes.lines}
        plt.close(figure)
    for text in pixels:
        nearest = min(pixels, key=lambda other: style.away(boxes[text], *pixels[other]))
        assert nearest == text or text in joined, text
    assert not any(boxes[a].overlaps(boxes[b]) for a in boxes for b in boxes if a < b)


def test_methods_of_one_colour_differ_in_shape():
    names = [f"method-{k}" for k in range(200)]
    assert len({(style.colour(name), style.marker(name)) for name in names}) > len(style.OTHERS)


@pytest.mark.thorough
def test_the_report_of_many_methods(tmp_path):
    methods = (*METHODS, *(f"method-{k}" for k in range(style.MANY - 3)))
    planned = write_results(tmp_path, methods=methods)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="constrained_layout not applied")
        write_summary(results_root=tmp_path, summary_dir=tmp_path / "summary", cells=planned, title="Many")
    page = (tmp_path / "summary/report.html").read_text()
    pairs = len(methods) * (len(methods) - 1) // 2
    assert pairs > PAIRS and f"The {PAIRS} of {pairs} pairs with the smallest p" in page
    tests = pd.read_csv(tmp_path / "summary/tests.csv")
    assert len(tests[tests["b"] != "base"].drop_duplicates(["a", "b"])) == pairs  # left out of the page alone
    shared = pd.read_csv(next((tmp_path / "summary/figures").glob("lost_in_common-*.csv")))
    assert len(shared) == pairs
    assert "<th>science<small>domain</small>" in page  # tasks are columns, because methods are more
