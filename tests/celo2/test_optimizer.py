"""The torch.optim contract of FusedCelo2, its closed forms, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from celo2 import FusedCelo2, MatrixView, load_weights
from celo2.reference import MatrixState, VectorState, matrix_update, vector_update
from celo2.theta import DEFAULT_WEIGHTS


def _model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3))


def _loss(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 6, generator=generator)
    return model(x).square().mean() + model(x).sum(-1).sin().mean()


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = _loss(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _bits(optimizer: FusedCelo2) -> list[torch.Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.detach().clone() for p in parameters] + [
        value.clone() for p in parameters for _, value in sorted(optimizer.state[p].items())
    ]


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_trains_and_is_deterministic():
    runs = []
    for _ in range(2):
        model = _model()
        optimizer = FusedCelo2(model, lr=3e-3, weights="momentum", weight_decay=0.01)
        runs.append(_train(model, optimizer, range(60)))
    assert runs[0] == runs[1]
    assert runs[0][-1] < runs[0][0] - 0.4


@pytest.mark.parametrize("kind", ["tensors", "pairs", "groups", "generator"])
def test_parameter_forms_agree(kind):
    expected = None
    for form in ("module", kind):
        model = _model()
        params = {
            "module": lambda m=model: m,
            "tensors": lambda m=model: list(m.parameters()),
            "generator": lambda m=model: m.parameters(),
            "pairs": lambda m=model: list(m.named_parameters()),
            "groups": lambda m=model: [{"params": [p]} for p in m.parameters()],
        }[form]()
        _train(model, FusedCelo2(params, weights="momentum"), range(3))
        values = [p.detach().clone() for p in model.parameters()]
        expected = expected or values
        assert _same(values, expected)


def test_group_options_override_the_defaults():
    first, second, vector = (nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (4, 6), (5,)))
    optimizer = FusedCelo2(
        [
            {"params": [first], "lr": 0.5, "weights": "adam", "orthogonalize": False},
            {"params": [second], "rule": "adamw", "adam_lr_mult": 3.0, "weight_decay": 0.0},
            {"params": [vector], "rule": "celo2", "weight_decay": 0.1},
        ],
        lr=0.01,
        weights="momentum",
        weight_decay=0.1,
    )
    before = [p.detach().clone() for p in (first, second, vector)]
    for p in (first, second, vector):
        p.grad = torch.randn_like(p)
    optimizer.step()
    # group 0: u has RMS 1 at lr 0.5, decay 0.1
    u = (before[0] * (1 - 0.05) - first.detach()) / 0.5
    assert math.isclose(float(u.square().mean()), 1, rel_tol=1e-4)
    assert set(optimizer.state[second]) == {"step", "exp_avg", "exp_avg_sq"}
    # the first bias-corrected AdamW step is lr * mult * sign(g)
    torch.testing.assert_close(before[1] - second.detach(), 0.03 * second.grad.sign(), rtol=1e-4, atol=1e-6)
    u = (before[2] * (1 - 0.001) - vector.detach()) / 0.01
    assert math.isclose(float(u.square().mean()), 1, rel_tol=1e-3)
    assert optimizer.state[vector]["factor"].shape == (5, 3)


def test_matrix_views_equal_separate_matrices(random_theta):
    theta = random_theta()
    fused = nn.Parameter(torch.randn(12, 5))
    blocks = [nn.Parameter(block.clone()) for block in fused.detach().chunk(6)]
    one = FusedCelo2([{"params": [fused], "split": 3, "heads": 2}], weights=theta)
    many = FusedCelo2(blocks, weights=theta)
    for _ in range(3):
        fused.grad = torch.randn(12, 5)
        for block, gradient in zip(blocks, fused.grad.chunk(6), strict=True):
            block.grad = gradient.clone()
        one.step()
        many.step()
    torch.testing.assert_close(fused.detach(), torch.cat([block.detach() for block in blocks]), rtol=0, atol=2e-7)


def test_column_views_and_transposed_storage(random_theta):
    theta = random_theta()
    fused = nn.Parameter(torch.randn(5, 12))
    blocks = [nn.Parameter(block.clone()) for block in fused.detach().chunk(3, dim=1)]
    transposed = nn.Parameter(fused.detach().T.contiguous().T)
    assert not transposed.is_contiguous()
    one = FusedCelo2([{"params": [fused], "heads": 3, "axis": 1}], weights=theta)
    many = FusedCelo2(blocks, weights=theta)
    strided = FusedCelo2([{"params": [transposed], "heads": 3, "axis": 1}], weights=theta)
    for _ in range(3):
        fused.grad = torch.randn(5, 12)
        transposed.grad = fused.grad.clone()
        for block, gradient in zip(blocks, fused.grad.chunk(3, dim=1), strict=True):
            block.grad = gradient.clone()
        for optimizer in (one, many, strided):
            optimizer.step()
    torch.testing.assert_close(fused.detach(), torch.cat([block.detach() for block in blocks], 1), rtol=0, atol=2e-7)
    torch.testing.assert_close(transposed.detach(), fused.detach(), rtol=0, atol=2e-7)


def test_float64_equals_the_oracle_through_the_optimizer(random_theta):
    theta = random_theta()
    p = nn.Parameter(torch.randn(7, 9, dtype=torch.float64))
    optimizer = FusedCelo2([p], lr=0.01, weights=theta, weight_decay=0.3, max_grad_norm=0.5)
    expected, state = p.detach().clone(), MatrixState.zeros_like(p.detach())
    tensors = theta.tensors(torch.float64, p.device)
    for _ in range(4):
        p.grad = torch.randn(7, 9, dtype=torch.float64)
        coefficient = min(1.0, 0.5 / (float(p.grad.norm()) + 1e-6))
        u, state = matrix_update(tensors, expected, p.grad * coefficient, state, orthogonalize=True)
        expected = expected - 0.01 * (u + 0.3 * expected)
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-11)
    assert optimizer.state[p]["momentum_slow"].dtype == torch.float64


# closed forms: known answers


def test_momentum_with_newton_schulz_is_muon():
    p, q = (nn.Parameter(torch.zeros(16, 24)) for _ in range(2))
    ours = FusedCelo2([p], lr=1.0, weights="momentum")
    # Muon's EMA momentum is ours at momentum = 0.9 without Nesterov; it iterates in bfloat16
    muon = torch.optim.Muon([q], lr=1.0, momentum=0.9, nesterov=False, weight_decay=0.0)
    for _ in range(5):
        p.grad = torch.randn(16, 24) * 0.01
        q.grad = p.grad.clone()
        p.data.zero_()
        q.data.zero_()
        ours.step()
        muon.step()
        a, b = p.detach().flatten(), q.detach().flatten()
        assert torch.cosine_similarity(a, b, dim=0) > 0.999
        assert math.isclose(float(a.square().mean()), 1, rel_tol=1e-5)


def test_adam_is_adamws_direction():
    p, q = (nn.Parameter(torch.zeros(16, 24)) for _ in range(2))
    ours = FusedCelo2([p], lr=1.0, weights="adam")
    adam = torch.optim.AdamW([q], lr=1.0, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    for _ in range(6):
        # far from zero, where the two epsilons would differ
        p.grad = 10 * (1 + torch.rand(16, 24)) * torch.randn(16, 24).sign()
        q.grad = p.grad.clone()
        p.data.zero_()
        q.data.zero_()
        ours.step()
        adam.step()
        expected = q.detach() / q.detach().square().mean().sqrt()
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=2e-5)


def test_adamw_side_is_torch_adamw():
    p, q = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    ours = FusedCelo2([p], lr=1e-3, weights="momentum", weight_decay=0.1, adam_lr_mult=5.0, vector_weight_decay=None)
    adamw = torch.optim.AdamW([q], lr=5e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for _ in range(5):
        p.grad = torch.randn(7)
        q.grad = p.grad.clone()
        ours.step()
        adamw.step()
    assert torch.equal(p.detach(), q.detach())


# the torch.optim contract


def test_scheduler_and_tensor_lr():
    results = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        model = _model()
        optimizer = FusedCelo2(model, lr=lr, weights="momentum")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        for step in range(4):
            _train(model, optimizer, range(step, step + 1))
            schedule.step()
        assert abs(float(optimizer.param_groups[0]["lr"])) < 1e-9
        results.append([p.detach().clone() for p in model.parameters()])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_closure_and_hooks():
    model = _model()
    optimizer = FusedCelo2(model, weights="momentum")
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _loss(model, 0)
        loss.backward()
        calls.append("closure")
        return loss

    assert optimizer.step(closure).item() > optimizer.step(closure).item()
    assert calls == ["pre", "closure", "post"] * 2


def test_add_param_group_later():
    model = _model()
    optimizer = FusedCelo2(list(model[0].parameters()), weights="momentum")
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.0})
    before = model[2].weight.detach().clone()
    _train(model, optimizer, range(2))
    assert torch.equal(model[2].weight, before) and int(optimizer.state[model[2].weight]["step"]) == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_continue_bitwise(how, random_theta):
    model = _model()
    optimizer = FusedCelo2(model, weights=random_theta(), weight_decay=0.1)
    _train(model, optimizer, range(4))
    if how == "deepcopy":
        model2, optimizer2 = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        model2, optimizer2 = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        model2 = _model()
        model2.load_state_dict(model.state_dict())
        optimizer2 = FusedCelo2(model2, weights=random_theta(), lr=9.0)
        optimizer2.load_state_dict(optimizer.state_dict())
    assert _train(model, optimizer, range(4, 8)) == _train(model2, optimizer2, range(4, 8))
    assert _same(_bits(optimizer), _bits(optimizer2))


def test_state_dict_round_trip_in_another_process(tmp_path):
    model = _model()
    optimizer = FusedCelo2(model, weights="momentum", weight_decay=0.1)
    _train(model, optimizer, range(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    code = """
