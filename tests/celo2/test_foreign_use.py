"""What other people's trainers do to an optimizer: ambient settings, options of other optimizers, paths of weights."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from celo2 import FusedCelo2, Theta, load_weights


def stepped(context=None, **options):
    """Parameters after three steps, made within a context."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 7))
    optimizer = FusedCelo2(model, lr=1e-2, weights=options.pop("weights", "celo2"), **options)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        if context is None:
            optimizer.step()
        else:
            with context:
                optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", ["celo2", "celo2-base"])
def test_autocast_does_not_reach_into_the_step(weights, dtype):
    expected = stepped(weights=weights)
    found = stepped(torch.autocast("cpu", dtype=dtype), weights=weights)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_closure_keeps_its_autocast():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = FusedCelo2([p], lr=1e-2)
    seen = []

    def closure():
        loss = (p @ p).sum()
        seen.append((p @ p).dtype)
        loss.backward()
        return loss.detach()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert math.isfinite(float(optimizer.step(closure)))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_the_default_dtype_changes_nothing(state_dtype):
    expected = stepped(state_dtype=state_dtype)
    before = torch.get_default_dtype()

    class Double:
        def __enter__(self):
            torch.set_default_dtype(torch.float64)

        def __exit__(self, *_):
            torch.set_default_dtype(before)

    found = stepped(Double(), state_dtype=state_dtype)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_options_of_other_optimizers_are_explained():
    p = nn.Parameter(torch.zeros(4, 4))
    for options, expected in (
        ({"betas": (0.9, 0.95)}, "takes adam_betas="),
        ({"eps": 1e-8}, "takes adam_eps="),
        ({"maximize": True}, "takes a negated loss"),
        ({"lrr": 1}, "has no option 'lrr'"),
    ):
        with pytest.raises(TypeError, match=expected):
            FusedCelo2([p], **options)
    FusedCelo2([p], fused=True, foreach=False, capturable=True, maximize=False, amsgrad=False)


def test_seeds_of_rounding_differ_between_positions_and_steps():
    from celo2.stochastic_rounding import mix64, rounding_seed

    assert len({rounding_seed(position, step) for position in range(40) for step in range(40)}) == 1600
    # the seeds of the state, as the step makes them
    assert len({mix64(mix64(position) ^ step) for position in range(40) for step in range(40)}) == 1600
    runs = []
    for order in ((0, 1), (1, 0)):
        torch.manual_seed(0)
        values = [torch.randn(16, 16), torch.randn(16, 16)]
        params = [nn.Parameter(values[i].clone()) for i in order]
        optimizer = FusedCelo2(params, lr=1e-2, state_dtype="bfloat16", orthogonalize=False)
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
        runs.append([optimizer.state[p]["momentum_slow"] for p in params])
    # equal gradients, at two positions: other bits
    assert not torch.equal(runs[0][0], runs[0][1])


def test_a_tensor_of_somebody_else():
    p, foreign = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(3, 3))
    optimizer = FusedCelo2([p])
    with pytest.raises(ValueError, match=r"a tensor of shape \(3, 3\) is not a parameter"):
        optimizer.rule_of(foreign)
    assert foreign not in optimizer.state and optimizer.rule_of(p) == "celo2"


def test_the_norm_is_that_of_the_last_step():
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = FusedCelo2([p])
    p.grad = torch.ones(4, 4)
    optimizer.step()
    assert float(optimizer.grad_norm) == 4
    p.grad = None
    optimizer.step()
    assert optimizer.grad_norm is None


def test_weights_by_folder_and_home(tmp_path, monkeypatch):
    theta = load_weights("celo2-base")
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="the folder holds no .safetensors"):
        load_weights("runs/mine")
    load_weights("adam").save(folder / "another.safetensors")
    theta.save(folder / "theta.safetensors")
    # a path that exists, and not the hub's
    assert load_weights("runs/mine").sha256 == theta.sha256
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_weights("~/runs/mine/theta.safetensors").sha256 == theta.sha256
    assert (
        FusedCelo2([nn.Parameter(torch.zeros(4, 4))], weights="~/runs/mine").param_groups[0]["weights"] == theta.label
    )


