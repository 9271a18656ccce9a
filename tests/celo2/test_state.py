"""State: where it lives, how it follows the parameters, how it is loaded, and that no refusal leaves half a step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from celo2 import FusedCelo2, MatrixView, Theta


def _model(bias: bool = True) -> nn.Module:
    torch.manual_seed(1)
    layers = {"embed": nn.Embedding(7, 6), "h": nn.Linear(6, 8, bias=bias), "conv": nn.Conv2d(2, 3, 2)}
    return nn.ModuleDict(layers)


def _gradients(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def _step(model: nn.Module, optimizer: FusedCelo2, seed: int = 0) -> None:
    _gradients(model, seed)
    optimizer.step()


def _snapshot(model: nn.Module, optimizer: FusedCelo2) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    return [tensor.detach().clone() for tensor in tensors]


def _unchanged(before: list[torch.Tensor], model: nn.Module, optimizer: FusedCelo2) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, _snapshot(model, optimizer), strict=True))


# loading


@pytest.mark.parametrize(("saved", "loaded"), [("float", "double"), ("double", "float"), ("float", "bfloat16")])
def test_state_loads_into_another_dtype(saved, loaded):
    first, second = getattr(_model(), saved)(), getattr(_model(), loaded)()
    one, two = FusedCelo2(first, weights="momentum"), FusedCelo2(second, weights="momentum")
    _step(first, one)
    two.load_state_dict(one.state_dict())
    expected = torch.float64 if loaded == "double" else torch.float32
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        for name, value in two.state[q].items():
            assert value.dtype == (torch.float32 if name == "step" else expected)
            torch.testing.assert_close(value, one.state[p][name].to(value.dtype), rtol=1e-6, atol=0)
    _step(second, two)


def test_loading_twice_and_with_hooks():
    model = _model()
    optimizer = FusedCelo2(model, weights="momentum")
    _step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    seen = []

    def halve(_: FusedCelo2, state_dict: dict) -> dict:
        state = {
            k: {n: v / 2 if n == "second_moment" else v for n, v in s.items()} for k, s in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[model["h"].weight]["second_moment"].clone())
    )
    for _ in range(2):
        optimizer.load_state_dict(saved)
    position = [id(p) for g in optimizer.param_groups for p in g["params"]].index(id(model["h"].weight))
    expected = saved["state"][position]["second_moment"] / 2
    assert torch.equal(seen[0], expected) and torch.equal(seen[1], expected)


def test_an_option_that_the_saving_version_lacked_keeps_its_value_and_bad_ones_are_refused():
    model = _model()
    optimizer = FusedCelo2(model, weights="momentum", ns_steps=3)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["ns_steps"]
    optimizer.load_state_dict(saved)
    assert all(group["ns_steps"] == 3 for group in optimizer.param_groups)
    saved["param_groups"][0]["lr"] = float("nan")
    before = _snapshot(model, optimizer)
    with pytest.raises(ValueError, match="lr=nan"):
        optimizer.load_state_dict(saved)
    assert _unchanged(before, model, optimizer) and optimizer.param_groups[0]["lr"] == 1e-3


def test_a_theta_file_may_be_renamed(random_theta):
    arrays = random_theta().arrays
    model = _model()
    one = FusedCelo2(model, weights=Theta.from_arrays(arrays, {"name": "run1"}))
    _step(model, one)
    two = FusedCelo2(model, weights=Theta.from_arrays(arrays, {"name": "copy"}))
    two.load_state_dict(one.state_dict())
    _step(model, two)


@pytest.mark.parametrize("pairs", [False, True])
def test_distributed_state_dict_round_trip_with_a_frozen_layer(pairs):
    models = [_model(), _model()]
    optimizers = []
    for model in models:
        optimizers.append(
            FusedCelo2(list(model.named_parameters()) if pairs else model.parameters(), weights="momentum")
        )
        model["h"].weight.requires_grad_(False)
    for seed in range(2):
        _gradients(models[0], seed)
        models[0]["h"].weight.grad = None
        optimizers[0].step()
    set_optimizer_state_dict(models[1], optimizers[1], get_optimizer_state_dict(models[0], optimizers[0]))
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        _gradients(model, 9)
        model["h"].weight.grad = None
        optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


# a module that changes after construction


@pytest.mark.parametrize("when", [0, 1])
def test_state_follows_a_module_that_changes_dtype_and_layout(when):
    model = _model()
    optimizer = FusedCelo2(model, weights="adam")
    for step in range(3):
        if step == when:
            model.double()
            embedding = model["embed"].weight
            embedding.data = embedding.data.T.contiguous().T
        _step(model, optimizer, step)
    assert optimizer.state[model["h"].weight]["momentum_slow"].dtype == torch.float64
    assert optimizer.state[model["embed"].weight]["exp_avg"].stride() == (1, 7)
    assert all(float(state["step"]) == 3 for state in optimizer.state.values())
    exact = _model().double()
    reference = FusedCelo2(exact, weights="adam")
    for step in range(3):
        _step(exact, reference, step)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


# nothing half done


def test_a_refusal_in_the_last_group_leaves_everything_untouched():
    model = _model()
    optimizer = FusedCelo2(model, weights="momentum")
    _step(model, optimizer)
    # the rows between the columns' axes
    model["conv"].weight.data = model["conv"].weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    before = _snapshot(model, optimizer)
    _gradients(model)
    with pytest.raises(ValueError, match=r"conv\.weight: a tensor of shape .*contiguous_format"):
        optimizer.step()
    assert _unchanged(before, model, optimizer)


def test_a_gradient_in_another_layout_is_no_reason_to_refuse(random_theta):
    weights = [nn.Parameter(torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    optimizers = [FusedCelo2([{"params": [w], "flatten": True}], weights=random_theta()) for w in weights]
    gradient = torch.randn(3, 2, 2, 2)
    weights[0].grad, weights[1].grad = gradient.to(memory_format=torch.channels_last), gradient
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(*weights)


def test_a_failed_group_leaves_no_trace():
    model = _model()
    optimizer = FusedCelo2(model, weights="momentum")
    good, bad = nn.Parameter(torch.zeros(6, 6)), nn.Parameter(torch.zeros(5, 5))
    with pytest.raises(ValueError, match="bad of shape .* does not divide"):
        optimizer.add_param_group({"params": [("good", good), ("bad", bad)], "heads": 2})
    assert good not in optimizer.state and len(optimizer.param_groups) == len(_groups(model))
    optimizer.load_state_dict(optimizer.state_dict())


def _groups(model: nn.Module) -> list[dict]:
    return FusedCelo2(model, weights="momentum").param_groups


def test_weights_of_a_group_may_change_between_steps():
    model = _model()
    optimizer = FusedCelo2(model, weights="momentum")
    for group in optimizer.param_groups:
        group["weights"] = "adam"
    _step(model, optimizer)
    assert {group["weights"].split("@")[0] for group in optimizer.param_groups} == {"adam"}
    optimizer.param_groups[0]["weights"] = "celo9"
    before = _snapshot(model, optimizer)
    _gradients(model)
    with pytest.raises(ValueError, match="weights='celo9': not a known name"):
        optimizer.step()
    assert _unchanged(before, model, optimizer)


# options resolved per group


def test_equal_arrays_with_other_cards_keep_their_own_orthogonalize(random_theta):
    p, q, r = (nn.Parameter(torch.zeros(6, 9)) for _ in range(3))
    cards = [{"orthogonalize": "true"}, {"orthogonalize": "false"}]
    thetas = [Theta.from_arrays(random_theta().arrays, card) for card in cards]
    both = FusedCelo2([{"params": [p], "weights": thetas[0]}, {"params": [q], "weights": thetas[1]}], weights="adam")
    alone = FusedCelo2([r], weights=thetas[0])
    p.grad = torch.randn(6, 9)
    q.grad, r.grad = p.grad.clone(), p.grad.clone()
    both.step()
    alone.step()
    assert torch.equal(p, r) and not torch.equal(p, q)
    assert [group["orthogonalize"] for group in both.param_groups] == [True, False]


def test_a_tensor_lr_is_each_groups_own():
    lr = torch.tensor(0.5)
    optimizer = FusedCelo2(_model(), lr=lr, weights="momentum")
    torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda _, i=i: 1 / (1 + i) for i in range(len(optimizer.param_groups))]
    )
    expected = [0.5 * group["lr_mult"] / (1 + i) for i, group in enumerate(optimizer.param_groups)]
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx(expected)


def test_an_unnamed_group_can_be_added_to_a_named_one():
    model, late = _model(), nn.Linear(4, 4)
    optimizer = FusedCelo2(model, weights="momentum")
    optimizer.add_param_group({"params": late.parameters()})
    assert all(f"group {len(FusedCelo2(model).param_groups)}, parameter {i}" in optimizer.table() for i in range(2))
    _step(late, optimizer)


def test_names_alone_route_embeddings_and_heads():
    model = nn.ModuleDict({"wte": nn.Embedding(5, 4), "h": nn.Linear(4, 4), "lm_head": nn.Linear(4, 5, bias=False)})
    optimizer = FusedCelo2(model.named_parameters(), weights="momentum")
    rules = {name: optimizer.rule_of(p) for name, p in model.named_parameters()}
    assert rules == {"wte.weight": "adamw", "h.weight": "celo2", "h.bias": "adamw", "lm_head.weight": "adamw"}
    base = Theta.from_arrays(FusedCelo2(model, weights="adam")._thetas.popitem()[1].arrays, {"variant": "celo2-base"})
    optimizer = FusedCelo2(model.named_parameters(), weights=base)
    assert {optimizer.rule_of(p) for p in model.parameters()} == {"celo2"}


def test_a_view_that_is_not_used_warns():
    p = nn.Parameter(torch.zeros(4, 4))
    with pytest.warns(UserWarning, match="matrix view of parameter 0 is not used: AdamW steps it whole"):
        FusedCelo2([{"params": [p], "rule": "adamw", "heads": 2}], weights="momentum")
    from celo2 import param_groups

    with pytest.warns(UserWarning, match=r"matrix view of embed\.weight is not used"):
        param_groups(_model(), views={"embed.weight": MatrixView(heads=7)})


def test_a_view_passes_over_the_vectors_of_its_group(random_theta):
    layers = [nn.Linear(4, 6) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    together = [layers[0].bias, layers[0].weight]
    optimizers = [
        FusedCelo2([{"params": together, "heads": 3}], weights=random_theta()),
        FusedCelo2([{"params": [layers[1].weight], "heads": 3}, {"params": [layers[1].bias]}], weights=random_theta()),
    ]
    for layer, optimizer in zip(layers, optimizers, strict=True):
        _step(layer, optimizer)
    assert torch.equal(layers[0].weight, layers[1].weight) and torch.equal(layers[0].bias, layers[1].bias)


def test_groups_can_be_used_again_with_other_weights():
    from celo2 import param_groups

    model = _model()
    groups = param_groups(model)
    for weights in ("momentum", "adam"):
        optimizer = FusedCelo2(groups, weights=weights)
        assert {group["weights"].split("@")[0] for group in optimizer.param_groups} == {weights}
        _step(model, optimizer)


def test_skipped_steps_reach_a_late_group():
    model, late = _model(), nn.Linear(4, 4)
    optimizer = FusedCelo2(model, weights="momentum")
    _gradients(model)
    model["h"].weight.grad.fill_(torch.nan)
    optimizer.step()
    optimizer.add_param_group({"params": late.parameters()})
    assert [group["skipped_steps"] for group in optimizer.param_groups] == [1] * len(optimizer.param_groups)


def test_inference_mode_does_not_spoil_later_steps():
    p = nn.Parameter(torch.randn(4, 6))
    optimizer = FusedCelo2([p], weights="momentum")
    p.grad = torch.randn(4, 6)
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 2


def test_a_checkpoint_of_an_earlier_version_goes_on(golden_folder):
    """Saved at commit ebe6f4b, before the step was one pipeline, with the parameters two steps later."""
    saved = torch.load(golden_folder / "state_dict_of_ebe6f4b.torch")
    params = {name: nn.Parameter(value.clone()) for name, value in saved["before"].items()}
    rest = [(name, p) for name, p in params.items() if "qkv" not in name]
    name = "blocks.0.qkv.weight"
    groups = [{"params": [(name, params[name])], "split": 3}, {"params": rest}]
    optimizer = FusedCelo2(groups, lr=1e-2, weights="momentum", max_grad_norm=1.0)
    optimizer.load_state_dict(saved["state_dict"])
    for gradients in saved["gradients"]:
        for key, p in params.items():
            p.grad = gradients[key].clone()
        optimizer.step()
    for key, p in params.items():
        assert not torch.equal(p, saved["before"][key])
        torch.testing.assert_close(p.detach(), saved["after"][key], rtol=0, atol=1e-6)