import sys, torch
from torch import nn
from celo2 import FusedCelo2
model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3))
optimizer = FusedCelo2(model, weights="momentum")
checkpoint = torch.load(sys.argv[1] + "/checkpoint.pt", weights_only=True)
model.load_state_dict(checkpoint["model"])
optimizer.load_state_dict(checkpoint["optimizer"])
for parameter in model.parameters():
    parameter.grad = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
optimizer.step()
torch.save([p.detach() for p in model.parameters()], sys.argv[1] + "/after.pt")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for parameter in model.parameters():
        parameter.grad = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
    optimizer.step()
    assert _same([p.detach() for p in model.parameters()], torch.load(tmp_path / "after.pt"))


def test_state_is_made_when_it_is_needed_and_survives_missing_gradients():
    model = _model()
    optimizer = FusedCelo2(model, weights="momentum")
    assert not optimizer.state
    keys = {"step", "momentum_fast", "momentum_medium", "momentum_slow", "second_moment", "row_factor", "column_factor"}
    assert set(optimizer.state[model[0].weight]) == keys
    before = _bits(optimizer)
    optimizer.step()
    assert _same(before, _bits(optimizer)) and len(optimizer.state) == 6


def test_state_dict_of_another_optimizer_is_refused(random_theta):
    model = _model()
    optimizer = FusedCelo2(model, weights="momentum")
    # makes the state
    optimizer.step()
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="was saved with weights='momentum@"):
        FusedCelo2(model, weights=random_theta()).load_state_dict(saved)
    with pytest.raises(ValueError, match="saved with rule='celo2'"):
        FusedCelo2([{**group, "rule": "adamw"} for group in _as_groups(model)], weights="momentum").load_state_dict(
            saved
        )
    other = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 4))
    with pytest.raises(
        ValueError, match=r"another model: momentum_fast of 4.weight has shape \(3, 10\), expected \(4, 10\)"
    ):
        FusedCelo2(other, weights="momentum").load_state_dict(saved)
    del saved["state"][0]
    with pytest.raises(ValueError, match="no state for parameter 0.weight"):
        FusedCelo2(model, weights="momentum").load_state_dict(saved)