@pytest.mark.needs("huggingface_hub")
def test_the_hubs_cache_serves_without_a_network(tmp_path):
    """As a process: the hub's client reads its settings when it is imported."""
    import os
    import subprocess
    import sys

    commit = "0" * 40
    repository = tmp_path / "models--owner--mytheta"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    theta: Theta = load_weights("celo2-base")
    theta.save(snapshot / "theta.safetensors")
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    program = "from celo2 import load_weights; print(load_weights('owner/{}').sha256)"
    found = subprocess.run(
        [sys.executable, "-c", program.format("mytheta")], env=environment, capture_output=True, text=True
    )
    assert found.stdout.strip() == theta.sha256, found.stderr
    missing = subprocess.run(
        [sys.executable, "-c", program.format("other")], env=environment, capture_output=True, text=True
    )
    assert missing.returncode == 1 and "weights='owner/other' could not be fetched" in missing.stderr


# wrappers that change what is in the groups


def routed():
    torch.manual_seed(0)
    return nn.ModuleDict({"embedding": nn.Embedding(7, 8), "hidden": nn.Linear(8, 8), "lm_head": nn.Linear(8, 7)})


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None


def test_state_is_lazy_and_made_again_when_it_was_cleared():
    expected, model = routed(), routed()
    optimizers = [FusedCelo2(m, lr=1e-2) for m in (expected, model)]
    assert not optimizers[1].state and optimizers[1].state_dict()["state"] == {}
    optimizers[1].state.clear()
    for m, optimizer in zip((expected, model), optimizers, strict=True):
        for step in range(2):
            set_gradients(m, step)
            optimizer.step()
    optimizers[1].state.clear()
    for m, optimizer in zip((expected, model), optimizers, strict=True):
        set_gradients(m, 2)
        optimizer.step()
    # from nothing, as a new optimizer would
    assert float(optimizers[1].state[model["hidden"].weight]["step"]) == 1
    assert float(optimizers[0].state[expected["hidden"].weight]["step"]) == 3


def test_parameters_that_are_replaced_in_their_group():
    """As accelerate does under FSDP2: the rule belongs to the place, and the state follows the parameter."""
    expected, model = routed(), routed()
    first, second = FusedCelo2(expected, lr=1e-2), FusedCelo2(model, lr=1e-2)
    rules = [second.rule_of(p) for p in model.parameters()]
    replaced = {}
    for module in model.values():
        for name, p in list(module.named_parameters(recurse=False)):
            replaced[p] = nn.Parameter(p.detach().clone())
            setattr(module, name, replaced[p])
    for group in second.param_groups:
        group["params"] = [replaced[p] for p in group["params"]]
    for step in range(2):
        for m, optimizer in ((expected, first), (model, second)):
            set_gradients(m, step)
            optimizer.step()
    assert [second.rule_of(p) for p in model.parameters()] == rules
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.parameters(), strict=True))
    # nothing is kept of what is gone, also when it had state
    assert set(second.state) == set(model.parameters())
    again = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for group in second.param_groups:
        group["params"] = [again[p] for p in group["params"]]
    for p in again.values():
        p.grad = torch.ones_like(p)
    second.step()
    assert set(second.state) == set(again.values())


def test_a_parameter_that_is_unfrozen_later_is_trained():
    model = routed()
    model["hidden"].weight.requires_grad_(False)
    optimizer = FusedCelo2(model, lr=1e-2)
    before = model["hidden"].weight.detach().clone()
    set_gradients(model, 0)
    optimizer.step()
    assert torch.equal(model["hidden"].weight, before) and model["hidden"].weight not in optimizer.state
    saved = optimizer.state_dict()
    other = FusedCelo2(model, lr=1e-2)
    other.load_state_dict(saved)
    model["hidden"].weight.requires_grad_(True)
    for each in (optimizer, other):
        set_gradients(model, 1)
        each.step()
        assert float(each.state[model["hidden"].weight]["step"]) == 1
    assert not torch.equal(model["hidden"].weight, before)


def test_a_state_dict_from_before_the_first_step():
    model = routed()
    fresh = FusedCelo2(model, lr=1e-2).state_dict()
    optimizer = FusedCelo2(model, lr=1e-3)
    set_gradients(model, 0)
    optimizer.step()
    optimizer.load_state_dict(fresh)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 1e-2
    import copy
    import pickle

    set_gradients(model, 1)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        parameters = [p for group in other.param_groups for p in group["params"]]
        assert [float(other.state[p]["step"]) for p in parameters] == [1.0] * len(parameters)
        other.state.clear()
        assert "step" in other.state[parameters[0]]
    assert optimizer.state[nn.Parameter(torch.zeros(2, 2))] == {} and len(optimizer.state) == 5


