"""Trajectories: slots, ends, restarts, divergence, snapshots."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from celo2.meta.learned_rule import flatten
from celo2.meta.network import MLP
from celo2.meta.recipes import get_recipe
from celo2.meta.tasks import TaskFamily
from celo2.meta.truncated_step import TruncatedStep

LOSS_CLIP = MLP().loss_clip


def start(recipe, image_sets, particles=None):
    family = TaskFamily(image_sets, seed=0, particles=recipe.particles, scale_range=recipe.scale_range)
    mine = particles or range(family.total_particles)
    return TruncatedStep(recipe, family, mine, device=torch.device("cpu"), compiled=False)


def vectors(random_theta, problems, noise=0.0):
    theta = torch.from_numpy(flatten(random_theta())).expand(problems, -1)
    return theta + noise * torch.randn(problems, theta.shape[1])


def test_equal_thetas_keep_both_signs_equal(image_sets, small_recipe, random_theta):
    step = start(small_recipe(resume_probability=0.5), image_sets)
    restarts = 0
    for outer_step in range(8):
        unroll = step.unroll(vectors(random_theta, 8), outer_step)
        np.testing.assert_array_equal(unroll.losses[:, 0], unroll.losses[:, 1])
        restarts += len(unroll.plan.restarts)
        for name, x in step.state.items():
            torch.testing.assert_close(x[:4], x[4:], rtol=0, atol=0, msg=name)
    assert restarts >= 8


def test_signs_share_scale_start_and_ends_whatever_theta_does(image_sets, small_recipe, random_theta):
    step = start(small_recipe(), image_sets)
    before = step.state["scale"].clone()
    unroll = step.unroll(vectors(random_theta, 8, noise=0.1), 0)
    assert np.abs(unroll.losses[:, 0] - unroll.losses[:, 1]).max() > 0
    for outer_step in range(1, 6):
        unroll = step.unroll(vectors(random_theta, 8, noise=0.1), outer_step)
        for slot, particles in unroll.plan.restarts.items():
            if slot == step.recipe.window - 1:
                for i in particles:
                    for name, x in step.state.items():
                        torch.testing.assert_close(x[i], x[4 + i], rtol=0, atol=0, msg=name)
    torch.testing.assert_close(step.state["scale"][:4], step.state["scale"][4:], rtol=0, atol=0)
    assert (step.state["scale"] != before).any()


def test_a_window_with_a_restart_has_one_slot_less(image_sets):
    step = start(get_recipe("celo2"), image_sets)
    lengths, seen = [], 0
    for outer_step in range(60):
        counters = step.iteration.copy()
        plan = step.plan(outer_step)
        for particles in plan.restarts.values():
            seen += len(particles)
        restarted = (~plan.mask).any(0)
        np.testing.assert_array_equal(plan.mask.sum(0), 50 - restarted)
        # D stands on the last training slot; the slot after it is the restart
        for slot, i in zip(*np.nonzero(plan.done), strict=True):
            assert plan.mask[slot, i]
            if slot + 1 < 50:
                assert not plan.mask[slot + 1, i]
        np.testing.assert_array_equal(step.iteration[~restarted], counters[~restarted] + 50)
        assert (step.iteration[restarted] < 50).all()
        lengths.extend(step.length[plan.done.any(0)])
    assert seen > 40 and all(100 <= length < 2000 for length in lengths)


def test_length_distributions(image_sets, small_recipe):
    step = start(get_recipe("celo2"), image_sets, range(1))
    from celo2.meta.randomness import Purpose

    draws = np.array([step._draw_length(Purpose.LENGTH, 0, u) for u in range(4000)])
    # log-uniform on [100, 2000): mean 1900 / ln 20 = 634, median 447
    assert draws.mean() == pytest.approx(634, rel=0.04) and np.median(draws) == pytest.approx(447, rel=0.06)
    step = start(small_recipe(length_distribution="uniform", length_range=(100, 2000)), image_sets, range(1))
    assert np.mean([step._draw_length(Purpose.LENGTH, 0, u) for u in range(4000)]) == pytest.approx(1050, rel=0.03)


def test_cosine_rate_falls_to_zero_over_each_trajectory(image_sets, small_recipe):
    step = start(small_recipe(inner_schedule="cosine"), image_sets)
    for outer_step in range(8):
        counters, lengths = step.iteration.copy(), step.length.copy()
        plan = step.plan(outer_step)
        untouched = plan.mask.all(0) & ~plan.done.any(0)
        progress = np.minimum(1, (counters + np.arange(5)[:, None]) / lengths)
        expected = 1e-3 * 0.5 * (1 + np.cos(np.pi * progress))
        np.testing.assert_allclose(plan.lr[:, untouched], expected[:, untouched], rtol=1e-6)
        for slot, particles in plan.restarts.items():
            if slot < 4:
                np.testing.assert_allclose(plan.lr[slot + 1, particles], 1e-3, rtol=1e-6)
    assert (start(small_recipe(), image_sets).plan(0).lr == np.float32(1e-3)).all()


def test_a_trajectory_has_a_rate_a_warm_up_and_a_tail_that_counts(image_sets, small_recipe):
    changes = {"inner_schedule": "cosine", "inner_warmup": 0.25, "inner_lr_range": (0.1, 10.0), "loss_tail": 0.2}
    recipe = small_recipe(**changes, length_range=(40, 80), initial_iterations=1)
    step = start(recipe, image_sets)
    rates, previous = set(), {}
    for outer_step in range(40):
        counters, lengths, factors = step.iteration.copy(), step.length.copy(), step.rate.copy()
        plan = step.plan(outer_step)
        untouched = np.flatnonzero(plan.mask.all(0) & ~plan.done.any(0))
        progress = np.minimum(1, (counters + np.arange(5)[:, None]) / lengths)
        for i in untouched:
            # one factor a trajectory, from its start to its end
            if counters[i] > 0:
                assert factors[i] == previous[i]
            rates.add(factors[i])
            x = progress[:, i]
            expected = np.where(x < 0.25, (x + 1e-3) / 0.251, 0.5 * (1 + np.cos(np.pi * (x - 0.25) / 0.75)))
            np.testing.assert_allclose(plan.lr[:, i], 1e-3 * factors[i] * expected, rtol=1e-5)
            np.testing.assert_array_equal(plan.weight[:, i], np.where(x >= 0.8, 1 / 0.2, 0.0))
        previous = dict(enumerate(step.rate))
    assert len(rates) > 8 and min(rates) < 0.5 and max(rates) > 2 and all(0.1 <= rate <= 10 for rate in rates)
    plain = start(small_recipe(), image_sets).plan(0)
    assert (plain.weight == 1).all()
    arrays = step.state_dict()
    again = start(recipe, image_sets)
    again.load_state_dict(arrays)
    np.testing.assert_array_equal(again.rate, step.rate)


def test_first_loss_does_not_depend_on_the_scale(image_sets, small_recipe, random_theta):
    losses = []
    for scale in (1e-3, 1.0, 1e3):
        step = start(small_recipe(scale_range=(scale, scale), initial_iterations=1), image_sets)
        losses.append(step.unroll(vectors(random_theta, 8), 0).losses[0])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-5)
    assert losses[1].mean() == pytest.approx(math.log(10), abs=0.35)


def test_restart_slot_takes_no_step(image_sets, small_recipe, random_theta):
    step = start(small_recipe(), image_sets)
    for outer_step in range(6):
        unroll = step.unroll(vectors(random_theta, 8), outer_step)
        assert (unroll.losses[:, 0][~unroll.plan.mask] == 0).all()
        assert (unroll.losses[:, 0][unroll.plan.mask] > 0).all()
        for slot, particles in unroll.plan.restarts.items():
            for i in particles:
                # what has been stepped since: the slots after the restart
                assert step.state["iteration"][i] == step.recipe.window - 1 - slot


def test_a_diverged_trajectory_is_clipped_counted_and_gone_after_its_restart(image_sets, small_recipe, random_theta):
    recipe = small_recipe(inner_clip_norm=None)
    sick, healthy = start(recipe, image_sets), start(recipe, image_sets)
    sick.state["hidden_weight"][1, 3, 3] = math.nan
    first = sick.unroll(vectors(random_theta, 8), 0)
    reference = healthy.unroll(vectors(random_theta, 8), 0)
    others = [0, 2, 3]
    np.testing.assert_array_equal(first.losses[..., others], reference.losses[..., others])
    before = ~np.logical_or.accumulate(~first.plan.mask[:, 1])
    assert (first.losses[before, 0, 1] == LOSS_CLIP).all() and first.non_finite == before.sum() > 0
    for outer_step in range(1, 6):
        last = sick.unroll(vectors(random_theta, 8), outer_step)
        reference = healthy.unroll(vectors(random_theta, 8), outer_step)
    assert last.non_finite == 0
    np.testing.assert_array_equal(last.losses, reference.losses)


def test_snapshots_are_healthy_and_a_resumed_particle_continues_one(image_sets, small_recipe, random_theta):
    recipe = small_recipe(resume_probability=0.9, max_iterations=30, length_distribution="uniform")
    step = start(recipe, image_sets)
    resumed = 0
    for outer_step in range(40):
        if outer_step == 3:
            step.state["output_weight"][0] = math.nan
        stored = {name: x.clone() for name, x in step.snapshot.items()}
        ages = step.snapshot_iteration.copy()
        unroll = step.unroll(vectors(random_theta, 8, noise=0.05), outer_step)
        assert all(x.isfinite().all() for x in step.snapshot.values())
        # the cap holds where a snapshot is stored
        assert (step.snapshot_iteration < 30).all()
        for slot, particles in unroll.plan.restarts.items():
            for i in particles:
                if not unroll.plan.resumed[i]:
                    continue
                resumed += 1
                assert step.iteration[i] == ages[i] + recipe.window - 1 - slot
                if slot == recipe.window - 1:
                    for name, x in step.state.items():
                        torch.testing.assert_close(x[i], stored[name][i], rtol=0, atol=0)
                        torch.testing.assert_close(x[4 + i], stored[name][i], rtol=0, atol=0)
    assert resumed > 20 and step.iteration.max() > 16


def test_state_round_trip_and_refusal(image_sets, small_recipe, random_theta):
    recipe = small_recipe(resume_probability=0.5)
    one, two = start(recipe, image_sets), start(recipe, image_sets)
    for outer_step in range(4):
        one.unroll(vectors(random_theta, 8), outer_step)
    arrays = {name: array.copy() for name, array in one.state_dict().items()}
    two.load_state_dict(arrays)
    for outer_step in range(4, 8):
        a, b = (step.unroll(vectors(random_theta, 8), outer_step) for step in (one, two))
        np.testing.assert_array_equal(a.losses, b.losses)
    del arrays["state/scale"]
    with pytest.raises(ValueError, match="'state/scale': expected shape .* found nothing"):
        two.load_state_dict(arrays)
