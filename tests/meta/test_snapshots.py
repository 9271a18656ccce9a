"""Ends, rates and snapshots of trajectories, slot by slot, with losses that the tests write."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from celo2.meta.learned_rule import flatten
from celo2.meta.network import MLP
from celo2.meta.randomness import Purpose
from celo2.meta.recipes import get_recipe
from celo2.meta.tasks import TaskFamily
from celo2.meta.truncated_step import TruncatedStep

LOSS_CLIP = MLP().loss_clip


def start(recipe, image_sets):
    family = TaskFamily(image_sets, seed=0, particles=recipe.particles)
    everyone = range(family.total_particles)
    return TruncatedStep(recipe, family, everyone, device=torch.device("cpu"), compiled=False)


@pytest.fixture
def scripted(image_sets, small_recipe, random_theta, monkeypatch):
    """Two particles whose losses are given by window, `[window][particle]`; return the snapshots' ages after each."""

    def run(losses, lengths):
        recipe = small_recipe(length_range=(60, 61), initial_iterations=1, resume_probability=1e-9)
        step = start(recipe, image_sets[:1])
        step.length[:] = lengths
        theta = torch.from_numpy(flatten(random_theta())).expand(4, -1)
        ages = []
        for outer_step, values in enumerate(losses):
            loss = torch.tensor([*values, *values], dtype=torch.float32)

            def scripted_step(state, *arguments, loss=loss, **options):
                state["iteration"] += 1
                return loss, None

            monkeypatch.setattr(step.optimizer, "step", scripted_step)
            step.unroll(theta, outer_step)
            ages.append(step.snapshot_iteration.tolist())
        return ages

    return run


def test_slots_follow_the_state_machine_of_the_specification(image_sets, small_recipe):
    recipe = small_recipe("celo2", particles=100, window=50, length_range=(100, 2000), initial_iterations=2000)
    step = start(recipe, image_sets)
    k, length, ended = step.iteration.copy(), step.length.copy(), np.zeros(200, bool)
    for outer_step in range(40):
        plan = step.plan(outer_step)
        for slot in range(50):
            np.testing.assert_array_equal(plan.mask[slot], ~ended)
            k = np.where(ended, 0, k + 1)
            ended = ~ended & (k >= length)
            np.testing.assert_array_equal(plan.done[slot], ended)
            length = np.where(ended, step.length, length)  # an end draws the next length; one end a window
        np.testing.assert_array_equal(step.iteration, k)
        if outer_step == 0:
            # independent draws of k0 and L0: 68 % of the first trajectories end with their first step
            assert plan.done[0].mean() == pytest.approx(0.68, abs=0.1)
    # the shortest length is the lower bound itself: rounded down
    assert min(step._draw_length(Purpose.LENGTH, 0, u) for u in range(4000)) == 100


def test_a_snapshot_is_the_window_before_a_record_rise_of_the_loss(scripted):
    # by window: falls from its start, rises, falls, rises less, rises to a new record; the other particle only falls
    first = [2.0, 3.0, 1.0, 2.0, 3.0]
    ages = scripted([[loss, 2 - 0.3 * window] for window, loss in enumerate(first)], lengths=[60, 60])
    assert ages == [[-1, -1], [5, -1], [5, -1], [5, -1], [20, -1]]


def test_an_end_stores_the_window_and_the_next_trajectory_starts_its_own_record(scripted):
    # a new trajectory begins above the old one's loss: that is no rise
    ages = scripted([[1.0, 1.0], [1.0, 1.0], [2.3, 1.0], [2.3, 1.0]], lengths=[10, 60])
    assert ages == [[-1, -1], [5, -1], [5, -1], [5, -1]]


@pytest.mark.parametrize("sick", [LOSS_CLIP, 50.0, math.inf, math.nan])
def test_a_trajectory_at_the_clip_is_not_stored(scripted, sick):
    assert scripted([[sick, 1.0], [sick, 1.0]], lengths=[8, 8])[-1] == [-1, 5]


def test_a_loaded_state_is_the_saved_one(image_sets, small_recipe, random_theta):
    recipe = small_recipe(resume_probability=0.5)
    one, two = start(recipe, image_sets), start(recipe, image_sets)
    theta = torch.from_numpy(flatten(random_theta())) + 0.05 * torch.randn(8, 347)
    for outer_step in range(6):
        one.unroll(theta, outer_step)
    assert one.drawup.any() and (one.snapshot_iteration >= 0).all()
    saved = {name: array.copy() for name, array in one.state_dict().items()}
    two.load_state_dict(saved)
    for name, array in two.state_dict().items():
        np.testing.assert_array_equal(array, saved[name], err_msg=name)


def test_a_cosine_rate_ends_with_its_trajectory(image_sets, small_recipe, random_theta, monkeypatch):
    step = start(small_recipe(inner_schedule="cosine"), image_sets)
    step.iteration[:], step.length[:] = [0, 3, 6, 9], [7, 7, 7, 14]
    k, length, ended = step.iteration.copy(), step.length.copy(), np.zeros(4, bool)
    rates = []
    monkeypatch.setattr(
        step.optimizer, "step", lambda *a, lr, **b: (rates.append(lr.numpy()), (torch.ones(8), None))[1]
    )
    for outer_step in range(4):
        rates.clear()
        plan = step.unroll(torch.from_numpy(flatten(random_theta())).expand(8, -1), outer_step).plan
        for slot in range(5):
            expected = 1e-3 * 0.5 * (1 + np.cos(np.pi * k / length))
            trains = plan.mask[slot]
            for sign in (rates[slot][:4], rates[slot][4:]):
                np.testing.assert_allclose(sign[trains], expected[trains], rtol=1e-5)
            k = np.where(ended, 0, k + 1)
            ended = plan.done[slot]
            length = np.where(ended, step.length, length)
    assert get_recipe("celo2").inner_schedule == "constant"
