"""The step split over replicas, with real processes on gloo: equal to one process, on 1 to 4 ranks, alike on all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from celo2.shard_layout import chunk
from celo2.zero1 import fingerprint, plan_buckets

PROGRAM = Path(__file__).with_name("zero1_ranks.py")
RANKS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, reports_of: Any, run_ranks: Callable[..., Any]) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("zero1")
    return reports_of(lambda ranks: run_ranks(PROGRAM, ranks, folder))


@pytest.mark.dist
@pytest.mark.parametrize("ranks", RANKS)
def test_equals_one_process(ranks, reports):
    differences = reports[ranks]["differences"]
    print(json.dumps(differences))
    assert len(differences) == 4
    assert max(differences.values()) <= 2e-6


@pytest.mark.dist
@pytest.mark.parametrize("ranks", RANKS)
def test_a_bfloat16_wire_stays_within_a_thousandth(ranks, reports):
    wire = reports[ranks]["wire"]
    print(json.dumps(wire))
    assert len(wire) == 6
    assert max(wire.values()) <= 1e-3
    # one rank rounds alike: its directions pass through the wire's dtype too
    assert min(wire.values()) > 0


@pytest.mark.dist
@pytest.mark.parametrize("ranks", RANKS)
def test_matrices_without_gradients_do_not_move(ranks, reports):
    for worst, still, moved in reports[ranks]["idle"]:
        assert still and moved and worst <= 2e-6


@pytest.mark.dist
@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_gets_all_rows(ranks, reports):
    assert reports[ranks]["gathered"]


@pytest.mark.dist
@pytest.mark.parametrize("ranks", RANKS)
def test_few_flat_collectives(ranks, reports):
    assert reports[ranks]["collectives"] == {
        "celo2": {"all_reduce": 2, "all_to_all_single": 2, "gather": 1},
        "celo2-base": {"all_reduce": 3, "gather": 1},
    }


@pytest.mark.dist
@pytest.mark.parametrize("ranks", RANKS)
def test_a_skipped_step_changes_no_byte(ranks, reports):
    unchanged, skipped, scaled = reports[ranks]["skipped"]
    assert unchanged and skipped == 5
    assert scaled <= 2e-6


@pytest.mark.dist
@pytest.mark.parametrize("ranks", RANKS)
def test_parameters_without_gradients(ranks, reports):
    worst, message = reports[ranks]["missing"]
    assert worst <= 2e-6
    if ranks > 1:
        assert f"has a gradient on {ranks - 1} of {ranks} ranks" in message


@pytest.mark.dist
@pytest.mark.parametrize("ranks", RANKS)
def test_state_is_split(ranks, reports):
    # matrices of 96 rows; the short factor of each is whole on every rank
    assert 1 / ranks <= reports[ranks]["state"] <= 1.03 / ranks


@pytest.mark.dist
@pytest.mark.parametrize("ranks", RANKS)
def test_ddp_trains_and_checkpoints_move_between_modes_and_world_sizes(ranks, reports):
    losses, trained = reports[ranks]["losses"], reports[ranks]["trained"]
    assert {"ddp", "ddp to whole", "ddp to ddp", "ddp to fsdp2", "fsdp2 to ddp", "whole to ddp"} <= losses.keys()
    for name, run in losses.items():
        assert run == pytest.approx(losses["whole"][-len(run) :], abs=1e-5), name
    assert losses["whole"][-1] < losses["whole"][0]
    assert max(trained.values()) <= 5e-6


@pytest.mark.dist
def test_layouts_of_parameters_and_gradients(reports):
    assert reports[2]["layouts"] <= 2e-6
    assert reports[2]["placed as fsdp2"]
    assert reports[2]["nothing to split"] <= 2e-6
    assert reports[2]["float64"] <= 1e-6


@pytest.mark.dist
def test_low_precision(reports):
    # of the distance that parameters moved: a bfloat16's last bit at 0.1 is 5e-4, steps are of 1e-2
    parameters, state, levels = (reports[2][what] for what in ("bfloat16 parameters", "bfloat16 state", "8-bit state"))
    print(json.dumps([parameters, state, levels]))
    assert 1e-5 < parameters["distance"] <= 3e-2 and parameters["mean"] <= 1e-3
    assert 1e-5 < state["distance"] <= 2e-2 and state["mean"] <= 1e-3
    assert 1e-5 < levels["distance"] <= 4e-2 and levels["mean"] <= 1e-3


@pytest.mark.dist
def test_copies_state_dicts_and_late_groups(reports):
    copies = reports[2]["copies"]
    assert copies["pickled"] == copies["deep"] == 0
    assert max(copies.values()) <= 2e-6


@pytest.mark.dist
def test_full_state_dicts(reports):
    is_plain, distances = reports[2]["full"]
    assert is_plain
    assert max(distances) <= 2e-6


@pytest.mark.dist
def test_refusals_say_what_to_do(reports):
    answers = reports[2]["refusals"]
    for name, words in {
        "dtensor": "ValueError.* DTensor .*leave zero1_mesh out",
        "late dtensor": "ValueError.* DTensor .*leave zero1_mesh out",
        "mesh": "ValueError: zero1_mesh=.* has 2 axes: take one of them",
        "type": "TypeError: zero1_mesh is a ProcessGroup, expected a DeviceMesh",
        "device": "ValueError.* on meta.* mesh of cpu devices; move the module first",
        "moved": "ValueError.*torch.float64 on cpu now.*convert the module before",
    }.items():
        assert re.search(words, answers[name]), answers[name]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [1, 100, 1000, 10**9])
def test_buckets_hold_every_row_once(ranks, limit):
    shapes = [torch.Size(shape) for shape in [(1, 3), (5, 4), (8, 2, 3), (13, 7), (2, 400), (30, 5)]]
    rows: dict[int, list[int]] = {index: [] for index in range(len(shapes))}
    for stretches, size in plan_buckets(shapes, ranks, limit):
        end = 0
        for stretch in stretches:
            assert stretch.offset == end
            end += stretch.rows * shapes[stretch.tensor][1:].numel()
            rows[stretch.tensor] += range(stretch.first, stretch.first + stretch.rows)
        assert size == end
        assert ranks * size <= limit or (len(stretches) == 1 and stretches[0].rows == 1)
    assert rows == {index: list(range(chunk(shape[0], ranks, 0)[1])) for index, shape in enumerate(shapes)}
    if limit == 10**9:
        assert len(list(plan_buckets(shapes, ranks, limit))) == 1


@pytest.mark.dist
def test_replicas_that_differ_are_refused_by_name(run_ranks):
    answers = run_ranks(PROGRAM.with_name("replica_ranks.py"), 2)
    assert answers["weights"].startswith("zero1_mesh: parameter 1.bias differs between ranks")
    assert answers["gradients"].startswith("zero1_mesh: gradient of 0.weight differs between ranks")
    assert all("wrap the model in DistributedDataParallel" in answers[case] for case in ("weights", "gradients"))
    # mended, the same optimizer steps
    assert answers["reduced"] == answers["equal"] == answers["ddp"] == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_fingerprint_is_of_bits_and_order(dtype):
    tensor = torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = fingerprint(tensor)
    finally:
        torch.set_num_threads(threads)
    assert fingerprint(tensor.clone()) == first and 0 <= first < 2**64
    for index in (0, 12345, -1):
        other = tensor.clone()
        other[index] += 1
        assert fingerprint(other) != first
    swapped = tensor.clone()
    swapped[[3, 1 << 20]] = swapped[[1 << 20, 3]]
    assert fingerprint(swapped) != first and fingerprint(tensor.flip(0)) != first
    square = tensor[: 1 << 20].view(1024, 1024)
    assert fingerprint(square.t()) == fingerprint(square.t().contiguous())
    assert fingerprint(tensor[:0]) == fingerprint(tensor[5:5]) and fingerprint(torch.ones((), dtype=dtype)) > 0