def _as_groups(model: nn.Module) -> list[dict]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim < 2]}]


# low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_float32_state(dtype):
    model = _model().to(dtype)
    optimizer = FusedCelo2(model, lr=1e-3, weights="momentum")
    state_dict = None
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.step()
        if step == 1:
            state_dict = copy.deepcopy(optimizer.state_dict())
            copied = copy.deepcopy(model)
    floats = [v for state in optimizer.state.values() for v in state.values()]
    assert all(value.dtype == torch.float32 for value in floats)
    assert all(p.dtype == dtype for p in model.parameters())
    restored = FusedCelo2(copied, weights="momentum")
    restored.load_state_dict(state_dict)
    assert all(value.dtype == torch.float32 for state in restored.state.values() for value in state.values())
    for p in copied.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    restored.step()
    assert _same([p.detach() for p in model.parameters()], [p.detach() for p in copied.parameters()])


def test_bfloat16_keeps_updates_far_below_its_resolution():
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = FusedCelo2([p], lr=1e-4, weights="adam")  # bfloat16 near 1 resolves 4e-3 and 8e-3
    for _ in range(50):
        p.grad = torch.ones(64, 64, dtype=torch.bfloat16)
        optimizer.step()
    assert abs(float(p.detach().double().mean()) - (1 - 50e-4)) < 5e-4


