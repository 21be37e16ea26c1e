"""Charts: where points, bands and names stand, read back from the SVG; looks that differ without colour."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from folklora.stream.charts import Line, growth_chart, line_chart, look_of, point_chart, row_chart, tasks_axis
from folklora.stream.plots import bytes_text
from folklora.stream.scales import Axis, log_ticks, spread_out, ticks

PLACE = re.compile(r"translate\(([-\d.]+) ([-\d.]+)\)")


def parts(svg: str, kind: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg) if element.get("class") == kind]


def dots(svg: str) -> dict[str, tuple[float, float]]:
    """Where the marks that carry a tooltip are, by its text."""
    found = (e for e in parts(svg, "dot") if len(e))
    return {e[0].text: tuple(map(float, PLACE.search(e.get("transform")).groups())) for e in found}


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    """The room that each name takes, by the width of six units a letter."""
    found = []
    for e in parts(svg, "name"):
        x, y = float(e.get("x")), float(e.get("y"))
        found.append((x, y - 9, x + 6 * len(e.text), y + 2))
    return found


def meet(one: tuple, other: tuple) -> bool:
    return min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])


def test_looks_differ_in_mark_or_dashes_where_the_colour_is_the_same() -> None:
    looks = [look_of(i) for i in range(49)]
    assert len({(colour, mark) for colour, mark, _ in looks}) == 49
    # told apart without colour: in the first 21 no two have the same mark and dashes
    assert len({(mark, dashes) for _, mark, dashes in looks[:21]}) == 21


def test_a_band_is_one_deviation_to_either_side() -> None:
    line = Line("replay", 0, [(1, 80.0), (2, 60.0), (3, 99.0)], [5.0, 10.0, 4.0])
    svg = line_chart([line], "x", tasks_axis(3), Axis("accuracy (%)", 100))
    (band,) = parts(svg, "band")
    corners = [tuple(map(float, pair.split())) for pair in band.get("d")[1:-1].split("L")]
    places = dots(svg)
    at = [
        places[f"replay at {x}: {y} ± {s}"] for x, y, s in ((1, "80.0", "5.0"), (2, "60.0", "10.0"), (3, "99.0", "4.0"))
    ]
    unit = (at[1][1] - at[0][1]) / 20
    expected = [(at[0][0], at[0][1] - 5 * unit), (at[1][0], at[1][1] - 10 * unit), (at[2][0], at[2][1] - unit)]
    expected += [(at[2][0], at[2][1] + 4 * unit), (at[1][0], at[1][1] + 10 * unit), (at[0][0], at[0][1] + 5 * unit)]
    # two places are rounded to a tenth each, and the band ends with the axis
    np.testing.assert_allclose(corners, expected, atol=0.15)
    assert not parts(line_chart([Line("a", 0, [(1, 5.0)], [None])], "x", tasks_axis(1), Axis("y", 10)), "band")


def test_names_at_the_ends_of_lines_keep_apart() -> None:
    lines = [Line(f"method {i}", i, [(1, 50.0), (2, 70.0 + 0.1 * i)]) for i in range(12)]
    lines += [Line("joint", 12, [(1, None), (2, 20.0)]), Line("never tested", 13, [(1, None), (2, None)])]
    svg = line_chart(lines, "x", tasks_axis(2), Axis("accuracy (%)", 100), size=(560, 310), names=True)
    named = boxes(svg)
    assert len(named) == 13
    assert not any(meet(a, b) for i, a in enumerate(named) for b in named[:i])
    assert all(box[2] <= 560 and box[1] >= 0 and box[3] <= 310 for box in named)


def test_the_names_of_points_meet_neither_each_other_nor_marks() -> None:
    generator = np.random.default_rng(0)
    lines = [
        Line(f"some method {i}", i, [(float(10 ** generator.uniform(4, 7)), float(generator.uniform(40, 90)))], [2.0])
        for i in range(14)
    ]
    # three that lie on one another
    lines += [Line(f"twin {i}", 14 + i, [(1e5, 60.0)], [None]) for i in range(3)]
    svg = point_chart(lines, "x", Axis("stored bytes", 2e7, 5e3, log=True, text=bytes_text), Axis("y", 100, 30))
    named = boxes(svg)
    assert len(named) == 17
    assert not any(meet(a, b) for i, a in enumerate(named) for b in named[:i])
    marks = [(x - 3, y - 3, x + 3, y + 3) for x, y in dots(svg).values()]
    assert not any(meet(name, mark) for name in named for mark in marks)
    assert len(parts(svg, "whisker")) == 14
    numbers = point_chart(lines, "x", Axis("stored numbers", 1e7, 5e3, log=True, text="{:,.0f}".format), Axis("y", 100))
    words = [e for e in ElementTree.fromstring(numbers) if e.tag.endswith("text") and "," in e.text]
    assert all(float(e.get("x")) + 3 * len(e.text) <= 560 for e in words), "the last value is not cut off"
    assert words[-1].text == "10,000,000"


def test_rows_of_a_task_stand_in_its_group() -> None:
    lines = [Line("a", 0, [(0, 10.0), (1, -5.0)], [2.0, None]), Line("b", 1, [(0, None), (1, 0.0)])]
    lines += [Line("nothing", 2, [(0, None), (1, None)])]
    svg = row_chart(lines, "x", ["first", "a task with a name that is long"], Axis("forgetting (points)", 12, -6))
    places = dots(svg)
    long = "a task with a name that is long"
    assert set(places) == {"a, first: 10.0 ± 2.0", f"a, {long}: -5.0", f"b, {long}: 0.0"}
    (zero,) = parts(svg, "zero")
    middle = float(zero.get("d")[1:].split()[0])
    assert places[f"b, {long}: 0.0"][0] == pytest.approx(middle, abs=0.06)
    assert places[f"a, {long}: -5.0"][0] < middle < places["a, first: 10.0 ± 2.0"][0]
    assert places["a, first: 10.0 ± 2.0"][1] < places[f"a, {long}: -5.0"][1] < places[f"b, {long}: 0.0"][1]
    (whisker,) = parts(svg, "whisker")
    ends = [tuple(map(float, pair.split())) for pair in whisker.get("d")[1:].split("L")]
    unit = (places["a, first: 10.0 ± 2.0"][0] - middle) / 10
    assert ends[1][0] - ends[0][0] == pytest.approx(4 * unit, abs=0.2)
    assert {e.text for e in parts(svg, "name")} == {"first", long[:23] + "…"}


def test_growth_has_no_place_for_nothing() -> None:
    assert growth_chart([Line("a", 0, [(1, None), (2, 0)])], 2) == ""
    svg = growth_chart([Line("a", 0, [(1, 0), (2, 1e6)]), Line("b", 1, [(1, 1e3), (2, 1e3)])], 2)
    assert set(dots(svg)) == {"a at 2: 1 MB", "b at 1: 1 kB", "b at 2: 1 kB"}
    level = [y for title, (_, y) in dots(svg).items() if title.startswith("b")]
    assert level[0] == level[1]


@pytest.mark.parametrize(("low", "high"), [(900, 1100), (1e3, 1e4), (5e4, 8e6), (3, 3e9)])
def test_log_ticks_are_round_and_few(low: float, high: float) -> None:
    found = log_ticks(low, high)
    assert 1 <= len(found) <= 10
    assert all(low <= value <= high and f"{value:e}"[0] in "125" for value in found)


def test_ticks_of_a_range_that_does_not_begin_at_0() -> None:
    assert ticks(90.0, low=38.0) == [40, 50, 60, 70, 80, 90]
    assert ticks(5.2, low=0.8, whole=True) == [1, 2, 3, 4, 5]
    assert ticks(1.2, low=0.8, whole=True) == [1]


def test_spread_out_moves_only_what_is_too_near() -> None:
    assert spread_out([0.0, 50.0, 100.0], 10, 0, 100) == [0.0, 50.0, 100.0]
    np.testing.assert_allclose(spread_out([48.0, 50.0, 52.0, 90.0], 10, 0, 100), [40, 50, 60, 90])
    found = spread_out([99.0, 99.0, 100.0], 10, 0, 100)
    np.testing.assert_allclose(found, [80, 90, 100])
    # more than there is room for: as far apart as it goes
    np.testing.assert_allclose(spread_out([5.0] * 5, 10, 0, 20), [0, 5, 10, 15, 20])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (812, "812 B"), (999.6, "1 kB"), (37_640, "37.6 kB"), (999_600, "1 MB"), (1_126_000, "1.13 MB"),
     (123_400_000, "123 MB"), (-2_000, "−2 kB"), (5e12, "5000 GB")],
)  # fmt: skip
def test_bytes_in_words(count: float, text: str) -> None:
    assert bytes_text(count) == text
