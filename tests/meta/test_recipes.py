"""Recipes: the paper's constants, the schedules, what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from celo2.meta.recipes import RECIPES, get_recipe


def test_the_papers_constants():
    for name, lr in (("celo2", 5e-5), ("celo2-base", 1e-4)):
        recipe = get_recipe(name)
        assert recipe.variant == name and recipe.outer_lr == lr == recipe.lr(0) == recipe.lr(99_999)
        assert (recipe.outer_steps, recipe.particles, recipe.window, recipe.std) == (100_001, 8, 50, 0.01)
        assert recipe.outer_weight_decay == 1e-4 and recipe.outer_clip_norm is None and recipe.inner_clip_norm is None
        assert recipe.scale_range == (1e-3, 1e3) and recipe.length_range == (100, 2000)
        assert recipe.inner_lr == 1e-3 and recipe.adam_lr_mult == 20 and recipe.expert is None
    # 3.2e8 inner steps on four tasks
    assert pytest.approx(3.2e8, rel=1e-3) == 100_001 * 4 * 8 * 2 * 50


def test_short_schedule_warms_up_and_decays():
    recipe = get_recipe("celo2-short")
    assert recipe.lr(0) == pytest.approx(3e-5) and recipe.lr(99) == pytest.approx(3e-3)
    assert recipe.lr(recipe.outer_steps - 1) == pytest.approx(1e-5)
    assert all(recipe.lr(step) >= recipe.lr(step + 1) for step in range(100, recipe.outer_steps - 1))
    assert recipe.with_outer_steps(200).outer_warmup == 20 and recipe.with_outer_steps(200).lr(199) == pytest.approx(
        1e-5
    )


def test_the_expert_leads_and_leaves():
    recipe = get_recipe("celo2-elo")
    start, end = (int(part * recipe.outer_steps) for part in recipe.expert_until)
    assert recipe.expert_weight(0) == recipe.expert_weight(start) == 1
    assert recipe.expert_weight((start + end) // 2) == pytest.approx(0.5, abs=0.01) and recipe.expert_weight(end) == 0
    assert recipe.imitation_weight(0) == 0.7 and recipe.imitation_weight(end) == pytest.approx(0.21)
    assert get_recipe("celo2").expert_weight(0) == get_recipe("celo2").imitation_weight(0) == 0


def test_identity_counts_the_steps_only_where_the_schedule_does():
    constant, cosine = get_recipe("celo2"), get_recipe("celo2-short")
    assert constant.identity == constant.with_outer_steps(10).identity
    assert cosine.identity != cosine.with_outer_steps(10).identity
    assert len({str(recipe.identity) for recipe in RECIPES.values()}) == len(RECIPES)


def test_fields_that_came_later_do_not_change_what_a_checkpoint_was():
    plain = get_recipe("celo2")
    assert not {"tasks", "batch_range", "loss_tail", "inner_warmup", "inner_lr_range", "hidden"} & plain.identity.keys()
    changed = replace(plain, loss_tail=0.2, tasks=("images", "text"))
    assert changed.identity["loss_tail"] == 0.2 and changed.identity["tasks"] == ["images", "text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "adam"}, "variant='adam', allowed: celo2, celo2-base"),
        ({"length_distribution": "normal"}, "allowed: log-uniform, uniform"),
        ({"start": "sgd"}, "start='sgd', allowed: random, muon, adam"),
        ({"inner_schedule": "linear"}, "inner_schedule='linear', allowed: constant, cosine"),
        ({"expert": "sgd"}, "expert='sgd', allowed: None, muon, adam"),
        ({"inner_warmup": 1.0}, "inner_warmup=1.0: expected [0, 1)"),
        ({"loss_tail": 0.0}, "loss_tail=0.0: expected (0, 1]"),
        ({"inner_lr_range": (2.0, 1.0)}, "inner_lr_range=(2.0, 1.0): expected 0 < low <= high"),
        ({"batch_range": (0.0, 1.0)}, "batch_range=(0.0, 1.0): expected 0 < low <= high <= 1"),
        ({"batch_range": (0.5, 2.0)}, "batch_range=(0.5, 2.0): expected 0 < low <= high <= 1"),
        ({"tasks": ("image",)}, "tasks=('image',), allowed: images, text, memory, transformer"),
        ({"outer_steps": 0}, "outer_steps=0: expected at least 1"),
        ({"length_range": (50, 2000)}, "expected 0 < window < low < high"),
        ({"resume_probability": 1.0}, "resume_probability=1.0"),
        ({"particles": 0}, "must be positive"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=f"recipe 'celo2': .*{re.escape(message)}"):
        replace(get_recipe("celo2"), **change)
    with pytest.raises(ValueError, match="recipe 'celo3': allowed: celo2, "):
        get_recipe("celo3")
