"""VeLO of sharded parameters, real processes on gloo: equal to one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.distributed.tensor import Shard

from scenarios import velo

pytestmark = pytest.mark.dist

on_one_to_four = pytest.mark.parametrize("ranks", [1, 2, 3, 4])


@on_one_to_four
def test_equals_one_process(on_ranks, ranks) -> None:
    cases = {f"axis {axis}": on_ranks(ranks, velo.difference, [Shard(axis)]) for axis in (0, 1)}
    cases["axis 2"] = on_ranks(ranks, velo.difference, [Shard(2)], shapes=[(5, 6, 7), (9, 4, 4), (3, 4, 6, 2)])
    cases["decay"] = on_ranks(ranks, velo.difference, [Shard(0)], steps=11, scale=2e3, weight_decay=0.1)
    cases["small blocks"] = on_ranks(ranks, velo.difference_in_small_blocks)
    if ranks == 4:
        cases["hsdp"] = on_ranks(ranks, velo.hsdp_difference)
    print(json.dumps(cases))
    assert max(cases.values()) <= 2e-6


@on_one_to_four
def test_ranks_agree(on_ranks, ranks) -> None:
    # three messages a step: what everybody must agree on, sums, and the columns' sums
    assert on_ranks(ranks, velo.count_all_reduces) == 3
    assert on_ranks(ranks, velo.skipped_step) == (True, 1)
    assert on_ranks(ranks, velo.mean_loss) <= 1e-7
    if ranks > 1:
        assert f"has a gradient on {ranks - 1} of {ranks} ranks" in on_ranks(ranks, velo.missing_gradient)
        assert "the set of sharded parameters differs between ranks" in on_ranks(ranks, velo.other_parameters)


@pytest.fixture(scope="module")
def checkpoint_of_two(on_ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("velo")
    on_ranks(2, velo.train, "saved", folder)
    return folder


@on_one_to_four
def test_fsdp2_trains_and_resumes_on_another_world_size(on_ranks, ranks, checkpoint_of_two) -> None:
    whole, several, resumed = (
        on_ranks(ranks, velo.train, how, checkpoint_of_two) for how in ("whole", "sharded", "resumed")
    )
    assert several == pytest.approx(whole, abs=1e-5)
    assert resumed == pytest.approx(whole[3:], abs=1e-5)
    assert whole[-1] != whole[0]


@pytest.mark.parametrize("ranks", [4])
def test_meshes_of_the_same_ranks_are_one(on_ranks, ranks) -> None:
    assert on_ranks(ranks, velo.equal_meshes) <= 1e-6


@pytest.mark.parametrize("ranks", [4])
def test_tensor_parallelism_is_refused_by_name(on_ranks, ranks) -> None:
    assert "w is sharded on 2 axes of DeviceMesh" in on_ranks(ranks, velo.two_axes)
