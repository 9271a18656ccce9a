"""Scenarios on several processes: what is returned comes from rank 0, and what fails on one rank fails the test."""

from __future__ import annotations

import pytest

from scenarios import failing
from scenarios.pool import RankFailure, RankPool


@pytest.mark.dist
@pytest.mark.parametrize(
    ("scenario", "words"), [(failing.raises_on_the_last, "only here"), (failing.ends_on_the_last, "SystemExit")]
)
def test_a_rank_that_fails_fails_the_scenario(tmp_path, monkeypatch, scenario, words) -> None:
    monkeypatch.setattr("scenarios.pool.GRACE", 1)
    pool = RankPool(2, tmp_path / "store")
    try:
        assert pool.run(failing.number_of_ranks, factor=3) == (0, 6)
        with pytest.raises(RankFailure, match=f"(?s)rank 1: .*{words}"):
            pool.run(scenario)
        assert not pool.alive
    finally:
        pool.close()
