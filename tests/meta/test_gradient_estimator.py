"""PES: a linear problem with a known gradient, and the bookkeeping at a trajectory's end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from celo2.meta.gradient_estimator import PES, pes_gradients
from celo2.meta.learned_rule import flatten
from celo2.meta.tasks import TaskFamily
from celo2.meta.truncated_step import TruncatedStep


def test_pes_converges_to_the_analytic_gradient():
    # state x_t = x_{t-1} + c . theta from 0, loss_t = x_t: linear in every theta of the past
    rng = np.random.default_rng(0)
    particles, dimension, slots, windows, std = 20_000, 3, 4, 3, 0.1
    c = np.array([1.0, -2.0, 0.5])
    accumulator = np.zeros((particles, dimension))
    state = np.zeros((2, particles))
    estimates = np.zeros((windows, particles, dimension))
    naive = np.zeros_like(estimates)
    mask, done = np.ones((slots, particles), bool), np.zeros((slots, particles), bool)
    for window in range(windows):
        xi = std * rng.standard_normal((particles, dimension))
        steps = np.stack([xi @ c, -xi @ c])
        losses = state + steps * np.arange(1, slots + 1)[:, None, None]
        state = losses[-1]
        deltas = losses[:, 0] - losses[:, 1]
        naive[window] = pes_gradients(deltas, mask, done, np.zeros_like(accumulator), xi, std)[0]
        estimates[window], accumulator = pes_gradients(deltas, mask, done, accumulator, xi, std)
    # loss at step t has gradient t c; the mean over all windows is that of t = 1 .. 12
    expected = c * np.mean(np.arange(1, windows * slots + 1))
    mean = estimates.mean((0, 1))
    error = estimates.mean(0).std(0) / np.sqrt(particles)
    assert (np.abs(mean - expected) < 4 * error).all() and (4 * error < 0.25 * np.abs(expected)).all()
    # crediting the present perturbation alone sees only the window: t = 1 .. 4
    np.testing.assert_allclose(naive.mean((0, 1)), c * 2.5, rtol=0.1)


def test_credit_at_the_end_of_a_trajectory():
    std, dimension = 0.5, 2
    past, xi = np.array([[10.0, 0.0]]), np.array([[0.0, 1.0]])
    deltas = np.array([[1.0], [2.0], [4.0], [8.0]])
    done = np.array([[False], [True], [False], [False]])
    mask = np.array([[True], [True], [False], [True]])  # the slot after the end is the restart
    gradient, following = pes_gradients(deltas, mask, done, past, xi, std)
    # before the end: the sum of perturbations; the finishing slot and later: the present one; three valid slots
    expected = (1.0 * (past + xi) + (2.0 + 8.0) * xi) / 3 / (2 * std**2)
    np.testing.assert_allclose(gradient, expected)
    np.testing.assert_array_equal(following, xi)
    gradient, following = pes_gradients(deltas, np.ones((4, 1), bool), np.zeros((4, 1), bool), past, xi, std)
    np.testing.assert_allclose(gradient, 15.0 / 4 * (past + xi) / (2 * std**2))
    np.testing.assert_array_equal(following, past + xi)
    assert gradient.shape == (1, dimension)


def _estimator(recipe, image_sets):
    family = TaskFamily(image_sets, seed=0, particles=recipe.particles)
    step = TruncatedStep(recipe, family, range(4), device=torch.device("cpu"), compiled=False)
    return PES(recipe, step, 347)


def test_estimate_is_the_sum_of_the_particles_gradients(image_sets, small_recipe, random_theta):
    recipe = small_recipe()
    estimator, again = _estimator(recipe, image_sets), _estimator(recipe, image_sets)
    theta = flatten(random_theta())
    for outer_step in range(4):
        xi = again.draws(outer_step).perturbations.astype(np.float64)
        assert xi.std() == pytest.approx(recipe.std, rel=0.1)
        signed = np.concatenate([theta + xi, theta - xi]).astype(np.float32)
        unroll = again.truncated_step.unroll(torch.from_numpy(signed), outer_step)
        deltas = unroll.losses[:, 0] - unroll.losses[:, 1]
        expected, again.accumulator = pes_gradients(
            deltas, unroll.plan.mask, unroll.plan.done, again.accumulator, xi, recipe.std
        )
        estimate = estimator.estimate(theta, outer_step)
        np.testing.assert_array_equal(estimate.gradient, expected.sum(0))
        ended = unroll.plan.done.any(0)
        np.testing.assert_array_equal(estimator.accumulator[ended], xi[ended])
    assert estimate.loss == pytest.approx(4 * 2.3, rel=0.4)


def test_imitation_has_the_scale_it_is_given(image_sets, small_recipe, random_theta):
    recipe = small_recipe(expert="muon", direction_weight=1.0, direction_floor=1.0)
    estimator = _estimator(recipe, image_sets)
    xi = estimator.draws(0).perturbations
    theta = flatten(random_theta())
    signed = np.concatenate([theta + xi, theta - xi]).astype(np.float32)
    unroll = estimator.truncated_step.unroll(torch.from_numpy(signed), 0)
    deltas = estimator._deltas(unroll, 0)
    for task in range(2):
        part, mask = deltas[:, 2 * task : 2 * task + 2], unroll.plan.mask[:, 2 * task : 2 * task + 2]
        assert np.sqrt((part**2).sum() / mask.sum()) == pytest.approx(0.01, rel=1e-6)
    # equal signs: no difference, and no division by zero
    unroll = estimator.truncated_step.unroll(torch.from_numpy(np.tile(theta, (8, 1))), 1)
    assert not estimator._deltas(unroll, 1).any() or np.isfinite(estimator._deltas(unroll, 1)).all()


def test_the_end_of_a_trajectory_alone_has_a_gradient(image_sets, small_recipe, random_theta):
    recipe = small_recipe(loss_tail=0.2, length_range=(40, 41), initial_iterations=1)
    estimator, theta = _estimator(recipe, image_sets), flatten(random_theta())
    # windows of 5 slots: the last fifth of 40 steps begins in the seventh
    estimates = [estimator.estimate(theta, outer_step) for outer_step in range(8)]
    for estimate in estimates[:6]:
        assert estimate.loss == 0 and not estimate.gradient.any()
    assert all(estimate.loss > 0 and estimate.gradient.any() for estimate in estimates[6:])
