"""Charts as inline SVG: lines over tasks, a row a task, and points with their names; told apart without colour too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from folklora.stream.plots import COLOURS, bytes_text, escape, plain
from folklora.stream.scales import Axis, spread_out

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")
_MARKER_PATHS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
    "M-3 -3h6v6h-6z",
    "M0 -4L3.7 3H-3.7z",
    "M0 -4L4 0L0 4L-4 0z",
    "M0 4L3.7 -3H-3.7z",
    "M-1.3 -4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
    "M-3.5 -3.5L-1.5 -3.5L0 -1.5L1.5 -3.5L3.5 -3.5L1.2 0L3.5 3.5L1.5 3.5L0 1.5L-1.5 3.5L-3.5 3.5L-1.2 0z",
)
SMALL, WIDE = (340, 215), (560, 310)
_LEFT, _RIGHT, _TOP, _FLOOR = 44, 12, 24, 40
# of the style's text, which is 11 units high
_LETTER, _LINE = 6.0, 12
_ROW, _GAP, _LONGEST = 9, 10, 24
# from the end of a line to the name that stands there
_END = 26


@dataclass(frozen=True)
class Line:
    """One method in a chart: its name, its place in the order of looks, and its points (None is a gap).

    Args:
        name: The method's.
        look: Which colour, mark and dashes it has.
        points: What is drawn.
        spread: The standard deviation of each point's y; none where they are left out.
    """

    name: str
    look: int
    points: Sequence[tuple[float, float | None]]
    spread: Sequence[float | None] = ()

    def deviation(self, index: int) -> float:
        """The spread of one point; 0 where there is none."""
        return (self.spread[index] if self.spread else None) or 0.0


class _Picture:
    """An SVG with two axes; places are in its own units."""

    def __init__(
        self, label: str, x: Axis, y: Axis, size: tuple[int, int], left: float = _LEFT, right: float = _RIGHT
    ) -> None:
        self.width, self.height = size
        self.x, self.y, self.left = x, y, left
        self.right, self.floor = self.width - right, self.height - _FLOOR
        self.parts = [f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}">']

    def across(self, value: float) -> float:
        return self.left + self.x.share(value) * (self.right - self.left)

    def up(self, value: float) -> float:
        return self.floor - self.y.share(value) * (self.floor - _TOP)

    def text(self, x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> None:
        named = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def draw_x(self, grid: bool = False) -> None:
        for value in self.x.ticks():
            place = self.across(value)
            if grid:
                self.parts.append(f'<path class="axis" d="M{place:.1f} {_TOP}V{self.floor}"/>')
            text = self.x.text(value)
            self.text(min(place, self.width - _LETTER * len(text) / 2), self.floor + 15, text)
        self.text((self.left + self.right) / 2, self.floor + 32, self.x.title)

    def draw_y(self) -> None:
        for value in self.y.ticks():
            place = self.up(value)
            self.parts.append(f'<path class="axis" d="M{self.left} {place:.1f}H{self.right}"/>')
            self.text(self.left - 6, place + 4, self.y.text(value), "end")
        self.text(2, 11, self.y.title, "start")

    def dot(self, x: float, y: float, look: int, title: str = "") -> None:
        self.parts.append(_dot(x, y, look, title))

    def whisker(self, start: tuple[float, float], end: tuple[float, float], look: int) -> None:
        (x, y), (to_x, to_y) = start, end
        self.parts.append(f'<path class="whisker" style="{_colour(look)}" d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}"/>')

    def done(self) -> str:
        return "".join(self.parts) + "</svg>"


def legend(names: Sequence[str]) -> str:
    """The colours and marks of the lines, for all the charts of a section."""
    items = [
        f'<li><svg viewBox="0 0 30 12" aria-hidden="true"><path class="{_line_class(i)}" style="{_colour(i)}" '
        f'd="M1 6H29"/>{_dot(15, 6, i)}</svg>{escape(name)}</li>'
        for i, name in enumerate(names)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def line_chart(
    lines: Sequence[Line],
    label: str,
    x: Axis,
    y: Axis,
    *,
    size: tuple[int, int] = SMALL,
    dots: bool = True,
    names: bool = False,
    shade_to: float = 0.0,
    marks: Sequence[float] = (),
) -> str:
    """Lines, each in a band of one standard deviation to either side where it has a spread.

    Args:
        lines: What to draw; a gap (None) interrupts a line, a lone point is a mark alone.
        label: The chart in words, for those who cannot see it.
        x: The horizontal axis.
        y: The vertical axis.
        size: Width and height.
        dots: Whether each point carries its method's mark (with its value as tooltip).
        names: Whether each method's name stands at the end of its line.
        shade_to: The part before this x is shaded.
        marks: Where dashed vertical lines stand.
    """
    lines = [line for line in lines if any(value is not None for _, value in line.points)]
    room = _END + _LETTER * max((len(short(line.name)) for line in lines), default=0) if names else 0
    picture = _Picture(label, x, y, size, right=room + _RIGHT)
    if shade_to > x.low:
        width, height = picture.across(shade_to) - picture.left, picture.floor - _TOP
        picture.parts.append(
            f'<rect class="shade" x="{picture.left}" y="{_TOP}" width="{width:.1f}" height="{height}"/>'
        )
    picture.draw_y()
    picture.parts += [f'<path class="mark" d="M{picture.across(v):.1f} {_TOP}V{picture.floor}"/>' for v in marks]
    picture.draw_x()
    picture.parts += [_band(picture, line) for line in lines if any(line.spread)]
    for line in lines:
        placed = [(picture.across(a), None if b is None else picture.up(b)) for a, b in line.points]
        style = f'class="{_line_class(line.look)}" style="{_colour(line.look)}"'
        picture.parts.append(f'<path {style} d="{_path(placed)}"/>')
        for i, ((a, b), (across, up)) in enumerate(zip(line.points, placed, strict=True)):
            if dots and up is not None:
                picture.dot(across, up, line.look, f"{line.name} at {a:g}: {_value(y, b, line.deviation(i))}")
    if names:
        _name_ends(picture, lines)
    return picture.done()


def growth_chart(lines: Sequence[Line], count: int) -> str:
    """Stored bytes after each of `count` tasks; nothing where none is known.

    Args:
        lines: For each method, (number of the task from 1, bytes or None).
        count: The number of tasks.
    """
    known = [size for line in lines for _, size in line.points if size]
    if not known:
        return ""
    low, high = min(known) / 1.5, max(known) * 1.5
    # a method that stores nothing has no place on a scale of ratios
    shown = [Line(line.name, line.look, [(x, y or None) for x, y in line.points]) for line in lines]
    y = Axis("stored bytes", high, low, log=True, text=bytes_text)
    return line_chart(shown, "Bytes stored after each task, by method", tasks_axis(count), y, size=WIDE, names=True)


def tasks_axis(count: int) -> Axis:
    """The tasks of a stream, from the first."""
    return Axis("tasks trained", count + 0.2, 0.8, whole=True)


def row_chart(lines: Sequence[Line], label: str, names: Sequence[str], x: Axis) -> str:
    """A group of rows for each name, in which each method has a row of its own: a mark, and its spread as a line.

    Args:
        lines: For each method, points (number of the name from 0, value).
        label: The chart in words.
        names: What the groups are.
        x: What the values are.
    """
    lines = [line for line in lines if any(value is not None for _, value in line.points)]
    height = _ROW * len(lines) + _GAP
    left = 14 + _LETTER * max(min(len(plain(name)), _LONGEST) for name in names)
    size = WIDE[0], _TOP + height * len(names) + _FLOOR
    picture = _Picture(label, x, Axis("", len(names)), size, left)
    picture.draw_x(grid=True)
    for j, name in enumerate(names):
        top = _TOP + j * height
        picture.parts.append(f'<path class="axis" d="M{2} {top}H{picture.right}"/>')
        picture.text(left - 8, top + height / 2 + 4, short(name), "end", "name")
    picture.parts.append(f'<path class="zero" d="M{picture.across(0):.1f} {_TOP}V{picture.floor}"/>')
    for i, line in enumerate(lines):
        for k, (group, value) in enumerate(line.points):
            if value is None:
                continue
            place, spread = _TOP + group * height + _GAP / 2 + _ROW * (i + 0.5), line.deviation(k)
            ends = [(picture.across(value + side * spread), place) for side in (-1, 1)]
            if spread:
                picture.whisker(*ends, line.look)
            title = f"{line.name}, {names[int(group)]}: {_value(x, value, spread)}"
            picture.dot(picture.across(value), place, line.look, title)
    return picture.done()


def point_chart(lines: Sequence[Line], label: str, x: Axis, y: Axis) -> str:
    """A mark for each method at its only point, with its name beside it and its spread as a line.

    Args:
        lines: Methods, with one point each.
        label: The chart in words.
        x: The horizontal axis.
        y: The vertical axis.
    """
    picture = _Picture(label, x, y, WIDE)
    picture.draw_y()
    picture.draw_x(grid=True)
    spots = []
    for line in lines:
        ((a, b),), spread = line.points, line.deviation(0)
        spots.append((picture.across(a), picture.up(b)))
        if spread:
            ends = [(spots[-1][0], picture.up(b + side * spread)) for side in (-1, 1)]
            picture.whisker(*ends, line.look)
        title = f"{line.name}: {_value(y, b, spread)} at {x.text(a)}"
        picture.dot(*spots[-1], line.look, title)
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in spots]
    for line, spot in zip(lines, spots, strict=True):
        _name_point(picture, short(line.name), spot, taken)
    return picture.done()


def short(name: str) -> str:
    """A name that leaves room for others."""
    name = plain(name)
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def _name_ends(picture: _Picture, lines: Sequence[Line]) -> None:
    """Write each method's mark and name at the right, as near to the height of its last point as others allow."""
    ends = [max((a, b) for a, b in line.points if b is not None) for line in lines]
    heights = [picture.up(b) for _, b in ends]
    order = sorted(range(len(lines)), key=lambda i: heights[i])
    places = spread_out([heights[i] for i in order], _LINE, _TOP, picture.floor)
    for i, place in zip(order, places, strict=True):
        left, start = picture.right + _END, picture.across(ends[i][0])
        picture.parts.append(f'<path class="leader" d="M{start:.1f} {heights[i]:.1f}L{left - 12:.1f} {place:.1f}"/>')
        picture.dot(left - 7, place, lines[i].look)
        picture.text(left, place + 4, short(lines[i].name), "start", "name")


