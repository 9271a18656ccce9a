from __future__ import annotations

import pytest
import torch
from torch import nn

from celo2 import FusedCelo2, MatrixView, param_groups


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(8, 24), "output": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.wte.weight


def _rules(groups) -> dict[str, str]:
    return {name: group["rule"] for group in groups for name, _ in group["params"]}


def test_routes_by_type_and_name():
    assert _rules(param_groups(Tied())) == {
        "wte.weight": "adamw",  # tied with the head: once
        "blocks.0.qkv.weight": "celo2",
        "blocks.0.qkv.bias": "adamw",
        "blocks.0.output.weight": "celo2",  # a block's own output projection is no head
        "blocks.0.output.bias": "adamw",
        "blocks.1.qkv.weight": "celo2",
        "blocks.1.qkv.bias": "adamw",
        "blocks.1.output.weight": "celo2",
        "blocks.1.output.bias": "adamw",
        "norm.weight": "adamw",
        "norm.bias": "adamw",
    }
    assert set(_rules(param_groups(Tied(), variant="celo2-base")).values()) == {"celo2"}


def test_a_head_tied_to_a_plain_parameter_goes_to_adamw_under_its_first_name():
    model = nn.Module()
    model.table = nn.Parameter(torch.zeros(11, 8))
    model.hidden = nn.Linear(8, 8, bias=False)
    model.head = nn.Linear(8, 11, bias=False)
    model.head.weight = model.table
    assert _rules(param_groups(model)) == {"table": "adamw", "hidden.weight": "celo2"}


@pytest.mark.parametrize("name", ["lm_head", "output", "classifier", "fc", "embed_out", "token_embedding"])
def test_names_of_heads_and_embeddings(name):
    model = nn.ModuleDict({"body": nn.Linear(4, 4, bias=False), name: nn.Linear(4, 7, bias=False)})
    assert _rules(param_groups(model)) == {"body.weight": "celo2", f"{name}.weight": "adamw"}


def test_convolutions_are_flattened_and_frozen_parameters_kept():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    model[2].weight.requires_grad_(False)
    groups = param_groups(model)
    assert _rules(groups)["0.weight"] == _rules(groups)["2.weight"] == "celo2"
    optimizer = FusedCelo2(groups, weights="momentum")
    state = optimizer.state[model[0].weight]
    assert state["row_factor"].shape == (8, 3) and state["column_factor"].shape == (27, 3)


def test_wrapped_models_are_routed_alike():
    wrapped = torch.compile(Tied(), backend="eager")
    assert isinstance(wrapped, nn.Module)
    rules = {name.removeprefix("_orig_mod."): rule for name, rule in _rules(param_groups(wrapped)).items()}
    assert rules == _rules(param_groups(Tied()))


def test_views_split_into_matrices_on_the_same_storage():
    qkv = torch.arange(24.0 * 4).view(24, 4)
    parts = MatrixView(split=3, heads=2).matrices(qkv)
    assert parts.shape == (6, 4, 4) and torch.equal(parts[1], qkv[4:8])
    out = torch.arange(4.0 * 8).view(4, 8)
    parts = MatrixView(heads=2, axis=1).matrices(out)
    assert parts.shape == (2, 4, 4) and torch.equal(parts[1], out[:, 4:])
    parts.zero_()
    assert not out.any()
    assert MatrixView(flatten=False).matrices(torch.zeros(2, 3, 4, 5)).shape == (6, 4, 5)
    assert MatrixView().matrices(torch.zeros(2, 3, 4, 5)).shape == (1, 2, 60)
    assert MatrixView().matrices(torch.zeros(2, 3, 4)).shape == (2, 3, 4)
    assert MatrixView(flatten=True).matrices(torch.zeros(2, 3, 4)).shape == (1, 2, 12)
    transposed = torch.zeros(5, 3).T
    assert MatrixView().matrices(transposed).data_ptr() == transposed.data_ptr()


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"heads": 3}, (8, 4), "axis 0 of length 8 does not divide"),
        ({"heads": 2, "axis": 1}, (8, 5), "axis 1 of length 5 does not divide"),
        ({"heads": 2, "axis": 1}, (8, 4, 2), "cut into blocks along axis 0; the columns"),
        ({"heads": 3}, (8, 4, 2), "axis 0 of length 4 does not divide"),
        ({"heads": 2}, (8,), "fewer than two axes"),
    ],
)
def test_views_that_do_not_fit(options, shape, message):
    with pytest.raises(ValueError, match=message):
        MatrixView(**options).check(torch.Size(shape), "weight")