def test_bfloat16_parameters_and_steps_round_independently():
    parameters = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(3)]
    vector = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    groups = [{"params": parameters}, {"params": [vector], "rule": "celo2"}]
    optimizer = FusedCelo2(groups, lr=1e-3, weights="adam", orthogonalize=False)
    seen = []
    for _ in range(2):
        for p in (*parameters, vector):
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen += [p.detach().flatten().clone() for p in (*parameters, vector)]
    # each is a mixture of the two neighbours of its value, and no two mixtures are alike
    assert all(len(values.unique()) == 2 for values in seen)
    assert all(not torch.equal(one, two) for i, one in enumerate(seen) for two in seen[:i])


# clipping, scaling, and gradients that are not finite


def test_max_grad_norm_equals_clip_grad_norm():
    results = []
    for fused in (True, False):
        model = _model()
        optimizer = FusedCelo2(model, lr=1e-2, weights="momentum", max_grad_norm=0.05 if fused else None)
        for step in range(4):
            optimizer.zero_grad()
            _loss(model, step).backward()
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            before = [p.grad.clone() for p in model.parameters()]
            if not fused:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            if fused:
                torch.testing.assert_close(optimizer.grad_norm, norm)
                assert _same(before, [p.grad for p in model.parameters()])
        results.append([p.detach().clone() for p in model.parameters()])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["0.weight", "0.bias", "4.weight"])
def test_non_finite_gradient_skips_the_whole_step(bad, where):
    model = _model()
    optimizer = FusedCelo2(model, weights="momentum", weight_decay=0.1, max_grad_norm=1.0)
    _train(model, optimizer, range(2))
    before = _bits(optimizer)
    optimizer.zero_grad()
    _loss(model, 3).backward()
    dict(model.named_parameters())[where].grad.view(-1)[-1] = bad
    optimizer.step()
    assert _same(before, _bits(optimizer)) and optimizer.skipped_steps == 1
    assert not torch.isfinite(optimizer.grad_norm)
    _train(model, optimizer, range(3, 4))
    assert not _same(before, _bits(optimizer)) and optimizer.skipped_steps == 1
    restored = FusedCelo2(_model(), weights="momentum")
    restored.load_state_dict(optimizer.state_dict())
    assert restored.skipped_steps == 1


