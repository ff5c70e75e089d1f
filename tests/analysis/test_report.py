import re
import xml.etree.ElementTree as ElementTree

import pytest

from analysis import numbers
from analysis.compare import write_summary
from analysis.load import load_cells
from analysis.report.inline import Drawn, inline
from analysis.sections.tables import BANNER
from analysis.statistics.comparison import comparison
from methods.errors import UserError
from tests.analysis.fixtures import METHODS, NOTE, steps_race, write_bench, write_results

PAGES = ("report.html", "details.html", "bench.html")


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    root = tmp_path_factory.mktemp("project") / "results"
    planned = write_results(root)
    text = write_summary(
        results_root=root, summary_dir=root / "summary", cells=planned, title="Five methods", planned=planned
    )
    return root, planned, text, (root / "summary/report.html").read_text()


def test_all_files_are_there(summary):
    root, _, text, page = summary
    assert {"table.txt", "table.csv", "table.md", "tests.csv", "figures", *PAGES} == {
        path.name for path in (root / "summary").iterdir()
    }
    assert {path.suffix for path in (root / "summary/figures").iterdir()} == {".png", ".svg", ".csv"}
    assert "hierarchical" in text and "<title>Five methods</title>" in page


@pytest.mark.parametrize("name", PAGES)
def test_nothing_on_a_page_is_loaded_and_its_links_and_ids_hold(summary, name):
    folder = summary[0] / "summary"
    page = (folder / name).read_text()
    assert not re.search(r"https?://", page)
    assert not re.search(r"<(link|img|iframe)\b|<script [^>]|\bfetch\(|@import|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)
    for target in set(re.findall(r'href="([^"]*)"', page)):
        file, _, place = target.partition("#")
        there = ids if not file else re.findall(r'\bid="([^"]*)"', (folder / file).read_text()) if place else ()
        assert (folder / file).exists() and (not place or place in there), target


def test_every_methods_numbers_are_on_the_page(summary):
    root, planned, _, page = summary
    table = comparison(load_cells(root, planned)).set_index("method")
    for method in METHODS:
        row = table.loc[method]
        for text in (
            numbers.percent(row["domain_score"]),
            numbers.points(row["domain_gain"]),
            numbers.points(row["forgetting"]),
            f"×{row['perplexity_ratio']:.2f}",
            numbers.seconds(row["seconds_train"]),
        ):
            assert text in page, (method, text)


def test_the_page_says_what_a_sceptic_asks(summary):
    root, planned, _, page = summary
    details = (root / "summary/details.html").read_text()
    assert NOTE in page and "At chance, cannot show loss:</strong> copa" in page
    assert "the scored items of this run, not another run" in page and "No cell has finished" not in page
    assert "make repro" in page and "0123456789abcdef" in details and "shared-prefix" in page
    assert "has 1.500 nats per token there" in details and "train.learning_rate = 1: loss is NaN at step 3" in details
    assert "the setting with the least nats" in details and details.count('<td class="left">yes</td>') == len(METHODS)
    assert "Nothing: every planned cell has a result" in page and BANNER not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page and "width=device-width" in page


def test_the_page_begins_with_three_sentences_a_figure_and_one_table(summary):
    _, _, _, page = summary
    first = re.search(r"<h1>.*?<div class=\"answer\"[^>]*>(.*?)</div>\s*<figure.*?</figure>", page, re.S)
    assert first and len(re.findall("<p>.*?</p>", first[1])) == 3
    assert "recommend" not in page
    top = re.search(r'id="comparison".*?(<thead>.*?)</table>', page, re.S)[1]
    assert len(re.findall("<th>", top.partition("</thead>")[0])) <= 10
    behind = page.index('<details class="part"')
    assert page.index('id="contents"') < behind < page.index("Which differences are significant")


def test_commands_on_the_page_name_the_study(tmp_path):
    planned = write_results(tmp_path / "birds")
    write_bench(tmp_path / "birds", "steps", races=[steps_race()])
    write_summary(results_root=tmp_path / "birds", summary_dir=tmp_path / "out", cells=planned, title="t")
    page = (tmp_path / "out/report.html").read_text()
    for command in (
        "compare --study birds",
        "tune --study birds",
        f"export {planned[0]} DIR --study birds",
        "*&#39; --study birds",
        "bench steps",
    ):
        assert command in page, command


def test_a_demo_is_marked_and_failures_are_named(tmp_path):
    planned = write_results(
        tmp_path / "demo", not_a_result=True, failed={"mofo": "loss is NaN <at> step 12"}, missing=("ewc",)
    )
    write_summary(results_root=tmp_path / "demo", summary_dir=tmp_path / "out", cells=planned, title="Demo")
    page = (tmp_path / "out/report.html").read_text()
    assert f'role="alert">{BANNER}' in page and "NOT A RESULT" in (tmp_path / "out/table.md").read_text()
    assert "loss is NaN &lt;at&gt; step 12" in page and "has not been run" in page and "3 of 5 planned" in page
    assert "make study NAME=demo" in page


def test_planned_cells_without_a_result_are_named_although_not_compared(tmp_path):
    planned = write_results(tmp_path, methods=("full", "lora"), missing=("lora",))
    write_summary(
        results_root=tmp_path, summary_dir=tmp_path / "summary", cells=planned[:1], title="t", planned=planned
    )
    assert planned[1] in (tmp_path / "summary/report.html").read_text()


def test_nothing_finished_still_makes_a_page_and_old_figures_go(tmp_path):
    old = tmp_path / "summary/figures/old.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"")
    write_summary(results_root=tmp_path, summary_dir=tmp_path / "summary", cells=["m/d/full/seed0"], title="t")
    assert "No cell has finished" in (tmp_path / "summary/report.html").read_text() and not old.exists()


def test_the_same_results_give_the_same_page(summary, tmp_path):
    root, planned, _, page = summary
    write_summary(results_root=root, summary_dir=tmp_path, cells=planned, title="Five methods", planned=planned)
    assert (tmp_path / "report.html").read_text() == page


def test_inline_svg_is_well_formed_and_follows_the_page(summary):
    root, _, _, _ = summary
    for path in (root / "summary/figures").glob("*.svg"):
        text = inline(path.read_text(), prefix="p", label='a "label"', drawn=Drawn())
        ElementTree.fromstring(text)
        assert "var(--ink)" in text and "metadata" not in text and "&quot;label" in text


def test_a_glyph_is_defined_once_for_all_figures_and_outside_of_them():
    letters = '<path id="I" d="M 0 10 z" transform="scale(0.5)"/><path id="space" transform="scale(0.5)"/>'
    text = '<g><use href="#{0}"/><use href="#{1}" x="6.5"/><use href="#{0}" x="10"/></g>'
    svg = f'<svg width="1pt" height="1pt"><defs>{letters}</defs>{text.format("I", "space")}</svg>'
    drawn = Drawn()
    both = [inline(svg, prefix=f"f{number}", label="l", drawn=drawn) for number in range(2)]
    assert both == [f'<svg role="img" aria-label="l" >{text.format("f0-0", "f0-1")}</svg>'] * 2
    defined = re.findall('<path id="(f[^"]*)"', drawn.definitions())
    assert defined == ["f0-0", "f0-1"] and ElementTree.fromstring(drawn.definitions()) is not None


@pytest.mark.parametrize(
    "active",
    [
        "<script>alert(1)</script>",
        '<g onload="alert(1)"/>',
        "<foreignObject><body/></foreignObject>",
        '<use href="https://example.org/a.svg#x"/>',
        '<a href="javascript:alert(1)"><g/></a>',
        '<image href="https://example.org/seen.png"/>',
        "<style>@import url(https://example.org/a.css);</style>",
        '<g style="fill: url(https://example.org/a)"/>',
        "<![CDATA[<script>alert(1)</script>]]>",
        "<g>",
        "<title><img src=x onerror=alert(1)></title>",
        """<use href="#a"/><path id="a" style='x/>'/>""",
        """<use href="#b"/><path id="b" d="' onclick=alert(1) x='"/>""",
        '<use href="#c"/><path id="c" d="&#62;&#60;script&#62;"/>',
    ],
)
def test_a_figure_that_someone_else_drew_brings_nothing_active_into_the_page(active):
    with pytest.raises(UserError, match="the SVG file of the figure 'drawn' holds .* delete it"):
        inline(
            f'<?xml version="1.0"?><svg width="1pt" height="1pt">{active}</svg>',
            prefix="p",
            label="drawn",
            drawn=Drawn(),
        )
