"""Curves of runs as numbers: where one reaches a value, what it is at a place, and smoothed."""

from __future__ import annotations

import math
from collections.abc import Sequence


def first_reaching(xs: Sequence[float], ys: Sequence[float], target: float, *, maximize: bool = False) -> float | None:
    """The first x at which y is `target` or better, on straight lines between the points; None when it never is.

    Better is lower, or with `maximize` higher. A y of NaN reaches nothing, and no line begins at it.
    """
    for index, y in enumerate(ys):
        if y >= target if maximize else y <= target:
            if index == 0 or not math.isfinite(ys[index - 1]):
                return xs[index]
            before = ys[index - 1]
            return xs[index - 1] + (before - target) / (before - y) * (xs[index] - xs[index - 1])
    return None


def value_at(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """y at x on straight lines between the points, whose xs increase; NaN outside of them."""
    for index, right in enumerate(xs):
        if right == x:
            return ys[index]
        if right > x:
            if index == 0:
                break
            left = xs[index - 1]
            return ys[index - 1] + (x - left) / (right - left) * (ys[index] - ys[index - 1])
    return math.nan


def smoothed(ys: Sequence[float], window: float) -> list[float]:
    """The exponential mean of the values so far, `window` of them the time constant; NaN is left out of it."""
    keep = 1 - 1 / max(1.0, window)
    total = weight = 0.0
    means = []
    for y in ys:
        if math.isfinite(y):
            # divided by the weights so far: the first values are not drawn to zero
            total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        means.append(total / weight if weight else math.nan)
    return means