Box = tuple[float, float, float, float]


def _name_point(picture: _Picture, name: str, spot: tuple[float, float], taken: list[Box]) -> None:
    """Write a name as near to a point as it meets no mark and no other name; further away with a line to it."""
    width, (x, y) = _LETTER * len(name), spot
    places = []
    for far in (9, 20, 34, 50, 70):
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (0.8, -0.8), (0.8, 0.8), (-0.8, -0.8), (-0.8, 0.8)):
            left = x + dx * far - (0 if dx > 0 else width if dx < 0 else width / 2)
            middle = y + dy * far
            places.append((far, (left, middle - _LINE / 2, left + width, middle + _LINE / 2)))
    inside = [p for p in places if p[1][0] >= picture.left and p[1][2] <= picture.width and p[1][3] <= picture.floor]
    inside = [p for p in inside if p[1][1] >= _TOP - _LINE] or places
    far, box = min(inside, key=lambda place: (sum(_overlap(place[1], other) for other in taken), place[0]))
    taken.append(box)
    if far > places[0][0]:
        near_x, near_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
        picture.parts.append(f'<path class="leader" d="M{x:.1f} {y:.1f}L{near_x:.1f} {near_y:.1f}"/>')
    picture.text(box[0], box[3] - 2, name, "start", "name")


