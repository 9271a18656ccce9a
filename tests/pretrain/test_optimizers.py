"""The optimizers of the harness: routing, rates, clipping, skipping."""

import math
from pathlib import Path

import pytest
import torch

from celo2.pretrain.model import GPT, GPTConfig
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.recipes import OPTS, recipe_for

VELO = Path(__file__).parents[1] / "golden" / "velo_small.theta.state"
CONFIG = GPTConfig("gpt2", n_layer=2, n_head=2, head_dim=8, context=16, vocab_size=31, bias=True)


def weights_of(opt: str) -> str | None:
    """VeLO has no weights of its own."""
    return str(VELO) if opt == "velo" else None


def build(opt: str, **changes: object) -> tuple[GPT, Optimizers]:
    import dataclasses

    model = GPT(CONFIG)
    model.init_weights(0)
    recipe = dataclasses.replace(recipe_for("nano", opt), **changes)
    return model, Optimizers(opt, recipe, model, weights_of(opt), num_steps=100)


def backward(model: GPT, scale: float = 1.0) -> torch.Tensor:
    tokens_BT = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
    (loss * scale).backward()
    return loss.detach()


@pytest.mark.parametrize("opt", OPTS)
def test_every_parameter_is_stepped_once(opt: str) -> None:
    model, optimizers = build(opt)
    assert sum(optimizers.parameters_by_rule().values()) == model.num_params()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm = optimizers.step(backward(model))
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if opt in ("celo2", "celo2-base"):
        assert norm == pytest.approx(float(expected), rel=1e-5)
    assert norm > 0
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter.detach(), before[name]), name
    optimizers.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hidden_matrices_go_to_the_method() -> None:
    model, optimizers = build("celo2")
    hidden = sum(p.numel() for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2)
    assert optimizers.parameters_by_rule()["celo2"] == hidden
    assert build("muon")[1].parameters_by_rule() == {"muon": hidden, "adamw": model.num_params() - hidden}
    assert build("adamw")[1].parameters_by_rule() == {"adamw": model.num_params()}
    assert build("celo2-base")[1].parameters_by_rule() == {"celo2": model.num_params()}


@pytest.mark.parametrize("opt", OPTS)
def test_state_bytes_are_those_of_the_state(opt: str) -> None:
    model, optimizers = build(opt)
    predicted = optimizers.state_bytes()
    optimizers.step(backward(model))
    states = [state for member in optimizers.members for state in member.state.values()]
    tensors = [(name, value) for state in states for name, value in state.items() if torch.is_tensor(value)]
    actual = sum(value.numel() * value.element_size() for _, value in tensors)
    assert predicted == actual


@pytest.mark.parametrize("opt", OPTS)
def test_set_lr_scales_every_peak(opt: str) -> None:
    _, optimizers = build(opt)
    groups = [group for member in optimizers.members for group in member.param_groups]
    peaks = [group["lr"] for group in groups]
    optimizers.set_lr(0.25)
    optimizers.set_lr(0.5)
    assert [group["lr"] for group in groups] == [0.5 * peak for peak in peaks]


def test_muon_has_two_peaks_and_adamw_decays_matrices_only() -> None:
    _, muon = build("muon")
    assert muon.members[0].param_groups[0]["lr"] == 2e-2
    assert muon.members[1].param_groups[0]["lr"] == 3e-3
    _, adamw = build("adamw", weight_decay=0.1)
    decays = {tuple(p.ndim for p in g["params"]): g["weight_decay"] for g in adamw.members[0].param_groups}
    assert {(set(dims) == {1}): decay for dims, decay in decays.items()} == {True: 0.0, False: 0.1}


