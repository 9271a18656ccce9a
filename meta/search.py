"""A search over an optimizer's options with a fixed number of runs, as long for every method of a comparison.

Options lie on a lattice, each on a list of values. From the start, runs go to the points nearest to the best one so
far: first along the first option, then the others, then diagonally. Where the best moves, so do the next runs: a good
rate is found also far from the start, and no run of the budget is left unused. The order is a function of the results.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

Point = tuple[tuple[str, float], ...]
"""Options and their values, in the order of the method's axes."""

# runs of a round: whatever the number of workers, so that it does not change the search
ROUND = 2


@dataclass(frozen=True)
class Axis:
    """An option of a method, and the values that it may take, in order."""

    option: str
    values: tuple[float, ...]
    start: float

    def __post_init__(self) -> None:
        if self.start not in self.values:
            raise ValueError(f"{self.option}: the start {self.start} is none of {self.values}")


@dataclass(frozen=True)
class Lattice:
    """All points of some axes."""

    axes: tuple[Axis, ...]

    @property
    def start(self) -> Point:
        return tuple((axis.option, axis.start) for axis in self.axes)

    def indices(self, point: Point) -> tuple[int, ...]:
        """Return a point's place on each axis; raises ValueError for one that is not on the lattice."""
        if tuple(option for option, _ in point) != tuple(axis.option for axis in self.axes):
            raise ValueError(f"{point} is no point of {[axis.option for axis in self.axes]}")
        return tuple(axis.values.index(value) for axis, (_, value) in zip(self.axes, point, strict=True))

    def at_edge(self, point: Point) -> list[str]:
        """Return the options of a point that are at an end of their axis; 0 is no end, for nothing lies below it."""
        return [
            axis.option
            for axis, here in zip(self.axes, self.indices(point), strict=True)
            if len(axis.values) > 1 and here in (0, len(axis.values) - 1) and axis.values[here] != 0
        ]


@cache
def around(lattice: Lattice, point: Point) -> tuple[Point, ...]:
    """Return all other points, the nearest first; at one distance the first axis first, downwards first."""
    axes, centre = lattice.axes, lattice.indices(point)
    offsets = itertools.product(
        *(range(-here, len(axis.values) - here) for here, axis in zip(centre, axes, strict=True))
    )

    def order(offset: tuple[int, ...]) -> tuple[int, int, list[int], tuple[int, ...]]:
        return sum(map(abs, offset)), sum(map(bool, offset)), [-abs(step) for step in offset], offset

    return tuple(
        tuple((axis.option, axis.values[here + step]) for axis, here, step in zip(axes, centre, offset, strict=True))
        for offset in sorted(offsets, key=order)
        if any(offset)
    )


@dataclass(frozen=True)
class Search:
    """A search from a point, replayed from the losses of the runs that have ended: so it goes on where it stopped."""

    lattice: Lattice
    start: Point
    budget: int
    losses: Mapping[Point, float]

    def _replay(self) -> tuple[list[Point], list[Point]]:
        """The points that were taken, in order, and those of the next round."""
        done: list[Point] = []
        wanted = [self.start]
        while wanted and all(point in self.losses for point in wanted):
            done += wanted
            best = min(done, key=lambda point: self.losses[point])
            fresh = (point for point in around(self.lattice, best) if point not in done)
            wanted = list(itertools.islice(fresh, min(ROUND, self.budget - len(done))))
        return done, wanted

    @property
    def done(self) -> list[Point]:
        return self._replay()[0]

    @property
    def missing(self) -> list[Point]:
        """The runs that come next; none when the search is over."""
        return [point for point in self._replay()[1] if point not in self.losses]

    @property
    def best(self) -> Point | None:
        """The best point, None before the end."""
        done, wanted = self._replay()
        return None if wanted else min(done, key=lambda point: self.losses[point])