def test_finite_gradients_whose_squares_overflow_are_clipped_not_skipped(random_theta):
    theta = random_theta()
    p, q = (nn.Parameter(torch.zeros(6, 5)) for _ in range(2))
    gradient = torch.randn(6, 5)
    huge, clipped = FusedCelo2([p], weights=theta), FusedCelo2([q], weights=theta)
    p.grad, q.grad = gradient * 1e25, gradient.sign() * 1000
    huge.step()
    clipped.step()
    assert huge.skipped_steps == 0 and torch.equal(p.detach(), q.detach())


def test_ns_steps_and_vectors_take_their_options(random_theta):
    """Newton-Schulz with another number of steps, and a scaled gradient of a vector, against the oracle."""
    theta = random_theta()
    tensors = theta.tensors(torch.float64, torch.device("cpu"))
    p = nn.Parameter(torch.randn(5, 7, dtype=torch.float64))
    vector = nn.Parameter(torch.randn(9, dtype=torch.float64))
    optimizer = FusedCelo2(
        [{"params": [p]}, {"params": [vector], "rule": "celo2"}], lr=0.1, weights=theta, ns_steps=2, max_grad_norm=0.1
    )
    p.grad, vector.grad = torch.randn_like(p), torch.randn_like(vector)
    coefficient = 0.1 / (float(nn.utils.get_total_norm([p.grad, vector.grad])) + 1e-6)
    u, _ = matrix_update(
        tensors, p.detach(), p.grad * coefficient, MatrixState.zeros_like(p.detach()), orthogonalize=True, ns_steps=2
    )
    w, _ = vector_update(tensors, vector.detach(), vector.grad * coefficient, VectorState.zeros_like(vector.detach()))
    expected = p.detach() - 0.1 * u, vector.detach() - 0.1 * w
    optimizer.step()
    torch.testing.assert_close(p.detach(), expected[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(vector.detach(), expected[1], rtol=0, atol=1e-11)


def test_found_inf_alone_skips():
    model = _model()
    optimizer = FusedCelo2(model, weights="momentum")
    _train(model, optimizer, range(1))
    before = _bits(optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert _same(before, _bits(optimizer)) and optimizer.skipped_steps == 1
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not _same(before, _bits(optimizer)) and optimizer.skipped_steps == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, max_lr=[group["lr"] for group in o.param_groups], total_steps=6, cycle_momentum=False
        ),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
            milestones=[2],
        ),
    ],
)
def test_other_schedulers(make):
    model = _model()
    optimizer = FusedCelo2(model, lr=1e-3, weights="momentum")
    schedule = make(optimizer)
    rates = []
    for step in range(5):
        _train(model, optimizer, range(step, step + 1))
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert len(set(rates)) >= 4
    # AdamW's groups follow, at their multiple
    base = {round(group["lr"] / group["lr_mult"], 12) for group in optimizer.param_groups}
    assert len(base) == 1 and {group["lr_mult"] for group in optimizer.param_groups} == {1.0, 20.0}


def test_huge_float64_gradients_are_finite():
    p = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = FusedCelo2([p], weights="momentum", max_grad_norm=1.0)
    p.grad = torch.full((3, 4), 1e200, dtype=torch.float64)
    optimizer.step()
    assert optimizer.skipped_steps == 0 and p.detach().abs().min() > 0


def test_low_precision_norms_are_float32():
    p = nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))
    optimizer = FusedCelo2([p], weights="momentum")
    p.grad = torch.linspace(0.1, 1.7, 10).to(torch.bfloat16)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, p.grad.float().norm())


