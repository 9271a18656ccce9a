"""Groups with the rate and the decay that they step with, and state dicts matched by name."""

from __future__ import annotations

import copy
import io
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from celo2 import FusedCelo2, MatrixView, param_groups


def model(order=("embedding", "hidden", "norm", "lm_head")):
    torch.manual_seed(0)
    parts = {
        "embedding": nn.Embedding(7, 8),
        "hidden": nn.Linear(8, 8),
        "norm": nn.LayerNorm(8),
        "lm_head": nn.Linear(8, 7),
    }
    return nn.ModuleDict({name: parts[name] for name in order})


def set_gradients(module, step, zero=False):
    for name, p in module.named_parameters():
        generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * step)
        p.grad = torch.zeros_like(p) if zero else torch.randn(p.shape, generator=generator)


def by_name(optimizer, key):
    return {name: group[key] for group in optimizer.param_groups for name in group["param_names"]}


def test_the_rate_in_a_group_is_the_rate_of_its_parameters():
    net = model()
    optimizer = FusedCelo2(net, lr=1e-3, adam_lr_mult=5.0)
    rates, rules = by_name(optimizer, "lr"), by_name(optimizer, "rule")
    assert rates["hidden.weight"] == 1e-3 and optimizer.param_groups[0]["lr"] == 1e-3
    assert {rate for name, rate in rates.items() if name != "hidden.weight"} == {5e-3}
    assert rules["hidden.weight"] == "celo2" and set(rules.values()) == {"celo2", "adamw"}
    # embeddings, head, vectors of AdamW and matrices are apart
    kinds = by_name(optimizer, "kind")
    assert len({kinds["embedding.weight"], kinds["lm_head.weight"], kinds["norm.weight"], kinds["hidden.weight"]}) == 4
    assert kinds["norm.weight"] == kinds["lm_head.bias"] == "vector"
    # what is written there is what counts: the first step of AdamW is its rate
    before = net["lm_head"].weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] *= 2
    set_gradients(net, 0)
    optimizer.step()
    moved = (net["lm_head"].weight.detach() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", ["float", "tensor"])
def test_a_group_of_adamw_is_taken_at_its_word(form):
    def rate(value):
        return torch.tensor(value) if form == "tensor" else value

    p, q, r, s = (nn.Parameter(torch.ones(4, 4)) for _ in range(4))
    groups = [
        {"params": [p], "rule": "adamw", "lr": rate(3e-4)},
        {"params": [q], "rule": "adamw"},
        {"params": [r], "rule": "adamw", "adam_lr_mult": 2.0},
        {"params": [s], "rule": "celo2"},
    ]
    optimizer = FusedCelo2(groups, lr=rate(1e-3))
    found = [float(group["lr"]) for group in optimizer.param_groups]
    assert found == pytest.approx([3e-4, 2e-2, 2e-3, 1e-3])
    assert [group["lr_mult"] for group in optimizer.param_groups] == [1.0, 20.0, 2.0, 1.0]
    for parameter in (p, q, r, s):
        parameter.grad = torch.ones(4, 4)
    optimizer.step()
    for parameter, expected in ((p, 3e-4), (q, 2e-2), (r, 2e-3)):
        torch.testing.assert_close(1 - parameter.detach(), torch.full((4, 4), expected), rtol=1e-3, atol=0)


def test_monitors_and_schedulers_see_the_rates():
    optimizer = FusedCelo2(model(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    set_gradients(model(), 0)
    optimizer.step()
    schedule.step()
    assert sorted(set(schedule.get_last_lr())) == pytest.approx([5e-4, 1e-2])


def test_a_loop_that_sets_one_rate_for_all_is_told_how():
    net = model()
    optimizer = FusedCelo2(net, lr=1e-3)
    set_gradients(net, 0)
    for group in optimizer.param_groups:
        group["lr"] = 5e-4
    with pytest.warns(UserWarning, match=r"all groups have lr=0.0005.*lr \* group\[\"lr_mult\"\]") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # once
        for rate in (0.0, 5e-4):
            other = FusedCelo2(net, lr=1e-3)
            for group in other.param_groups:
                group["lr"] = rate * group["lr_mult"]
            other.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_rate_that_cannot_be_used_is_refused_before_anything_moves(bad):
    net = model()
    optimizer = FusedCelo2(net, lr=1e-3)
    set_gradients(net, 0)
    optimizer.param_groups[1]["lr"] = bad
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="of group 1: must be finite and at least 0"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))


def test_numpy_rates_are_stored_as_floats():
    net = model()
    optimizer = FusedCelo2(net, lr=np.float64(1e-3))
    optimizer.param_groups[0]["lr"] = np.float32(1e-3)
    set_gradients(net, 0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.float64(2e-3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["lr"] == 2e-3


@pytest.mark.parametrize("weights", ["celo2", "celo2-base"])
def test_vectors_do_not_decay_unless_told_to(weights):
    for options, expected in (({}, 1.0), ({"vector_weight_decay": 0.5}, None), ({"vector_weight_decay": None}, None)):
        net = model()
        optimizer = FusedCelo2(net, lr=1e-3, weights=weights, weight_decay=0.1, **options)
        decays, rates = by_name(optimizer, "weight_decay"), by_name(optimizer, "lr")
        assert decays["hidden.weight"] == decays["embedding.weight"] == 0.1
        assert (
            decays["norm.weight"]
            == decays["hidden.bias"]
            == {1.0: 0.0}.get(expected, options.get("vector_weight_decay") or 0.1)
        )
        if weights == "celo2":
            for _ in range(100):
                set_gradients(net, 0, zero=True)
                optimizer.step()
            gain = (1 - rates["norm.weight"] * decays["norm.weight"]) ** 100
            torch.testing.assert_close(net["norm"].weight.detach(), torch.full((8,), gain), rtol=1e-4, atol=0)


def test_decay_given_by_groups_and_options():
    net = model()
    named = dict(net.named_parameters())
    groups = [
        {"params": [("embedding.weight", named["embedding.weight"]), ("norm.weight", named["norm.weight"])]},
        {"params": [("hidden.weight", named["hidden.weight"])], "weight_decay": 0.3},
        {"params": [("hidden.bias", named["hidden.bias"])], "rule": "adamw", "weight_decay": 0.4},
        {"params": [("norm.bias", named["norm.bias"])], "rule": "adamw"},
        {"params": [("lm_head.bias", named["lm_head.bias"])], "weight_decay": 0.6},
    ]
    optimizer = FusedCelo2(groups, weight_decay=0.1, adam_weight_decay=0.2, vector_weight_decay=0.05)
    assert by_name(optimizer, "weight_decay") == {
        "embedding.weight": 0.2,
        "norm.weight": 0.05,
        "hidden.weight": 0.3,
        "hidden.bias": 0.4,
        "norm.bias": 0.05,
        # the group's is that of matrices
        "lm_head.bias": 0.05,
    }
    assert "adam_weight_decay" not in optimizer.param_groups[0] and "adam_lr_mult" not in optimizer.param_groups[0]
    # the groups of one optimizer make another that is the same
    again = FusedCelo2(copy.deepcopy(optimizer).param_groups)
    for key in ("lr", "weight_decay", "rule", "kind"):
        assert by_name(again, key) == by_name(optimizer, key)


def test_a_view_on_a_mixed_group_is_for_its_matrices():
    net = model()
    optimizer = FusedCelo2([{"params": list(net.named_parameters()), "heads": 2}])
    table = {line.split()[0]: line for line in optimizer.table().splitlines()}
    assert "2 x [4, 8]" in table["hidden.weight"]


def test_overrides_of_the_routing():
    net = model()
    assert FusedCelo2(net, overrides={"hidden.*": "adamw"}).rule_of(net["hidden"].weight) == "adamw"
    for weights in ("celo2", "celo2-base"):
        optimizer = FusedCelo2(list(net.parameters()), module=net, overrides={"h*.weight": "adamw"}, weights=weights)
        assert optimizer.rule_of(net["hidden"].weight) == "adamw"
        assert 'override "h*.weight"' in optimizer.table()
    assert {g["rule"] for g in param_groups(net, overrides={"*": "celo2"})} == {"celo2"}
    with pytest.raises(ValueError, match="nothing.*matches no parameter"):
        FusedCelo2(net, overrides={"nothing.*": "adamw"})
    with pytest.raises(ValueError, match="unknown rule, allowed: celo2, adamw"):
        param_groups(net, overrides={"hidden.*": "muon"})
    with pytest.raises(ValueError, match="goes by a module's names"):
        FusedCelo2(list(net.named_parameters()), overrides={"hidden.*": "adamw"})


# state dicts


def trained(net, optimizer, steps=range(3)):
    for step in steps:
        set_gradients(net, step)
        optimizer.step()
    return net, optimizer


def assert_same(one, two):
    other = dict(two.named_parameters())
    for name, p in one.named_parameters():
        assert torch.equal(p, other[name]), name


@pytest.mark.parametrize("form", ["module", "pairs", "one group each"])
def test_another_order_is_loaded_by_name(form):
    def optimizer(net):
        params = {
            "module": net,
            "pairs": list(net.named_parameters()),
            "one group each": [{"params": [pair]} for pair in net.named_parameters()],
        }[form]
        return FusedCelo2(params, lr=1e-2, weight_decay=0.1)

    one, first = trained(*(lambda net: (net, optimizer(net)))(model()))
    two = model(("lm_head", "norm", "hidden", "embedding"))
    two.load_state_dict(one.state_dict())
    second = optimizer(two)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    trained(one, first, [3])
    trained(two, second, [3])
    assert_same(one, two)


def test_other_groups_and_wrappers_are_loaded_by_name():
    one, first = (lambda net: trained(net, FusedCelo2(net, lr=1e-2)))(model())
    for wrap in (
        lambda net: nn.ModuleDict({"module": net}),
        lambda net: torch.compile(net, backend="eager"),
        lambda net: nn.ModuleDict({"backbone": net}),
    ):
        two = model()
        two.load_state_dict(one.state_dict())
        wrapped = wrap(two)
        second = FusedCelo2([{"params": [pair]} for pair in wrapped.named_parameters()], lr=1e-2)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        kept = copy.deepcopy(first)
        assert_same_state(kept, second)


def assert_same_state(one, two):
    states = [
        {
            name.removeprefix("module.").removeprefix("_orig_mod.").removeprefix("backbone."): optimizer.state[p]
            for group in optimizer.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        }
        for optimizer in (one, two)
    ]
    assert states[0].keys() == states[1].keys()
    for name, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(value, states[1][name][key]), (name, key)


def test_other_names_are_refused_and_change_nothing():
    _, first = (lambda net: trained(net, FusedCelo2(net, lr=1e-2)))(model())
    two = nn.ModuleDict({"renamed" if name == "hidden" else name: part for name, part in model().items()})
    second = FusedCelo2(two, lr=5e-3)
    with pytest.raises(ValueError, match=r"lacks renamed.bias, renamed.weight and has hidden.bias, hidden.weight"):
        second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == 5e-3
    # without names the order is all there is
    third = FusedCelo2([{"params": list(two.parameters()), "rule": "celo2"}])
    fourth = FusedCelo2([{"params": list(two.parameters())[:-1], "rule": "celo2"}])
    with pytest.raises(ValueError, match="it has 7 parameters in 2 groups, this optimizer 6 in 2"):
        fourth.load_state_dict(third.state_dict())


def test_groups_that_were_saved_with_other_rates_do_not_become_one():
    net = model()
    apart = FusedCelo2([{"params": [pair], "lr": 1e-3 * (1 + i)} for i, pair in enumerate(net.named_parameters())])
    together = FusedCelo2(net, lr=1e-3)
    with pytest.raises(ValueError, match=r"were saved in several groups, with lr="):
        together.load_state_dict(apart.state_dict())


@pytest.mark.parametrize("form", ["module", "pairs", "tensors"])
def test_checkpoints_from_before_groups_were_split_still_load(form):
    """They had the learned rule's rate in every group, and decayed vectors with the rest of AdamW's."""
    path = Path(__file__).parents[1] / "checkpoints" / "before_groups_were_split.pt"
    saved = torch.load(path, weights_only=True)[form]
    net = nn.ModuleDict({"embedding": nn.Embedding(7, 8), "hidden": nn.Linear(8, 8), "lm_head": nn.Linear(8, 7)})
    net.load_state_dict(saved["parameters"])
    params = {"module": net, "pairs": list(net.named_parameters()), "tensors": list(net.parameters())}[form]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if form == "tensors" else "error")
        # the saved step was PyTorch's
        optimizer = FusedCelo2(params, lr=1.0, weights="celo2", backend="torch")
    optimizer.load_state_dict(saved["optimizer"])
    generator = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), saved["after"][name], rtol=0, atol=1e-7, msg=name)
    # three steps of the schedule, and AdamW's five times that
    rates = {group["rule"]: (group["lr"], group["initial_lr"]) for group in optimizer.param_groups}
    assert rates == {"celo2": pytest.approx((2.5e-3, 1e-2)), "adamw": pytest.approx((1.25e-2, 5e-2))}


