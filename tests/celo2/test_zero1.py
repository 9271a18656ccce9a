"""The step split over replicas, with real processes on gloo: equal to one process, on 1 to 4 ranks, alike on all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from celo2.shard_layout import chunk
from celo2.zero1 import fingerprint, plan_buckets
from scenarios import replicas, sharded, zero1

VARIANTS = ("celo2", "celo2-base")
on_one_to_four = pytest.mark.parametrize("ranks", [1, 2, 3, 4])


@pytest.mark.dist
@on_one_to_four
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_one_process(on_ranks, ranks, variant) -> None:
    differences = (
        on_ranks(ranks, zero1.difference, variant, max_grad_norm=1.0),
        on_ranks(ranks, zero1.difference, variant, steps=2, scale=2e3),
    )
    print(differences)
    assert max(differences) <= 2e-6


@pytest.mark.dist
@on_one_to_four
def test_a_bfloat16_wire_stays_within_a_thousandth(on_ranks, ranks) -> None:
    wire = sharded.relative_differences(on_ranks(ranks, sharded.wire_runs, split=True))
    print(json.dumps(wire))
    assert len(wire) == 6
    assert max(wire.values()) <= 1e-3
    # one rank rounds alike: its directions pass through the wire's dtype too
    assert min(wire.values()) > 0


@pytest.mark.dist
@on_one_to_four
@pytest.mark.parametrize("variant", VARIANTS)
def test_matrices_without_gradients_do_not_move(on_ranks, ranks, variant) -> None:
    worst, still, moved = on_ranks(ranks, zero1.idle, variant)
    assert still and moved and worst <= 2e-6


@pytest.mark.dist
@on_one_to_four
def test_every_rank_gets_all_rows(on_ranks, ranks) -> None:
    assert on_ranks(ranks, zero1.gathered)


@pytest.mark.dist
@on_one_to_four
def test_few_flat_collectives(on_ranks, ranks) -> None:
    orthogonalised = on_ranks(ranks, zero1.count_collectives, "celo2")
    assert orthogonalised == {"all_reduce": 2, "all_to_all_single": 2, "gather": 1}
    assert on_ranks(ranks, zero1.count_collectives, "celo2-base") == {"all_reduce": 3, "gather": 1}


@pytest.mark.dist
@on_one_to_four
def test_a_skipped_step_changes_no_byte(on_ranks, ranks) -> None:
    unchanged, skipped, scaled = on_ranks(ranks, zero1.skipped_steps)
    assert unchanged and skipped == 5
    assert scaled <= 2e-6


@pytest.mark.dist
@on_one_to_four
def test_parameters_without_gradients(on_ranks, ranks) -> None:
    worst, message = on_ranks(ranks, zero1.missing_gradients)
    assert worst <= 2e-6
    if ranks > 1:
        assert f"has a gradient on {ranks - 1} of {ranks} ranks" in message


@pytest.mark.dist
@on_one_to_four
def test_state_is_split(on_ranks, ranks) -> None:
    # matrices of 96 rows; the short factor of each is whole on every rank
    assert 1 / ranks <= on_ranks(ranks, zero1.state_bytes) <= 1.03 / ranks


@pytest.fixture(scope="module")
def checkpoints_of_two(on_ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero1")
    for mode in ("whole", "ddp", "fsdp2"):
        on_ranks(2, zero1.train, mode, folder, saves=True)
    return folder


@pytest.mark.dist
@on_one_to_four
def test_ddp_trains_and_checkpoints_move_between_modes_and_world_sizes(on_ranks, ranks, checkpoints_of_two) -> None:
    whole, parameters = on_ranks(ranks, zero1.train, "whole", checkpoints_of_two)
    assert whole[-1] < whole[0]
    sources = [(None, "ddp"), (None, "fsdp2")]
    # what two ranks wrote; one process loads alike on every rank
    sources += [("ddp", "whole"), ("ddp", "ddp"), ("ddp", "fsdp2"), ("fsdp2", "ddp"), ("whole", "ddp")]
    for source, mode in sources:
        losses, trained = on_ranks(ranks, zero1.train, mode, checkpoints_of_two, source)
        assert losses == pytest.approx(whole[-len(losses) :], abs=1e-5), (source, mode)
        assert zero1.distance(trained, parameters) <= 5e-6, (source, mode)


@pytest.mark.dist
def test_layouts_of_parameters_and_gradients(on_ranks) -> None:
    assert on_ranks(2, zero1.layouts) <= 2e-6
    assert on_ranks(2, zero1.placed_as_fsdp2)
    assert on_ranks(2, zero1.nothing_to_split) <= 2e-6
    assert on_ranks(2, zero1.difference, "celo2", steps=3, dtype=torch.float64) <= 1e-6


@pytest.mark.dist
@pytest.mark.parametrize(
    ("options", "bound"),
    [({"dtype": torch.bfloat16}, 3e-2), ({"state_dtype": "bfloat16"}, 2e-2), ({"state_dtype": "int8"}, 4e-2)],
    ids=["bfloat16 parameters", "bfloat16 state", "8-bit state"],
)
def test_low_precision(on_ranks, options, bound) -> None:
    # of the distance that parameters moved: a bfloat16's last bit at 0.1 is 5e-4, steps are of 1e-2
    found = on_ranks(2, zero1.low_precision, **options)
    print(found)
    assert 1e-5 < found["distance"] <= bound and found["mean"] <= 1e-3


@pytest.mark.dist
def test_copies_state_dicts_and_late_groups(on_ranks) -> None:
    copies = on_ranks(2, zero1.copies)
    assert copies["pickled"] == copies["deep"] == 0
    assert max(copies.values()) <= 2e-6


@pytest.mark.dist
def test_full_state_dicts(on_ranks) -> None:
    is_plain, distances = on_ranks(2, zero1.full_state_dicts)
    assert is_plain
    assert max(distances) <= 2e-6


@pytest.mark.dist
def test_refusals_say_what_to_do(on_ranks) -> None:
    answers = on_ranks(2, zero1.refusals)
    for name, words in {
        "dtensor": " DTensor .*leave zero1_mesh out",
        "late dtensor": " DTensor .*leave zero1_mesh out",
        "mesh": "^zero1_mesh=.* has 2 axes: take one of them",
        "type": "^zero1_mesh is a ProcessGroup, expected a DeviceMesh",
        "device": " on meta.* mesh of cpu devices; move the module first",
        "moved": "torch.float64 on cpu now.*convert the module before",
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
def test_replicas_that_differ_are_refused_by_name(on_ranks) -> None:
    answers = on_ranks(2, replicas.steps)
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
