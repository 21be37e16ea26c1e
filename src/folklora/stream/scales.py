"""Places in a chart: what an axis measures, its round values, and labels that keep their distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """What is measured in one direction.

    Args:
        title: What it is, with its unit.
        high: The last value.
        low: The first one.
        whole: Whether it counts.
        log: Whether equal steps are equal ratios.
        text: How a value is written.
    """

    title: str
    high: float
    low: float = 0.0
    whole: bool = False
    log: bool = False
    text: Callable[[float], str] = "{:g}".format

    def share(self, value: float) -> float:
        """Where a value lies, from 0 at `low` to 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values, evenly spaced."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.high, low=self.low, whole=self.whole)


def ticks(high: float, *, low: float = 0.0, whole: bool = False) -> list[float]:
    """At most seven round numbers from `low` to `high`, evenly spaced."""
    width = high - low
    step = 10.0 ** math.floor(math.log10(width / 6)) if width > 0 else 1.0
    step = next(step * factor for factor in (1, 2, 5, 10) if width / (step * factor) <= 6 + 1e-9)
    if whole:
        step = max(step, 1.0)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, both above 0: 1, 2 and 5 of each power of ten, or the powers where many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    return [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]


def spread_out(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending values moved apart to at least `gap`, within `low` and `high` where there is room, as little as may be.

    Neighbours that are too near are set evenly around their mean, and together as a block from then on.
    """
    gap = min(gap, (high - low) / max(len(values) - 1, 1))
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and _middle(blocks[-1], gap, low, high) - _middle(blocks[-2], gap, low, high) < (
            gap * (len(blocks[-1]) + len(blocks[-2])) / 2 - 1e-9
        ):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [
        _middle(block, gap, low, high) + gap * (i - (len(block) - 1) / 2) for block in blocks for i in range(len(block))
    ]


def _middle(block: Sequence[float], gap: float, low: float, high: float) -> float:
    half = gap * (len(block) - 1) / 2
    return min(max(sum(block) / len(block), low + half), high - half)