@pytest.mark.parametrize("kept", ["tensor", "float"])
def test_a_tensor_rate_stays_the_same_tensor(kept):
    def rate(value):
        return torch.tensor(value) if kept == "tensor" else value

    net = model()
    _, first = trained(net, FusedCelo2(net, lr=2e-3 if kept == "tensor" else torch.tensor(2e-3)))
    second = FusedCelo2(model(), lr=rate(1e-3))
    tensors = [group["lr"] for group in second.param_groups]
    second.load_state_dict(first.state_dict())
    for group, before in zip(second.param_groups, tensors, strict=True):
        assert isinstance(group["lr"], torch.Tensor if kept == "tensor" else float)
        assert kept == "float" or group["lr"] is before
        assert float(group["lr"]) == pytest.approx(2e-3 * group["lr_mult"])


def test_views_are_compared_for_the_learned_rule_alone():
    net = model()
    first = FusedCelo2(param_groups(net, views={"hidden.weight": MatrixView(heads=2)}))
    trained(net, first, [0])
    with pytest.raises(ValueError, match="group 0 was saved with heads=2, this optimizer has 1"):
        FusedCelo2(net).load_state_dict(first.state_dict())


def test_a_model_may_have_modules_that_are_named_as_wrappers():
    def build():
        torch.manual_seed(0)
        return nn.ModuleDict(
            {
                "a": nn.ModuleDict({"module": nn.Linear(4, 4), "x": nn.Linear(4, 4)}),
                "module": nn.ModuleDict({"a": nn.ModuleDict({"x": nn.Linear(4, 4)})}),
            }
        )

    one, first = (lambda net: trained(net, FusedCelo2(net, lr=1e-2)))(build())
    two = build()
    two.load_state_dict(one.state_dict())
    second = FusedCelo2(two, lr=1e-2)
    second.load_state_dict(first.state_dict())
    trained(one, first, [3])
    trained(two, second, [3])
    assert_same(one, two)