def test_grad_scaler_unscales_and_skips():
    plain, scaled = _model(), _model()
    reference = FusedCelo2(plain, weights="momentum", max_grad_norm=0.1)
    optimizer = FusedCelo2(scaled, weights="momentum", max_grad_norm=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        _train(plain, reference, range(step, step + 1))
        optimizer.zero_grad()
        scaler.scale(_loss(scaled, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    for first, second in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    before = _bits(optimizer)
    scaler.scale(_loss(scaled, 9) * float("inf")).backward()
    scaler.step(optimizer)
    assert _same(before, _bits(optimizer)) and optimizer.skipped_steps == 1


# odd parameters


def test_scalars_vectors_and_empty_parameters():
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((), (1,), (4,), (0, 3), (0,), (1, 1), (2, 3, 4))]
    optimizer = FusedCelo2([{"params": parameters, "rule": "celo2"}], weights="momentum")
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in parameters)
    assert optimizer.state[parameters[-1]]["row_factor"].shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr=-0.001: must be finite and at least 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": torch.ones(2)}, "real 0-d tensor"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"adam_lr_mult": float("inf")}, "adam_lr_mult=inf"),
        ({"adam_betas": (0.9, 1.0)}, r"adam_betas\[1\]=1.0: must be less than 1"),
        ({"adam_betas": (0.9,)}, "must be two numbers"),
        ({"adam_eps": -1e-8}, "adam_eps"),
        ({"adam_weight_decay": -0.1}, "adam_weight_decay"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: must be finite and greater than 0"),
        ({"ns_steps": 0}, "ns_steps=0"),
        ({"ns_steps": 2.5}, "ns_steps=2.5"),
        ({"orthogonalize": "yes"}, "orthogonalize='yes'"),
        ({"weights": "celo9"}, "weights='celo9': not a known name"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        FusedCelo2(_model(), **({"weights": "momentum"} | options))
    if "weights" not in options:
        with pytest.raises(ValueError, match=message):
            FusedCelo2([{"params": list(_model().parameters()), **options}], weights="momentum")


def test_default_weights_are_the_bundled_celo2():
    assert FusedCelo2(_model()).param_groups[0]["weights"] == load_weights(DEFAULT_WEIGHTS["celo2"]).label


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda p: [{"params": [p], "rule": "sgd"}], ValueError, "rule='sgd', allowed: auto, celo2, adamw"),
        (lambda p: [p, p], ValueError, "twice in one group"),
        (lambda p: [{"params": [p]}, {"params": [p]}], ValueError, "more than one parameter group"),
        (lambda p: [torch.zeros(2, 2, dtype=torch.int64)], ValueError, "dtype torch.int64; allowed"),
        (lambda p: [torch.zeros(2, 2, dtype=torch.complex64)], ValueError, "dtype torch.complex64"),
        (lambda p: [torch.eye(2).to_sparse()], ValueError, "layout torch.sparse_coo"),
        (lambda p: ["weight"], TypeError, "is a str, expected a tensor"),
        (lambda p: [], ValueError, "empty parameter list"),
        (lambda p: [{"params": {p}}], TypeError, "come in a set"),
        (lambda p: [{"lr": 1.0}], TypeError, "a parameter group needs params="),
        (lambda p: [{"params": nn.Linear(2, 2)}], TypeError, r"got Linear; pass module.named_parameters\(\)"),
        (lambda p: [{"params": [p], "heads": 3}], ValueError, "does not divide"),
    ],
)
def test_refused_parameters(params, error, message):
    with pytest.raises(error, match=message):
        FusedCelo2(params(nn.Parameter(torch.randn(4, 4))), weights="momentum")


def test_refused_gradients():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = FusedCelo2(embedding, weights="momentum")
    embedding(torch.tensor([1])).sum().backward()
    before = _bits(optimizer)
    with pytest.raises(ValueError, match="gradient of weight, .* is sparse .* sparse=False"):
        optimizer.step()
    assert _same(before, _bits(optimizer))
    meta = nn.Parameter(torch.zeros(2, 2, device="meta"))
    optimizer = FusedCelo2([("weight", meta)], weights="momentum")
    meta.grad = torch.zeros(2, 2, device="meta")
    with pytest.raises(ValueError, match="gradient of weight, .* meta tensor"):
        optimizer.step()


