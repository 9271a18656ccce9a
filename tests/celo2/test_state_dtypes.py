"""State in bfloat16 and 8 bits through PyTorch: unbiased, replayable, and as good as float32 on a small model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from celo2 import FusedCelo2
from celo2.matrices import MatrixView
from celo2.quantisation import QUANTUM, dequantise, quanta, quantise_
from celo2.state import read_momenta


def test_8_bits_are_unbiased_bounded_and_replayable():
    torch.manual_seed(0)
    value = torch.randn(2, 50, 150) * torch.logspace(-6, 0, 50)[:, None]
    value[0, 3] = 0
    levels, scale = torch.empty(value.shape, dtype=torch.int8), torch.empty(2, 50, quanta(150))
    total = torch.zeros(value.shape, dtype=torch.float64)
    for seed in range(400):
        quantise_(levels, scale, value, seed)
        read = dequantise(levels, scale)
        spacing = scale.repeat_interleave(QUANTUM, -1)[..., :150]
        assert ((read - value).abs() <= 1.001 * spacing).all()
        total += read
    error = (total / 400 - value) / spacing.clamp_min(1e-30)
    # a coin's standard deviation is at most half a spacing
    assert float(error.abs().max()) < 6 * 0.5 / math.sqrt(400)
    assert float(error[value != 0].mean().abs()) < 5 * 0.5 / math.sqrt(400 * value.numel())
    assert int(levels[0, 3].abs().max()) == 0 and int(levels.abs().max()) == 127
    again = torch.empty_like(levels)
    quantise_(again, scale.clone(), value, 399)
    assert torch.equal(levels, again)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_step_equals_the_wide_rule_up_to_rounding(dtype, random_theta):
    torch.manual_seed(0)
    theta = random_theta()
    shapes = [(3, 40, 70), (70, 40), (9,)]
    for transposed in (False, True):
        params = [nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
        if transposed:
            params = [nn.Parameter(p.detach().mT.contiguous().mT) if p.ndim > 1 else p for p in params]
        wide = [nn.Parameter(p.detach().clone()) for p in params]
        low = FusedCelo2([{"params": params, "rule": "celo2"}], weights=theta, state_dtype=dtype)
        exact = FusedCelo2([{"params": wide, "rule": "celo2"}], weights=theta)
        for _ in range(2):
            for p, w in zip(params, wide, strict=True):
                p.grad = 1e-3 * torch.randn_like(p)
                w.grad = p.grad.clone()
            low.step()
            exact.step()
        for p, w in zip(params, wide, strict=True):
            view = MatrixView()
            for value, key in zip(read_momenta(low.state[p], view), ("fast", "medium", "slow"), strict=True):
                expected = exact.state[w][f"momentum_{key}"]
                error = (value.float() - expected).abs().max() / expected.abs().max()
                assert float(error) < 2 / 100, key
            second = low.state[p]["second_moment"]
            assert second.dtype == (torch.float32 if p.ndim < 2 and dtype == "int8" else torch.bfloat16)
            torch.testing.assert_close(second.float(), exact.state[w]["second_moment"], rtol=2**-6, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_resume_and_moves_keep_the_state(dtype, random_theta):
    def run(resumes: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(70, 40)
        optimizer = FusedCelo2(model, weights=random_theta(), state_dtype=dtype)
        for step in range(4):
            if resumes and step == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = FusedCelo2(model, weights=random_theta(), state_dtype=dtype)
                optimizer.load_state_dict(saved)
            model.weight.grad, model.bias.grad = torch.randn(40, 70), torch.randn(40)
            optimizer.step()
        return [model.weight.detach(), *optimizer.state[model.weight].values()]

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)

    model = nn.Linear(70, 40)
    optimizer = FusedCelo2(model, weights=random_theta(), state_dtype=dtype)
    model.weight.grad, model.bias.grad = torch.randn(40, 70), torch.randn(40)
    optimizer.step()
    before = [value.float().clone() for value in read_momenta(optimizer.state[model.weight], MatrixView())]
    # another layout: the state follows it in the next step, here one without a gradient in it
    model.weight.data = model.weight.detach().t().contiguous().t()
    model.weight.grad = torch.zeros(40, 70)
    optimizer.step()
    after = [value.float() for value in read_momenta(optimizer.state[model.weight], MatrixView())]
    for old, new, decay in zip(before, after, (0.9, 0.99, 0.999), strict=True):
        torch.testing.assert_close(new, decay * old, rtol=0, atol=0.03 * float(old.abs().max()))


def test_state_dtype_is_checked(random_theta):
    with pytest.raises(ValueError, match="state_dtype='int4', allowed: float32, bfloat16, int8"):
        FusedCelo2([nn.Parameter(torch.zeros(4, 4))], state_dtype="int4")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("there", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("here", ["float32", "bfloat16", "int8"])
def test_state_is_converted_between_dtypes(here, there, transposed):
    def stepped(dtype, steps):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(70, 9), nn.LayerNorm(9))
        if transposed:
            model[0].weight.data = model[0].weight.data.T.contiguous().T
        optimizer = FusedCelo2(model, lr=1e-3, state_dtype=dtype)
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return model, optimizer

    def momenta(model, optimizer):
        return read_momenta(optimizer.state[model[0].weight], MatrixView())

    source, target = stepped(there, 3), stepped(here, 0)
    if transposed and "int8" in (here, there):
        # scales go by the order in memory: a state dict from the other order
        target[0][0].weight.data = target[0][0].weight.data.contiguous()
    target[1].load_state_dict(source[1].state_dict())
    state = target[1].state[target[0][0].weight]
    assert ("momentum_scale" in state) == (here == "int8")
    assert state["second_moment"].dtype == (torch.float32 if here == "float32" else torch.bfloat16)
    assert [group["state_dtype"] for group in target[1].param_groups] == [here] * 2
    for one, two in zip(momenta(*source), momenta(*target), strict=True):
        bound = 2.0 / 127 if "int8" in (here, there) and here != there else 1 / 128
        limit = 0.0 if (here == there and not transposed) or here == "float32" else bound * float(one.abs().max())
        assert float((one.float() - two.float()).abs().max()) <= limit
    target[1].step()


def test_a_small_model_trains_as_well(random_theta):
    """100 steps of a small GPT on a Markov chain: losses of the last steps beside float32's."""
    from celo2.pretrain.model import GPT, GPTConfig

    generator = torch.Generator().manual_seed(0)
    chain = torch.softmax(3 * torch.randn(32, 32, generator=generator), -1)
    losses = {}
    for dtype in ("float32", "bfloat16", "int8"):
        model = GPT(GPTConfig("gpt2", n_layer=2, n_head=2, head_dim=32, context=32, vocab_size=32, bias=False))
        model.init_weights(0)
        optimizer = FusedCelo2(model, lr=1e-3, max_grad_norm=1.0, state_dtype=dtype)
        data = torch.Generator().manual_seed(1)
        run = []
        for _ in range(100):
            tokens = torch.randint(32, (8, 33), generator=data)
            for t in range(1, 33):
                tokens[:, t] = torch.multinomial(chain[tokens[:, t - 1]], 1, generator=data)[:, 0]
            loss = model(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(float(loss.detach()))
        losses[dtype] = sum(run[-20:]) / 20
        assert losses[dtype] < run[0] - 1
    print(losses)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.02)
    assert losses["int8"] == pytest.approx(losses["float32"], abs=0.02)