def _overlap(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    along = min(one[3], other[3]) - max(one[1], other[1])
    return max(across, 0.0) * max(along, 0.0)


def look_of(index: int) -> tuple[int, int, int]:
    """Number of the colour, of the mark and of the dashes of a method: no two of the first 49 are alike."""
    turn, place = divmod(index, len(COLOURS))
    return place, (place + turn) % len(MARKERS), turn % len(DASHES)


def _value(axis: Axis, value: float, spread: float) -> str:
    if axis.log:
        return axis.text(value)
    return f"{value:.1f} ± {spread:.1f}" if spread else f"{value:.1f}"


def _colour(index: int) -> str:
    return f"--c:var(--c{look_of(index)[0]})"


def _line_class(index: int) -> str:
    return ("line", "line second", "line third")[look_of(index)[2]]


def _dot(x: float, y: float, index: int, title: str = "") -> str:
    shape = _MARKER_PATHS[look_of(index)[1]]
    inner = f"<title>{escape(title)}</title>" if title else ""
    place = f'transform="translate({x:.1f} {y:.1f})"'
    return f'<path class="dot" style="{_colour(index)}" {place} d="{shape}">{inner}</path>'


def _band(picture: _Picture, line: Line) -> str:
    known = [(a, b, line.deviation(i)) for i, (a, b) in enumerate(line.points) if b is not None]
    y = picture.y
    edges = [[(picture.across(a), min(max(b + side * s, y.low), y.high)) for a, b, s in known] for side in (1, -1)]
    around = [f"{across:.1f} {picture.up(value):.1f}" for across, value in (*edges[0], *reversed(edges[1]))]
    return f'<path class="band" style="{_colour(line.look)}" d="M{"L".join(around)}z"/>'


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    steps, pen_down = [], False
    for x, y in points:
        if y is not None:
            steps.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = y is not None
    return "".join(steps)
