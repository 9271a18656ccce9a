"""The sharded step through the kernels, real processes on gloo with Triton's interpreter: equal to one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("sharded_kernel_ranks.py")


@pytest.fixture(scope="module")
def reports(reports_of: Any, run_ranks: Callable[..., Any]) -> dict[int, Any]:
    return reports_of(lambda ranks: run_ranks(PROGRAM, ranks, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_one_process(ranks, reports):
    report = reports[ranks]
    print(json.dumps(report["differences"]), f"{report['seconds']:.0f} s")
    assert len(report["differences"]) == {1: 1, 2: 4, 3: 3, 4: 2}[ranks]
    assert max(report["differences"].values()) <= 2e-6


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3])
def test_whole_parameters_are_stepped_by_rows(ranks, reports):
    assert reports[ranks]["divided"] <= 2e-6


@pytest.mark.dist
def test_momenta_of_8_bits(reports):
    # the first direction is of momenta before they are rounded
    first, later = reports[2]["eight bits"]
    assert first <= 2e-6 < later <= 0.02


@pytest.mark.dist
@pytest.mark.slow
def test_a_bad_gradient_or_infinity_on_one_rank_changes_no_byte(reports):
    assert reports[2]["skipped"] == [True, 3]
    assert reports[3]["disagreement"]["unchanged"] and reports[3]["disagreement"]["skipped"] == 1


@pytest.mark.dist
def test_fsdp2_trains_beside_parameters_that_are_not_sharded(reports):
    whole, sharded = reports[2]["losses"]
    assert sharded == pytest.approx(whole, abs=1e-5) and whole[-1] != whole[0]
    assert reports[2]["beside whole ones"] <= 2e-6


@pytest.mark.dist
@pytest.mark.slow
def test_parameters_without_gradients(reports):
    worst, message = reports[2]["missing"]
    assert worst <= 2e-6
    assert "has a gradient on 1 of 2 ranks" in message
    # as on a GPU, read after the step, which has changed nothing
    assert "parameter 0 has a gradient on 2 of 3 ranks" in reports[3]["disagreement"]["message"]
    assert reports[3]["disagreement"]["goes on"]


@pytest.mark.dist
def test_gradients_that_come_and_go_make_no_plan_twice(reports):
    worst, plans = reports[2]["alternating"]
    assert worst <= 2e-6 and plans == 2


@pytest.mark.dist
@pytest.mark.slow
def test_matrices_without_gradients_do_not_move(reports):
    for worst, still, moved in reports[3]["idle"]:
        assert still and moved and worst <= 2e-6


@pytest.mark.dist
@pytest.mark.slow
def test_nothing_is_read_on_the_host_and_launches_do_not_grow(reports):
    launches, collectives = reports[3]["launches"], reports[3]["collectives"]
    assert launches == [13, 13]
    assert {name: collectives[name] for name in ("all_reduce", "all_to_all_single")} == {
        "all_reduce": 2,
        "all_to_all_single": 2,
    }
    assert not {"gather", "all_gather", "all_gather_object", "broadcast"} & set(collectives)


@pytest.mark.dist
def test_what_the_kernels_cannot_take_goes_through_pytorch(reports):
    refused = reports[2]["refused"]
    assert refused["limit"][0] and "max_grad_norm=2000.0, above the rule's own clip" in refused["limit"][1]
    assert refused["float64"][0] and "stepped by PyTorch, parameter 0: torch.float64" in refused["float64"][1]
