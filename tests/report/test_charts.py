"""Charts: what is drawn, the data behind it, and names that could be markup."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from trainer.report.charts import MOST_POINTS, Chart, Point, Series, dot_chart, line_chart, precise, share_chart, short

EVIL = '"><script>alert(1)</script>'


def drawn(chart: Chart | None) -> ElementTree.Element:
    """Return the parsed drawing."""
    assert chart is not None
    return ElementTree.fromstring(chart.svg)


def test_a_line_goes_through_its_points() -> None:
    chart = line_chart("Loss", "rows", "loss", [Series.of("a", [0, 50, 100], [1.0, None, 0.0])])
    path = drawn(chart).find("path")
    assert path is not None
    (x1, y1), (x2, y2) = re.findall(r"[ML]([\d.]+) ([\d.]+)", path.attrib["d"])
    assert float(x1) < float(x2) and float(y1) < float(y2), "a smaller value lies lower, so its y is larger"
    assert chart is not None and chart.legend == []
    assert (chart.header, chart.rows) == (["rows", "a"], [["0", "1"], ["50", "–"], ["100", "0"]])
    assert drawn(chart).attrib["aria-label"] == "Loss: 1 to 0"


def test_everything_that_is_drawn_is_inside() -> None:
    series = [Series(str(n), range(5), [Point(10.0**n * x, 0, 2e7) for x in range(5)]) for n in range(9)]
    for chart in (
        line_chart("t", "x", "y", series, names="abcde"),
        line_chart("t", "x", "y", series),
        dot_chart("t", "x", [*"abcde"], series),
        line_chart("t", "x", "y", series, logarithmic=True, diagonal=True),
    ):
        root = drawn(chart)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for element in root:
            for key, value in element.attrib.items():
                if key in ("x", "x1", "x2", "cx"):
                    assert 0 <= float(value) <= width
                elif key in ("y", "y1", "y2", "cy"):
                    assert 0 <= float(value) <= height
        assert chart is not None and len({(entry.colour, entry.dashes) for entry in chart.legend}) == 9


def test_a_long_line_is_thinned_and_keeps_its_end() -> None:
    chart = line_chart("t", "x", "y", [Series.of("a", range(10_001), [float(x) for x in range(10_001)])])
    assert chart is not None and MOST_POINTS / 2 < len(chart.rows) <= MOST_POINTS and chart.rows[-1][0] == "10,000"


@pytest.mark.parametrize("values", [[], [None], [float("nan")], [float("inf")]])
def test_without_a_point_there_is_no_chart(values: list[float | None]) -> None:
    series = [Series.of("a", range(len(values)), values)]
    assert line_chart("t", "x", "y", series) is None and dot_chart("t", "x", ["a"], series) is None
    assert share_chart("t", [("a", 0.0)]) is None and line_chart("t", "x", "y", []) is None
    assert line_chart("t", "x", "y", [Series.of("a", [0], [0.0])], logarithmic=True) is None


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-9, 1e12])
def test_a_single_value_can_be_drawn(value: float) -> None:
    assert drawn(line_chart("t", "x", "y", [Series.of("a", [0], [value])])).find("circle") is not None
    assert drawn(dot_chart("t", "x", ["a"], [Series.of("a", [0], [value])])).find("circle") is not None


def test_names_are_texts_and_no_markup() -> None:
    series = [Series.of(EVIL, [0], [0.5]), Series.of("b", [0], [0.5])]
    for chart in (
        line_chart(EVIL, EVIL, EVIL, series, names=[EVIL]),
        dot_chart(EVIL, EVIL, [EVIL], series),
        share_chart(EVIL, [(EVIL, 1.0)]),
    ):
        assert chart is not None and "<script" not in chart.svg
        assert EVIL in drawn(chart).attrib["aria-label"]


def test_numbers_are_short_on_axes_and_exact_in_tables() -> None:
    values = (0, 0.25, 0.0001, 1500, 44_000, 1.2e6, 0.0002)
    assert [short(value) for value in values] == ["0", "0.25", "1e-4", "1.5k", "44k", "1.2M", "2e-4"]
    exact = [precise(value) for value in (0.0, 0.25, 0.00012345, 1500.25, 44_000, None, float("nan"))]
    assert exact == ["0", "0.2500", "0.000123", "1,500.2", "44,000", "–", "–"]


def test_shares_are_parts_of_the_whole() -> None:
    chart = share_chart("Time", [("data", 1.0), ("network", 3.0)])
    widths = [float(rect.attrib["width"]) for rect in drawn(chart).findall("rect")]
    assert widths[1] == pytest.approx(3 * widths[0])
    assert chart is not None and chart.rows == [["data", "25.0 %"], ["network", "75.0 %"]]