@pytest.mark.parametrize("options", [{"heads": 0}, {"split": 1.5}, {"axis": 2}, {"flatten": 1}, {"heads": True}])
def test_view_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MatrixView(**options)


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, (1, 2), bias=False))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@pytest.mark.parametrize("gradients", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize("when", [0, 2, None])
def test_channels_last_steps_as_contiguous_does(when, gradients, state_dtype, backend):
    """Converted before construction, after two steps, or not at all with gradients that are."""
    device = "cuda" if torch.cuda.is_available() and backend == "triton" else "cpu"
    models = [convolutions().to(device), convolutions().to(device)]
    if when == 0:
        models[1].to(memory_format=torch.channels_last)
    options = {"lr": 1e-2, "state_dtype": state_dtype, "backend": backend, "ns_dtype": "float32"}
    if backend == "torch":
        del options["ns_dtype"]
    optimizers = [FusedCelo2(model, **options) for model in models]
    for step in range(4):
        if step == when:
            models[1].to(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(device)
            layout = getattr(torch, gradients) if q.ndim == 4 else torch.contiguous_format
            q.grad = p.grad.clone().to(memory_format=layout)
        for optimizer in optimizers:
            optimizer.step()
    # 8 bits round at random, by the place in memory
    limit = 5e-6 if state_dtype == "float32" else 2e-2
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=limit)
    assert when is None or not models[1][0].weight.is_contiguous()


@pytest.mark.parametrize("there", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("here", [torch.channels_last, torch.contiguous_format])
def test_checkpoints_move_between_memory_formats(here, there):
    one, two = convolutions().to(memory_format=there), convolutions().to(memory_format=here)
    first, second = FusedCelo2(one, lr=1e-2), FusedCelo2(two, lr=1e-2)

    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    for seed in range(2):
        step(one, first, seed)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    step(one, first, 2)
    step(two, second, 2)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


def test_columns_in_another_order_are_not_cut():
    weight = nn.Parameter(torch.zeros(4, 4, 3, 3).to(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="cannot be cut along its columns"):
        FusedCelo2([{"params": [weight], "heads": 2, "axis": 1}], weights="momentum")


def test_refusals():
    with pytest.raises(ValueError, match=r"unknown parameters \['nope'\]"):
        param_groups(Tied(), views={"nope": MatrixView()})
    with pytest.raises(ValueError, match="variant='celo3', allowed: celo2, celo2-base"):
        param_groups(Tied(), variant="celo3")
    with pytest.raises(TypeError, match="torch.nn.Module"):
        param_groups([torch.zeros(1)])
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        param_groups(nn.ReLU())


def test_table_prints_rule_rate_and_matrices():
    model = Tied()
    groups = param_groups(model, views={f"blocks.{i}.qkv.weight": MatrixView(split=3, heads=2) for i in range(2)})
    table = FusedCelo2(groups, lr=1e-3, weights="momentum", weight_decay=0.1).table()
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert "6 x [4, 8]" in lines["blocks.0.qkv.weight"] and "celo2  0.001" in lines["blocks.0.qkv.weight"]
    assert "adamw  0.02   0.1           0.002       nn.Embedding" in lines["wte.weight"]
    assert "adamw  0.02   0             0  " in lines["norm.weight"]
    assert len(table.splitlines()) == 2 + len(list(model.parameters()))


def test_the_scales_of_a_layer_decay_stay_in_the_groups(recwarn):
    model = Tied()
    scales = {0.5: model.blocks[0].parameters(), 1.0: model.blocks[1].parameters()}
    groups = [{"params": list(members), "lr": scale * 1e-3, "lr_scale": scale} for scale, members in scales.items()]
    optimizer = FusedCelo2(groups, module=model, weights="momentum")
    assert {group["lr"] / group["lr_mult"] / group["lr_scale"] for group in optimizer.param_groups} == {1e-3}
    assert list(recwarn) == []


def test_views_go_by_patterns():
    model = Tied()
    views = {"blocks.*.qkv.weight": MatrixView(split=3, heads=2), "blocks.1.*kv.weight": MatrixView(split=3)}
    optimizer = FusedCelo2(model, weights="momentum", views=views)
    lines = {line.split()[0]: line for line in optimizer.table().splitlines()}
    # the last that matches wins
    assert "6 x [4, 8]" in lines["blocks.0.qkv.weight"] and "3 x [8, 8]" in lines["blocks.1.qkv.weight"]
    with pytest.raises(ValueError, match=r"unknown parameters \['\*.kqv.weight'\]"):
        FusedCelo2(model, views={"*.kqv.weight": MatrixView(split=3)})
    with pytest.raises(ValueError, match="views= goes by the names of a module that is given first"):
        FusedCelo2(model.named_parameters(), views=views)


def test_a_collapsed_table_gives_one_view_for_all_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 2
            self.c_attn = nn.Linear(8, 24, bias=False)

    model = nn.ModuleDict({"h": nn.ModuleList(Block() for _ in range(3))})
    table = FusedCelo2(model, weights="momentum").table(collapse=True)
    (line,) = table.splitlines()[2:]
    assert line.startswith("h.*.c_attn.weight x3")
    hint = 'views={"h.*.c_attn.weight": MatrixView(split=3, heads=2)}'
    assert line.endswith(hint)
    # and it is one that the optimizer takes
    views = eval(hint.removeprefix("views="), {"MatrixView": MatrixView})
    assert FusedCelo2(model, weights="momentum", views=views).table(collapse=True).count("6 x [4, 8]") == 1


def test_views_split_every_matrix_of_a_batch():
    """The fused gate and up projections of experts, [E, 2 d, n]: what steps them apart steps them together."""
    torch.manual_seed(0)
    experts = torch.randn(3, 10, 8)
    fused = nn.Parameter(experts.clone())
    apart = [nn.Parameter(experts[e, 5 * h : 5 * (h + 1)].clone()) for e in range(3) for h in range(2)]
    view = MatrixView(split=2)
    assert view.shape(fused.shape) == (6, 5, 8) and view.factor_shapes(fused.shape) == ((3, 10, 3), (3, 2, 8, 3))
    assert torch.equal(view.matrices(fused)[3], apart[3])
    one = FusedCelo2([{"params": [fused], "rule": "celo2", "split": 2}], lr=1e-2)
    many = FusedCelo2([{"params": apart, "rule": "celo2"}], lr=1e-2)
    for _ in range(3):
        fused.grad = torch.randn(3, 10, 8)
        for index, p in enumerate(apart):
            p.grad = view.matrices(fused.grad)[index].clone()
        one.step()
        many.step()
    torch.testing.assert_close(view.matrices(fused.detach()), torch.stack([p.detach() for p in apart]))


@pytest.mark.parametrize("axes", [(3, 10, 8), (2, 3, 10, 8)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_of_a_batch_in_blocks_are_its_matrices(axes, ranks):
    from celo2.shard_layout import Cut, ShardLayout, chunk

    view = MatrixView(split=2, flatten=False)
    whole = torch.randn(axes)
    rows, columns = (torch.randn(shape) for shape in view.factor_shapes(whole.shape))
    for axis in range(len(axes) - 2):
        layout = ShardLayout.of(whole.shape, view, (Cut(axis, ranks),))
        assert layout.factor_axes(axis) == (axis, axis)
        for rank in range(ranks):
            start, stop = chunk(axes[axis], ranks, rank)
            shard = whole.narrow(axis, start, stop - start).contiguous()
            pieces, views = layout.slices(rank), layout.views(shard, rank)
            local = [factor.narrow(axis, start, stop - start).contiguous() for factor in (rows, columns)]
            factors = layout.factor_views(*local, rank)
            for index, piece in enumerate(pieces):
                there = slice(piece.matrix, piece.matrix + piece.count)
                assert torch.equal(views[index], view.matrices(whole)[there])
                for factor, parts in zip((rows, columns), factors, strict=True):
                    assert torch.equal(parts[index], MatrixView.factors(factor, 12 if len(axes) > 3 else 6)[there])
    with pytest.raises(ValueError, match="cut into 2 blocks, is sharded along axis"):
        ShardLayout.of(whole.shape, view, (Cut(len(axes) - 2, ranks),))