@pytest.mark.parametrize("opt", OPTS)
def test_a_gradient_that_is_not_finite_steps_nothing(opt: str) -> None:
    model, optimizers = build(opt)
    optimizers.step(backward(model))
    before = [p.detach().clone() for p in model.parameters()]
    states = [
        value.clone()
        for m in optimizers.members
        for s in m.state.values()
        for value in s.values()
        if torch.is_tensor(value)
    ]
    assert not math.isfinite(optimizers.step(backward(model, math.inf)))
    assert all(torch.equal(p.detach(), old) for p, old in zip(model.parameters(), before, strict=True))
    after = [
        value for m in optimizers.members for s in m.state.values() for value in s.values() if torch.is_tensor(value)
    ]
    assert all(torch.equal(new, old) for new, old in zip(after, states, strict=True))


def test_clip_is_applied_to_adamw() -> None:
    model, optimizers = build("adamw", max_grad_norm=1e-3)
    backward(model)
    norm = optimizers.step()
    clipped = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    assert norm > 0.1
    assert clipped == pytest.approx(1e-3, rel=1e-2)


def test_velo_steps_by_its_horizon_and_the_loss() -> None:
    def first_step(num_steps: int, loss: float) -> torch.Tensor:
        model = GPT(CONFIG)
        model.init_weights(0)
        optimizers = Optimizers("velo", recipe_for("nano", "velo"), model, str(VELO), num_steps=num_steps)
        for _ in range(3):
            # the losses of two steps do not show in the features yet
            backward(model)
            optimizers.step(torch.tensor(loss))
            loss *= 2
        return model.blocks[0].mlp.up.weight.detach()

    assert not torch.equal(first_step(100, 4.0), first_step(10, 4.0))
    model, optimizers = build("velo")
    backward(model)
    with pytest.raises(ValueError, match="loss"):
        optimizers.step()


def test_newton_schulz_may_be_switched() -> None:
    def orthogonalised(opt: str, **changes: object) -> set[bool]:
        groups = build(opt, **changes)[1].members[0].param_groups
        return {group["orthogonalize"] for group in groups if group["rule"] == "celo2"}

    assert orthogonalised("celo2") == {True} and orthogonalised("celo2-base") == {False}
    assert orthogonalised("celo2", newton_schulz="off") == {False}
    assert orthogonalised("celo2-base", newton_schulz="on") == {True}


def test_theta_is_the_bundled_one_by_default_and_may_be_given(random_theta, tmp_path) -> None:
    assert build("celo2")[1].theta.name == "celo2-lm"
    assert build("celo2-base")[1].theta.name == "celo2-base"
    path = tmp_path / "mine.safetensors"
    random_theta().save(path)
    model = GPT(CONFIG)
    model.init_weights(0)
    assert Optimizers("celo2", recipe_for("nano", "celo2"), model, str(path)).theta == random_theta()


def test_refusals() -> None:
    model = GPT(CONFIG)
    with pytest.raises(ValueError, match="unknown optimizer 'sgd': choose one of celo2, celo2-base, adamw, muon, velo"):
        Optimizers("sgd", recipe_for("nano", "adamw"), model)
    with pytest.raises(ValueError, match="--weights momentum belongs to --opt celo2, celo2-base or velo"):
        Optimizers("adamw", recipe_for("nano", "adamw"), model, "momentum")
    with pytest.raises(ValueError, match="VeLO has no weights of its own"):
        Optimizers("velo", recipe_for("nano", "velo"), model, num_steps=3)
    with pytest.raises(TypeError, match="needs the number of steps"):
        Optimizers("velo", recipe_for("nano", "velo"), model, str(VELO))
    with pytest.raises(ValueError, match="--zero1 belongs to --opt celo2 or celo2-base, not to muon"):
        Optimizers("muon", recipe_for("nano", "muon"), model, zero1_mesh=object())


@pytest.mark.parametrize("opt", OPTS)
def test_table_has_a_line_for_like_blocks(opt: str) -> None:
    table = build(opt)[1].table()
    assert "blocks.*.mlp.up.weight x2" in table
    assert "token_embedding.weight " in table
    assert len(table.splitlines()) == 2 + 2 + 12 + 2
