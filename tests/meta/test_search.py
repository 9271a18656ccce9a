"""The search of options: a budget that is used up, the best of a lattice, and a replay from results."""

from __future__ import annotations

import math

import pytest

from celo2.meta.search import Axis, Lattice, Search, around
from celo2.pretrain.sweep_points import log_spaced

RATES = tuple(log_spaced(1e-4, 1e-1, 13))
LATTICE = Lattice((Axis("lr", RATES, 1e-3), Axis("momentum", (0.8, 0.9, 0.95), 0.95)))


def loss(point) -> float:
    """A bowl around a rate of 1e-2 and a momentum of 0.8."""
    values = dict(point)
    return math.log10(values["lr"] / 1e-2) ** 2 + (values["momentum"] - 0.8) ** 2


def run(search: Search, evaluate=loss) -> list:
    """Run a search to its end; the rounds that it asked for."""
    rounds = []
    while missing := search.missing:
        rounds.append(missing)
        search = Search(
            search.lattice,
            search.start,
            search.budget,
            {**search.losses, **dict(zip(missing, map(evaluate, missing), strict=True))},
        )
    return [rounds, search]


def test_a_start_is_on_its_axis() -> None:
    with pytest.raises(ValueError, match=r"lr: the start 0\.5 is none of"):
        Axis("lr", RATES, 0.5)


def test_nearest_points_come_first() -> None:
    points = around(LATTICE, LATTICE.start)
    assert len(points) == 13 * 3 - 1 and len(set(points)) == len(points) and LATTICE.start not in points
    assert [dict(point) for point in points[:4]] == [
        {"lr": 5.62e-4, "momentum": 0.95},
        {"lr": 1.78e-3, "momentum": 0.95},
        {"lr": 1e-3, "momentum": 0.9},
        {"lr": 3.16e-4, "momentum": 0.95},
    ]
    with pytest.raises(ValueError, match="is no point of"):
        around(LATTICE, (("lr", 1e-3),))


def test_a_search_finds_the_lowest_point_far_from_its_start() -> None:
    rounds, search = run(Search(LATTICE, LATTICE.start, 16, {}))
    assert dict(search.best) == {"lr": 1e-2, "momentum": 0.8}
    assert len(search.done) == 16 == sum(map(len, rounds)) and len(set(search.done)) == 16
    assert rounds[0] == [LATTICE.start]


@pytest.mark.parametrize("budget", [1, 2, 5, 12, 39, 100])
def test_every_run_of_the_budget_is_used(budget: int) -> None:
    _, search = run(Search(LATTICE, LATTICE.start, budget, {}))
    assert len(search.done) == min(budget, 39) and not search.missing
    assert loss(search.best) == min(map(loss, search.done))


def test_a_search_goes_on_from_its_results_and_ignores_others() -> None:
    _, whole = run(Search(LATTICE, LATTICE.start, 12, {}))
    for count in range(12):
        kept = {point: whole.losses[point] for point in whole.done[:count]}
        # a run that another search has made counts when this one comes to it
        kept[("lr", 0.1), ("momentum", 0.9)] = -1.0
        part = Search(LATTICE, LATTICE.start, 12, kept)
        assert part.best is None and part.done == whole.done[: len(part.done)]
        assert all(point in whole.done for point in part.missing)
    assert (
        Search(LATTICE, LATTICE.start, 12, {**whole.losses, (("lr", 0.1), ("momentum", 0.9)): -1.0}).best == whole.best
    )


def test_runs_that_diverged_are_never_best() -> None:
    _, search = run(Search(LATTICE, LATTICE.start, 10, {}), lambda point: math.inf if dict(point)["lr"] > 1e-3 else 1.0)
    assert dict(search.best)["lr"] <= 1e-3


def test_edges_are_told() -> None:
    assert LATTICE.at_edge((("lr", 1e-4), ("momentum", 0.9))) == ["lr"]
    assert LATTICE.at_edge((("lr", 1e-3), ("momentum", 0.95))) == ["momentum"]
    assert Lattice((Axis("lr", (1.0,), 1.0),)).at_edge((("lr", 1.0),)) == []
    # nothing lies below no weight decay
    decay = Lattice((Axis("weight_decay", (0.0, 0.1), 0.0),))
    assert decay.at_edge((("weight_decay", 0.0),)) == [] and decay.at_edge((("weight_decay", 0.1),)) == ["weight_decay"]
