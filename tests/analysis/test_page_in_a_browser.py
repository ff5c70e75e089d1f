"""The committed report in a real browser: its length, and the first screen of a phone. Skipped without Chromium."""

import pytest

from experiments.study.paths import HERE
from tests.experiments.browser import NAMES, Browser, executable

pytestmark = pytest.mark.skipif(
    executable() is None,
    reason=f"no Chromium: none of {', '.join(NAMES)} is on PATH (Debian: apt-get install chromium)",
)

REPORT = HERE / "results" / "summary" / "report.html"
LONGEST = 19_300  # pixels at a width of 1280, a quarter of what the report had before it was one page
PHONE = {"width": 400, "height": 860, "deviceScaleFactor": 2, "mobile": True}
BOX = "(box => [box.left, box.right, box.top, box.bottom])(document.querySelector('%s').getBoundingClientRect())"
LETTERS = "[...document.querySelectorAll('#figure .on-phone svg use')].map(e => e.getBoundingClientRect().height)"

LINK = "document.querySelector('[id$=-costs]').id"  # behind the figures of its part
TOP = "document.querySelector('[id$=-costs]').getBoundingClientRect().top"


def test_the_report_is_short_and_a_phone_shows_answer_and_figure_first(tmp_path):
    with Browser(tmp_path, width=1280) as page:
        page.open(REPORT.as_uri())
        page.run("document.querySelectorAll('details').forEach(part => part.open = true)")
        page.wait("!document.querySelector('details.part noscript')")
        assert 2000 < page.run("document.documentElement.scrollHeight") <= LONGEST
        page._send("Emulation.setDeviceMetricsOverride", **PHONE)
        page.open(REPORT.as_uri())
        assert page.run("document.documentElement.scrollWidth") <= PHONE["width"]  # nothing to scroll sideways
        left, right, top, bottom = page.run(BOX % "#answer p")
        assert 0 <= left < right <= PHONE["width"] and 0 <= top < bottom <= PHONE["height"]
        left, right, top, bottom = page.run(BOX % "#figure .on-phone svg")
        assert right - left >= 0.85 * PHONE["width"] and bottom > top
        heights = sorted(page.run(LETTERS))
        assert heights[len(heights) // 2] >= 4  # half of them are small letters


def test_figures_of_a_part_are_drawn_when_it_is_opened_or_printed_and_without_scripts_at_once(tmp_path):
    drawn = "document.querySelectorAll('details.part figure svg').length"
    text = "document.querySelectorAll('details.part figure noscript').length"
    with Browser(tmp_path) as page:
        page.open(REPORT.as_uri())
        figures = page.run(text)
        assert figures > 5 and page.run(drawn) == 0 and page.run("document.querySelectorAll('#figure svg').length") == 2
        page.run("document.querySelector('details.part:has(noscript)').open = true")
        page.wait(f"{drawn} > 0")
        use = "[...document.querySelectorAll('details.part[open] figure use')]"
        assert page.run(f"{use}.length") > 100 and page.run(
            f"{use}.every(e => document.querySelector(e.getAttribute('href')))"
        )
        assert page.run(f"{use}.filter(e => e.getBoundingClientRect().height > 2).length") > 100
        page.open(REPORT.as_uri())
        page._send("Page.printToPDF")
        assert (page.run(text), page.run(drawn)) == (0, figures)
        page.open(f"{REPORT.as_uri()}#{page.run(LINK)}")
        assert page.run(drawn) > 0 and abs(page.run(TOP)) < 100
        page._send("Emulation.setScriptExecutionDisabled", value=True)
        page._send("Page.navigate", url="about:blank")
        page._send("Page.navigate", url=REPORT.as_uri())
        page.wait("document.readyState == 'complete'")
        assert page.run(drawn) == figures
