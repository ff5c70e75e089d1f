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


def test_the_report_is_short_and_a_phone_shows_answer_and_figure_first(tmp_path):
    with Browser(tmp_path, width=1280) as page:
        page.open(REPORT.as_uri())
        page.run("document.querySelectorAll('details').forEach(part => part.open = true)")
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