def test_shards_that_cannot_be_stepped_are_refused(tmp_path):
    flat = nn.Parameter(torch.randn(8))
    flat._is_flat_param = True
    with pytest.raises(ValueError, match="FSDP1 flat parameter.*fully_shard"):
        FusedCelo2([flat], weights="momentum")
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1))
        partial = nn.Parameter(DTensor.from_local(torch.zeros(4, 4), mesh, [Partial(), Replicate()]))
        with pytest.raises(ValueError, match=r"parameter 0 of shape \(4, 4\).* only Shard and Replicate are supported"):
            FusedCelo2([partial], weights="momentum")
        line = init_device_mesh("cpu", (1,))
        kernel = nn.Parameter(distribute_tensor(torch.zeros(4, 2, 3, 3), line, [Shard(1)]))
        with pytest.raises(ValueError, match="flattened to one matrix, is sharded along axis 1: shard axis 0"):
            FusedCelo2([{"params": [kernel], "flatten": True, "rule": "celo2"}], weights="momentum")
        # whole on every rank: stepped as a plain tensor
        shapes = [(4, 6), (5,)]
        values = [torch.randn(shape) for shape in shapes]
        both = [nn.Parameter(distribute_tensor(value.clone(), line, [Replicate()])) for value in values]
        alone = [nn.Parameter(value.clone()) for value in values]
        for chosen in (both, alone):
            optimizer = FusedCelo2([{"params": chosen, "rule": "celo2"}], weights="momentum", max_grad_norm=0.1)
            for p, value in zip(chosen, values, strict=True):
                p.grad = distribute_tensor(value.clone(), line, [Replicate()]) if chosen is both else value.clone()
            optimizer.step()
        for p, q in zip(both, alone, strict=True):
            assert torch.equal(p.detach().full_tensor(), q.detach())
        columns = nn.Parameter(distribute_tensor(torch.zeros(4, 4), line, [Shard(1)]))
        with pytest.raises(
            ValueError, match="state_dtype='int8' is not there for parameters whose columns are sharded"
        ):
            FusedCelo2([columns], weights="momentum", state_dtype="int8")
        transposed = torch.zeros(6, 4).t()
        lying = nn.Parameter(
            DTensor.from_local(transposed, line, [Shard(0)], run_check=False, shape=(4, 6), stride=transposed.stride())
        )
        with pytest.raises(ValueError, match="state_dtype='int8' needs contiguous shards"):
            FusedCelo2([lying], weights="momentum", state_dtype="int8")
    finally:
        destroy_process_group()
    with pytest.raises(ValueError, match="comm_dtype='float8', allowed: auto, float16, bfloat16, float32"):
        FusedCelo2([nn.Parameter(torch.zeros(2, 2))], comm_dtype="float8")


def test_options_under_their_names_before_warn():
    with pytest.warns(UserWarning, match="wire_dtype= is comm_dtype= now"):
        optimizer = FusedCelo2([nn.Parameter(torch.zeros(2, 2))], wire_dtype="float32")
    assert optimizer.comm_dtype == "float32"
    with pytest.warns(UserWarning, match="split_over= is zero1_mesh= now"), pytest.raises(TypeError, match="a str"):
        FusedCelo2([nn.Parameter(torch.zeros(2, 2))], split_over="mesh")


def test_unknown_group_options_warn():
    with pytest.warns(UserWarning, match="'wieght_decay' is not used .* did you mean 'weight_decay'"):
        FusedCelo2([{"params": [nn.Parameter(torch.zeros(2, 2))], "wieght_decay": 0.1}], weights="momentum")


def test_a_failed_group_leaves_the_optimizer_usable():
    model = _model()
    optimizer = FusedCelo2(model, weights="momentum")
    with pytest.raises(ValueError, match="does not divide"):
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.zeros(5, 5)))], "heads": 2})
    _train(model, optimizer, range(2))
    assert len(optimizer.param_groups) == 2


def test_views_are_kept_in_the_state_dict():
    view = MatrixView(split=3, heads=2)
    p = nn.Parameter(torch.randn(12, 4))
    optimizer = FusedCelo2([{"params": [p], "split": view.split, "heads": view.heads}], weights="momentum")
    assert optimizer.state[p]["row_factor"].shape == (12, 3)
    with pytest.raises(ValueError, match="saved with split=3"):
        FusedCelo2([p], weights="momentum").load_state_dict(optimizer.state_dict())
