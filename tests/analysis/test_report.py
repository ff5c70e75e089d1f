import re
import xml.etree.ElementTree as ElementTree

import pandas as pd
import pytest

from analysis import numbers
from analysis.chosen import chosen
from analysis.compare import write_summary
from analysis.load import load_cells
from analysis.report.inline import inline
from analysis.sections.answer import sentences
from analysis.sections.tables import BANNER
from analysis.statistics.comparison import comparison
from tests.analysis.fixtures import METHODS, NOTE, steps_race, write_bench, write_results


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
    assert {"table.txt", "table.csv", "table.md", "tests.csv", "report.html", "figures"} == {
        path.name for path in (root / "summary").iterdir()
    }
    assert len(list((root / "summary/figures").iterdir())) == 24
    assert "hierarchical" in text and "<title>Five methods</title>" in page


def test_nothing_on_the_page_is_loaded_from_anywhere(summary):
    _, _, _, page = summary
    assert not re.search(r"https?://", page)
    assert not re.search(r"<(link|img|iframe)\b|<script [^>]|\bfetch\(|@import|url\((?!#)", page)
    for target in re.findall(r'href="([^"]*)"', page):
        assert target.startswith(("#", "figures/")) or target == "tests.csv", target


def test_links_and_ids_hold(summary):
    root, _, _, page = summary
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    for target in set(re.findall(r'href="#([^"]*)"', page)) | set(re.findall(r"url\(#([^)]*)\)", page)):
        assert target in ids, target
    for target in re.findall(r'href="(figures/[^"]*)"', page):
        assert (root / "summary" / target).exists()


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
    _, planned, _, page = summary
    assert NOTE in page and "At chance, cannot show loss:</strong> copa" in page
    assert "this run, not this method" in page and "No cell has finished" not in page
    assert "make repro" in page and "0123456789abcdef" in page and "shared-prefix" in page
    assert "has 1.500 nats per token there" in page and "train.learning_rate = 1: loss is NaN at step 3" in page
    assert "the setting with the least nats" in page and page.count('<td class="left">yes</td>') == len(METHODS)
    assert "Nothing: every planned cell has a result" in page and BANNER not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page and "width=device-width" in page


def test_the_answer_is_computed(summary):
    root, planned, _, page = summary
    table = comparison(load_cells(root, planned))
    methods = table[table["method"] != "base"]
    most = methods.loc[methods["forgetting"].idxmax()]
    assert (
        f"({most['method']})" in page
        and f"{numbers.points(most['forgetting'])} [{numbers.points(most['forgetting_low'])}" in page
    )
    assert "The methods did not learn equally much" in page
    said = re.search(r'<div class="answer">(.*?)</div>', page, re.S)[1]
    assert len(re.findall(r"<p>.*?</p>", said)) == 4 and len(re.findall(r"\.(?= [A-Z]|</p>)", said)) == 4
    worst = methods.loc[methods["general_nll_lost"].idxmax()]
    assert f"{numbers.nats(worst['general_nll_lost'])} [" in said.split("</p>")[1] and "nats per token" in said


def test_of_a_sweep_the_answer_and_the_tests_speak_of_the_chosen_setting(tmp_path):
    root = tmp_path / "results"
    planned = write_results(root, methods=("full", "ewc", "ewc-s1"))
    write_summary(results_root=root, summary_dir=root / "summary", cells=planned, title="t")
    loaded = load_cells(root, planned)
    picked = chosen(loaded, "ewc", model="smollm2-135m", domain="science")
    (other,) = {"ewc", "ewc-s1"} - {picked}
    page, tests = (root / "summary/report.html").read_text(), pd.read_csv(root / "summary/tests.csv")
    assert set(tests["a"]) | set(tests["b"]) == {"full", picked, "base"} and f"chosen on probe rows ({picked})" in page
    said = re.search(r'<div class="answer">(.*?)</div>', page, re.S)[1]
    assert not re.search(rf"\b{other}\b(?!-s)", said) and f"<td>{picked}</td>" not in said
    assert other in re.search(r"<h3>The comparison</h3>(.*?)</table>", page, re.S)[1]  # the table has all of them


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


def test_many_methods_are_counted_and_not_listed():
    names = ["full", "lora", "ewc", "mofo", "l2sp"]
    rows = pd.DataFrame(
        {
            "method": ["base", *names],
            "seeds": 1,
            "n_domain": 300,
            "n_retention": 700,
            "domain_score": [0.5, 0.6, 0.7, 0.8, 0.9, 0.95],
            "forgetting": [0, 0.01, 0.02, 0.03, 0.04, 0.05],
            "forgetting_low": [None, -0.01, -0.01, -0.01, -0.01, 0.01],
            "forgetting_high": [None, 0.03, 0.04, 0.05, 0.06, 0.09],
            "perplexity_ratio": [1.0, None, None, None, None, None],
            "seconds_train": [None, 10, 20, 30, 40, 50],
            "seconds_prepare": [None, 1, 2, 3, 4, 5],
            "bytes_stored": [None, 0, 0, 10, 0, 20],
        }
    )
    tests = pd.DataFrame(
        {"measure": "forgetting", "a": names, "b": "base", "difference": 0.03, "p_holm": [0.06, 0.2, 1, 1, 0.01]}
    )
    tests["descriptive"] = False
    gains = tests.assign(measure="domain_gain", p_holm=[0.2, 0.01, 0.01, 0.01, 0.01])
    learned, forgotten, cost = sentences(rows, pd.concat([tests, gains]), domain="sums", model="m", tasks=["a", "b"])
    assert "a gain of +10.0 to +45.0 points, not significantly different from zero for full" in learned
    assert (
        "significantly different from zero for l2sp alone" in forgotten
        and forgotten.count(".") == forgotten.count(".0") + 1
    )
    assert "preparation took 1.0 s (full) to 5.0 s (l2sp)" in cost and "10 B for ewc and 20 B for l2sp" in cost


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
        text = inline(path.read_text(), prefix="p", label='a "label"')
        ElementTree.fromstring(text)
        assert "var(--ink)" in text and "metadata" not in text and "&quot;label" in text
