"""Several networks in one run: every particle is what it would be alone, and the gradient is of them all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from celo2.meta.gradient_estimator import PES, pes_gradients
from celo2.meta.learned_rule import flatten
from celo2.meta.mixed_step import MixedStep, trajectories
from celo2.meta.network import MLP, loss_and_gradients
from celo2.meta.outer_trainer import OuterTrainer
from celo2.meta.tasks import TaskFamily, TaskMix
from celo2.meta.truncated_step import TruncatedStep

CPU = torch.device("cpu")


def start(recipe, data_sets, rank=0, world=1):
    mix = TaskMix(data_sets, seed=0, particles=recipe.particles, scale_range=recipe.scale_range)
    return trajectories(recipe, mix, rank=rank, world=world, device=CPU, compiled=False)


def test_a_family_advances_as_it_does_alone(mixed_sets, small_recipe, random_theta):
    recipe = small_recipe(resume_probability=0.5, scale_range=(0.1, 10.0))
    mixed, images = start(recipe, mixed_sets), start(recipe, mixed_sets[:2])
    assert isinstance(mixed, MixedStep) and isinstance(images, TruncatedStep)
    assert mixed.particles == [0, 1, 2, 3, 4, 5] and mixed.parts == {"": slice(0, 4), "transformer/": slice(4, 6)}
    family = TaskFamily(mixed_sets[2:], seed=0, particles=2, scale_range=recipe.scale_range, first_task=2)
    text = TruncatedStep(recipe, family, [4, 5], device=CPU, compiled=False)
    vectors = torch.from_numpy(flatten(random_theta())) + 0.05 * torch.randn(12, 347)
    restarts = 0
    for outer_step in range(5):
        unroll = mixed.unroll(vectors, outer_step)
        signed = vectors.view(2, 6, 347)
        alone = [images.unroll(signed[:, :4].flatten(0, 1), outer_step)]
        alone.append(text.unroll(signed[:, 4:].flatten(0, 1), outer_step))
        np.testing.assert_array_equal(unroll.losses, np.concatenate([x.losses for x in alone], 2))
        np.testing.assert_array_equal(unroll.plan.mask, np.concatenate([x.plan.mask for x in alone], 1))
        for slot, particles in unroll.plan.restarts.items():
            assert not unroll.plan.mask[slot, particles].any() and (~unroll.plan.mask[slot]).sum() == len(particles)
        restarts += sum(map(len, unroll.plan.restarts.values()))
    assert restarts > 4
    assert mixed.iteration.tolist() == [*images.iteration, *text.iteration]
    # the MLP's arrays have the names of a run without other networks
    assert mixed.state_dict().keys() == images.state_dict().keys() | text.state_dict().keys()
    assert {"state/hidden_weight", "transformer/state/square/momentum_fast"} <= mixed.state_dict().keys()


def test_losses_are_clipped_by_their_own_classes(mixed_sets, small_recipe, random_theta):
    mixed = start(small_recipe(inner_clip_norm=None), mixed_sets)
    for step in mixed.steps:
        step.iteration[:], step.length[:] = 0, 30
        step.state[step.network.matrices[0]][:] = float("nan")
    unroll = mixed.unroll(torch.from_numpy(flatten(random_theta())).expand(12, -1), 0)
    assert unroll.non_finite == unroll.losses.size
    np.testing.assert_allclose(unroll.losses[0, 0], 1.5 * np.log([10, 10, 10, 10, 64, 64]))


def test_the_gradient_is_the_sum_over_both_networks(mixed_sets, small_recipe, random_theta):
    recipe = small_recipe(loss_tail=0.5)
    estimator, again = (PES(recipe, start(recipe, mixed_sets), 347) for _ in range(2))
    theta = flatten(random_theta())
    for outer_step in range(3):
        xi = again.draws(outer_step).perturbations.astype(np.float64)
        signed = np.concatenate([theta + xi, theta - xi]).astype(np.float32)
        unroll = again.truncated_step.unroll(torch.from_numpy(signed), outer_step)
        deltas = (unroll.losses[:, 0] - unroll.losses[:, 1]) * unroll.plan.weight
        plan = unroll.plan
        expected, again.accumulator = pes_gradients(deltas, plan.mask, plan.done, again.accumulator, xi, recipe.std)
        np.testing.assert_array_equal(estimator.estimate(theta, outer_step).gradient, expected.sum(0))
        assert np.abs(expected[:4]).max() > 0 and np.abs(expected[4:]).max() > 0
    parts = estimator.state_dict()
    assert {name: x.shape for name, x in parts.items()} == {
        "pes/accumulator": (1, 4, 347),
        "transformer/pes/accumulator": (1, 2, 347),
    }
    again.load_state_dict(parts)
    np.testing.assert_array_equal(again.accumulator, estimator.accumulator)
    with pytest.raises(ValueError, match="transformer/pes/accumulator: expected .* found None"):
        again.load_state_dict({"pes/accumulator": parts["pes/accumulator"]})


def test_every_rank_has_its_part_of_every_family(mixed_sets, small_recipe):
    ranks = [start(small_recipe(), mixed_sets, rank, 2) for rank in range(2)]
    assert [rank.particles for rank in ranks] == [[0, 1, 4], [2, 3, 5]]
    whole = start(small_recipe(), mixed_sets).state_dict()
    for rank in ranks:
        mine = rank.share(whole)
        for name, array in rank.state_dict().items():
            np.testing.assert_array_equal(array, mine[name], err_msg=name)
    with pytest.raises(ValueError, match="2 particles do not split over 4 ranks"):
        start(small_recipe(), mixed_sets, 0, 4)


def test_a_trajectory_learns_from_its_part_of_a_batch(mixed_sets, small_recipe, random_theta):
    recipe = small_recipe(batch_range=(0.1, 1.0), length_range=(12, 24))
    step, whole = start(recipe, mixed_sets).steps[1], start(small_recipe(), mixed_sets).steps[1]
    assert (whole.plan(0).batch == 8).all() and whole._window(whole.plan(1), 1).share_KNB is None
    theta = torch.from_numpy(flatten(random_theta())).expand(4, -1)
    seen, previous = set(), dict(enumerate(step.batch))
    for outer_step in range(30):
        counters, batches = step.iteration.copy(), step.batch.copy()
        plan = step.plan(outer_step)
        for i in np.flatnonzero(plan.mask.all(0)):
            # one size a trajectory, from its start to its end
            assert (plan.batch[:, i] == batches[i]).all() and (counters[i] == 0 or batches[i] == previous[i])
        seen.update(plan.batch.ravel().tolist())
        previous = dict(enumerate(step.batch))
    assert {1, 2, 4} <= seen <= set(range(1, 9)) and max(seen) > 5
    share = step._window(plan, outer_step).share_KNB
    torch.testing.assert_close(share.sum(2), torch.ones(5, 2))
    np.testing.assert_array_equal((share > 0).sum(2), plan.batch)
    # what does not count is not read, and both signs have the same noise
    step.iteration[:], step.length[:], step.batch[:] = 0, 20, [1, 3]
    again = start(recipe, mixed_sets).steps[1]
    again.load_state_dict(step.state_dict())
    real = again.family.batches

    def others(*arguments):
        indices = real(*arguments)
        for i, batch in enumerate([1, 3]):
            indices[:, i, batch:] = 0
        return indices

    again.family.batches = others
    first, second = step.unroll(theta, 40), again.unroll(theta, 40)
    np.testing.assert_allclose(first.losses, second.losses, rtol=1e-6)
    np.testing.assert_array_equal(first.losses[:, 0], first.losses[:, 1])


def test_shares_of_the_mlp_are_a_smaller_batch():
    network = MLP()
    weights = {name: torch.randn(4, *shape, dtype=torch.float64) for name, shape in network.shapes.items()}
    scale, images = torch.full((4,), 0.7, dtype=torch.float64), torch.rand(2, 64, 64, dtype=torch.float64)
    labels = torch.randint(10, (2, 64))
    share = torch.zeros(2, 64, dtype=torch.float64)
    share[:, :16] = 1 / 16
    loss, gradients = loss_and_gradients(weights, scale, images, labels, share)
    expected, theirs = loss_and_gradients(weights, scale, images[:, :16], labels[:, :16])
    torch.testing.assert_close(loss, expected)
    for name in weights:
        torch.testing.assert_close(gradients[name], theirs[name], msg=name)


def test_a_run_of_the_transformer_alone_learns_from_text(mixed_sets, small_recipe):
    recipe = small_recipe("celo2-base-lm", window=20, length_range=(40, 80), initial_iterations=1, loss_tail=1.0)
    run = OuterTrainer(recipe, mixed_sets[2:], compiled=False)
    losses = [run.step()["meta_loss"] for _ in range(2)]
    assert run.total == 2 and losses[1] < losses[0] - 0.5
    arrays = run.truncated_step.share(run.truncated_step.state_dict())
    np.testing.assert_array_equal(arrays["transformer/host/batch"][0], run.truncated_step.batch)
