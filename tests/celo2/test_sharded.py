"""The sharded step with real processes on gloo: equal to one process for every placement, odd shapes, world sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from celo2 import load_weights
from celo2.exchanges import padded
from celo2.matrices import MatrixView
from celo2.newton_schulz import newton_schulz_flops
from celo2.owners import assign_owners
from celo2.plan import Plan, Slot
from celo2.shard_layout import Cut, ShardLayout, chunk
from celo2.sharding import Team, shard_spec_of
from scenarios import sharded

VARIANTS = ("celo2", "celo2-base")
on_one_to_four = pytest.mark.parametrize("ranks", [1, 2, 3, 4])


@pytest.mark.dist
@on_one_to_four
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_one_process(on_ranks, ranks, variant) -> None:
    cases = {
        "rows": on_ranks(ranks, sharded.difference, variant, [Shard(0)], max_grad_norm=1.0),
        "columns": on_ranks(ranks, sharded.difference, variant, [Shard(1)], max_grad_norm=1.0),
        "clipped elements": on_ranks(ranks, sharded.difference, variant, [Shard(0)], steps=2, scale=2e3),
    }
    if ranks == 4:
        cases["hsdp"] = on_ranks(ranks, sharded.hsdp_difference, variant)
    print(json.dumps(cases))
    assert max(cases.values()) <= 2e-6


@pytest.mark.dist
@on_one_to_four
def test_a_bfloat16_wire_stays_within_a_thousandth(on_ranks, ranks) -> None:
    # parameters of 0.1 and ten steps of 1e-2: 1e-3 is 1e-2 of the distance, a bfloat16's last bit a step
    assert 1e-6 < on_ranks(ranks, sharded.difference, "celo2", [Shard(0)], comm_dtype="bfloat16") <= 1e-3
    wire = sharded.relative_differences(on_ranks(ranks, sharded.wire_runs, split=False))
    print(json.dumps(wire))
    assert len(wire) == 6
    assert max(wire.values()) <= 1e-3
    # one rank rounds alike: its directions pass through the wire's dtype too
    assert min(wire.values()) > 0


@pytest.mark.dist
@on_one_to_four
@pytest.mark.parametrize("low_rank", [False, True])
def test_a_float16_wire_stays_within_a_thousandth_also_where_newton_schulz_amplifies(on_ranks, ranks, low_rank) -> None:
    runs = on_ranks(ranks, sharded.wire_runs, split=False, low_rank=low_rank, comm_dtype="float16")
    wire = sharded.relative_differences(runs)
    print(json.dumps(wire))
    assert 0 < max(wire.values()) <= 1e-3


@pytest.fixture(scope="module")
def low_rank_of_two(on_ranks) -> Any:
    return on_ranks(2, sharded.wire_runs, split=False, low_rank=True)[1]


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_a_bfloat16_wire_does_not_depend_on_the_ranks_where_newton_schulz_amplifies(on_ranks, ranks, low_rank_of_two):
    runs = on_ranks(ranks, sharded.wire_runs, split=False, low_rank=True)
    differences = [float((a - b).norm() / a.norm()) for a, b in zip(low_rank_of_two, runs[1], strict=True)]
    rounded = sharded.relative_differences(runs)
    print(differences, "from no wire", json.dumps(rounded))
    assert 0 < max(differences) <= 1e-3
    # against directions that no wire has rounded it is more: small singular values are raised with their rounding
    assert 1e-3 < max(rounded.values()) <= 2e-2


@pytest.mark.dist
@on_one_to_four
def test_momenta_of_8_bits(on_ranks, ranks) -> None:
    first, later = (
        on_ranks(ranks, sharded.difference, "celo2", [Shard(0)], steps, state_dtype="int8") for steps in (1, 10)
    )
    print(first, later)
    # the first direction is of momenta before they are rounded; then each rank rounds by its own random bits
    assert first <= 2e-6 < later <= 0.02
    assert on_ranks(ranks, sharded.loads_of_8_bits) == (True, True, True)
    assert "whose columns are sharded" in on_ranks(ranks, sharded.cut_columns_of_8_bits)


@pytest.mark.dist
@on_one_to_four
@pytest.mark.parametrize("variant", VARIANTS)
def test_few_flat_collectives(on_ranks, ranks, variant) -> None:
    counts = on_ranks(ranks, sharded.count_collectives, variant)
    # the vector of this model has a sum of squares of its own
    assert counts["all_reduce"] == 3 and counts.get("all_to_all_single") == (2 if variant == "celo2" else None)
    assert not {"gather", "all_gather", "all_gather_object", "broadcast"} & set(counts)


@pytest.mark.dist
@on_one_to_four
def test_a_step_that_one_rank_cannot_take_is_taken_by_none(on_ranks, ranks) -> None:
    assert on_ranks(ranks, sharded.skipped_steps) == (True, 3)


@pytest.mark.dist
@on_one_to_four
def test_parameters_without_gradients(on_ranks, ranks) -> None:
    worst, message = on_ranks(ranks, sharded.missing_gradients)
    assert worst <= 2e-6
    if ranks > 1:
        assert f"has a gradient on {ranks - 1} of {ranks} ranks" in message


@pytest.mark.dist
@on_one_to_four
@pytest.mark.parametrize("variant", VARIANTS)
def test_matrices_without_gradients_do_not_move(on_ranks, ranks, variant) -> None:
    for axis in (0, 1):
        worst, still, moved = on_ranks(ranks, sharded.idle_shards, variant, axis)
        assert still and moved and worst <= 2e-6


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_with_other_parameters_get_an_error(on_ranks, ranks) -> None:
    assert "the set of sharded parameters differs between ranks" in on_ranks(ranks, sharded.other_parameters)
    messages = on_ranks(ranks, sharded.other_options)
    assert len(messages) == 4 and all("an option of the parameter groups differs" in text for text in messages)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_offloaded_shards_are_refused_by_name(on_ranks, ranks) -> None:
    assert "is on the cpu and its mesh of cuda devices" in on_ranks(ranks, sharded.offloaded)


@pytest.fixture(scope="module")
def checkpoint_of_two(on_ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    on_ranks(2, sharded.train, "saved", folder)
    return folder


@pytest.mark.dist
@on_one_to_four
def test_fsdp2_trains_and_resumes_on_another_world_size(on_ranks, ranks, checkpoint_of_two) -> None:
    whole, several, resumed = (
        on_ranks(ranks, sharded.train, how, checkpoint_of_two) for how in ("whole", "sharded", "resumed")
    )
    assert several == pytest.approx(whole, abs=1e-4)
    assert resumed == pytest.approx(whole[3:], abs=1e-4)
    assert whole[-1] != whole[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((24, 18), MatrixView()),
        ((36, 10), MatrixView(split=3, heads=2)),
        ((36, 10), MatrixView(heads=4)),
        ((10, 36), MatrixView(heads=4, axis=1)),
        ((6, 5, 7), MatrixView()),
        ((3, 4, 5, 7), MatrixView(flatten=False)),
        ((5, 4, 3, 2), MatrixView()),
        ((16, 3, 2, 2), MatrixView(flatten=True)),
        ((2, 3), MatrixView()),
    ],
    ids=str,
)
def test_pieces_put_together_are_the_matrices(shape, view, ranks):
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    expected = view.matrices(whole)
    for axis in range(1 if view.flattens(len(shape)) else len(shape)):
        layout = ShardLayout.of(torch.Size(shape), view, (Cut(axis, ranks),))
        result = torch.full(expected.shape, -1.0)
        for rank in range(ranks):
            start, stop = chunk(shape[axis], ranks, rank)
            shard = whole.narrow(axis, start, stop - start).contiguous()
            slices, views = layout.slices(rank), layout.views(shard, rank)
            assert len(slices) == len(views)
            for piece, part in zip(slices, views, strict=True):
                assert part.data_ptr() >= shard.data_ptr() and part.numel() == piece.numel
                target = result[
                    piece.matrix : piece.matrix + piece.count,
                    piece.row : piece.row + piece.rows,
                    piece.column : piece.column + piece.columns,
                ]
                assert (target == -1).all()
                target.copy_(part)
        assert torch.equal(result, expected), axis


def test_owners_are_balanced_and_whole_matrices_stay():
    shapes = [(768, 768)] * 48 + [(3072, 768), (768, 3072)] * 12
    owners = assign_owners(shapes, [[]] * len(shapes), [range(8)] * len(shapes), 8, 5)
    loads = [0] * 8
    for (m, n), owner in zip(shapes, owners, strict=True):
        loads[owner] += newton_schulz_flops(m, n, 5)
    assert max(loads) <= 1.1 * sum(loads) / 8
    assert assign_owners([(8, 8)] * 3, [[2], [], [2]], [range(3)] * 3, 3, 5) == [2, 0, 2]
    # replicas of an expert share them
    assert assign_owners([(8, 8)] * 4, [[1, 3]] * 4, [range(4)] * 4, 4, 5) == [1, 3, 1, 3]
    # others that may own some of them only
    assert assign_owners([(8, 8)] * 4, [[]] * 4, [(0, 1), (1,), (0, 1), (0, 2)], 3, 5) == [0, 1, 0, 2]


SHAPES = {
    "qkv": ((96, 20), MatrixView(split=3, heads=4)),
    "out": ((20, 32), MatrixView(heads=4, axis=1)),
    "up": ((70, 20), MatrixView()),
    "down": ((20, 70), MatrixView()),
    "stacked": ((6, 5, 7), MatrixView()),
    "vector": ((20,), MatrixView()),
}


def plain_moves(members, layouts, owner, ranks, source, target):
    """What one rank sends another, as the protocol says it: by members, slices and matrices in order."""
    return [
        (index, b, piece, number)
        for index in members
        for number, piece in enumerate(layouts[index].slices(source))
        for b in range(piece.matrix, piece.matrix + piece.count)
        if owner[index, b] == target
    ]


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1), (3, 0), (3, 2), (8, 0), (8, 5), (97, 0), (97, 19)])
def test_messages_are_those_of_the_plain_plan(ranks, rank):
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        theta = load_weights("momentum")
        slots = []
        for position, (name, (shape, view)) in enumerate(SHAPES.items()):
            parameter = distribute_tensor(torch.zeros(shape), mesh, [Shard(0)], src_data_rank=None)
            spec = shard_spec_of(parameter)
            slots.append(Slot(name, 0, position, parameter, {}, view, theta, len(shape) > 1, 5, {}, spec))
        step = Plan(slots, Team([mesh]), "bfloat16")
    finally:
        dist.destroy_process_group()
    members = range(5)
    layouts = [ShardLayout.of(torch.Size(shape), view, (Cut(0, ranks),)) for shape, view in list(SHAPES.values())[:5]]
    matrices = [(index, b) for index in members for b in range(layouts[index].matrices[0])]
    holders = []
    for index, b in matrices:
        having = {
            r
            for r in range(ranks)
            for piece in layouts[index].slices(r)
            if piece.matrix <= b < piece.matrix + piece.count
        }
        holders.append(having.pop() if len(having) == 1 else None)
    shapes = [layouts[index].matrices[1:] for index, _ in matrices]
    loads, owners = [0] * ranks, {}
    costs = [newton_schulz_flops(m, n, 5) for m, n in shapes]
    for key, holder, cost in zip(matrices, holders, costs, strict=True):
        if holder is not None:
            owners[key], loads[holder] = holder, loads[holder] + cost
    for number in sorted(range(len(matrices)), key=lambda number: -costs[number]):
        if holders[number] is None:
            least = loads.index(min(loads))
            owners[matrices[number]], loads[least] = least, loads[least] + costs[number]
    assert step.owner == owners
    for moves, counts, ends in (
        (step.parts, step.send_counts, [(rank, other) for other in range(ranks)]),
        (step.receives, step.receive_counts, [(other, rank) for other in range(ranks)]),
    ):
        expected, offset = [], 0
        for end, count in zip(ends, counts, strict=True):
            start = offset
            for index, b, piece, number in plain_moves(members, layouts, owners, ranks, *end):
                expected.append((index, b, piece, number, offset))
                offset += padded(piece.rows * piece.columns)
            assert offset - start == count
        assert [tuple(move) for move in moves] == expected


@pytest.mark.parametrize(
    ("cuts", "whole"),
    [
        ([Cut(0, 2)], True),  # three heads each
        ([Cut(0, 3)], True),
        ([Cut(0, 4)], False),
        ([Cut(0, 12)], False),
        ([Cut(0, 5)], False),  # 8 rows each, and 4
        ([Cut(0, 8)], False),
        ([Cut(0, 2, 3), Cut(0, 3)], True),
        ([Cut(0, 3, 2), Cut(0, 4)], False),
        ([Cut(1, 2)], False),
        ([Cut(0, 2, 2), Cut(1, 2)], False),
    ],
)
def test_heads_that_ranks_have_whole_are_not_cut(cuts, whole) -> None:
    layout = ShardLayout.of(torch.Size((36, 20)), MatrixView(split=3, heads=2), cuts)
    assert layout.whole is whole
    pieces = [piece for rank in range(max(cut.parts * cut.stride for cut in cuts)) for piece in layout.slices(rank)]
    assert all((piece.rows, piece.columns) == (6, 20) for piece in pieces) is whole
    assert layout.factor_axes(0) == (
        (0, 0) if whole else (None if layout.cuts_columns else 0, None if layout.cuts_rows else 1)
    )
