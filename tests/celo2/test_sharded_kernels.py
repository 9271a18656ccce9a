"""The sharded step through the kernels, real processes on gloo with Triton's interpreter: equal to one process."""

from __future__ import annotations

import pytest
from torch.distributed.tensor import Shard

from scenarios import sharded

pytest.importorskip("triton")
pytest.importorskip("celo2.kernels")

from scenarios import sharded_kernels
from scenarios.sharded_kernels import FEW, SPECS, TRITON

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("interpreter")]

TWO, THREE = (pytest.mark.parametrize("ranks", [ranks]) for ranks in (2, 3))


@pytest.mark.parametrize(
    ("ranks", "variant", "axis", "options"),
    [
        (1, "celo2", 0, {"steps": 2, "max_grad_norm": 0.3}),
        (2, "celo2", 1, {"steps": 2}),
        (2, "celo2-base", 0, {"steps": 3, "max_grad_norm": 0.3}),
        (3, "celo2", 0, {"steps": 3}),
        (3, "celo2-base", 1, {"steps": 2, "max_grad_norm": 0.3}),
        (4, "celo2", 0, {"steps": 2, "max_grad_norm": 0.3}),
    ],
)
def test_equals_one_process(on_ranks, ranks, variant, axis, options) -> None:
    assert on_ranks(ranks, sharded.difference, variant, [Shard(axis)], specs=SPECS, **TRITON, **options) <= 2e-6


@pytest.mark.parametrize("ranks", [4])
def test_hsdp_equals_one_process(on_ranks, ranks) -> None:
    assert on_ranks(ranks, sharded.hsdp_difference, "celo2-base", steps=2, specs=SPECS, **TRITON) <= 2e-6


@THREE
def test_adamw_alone_equals_one_process(on_ranks, ranks) -> None:
    specs = [((7, 3), {"rule": "adamw"}), ((2,), {"rule": "adamw"})]
    options = {"specs": specs, "max_grad_norm": 0.1}
    assert on_ranks(ranks, sharded.difference, "celo2", [Shard(0)], **TRITON, **options) <= 2e-6


@TWO
def test_clipped_elements_and_tiles_of_a_gpu(on_ranks, ranks) -> None:
    options = {"steps": 1, "scale": 2e3, "specs": SPECS}
    assert on_ranks(ranks, sharded.difference, "celo2", [Shard(0)], **TRITON, **options) <= 2e-6
    assert on_ranks(ranks, sharded_kernels.tiled_difference) <= 2e-6


@pytest.mark.parametrize(("ranks", "variant"), [(2, "celo2"), (3, "celo2-base")])
def test_whole_parameters_are_stepped_by_rows(on_ranks, ranks, variant) -> None:
    assert on_ranks(ranks, sharded_kernels.divided_rows, variant) <= 2e-6


@TWO
def test_momenta_of_8_bits(on_ranks, ranks) -> None:
    specs = [((10, 6), {}), ((12, 4), {"heads": 3}), ((2, 70), {})]
    options = {"state_dtype": "int8", "specs": specs}
    first, later = (
        on_ranks(ranks, sharded.difference, "celo2", [Shard(0)], steps, **TRITON, **options) for steps in (1, 3)
    )
    # the first direction is of momenta before they are rounded
    assert first <= 2e-6 < later <= 0.02


@TWO
def test_a_bad_gradient_on_one_rank_changes_no_byte(on_ranks, ranks) -> None:
    assert on_ranks(ranks, sharded.skipped_steps, (0, 2, 3), specs=FEW, **TRITON) == (True, 3)


@TWO
def test_fsdp2_trains_beside_parameters_that_are_not_sharded(on_ranks, ranks) -> None:
    whole, several = on_ranks(ranks, sharded_kernels.fsdp2_losses)
    assert several == pytest.approx(whole, abs=1e-5) and whole[-1] != whole[0]
    assert on_ranks(ranks, sharded_kernels.beside_whole_ones) <= 2e-6


@TWO
def test_parameters_without_gradients(on_ranks, ranks) -> None:
    worst, message = on_ranks(ranks, sharded.missing_gradients, (0, 2), specs=FEW, **TRITON)
    assert worst <= 2e-6
    assert "has a gradient on 1 of 2 ranks" in message


@THREE
def test_ranks_that_disagree_change_no_byte(on_ranks, ranks) -> None:
    found = on_ranks(ranks, sharded_kernels.disagreement)
    assert found["unchanged"] and found["skipped"] == 1
    # as on a GPU, read after the step, which has changed nothing
    assert "parameter 0 has a gradient on 2 of 3 ranks" in found["message"]
    assert found["goes on"]


@TWO
def test_gradients_that_come_and_go_make_no_plan_twice(on_ranks, ranks) -> None:
    worst, plans = on_ranks(ranks, sharded_kernels.alternating_gradients)
    assert worst <= 2e-6 and plans == 2


@pytest.mark.parametrize(("ranks", "variant", "axis"), [(3, "celo2", 0), (3, "celo2-base", 1)])
def test_matrices_without_gradients_do_not_move(on_ranks, ranks, variant, axis) -> None:
    worst, still, moved = on_ranks(ranks, sharded.idle_shards, variant, axis, specs=SPECS, **TRITON)
    assert still and moved and worst <= 2e-6


@THREE
def test_nothing_is_read_on_the_host_and_launches_do_not_grow(on_ranks, ranks) -> None:
    assert on_ranks(ranks, sharded_kernels.launches_without_host_reads) == [13, 13]
    collectives = on_ranks(ranks, sharded.count_collectives, "celo2", specs=[((6, 4), {}), ((4, 6), {})], **TRITON)
    assert collectives["all_reduce"] == 2 and collectives["all_to_all_single"] == 2
    assert not {"gather", "all_gather", "all_gather_object", "broadcast"} & set(collectives)


@TWO
def test_what_the_kernels_cannot_take_goes_through_pytorch(on_ranks, ranks) -> None:
    found = on_ranks(ranks, sharded_kernels.refused)
    assert found["limit"][0] and "max_grad_norm=2000.0, above the rule's own clip" in found["limit"][1]
    assert found["float64"][0] and "stepped by PyTorch, parameter 0: torch.float64" in found["float64"][1]
