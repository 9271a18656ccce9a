from __future__ import annotations

import torch

from celo2.stochastic_rounding import round_stochastically_, rounding_seed


def test_unbiased_replayable_and_between_neighbours():
    value = torch.full((200_000,), 1 + 2**-10)  # an eighth of the way from 1 to the next bfloat16
    target = torch.empty(200_000, dtype=torch.bfloat16)
    round_stochastically_(target, value, seed=3)
    assert set(target.float().unique().tolist()) == {1.0, 1 + 2**-7}
    # mean of 200,000 draws: standard error (2**-7 * sqrt(p q)) / sqrt(n), p = 1/8
    error = abs(target.double().mean().item() - (1 + 2**-10))
    assert error < 5 * 2**-7 * (1 / 8 * 7 / 8) ** 0.5 / 200_000**0.5
    again, other = torch.empty_like(target), torch.empty_like(target)
    round_stochastically_(again, value, seed=3)
    round_stochastically_(other, value, seed=4)
    assert torch.equal(again, target) and not torch.equal(other, target)


def test_exact_and_non_finite_values_stay():
    value = torch.tensor([0.0, -1.5, 2.0**-100, float("inf"), float("-inf")])
    target = round_stochastically_(torch.empty(5, dtype=torch.bfloat16), value, seed=0)
    assert torch.equal(target.float(), value)
    nan = round_stochastically_(torch.empty(1, dtype=torch.bfloat16), torch.tensor([float("nan")]), seed=0)
    assert nan.isnan().all()


def test_every_parameter_and_step_has_its_own_noise():
    seeds = {rounding_seed(position, step) for position in range(200) for step in range(200)}
    # 40,000 of 2**32: about 0.2 collisions are expected
    assert len(seeds) >= 39_997 and max(seeds) < 2**32
    value = torch.full((1000,), 1 + 2**-8)
    draws = []
    for position, step in ((0, 1), (1, 1), (0, 2)):
        target = torch.empty(1000, dtype=torch.bfloat16)
        draws.append(round_stochastically_(target, value, rounding_seed(position, step)).clone())
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