def test_four_axes_and_more_are_one_matrix_wherever_they_come_from():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv3d(2, 4, 2), nn.Conv2d(8, 4, 1))
    experts = nn.Parameter(torch.zeros(5, 6, 7))
    for params in (model.named_parameters(), model.parameters(), model):
        table = FusedCelo2(params).table()
        assert "1 x [8, 27]" in table and "1 x [4, 16]" in table and "1 x [4, 8]" in table
    assert "5 x [6, 7]" in FusedCelo2([("experts", experts)]).table()
    kernels = [("kernel", nn.Parameter(torch.zeros(8, 3, 3, 3)))]
    assert "24 x [3, 3]" in FusedCelo2([{"params": kernels, "flatten": False}]).table()


@pytest.mark.parametrize("flatten", [False, True, None])
def test_groups_that_were_saved_with_another_default_load(flatten):
    """`flatten` was False by default; what counts is what it comes to."""
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = FusedCelo2([p])
    p.grad = torch.ones(4, 6)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["flatten"] = flatten
    FusedCelo2([p]).load_state_dict(saved)
    kernel = nn.Parameter(torch.ones(4, 6, 2, 2))
    optimizer = FusedCelo2([kernel])
    kernel.grad = torch.ones_like(kernel)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["flatten"] = flatten
    if flatten is False:
        with pytest.raises(ValueError, match="saved with flatten=False"):
            FusedCelo2([kernel]).load_state_dict(saved)
    else:
        FusedCelo2([kernel]).load_state_dict(saved)


# trainers that hand over tensors or groups, and no names


