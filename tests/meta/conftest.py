"""Small image sets and small recipes: the meta-training's own code on a few images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from celo2.meta.images import ImageSet
from celo2.meta.recipes import Recipe, get_recipe
from celo2.meta.transformer import ByteWindows


@pytest.fixture
def image_sets() -> list[ImageSet]:
    """Two learnable sets of 200 images: the class is a bright stripe under noise."""
    sets = []
    for index in range(2):
        rng = np.random.default_rng(index)
        labels = rng.integers(10, size=200)
        images = 0.3 * rng.random((200, 64))
        images[np.arange(200)[:, None], labels[:, None] * 6 + np.arange(4)] += 0.6
        sets.append(ImageSet(f"stripes{index}", images.astype(np.float32), labels))
    return sets


@pytest.fixture
def mixed_sets(image_sets: list[ImageSet]) -> list[ImageSet | ByteWindows]:
    """The two sets of images, and a text in which a byte follows the one before it, with noise."""
    rng = np.random.default_rng(2)
    text = (np.cumsum(1 + (rng.random(2000) < 0.1)) % 20).astype(np.uint16)
    return [*image_sets, ByteWindows.of_text("counting", text)]


@pytest.fixture
def small_recipe() -> Callable[..., Recipe]:
    """Two pairs a task, windows of 5 slots, trajectories of 8 to 15 steps: restarts come often."""

    def make(name: str = "celo2-short", **changes: Any) -> Recipe:
        small = {"particles": 2, "window": 5, "length_range": (8, 16), "initial_iterations": 16, "outer_steps": 40}
        return replace(get_recipe(name), **(small | {"outer_warmup": 2} | changes))

    return make
