"""All pages in a real browser: no request, no error, nothing beyond the window, enough contrast in both schemes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.chromium import Tab, browser_tab, find_chromium
from tests.report.stored_runs import JOBS, write_ranker
from trainer.console.outputs import Output
from trainer.report.run_report import write_report

CHROMIUM = find_chromium()

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt-get install chromium)")

LEAST_CONTRAST = 4.5
"""Contrast that WCAG 2.1, level AA, asks of a text."""

CONTRASTS = """
(() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const part = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const below = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = numbers(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest(".inside")) continue;
    const style = getComputedStyle(element);
    const color = numbers(element instanceof SVGElement ? style.fill : style.color);
    const [one, other] = [light(color), light(below(element))].sort((a, b) => b - a);
    found.push([(one + 0.05) / (other + 0.05), element.tagName + ": " + element.textContent.trim()]);
  }
  for (const text of document.querySelectorAll("text.inside")) {
    const bar = getComputedStyle(text.previousElementSibling).fill;
    const [one, other] = [light(numbers(getComputedStyle(text).fill)), light(numbers(bar))].sort((a, b) => b - a);
    found.push([(one + 0.05) / (other + 0.05), "bar: " + text.textContent]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()
"""

OUTSIDE = """
[...document.body.querySelectorAll("*")].filter((element) => {
  const box = element.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5) && !element.closest(".scroll, pre");
}).map((element) => element.outerHTML.slice(0, 100))
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return kind of page -> file."""
    root = tmp_path_factory.mktemp("runs")
    # A name without a space is the hardest to fit.
    ranker = write_ranker(root / ("long_" * 20), name="long_name_" * 9)
    other = write_ranker(root / "other", 0.5, dropout=0.5)
    runs = {"ranker": ranker, **{kind: write(root / kind) for kind, write in JOBS.items()}}
    found = {}
    for kind, run in runs.items():
        found[kind] = root / f"{kind}.html"
        write_report(run, Output.of(found[kind]))
    found["two runs"] = root / "two.html"
    write_report(ranker, Output.of(found["two runs"]), [other], ranker)
    return found


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    assert CHROMIUM is not None
    with browser_tab(CHROMIUM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["ranker", "two runs", *JOBS])
def test_the_page_fits_and_can_be_read(pages: dict[str, Path], tab: Tab, kind: str, width: int, scheme: str) -> None:
    page = pages[kind]
    tab.open(page, width, scheme)
    assert tab.value("innerWidth") == width
    tab.value("document.querySelectorAll('details').forEach((element) => { element.open = true; })")
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value(OUTSIDE) == []
    figures = tab.value("document.querySelectorAll('figure').length")
    assert figures == 11 or kind != "ranker"
    charts = "[...document.querySelectorAll('figure svg[role=img]')]"
    assert tab.value(f"{charts}.length") == figures
    assert tab.value(f"{charts}.every((chart) => chart.getAttribute('aria-label').includes(':'))") is True
    assert tab.value("[...document.querySelectorAll('figure tbody')].every((body) => body.rows.length > 0)") is True
    lowest, where = tab.value(CONTRASTS)[0]
    assert lowest >= LEAST_CONTRAST, where
    dark = tab.value("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    requests = [
        event["params"]["request"]["url"] for event in tab.events if event.get("method") == "Network.requestWillBeSent"
    ]
    assert requests == [page.as_uri()]
    kinds = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
    assert [event for event in tab.events if event.get("method") in kinds] == []
    assert tab.screenshot().startswith(b"\x89PNG")