def rules_of(optimizer):
    return {p: (optimizer.rule_of(p), group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def test_bare_tensors_are_warned_of_once_and_routed_by_the_module():
    model = routed()
    with pytest.warns(UserWarning, match="3 matrices came without names.*module=model") as caught:
        FusedCelo2(model.parameters())
    assert len(caught) == 1 and caught[0].filename == __file__
    expected = rules_of(FusedCelo2(model))
    layers = [
        {"params": [model["embedding"].weight], "lr": 3e-4},
        {"params": list(model["hidden"].parameters()), "weight_decay": 0.1},
        {"params": list(model["lm_head"].parameters())},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for params in (model.parameters(), list(model.named_parameters()), layers):
            optimizer = FusedCelo2(params, module=model)
            found = rules_of(optimizer)
            assert {p: rule for p, (rule, _) in found.items()} == {p: rule for p, (rule, _) in expected.items()}
        # a trainer's rate is the learned rule's
        assert found[model["embedding"].weight] == ("adamw", 20 * 3e-4)
        decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decays[model["hidden"].weight] == 0.1 and decays[model["lm_head"].weight] == 0.0
        # a matrix or table of each, and the biases of two
        assert "lm_head.weight" in optimizer.table() and len(optimizer.param_groups) == 5
        # what a group says of its rule stands
        said = FusedCelo2([{"params": model.parameters(), "rule": "celo2"}], module=model)
        assert {rule for rule, _ in rules_of(said).values()} == {"celo2"}
        FusedCelo2(model.parameters(), weights="celo2-base")
    with pytest.raises(
        ValueError, match=r"a group has a tensor of shape \(2, 2\) that is not a parameter of the module given"
    ):
        FusedCelo2([nn.Parameter(torch.zeros(2, 2))], module=model)


def test_a_model_trains_the_same_through_groups_without_names():
    losses = []
    for way in ("module", "groups"):
        model = routed()
        params = model if way == "module" else [{"params": [p]} for p in model.parameters()]
        optimizer = FusedCelo2(params, lr=1e-2, **({} if way == "module" else {"module": model}))
        run = []
        for step in range(5):
            tokens = torch.randint(7, (4, 8), generator=torch.Generator().manual_seed(step))
            logits = model["lm_head"](model["hidden"](model["embedding"](tokens[:, :-1])).relu())
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(float(loss.detach()))
        losses.append(run)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("rate", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_rate_that_was_set_to_no_number_is_refused_and_changes_nothing(rate):
    parameter = nn.Parameter(torch.randn(8, 8))
    optimizer = FusedCelo2([("hidden.weight", parameter)], lr=1e-2)
    parameter.grad = torch.randn(8, 8)
    optimizer.step()
    before = [value.clone() for value in (parameter.detach(), *optimizer.state[parameter].values())]
    for name, value in (("lr", rate), ("weight_decay", math.nan), ("max_grad_norm", math.inf)):
        kept = optimizer.param_groups[0][name]
        optimizer.param_groups[0][name] = value
        with pytest.raises(ValueError, match=f"{name}=.*: must be finite"):
            optimizer.step()
        optimizer.param_groups[0][name] = kept
    after = (parameter.detach(), *optimizer.state[parameter].values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimizer.step()
    assert not torch.equal(before[0], parameter)


def test_numbers_of_numpy_become_plain_ones(tmp_path):
    parameter = nn.Parameter(torch.randn(8, 8))
    numbers = {"lr": np.float64(1e-2), "weight_decay": np.float32(0.5), "ns_steps": np.int64(4)}
    betas = {"adam_betas": (np.float64(0.8), 0.9)}
    optimizer = FusedCelo2(
        [{"params": [("a.weight", parameter)], "max_grad_norm": np.float64(1.0)}], **numbers, **betas
    )
    parameter.grad = torch.randn(8, 8)
    optimizer.step()
    # as a schedule that NumPy computes
    optimizer.param_groups[0]["lr"] = np.float64(1e-2) * np.cos(0.1)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt")
    optimizer.load_state_dict(loaded)
    group = optimizer.param_groups[0]
    kinds = {key: type(group[key]) for key in (*numbers, "max_grad_norm")}
    assert kinds == {"lr": float, "weight_decay": float, "ns_steps": int, "max_grad_norm": float}
    assert [type(beta) for beta in group["adam_betas"]] == [float, float]
    assert group["lr"] == 1e-2 * math.cos(0.1) and group["weight_decay"] == 0.5


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.kernels)])
def test_steps_that_are_skipped_in_a_row_are_warned_of_once(backend):
    # the interpreter runs the kernels where there is no GPU
    p = nn.Parameter(torch.zeros(4, 4, device="cuda" if torch.cuda.is_available() and backend == "triton" else "cpu"))
    optimizer = FusedCelo2([p], backend=backend)

    def step(value):
        p.grad = torch.full_like(p, value)
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (math.nan, 1.0, math.nan, math.nan, 1.0, math.nan, math.nan):
            step(value)
    with pytest.warns(UserWarning, match="steps in a row were skipped: a gradient is not finite") as caught:
        for _ in range(50):
            step(math.nan)
    assert len(caught) == 1 and optimizer.skipped_steps == 55


def test_a_grad_scaler_that_looks_for_its_scale_is_not_warned_of():
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = FusedCelo2([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            p.grad = torch.full_like(p, math.inf)
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()


def test_the_compiler_leaves_the_step_as_it_is():
    import torch._dynamo.utils as dynamo

    def trained(compiled):
        torch.manual_seed(0)
        model = routed()
        optimizer = FusedCelo2(model, lr=1e-2)
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        for number in range(3):
            set_gradients(model, number)
            step()
        return [p.detach() for p in model.parameters()]

    torch._dynamo.reset()
    dynamo.counters.clear()
    found = trained(True)
    # no graph of a part of it
    assert not dynamo.counters["stats"]["unique_graphs"]
    assert all(torch.equal(one, two) for one, two in zip(trained(False), found, strict=True))


def test_fsdp1_is_refused_with_its_original_parameters(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for original, expected in ((True, "use_orig_params=True.*fully_shard"), (False, "FSDP1 flat parameter")):
            wrapped = FullyShardedDataParallel(nn.Linear(8, 8), use_orig_params=original, device_id=torch.device("cpu"))
            for params in (wrapped, list(wrapped.parameters()), list(wrapped.named_parameters())):
                with pytest.raises(ValueError, match=expected):
                    FusedCelo2(params)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["hidden.weight", "embedding.weight", "hidden.bias"])
def test_a_parameter_of_another_shape_is_named(name):
    model = routed()
    optimizer = FusedCelo2(model)
    set_gradients(model, 0)
    optimizer.step()
    p = dict(model.named_parameters())[name]
    p.grad, p.data = None, torch.zeros(*p.shape[:-1], 3)
    set_gradients(model, 1)
    before = [q.detach().clone() for q in model.parameters()]
    with pytest.raises(ValueError, match=rf"{name}: its shape is \(.*\) and that of its state"):
        optimizer.step()
    assert all(torch.equal(q, other) for q, other in zip(before, model.parameters(), strict=True))


def test_a_full_graph_cannot_have_the_step() -> None:
    layer = nn.Linear(4, 4)
    optimizer = FusedCelo2(layer, lr=1e-3, weights="momentum")

    @torch.compile(fullgraph=True, backend="eager")
    def train(x: torch.Tensor) -> None:
        layer(x).sum().backward()
        optimizer.step()

    before = layer.weight.detach().clone()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        train(torch.ones(2, 4))
    assert torch.equal(layer.weight.detach(), before)
