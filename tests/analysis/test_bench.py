import json
import re

import pytest

from analysis.compare import write_summary
from analysis.load import load_cells
from analysis.sections import bench
from experiments.bench.race import Goal, Race
from methods.errors import UserError
from tests.analysis.fixtures import steps_race, write_bench, write_results

SELECTION = Race(
    title="2 entries <&> more",
    against="own",
    seconds={"own": [0.001, 0.002], "library": [0.05, 0.02]},
    goals=(Goal(runner="library", limit=3), Goal(runner="own", limit=1)),
    facts={"entries": 2, "bytes_scratch": 1_500_000, "masks equal": True},
)
CLAIM = Race(
    title="importance",
    against="ours",
    seconds={"ours": [1.0], "ewc-lora": [24.0]},
    facts={
        "sentence": "We find 24 times, <not> 20.",
        "threads": 1,
        "bytes_stored by <us>": {"importance": 2000},
        "paper: times faster": 20.0,
        "times as long, EWC-LoRA by batch size": {"8": 24.0},
        "times as long, Fisher of the adapted matrices": 0.75,
    },
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("project") / "results"
    planned = write_results(root, methods=("full", "ewc"))
    write_bench(root, "selection", races=[SELECTION, SELECTION], text="Text <of> it.")
    write_bench(root, "steps", races=[steps_race()], drawn=False)
    write_bench(root, "headline", races=[CLAIM], drawn=False)
    write_summary(results_root=root, summary_dir=root / "summary", cells=planned, title="t")
    return (root / "summary/bench.html").read_text()


def test_a_race_is_on_the_page_with_its_ratios_and_its_goals(page):
    assert (
        "<td>library</td><td>20</td><td>35</td><td>×20.0</td><td>×30.0</td>" in page
    )  # 20/1 ms; median of 50/1 and 20/2
    assert 'at most 3 times: <span class="bad">missed</span>' in page and "at most 1 times: met" in page
    assert (
        "2 of 4 goals are met; missed:" in page
        and page.count("<li>library at most 3 times (2 entries &lt;&amp;&gt; more)</li>") == 2
    )
    assert (
        "<dt>entries</dt><dd>2</dd>" in page
        and "<dt>scratch</dt><dd>1.5 MB</dd>" in page
        and "<dt>masks equal</dt><dd>yes</dd>" in page
    )
    assert "Text &lt;of&gt; it." in page and "2030-01-02 03:00; cpu example CPU" in page and "load 0.4" in page


def test_the_claim_has_its_own_block(page):
    claim = page[page.index('id="claim"') : page.index('id="benchmarks"')]
    assert "We find 24 times, &lt;not&gt; 20." in claim and "threads" not in claim
    assert "<dt>threads</dt><dd>1</dd>" in page and "<dt>stored by &lt;us&gt;</dt><dd>importance: 2.0 kB</dd>" in page
    assert (
        "by batch size)</td><td>20</td><td>8: 24</td><td>0.75</td>" in claim
        and "storage of our importance" not in claim
    )
    assert page.count("We find 24 times") == 1 and "×24.0" in page


def test_figures_are_inlined_with_ids_and_links_of_their_own(page):
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and any(name.startswith("bench-selection-") for name in ids)
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)
    assert 'href="../bench/selection.png"' in page and 'href="../bench/headline.png"' not in page
    assert not re.search(r"https?://|<(link|img|iframe)\b|<script [^>]|\bfetch\(|@import|url\((?!#)", page)


def test_without_benchmarks_the_page_says_how_to_make_them(tmp_path):
    write_summary(results_root=tmp_path / "results", summary_dir=tmp_path / "out", cells=["m/d/full/seed0"], title="t")
    page = (tmp_path / "out/bench.html").read_text()
    assert "<code>python -m experiments bench</code> writes them" in page and 'id="claim"' not in page


def test_the_newest_of_each_name_counts_for_any_study(tmp_path):
    older, newer = (
        {"races": [SELECTION], "when": f"{year}-01-02T03:00:00+00:00", "drawn": False} for year in (2029, 2031)
    )
    write_bench(tmp_path / "results", "b", **older)
    write_bench(tmp_path / "results/demo", "b", **newer)
    write_bench(tmp_path / "results", "a", **newer)
    found = load_cells(tmp_path / "results/demo", ["m/d/full/seed0"]).bench
    assert list(found) == [tmp_path / "results/bench/a.json", tmp_path / "results/demo/bench/b.json"]


def drop(record):
    del record["races"][0]["rows"][0]["ratio_min"]


def rename(record):
    record["races"][0]["against"] = "nobody"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (drop, "KeyError: 'ratio_min'"),
        (rename, "'nobody' is not a runner"),
        (lambda record: record.update(races=[]), "it holds no race"),
        (lambda record: record.update(when=None), "when is not a text"),
        (lambda record: record["races"][0]["goals"][0].update(runner="x"), "the goal of 'x' has no runner"),
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path, spoil, reason):
    path = write_bench(tmp_path, "selection", races=[SELECTION], drawn=False)
    record = json.loads(path.read_text())
    spoil(record)
    path.write_text(json.dumps(record))
    with pytest.raises(
        UserError, match=rf"bench/selection\.json is not a benchmark's record \({reason}.*experiments bench selection"
    ):
        load_cells(tmp_path, ["m/d/full/seed0"])
    path.write_text("[1]")
    with pytest.raises(UserError, match="selection.json"):
        load_cells(tmp_path, ["m/d/full/seed0"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (None, "unknown"),
        (25_000_000, "25,000,000"),
        (0.00030712, "0.0003071"),
        (1234567.0, "1,234,567"),
        ([1, 0.5], "1, 0.5"),
        ({"bytes_importance": 2000, "share": 0.25}, "bytes_importance: 2.0 kB; share: 0.25"),
        ("<b>", "<b>"),
    ],
)
def test_facts_in_words(value, text):
    assert bench.as_text(value) == text


def test_a_claim_with_other_facts_shows_them_all():
    known = {
        "paper: share of the storage": [0.1, 0.15],
        "share of EWC-LoRA's entries": 0.0341,
        "share of the storage of a Fisher of the adapted matrices": "n/a",
    }
    record = {
        "title": "t",
        "races": [{"title": "r", "facts": {"sentence": "So.", "times": 3}}, {"title": "s", "facts": known}],
    }
    other, storage = bench.claim(record)["races"]
    assert (other["sentence"], other["rows"], other["facts"]) == ("So.", [], [("times", "3")])
    assert (
        storage["rows"]
        == [("storage of our importance in the same bits, share of theirs", "10 % to 15 %", "3.41 %", "n/a")]
        and storage["facts"] == []
    )
