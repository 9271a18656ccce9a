"""Means with their 95 % intervals, and paired differences: what a comparison over seeds may claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean over `count` values with half of its 95 % interval (Student's t); infinite for a single value."""

    value: float
    half_width: float
    count: int

    def __format__(self, spec: str) -> str:
        if not self.count:
            return "-"
        if math.isinf(self.half_width):
            return f"{self.value:{spec}}"
        return f"{self.value:{spec}} +- {self.half_width.__abs__():{spec.lstrip('+')}}"


def mean(values: Sequence[float]) -> Mean:
    """The mean of `values` with its interval; NaN without values."""
    if not values:
        return Mean(math.nan, math.inf, 0)
    middle = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(middle):
        return Mean(middle, math.inf, len(values))
    from scipy.stats import t

    quantile = float(t.ppf(0.975, len(values) - 1))
    return Mean(middle, quantile * statistics.stdev(values) / math.sqrt(len(values)), len(values))


def margin(losses: Sequence[float], target: float = 3.28) -> float:
    """(target - mean) * sqrt(n): how surely n runs reach a loss.

    The optimization track of modded-nanogpt takes a record at 0.004 or more, about three deviations of its runs, which
    are 0.0013.
    """
    return (target - statistics.fmean(losses)) * math.sqrt(len(losses))


def paired_difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Mean:
    """The mean of ours minus theirs over the keys (seeds) that both have."""
    return mean([ours[key] - theirs[key] for key in ours if key in theirs])
