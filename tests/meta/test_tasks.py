"""Tasks, their data order, the start of a trajectory, and the image sets."""

from __future__ import annotations

import math

import numpy as np
import pytest

from celo2.meta import images as images_module
from celo2.meta.images import ImageSet, load_image_sets, load_npz, load_official, photo_patches, shrink, small_subset
from celo2.meta.network import MLP, SHAPES, initial_weights
from celo2.meta.tasks import Task, TaskFamily, normalised_loss

LOSS_CLIP = MLP().loss_clip


def test_batches_are_shuffled_epochs_by_seed(image_sets):
    task = Task(image_sets[0], 0, seed=3)
    stream = task.stream.batches(0, 9)
    assert task.stream.batches_per_epoch == 3 and stream.shape == (9, 64)
    for epoch in stream.reshape(3, -1):
        assert len(set(epoch.tolist())) == 3 * 64  # nothing twice in an epoch, the remainder is dropped
    assert not np.array_equal(stream[:3], stream[3:6])
    np.testing.assert_array_equal(task.stream.batches(2, 5), stream[2:7])
    np.testing.assert_array_equal(Task(image_sets[0], 0, seed=3).stream.batches(0, 9), stream)
    assert not np.array_equal(Task(image_sets[0], 0, seed=4).stream.batches(0, 9), stream)
    assert not np.array_equal(Task(image_sets[0], 1, seed=3).stream.batches(0, 9), stream)


def test_particles_take_the_stream_in_turn_on_any_rank(image_sets):
    family = TaskFamily(image_sets, seed=0, particles=2)
    whole = family.batches(range(4)).of(7, 3)
    stream = family.tasks[1].stream.batches(7 * 2, 3 * 2)
    for step in range(3):
        for particle in range(2):
            np.testing.assert_array_equal(whole[step, 2 + particle] - 200, stream[2 * step + particle])
    np.testing.assert_array_equal(family.batches(range(1, 3)).of(7, 3), whole[:, 1:3])
    images, labels = family.bank(__import__("torch").device("cpu"))
    np.testing.assert_array_equal(images[200:].numpy(), image_sets[1].images)
    assert labels.shape == (400,)


def test_starts_are_truncated_normals_over_a_log_uniform_scale(image_sets):
    family = TaskFamily(image_sets, seed=0)
    rng = np.random.default_rng(0)
    draws = np.concatenate([initial_weights(rng)["hidden_weight"].ravel() for _ in range(50)])
    assert draws.std() * 8 == pytest.approx(0.8796, rel=0.01) and np.abs(draws).max() <= 2 / 8
    scales = np.array([family.sample(0, occasion)[0] for occasion in range(2000)])
    logs = np.log10(scales)
    assert -3 <= logs.min() < -2.95 and 2.95 < logs.max() <= 3
    assert logs.mean() == pytest.approx(0, abs=0.12) and logs.std() == pytest.approx(6 / math.sqrt(12), rel=0.05)
    scale, weights = family.sample(1, 5)
    assert weights["hidden_weight"].std() * scale * 8 == pytest.approx(0.88, rel=0.05)
    assert {name: w.shape for name, w in weights.items()} == SHAPES and not weights["hidden_bias"].any()
    assert family.sample(1, 5)[0] == scale != family.sample(1, 6)[0]


def test_normalised_loss_is_clipped_and_finite():
    values = normalised_loss(np.array([-1.0, 0.5, 5.0, np.nan, np.inf, -np.inf]), LOSS_CLIP)
    np.testing.assert_allclose(values, [0, 0.5, LOSS_CLIP, LOSS_CLIP, LOSS_CLIP, 0])
    assert pytest.approx(3.45388, abs=1e-5) == LOSS_CLIP


def test_refusals(image_sets):
    small = ImageSet("few", image_sets[0].images[:50], image_sets[0].labels[:50])
    with pytest.raises(ValueError, match="data set 'few' has 50 examples, a batch needs 64"):
        Task(small, 0, 0)
    with pytest.raises(ValueError, match="at least one data set"):
        TaskFamily([], seed=0)
    with pytest.raises(ValueError, match="scale_range"):
        TaskFamily(image_sets, seed=0, scale_range=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"'odd': pixels must be finite and in \[0, 1\]"):
        ImageSet("odd", np.full((3, 64), 2.0, np.float32), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="'odd': labels must be 0 .. 9"):
        ImageSet("odd", np.zeros((3, 64), np.float32), np.full(3, 10))
    with pytest.raises(ValueError, match="expected"):
        ImageSet("odd", np.zeros((3, 63), np.float32), np.zeros(3, np.int64))


# image sets


@pytest.mark.needs("skimage")
def test_embedded_sets():
    sets = load_image_sets("embedded")
    assert [(s.name, len(s.images)) for s in sets] == [
        ("photo_patches", 10_000),
        ("fashion_mnist", 48_000),
        ("mnist5k", 5_000),
        ("digits", 733),
    ]
    for image_set in sets:
        assert set(image_set.labels.tolist()) == set(range(10)) and image_set.images.std() > 0.2
    assert photo_patches().sha256 == sets[0].sha256


def test_shrink_is_bilinear_without_antialias():
    rng = np.random.default_rng(0)
    big = rng.integers(0, 256, (2, 32, 32), dtype=np.uint8)
    taps = (big[:, 1::4, 1::4].astype(float) + big[:, 1::4, 2::4] + big[:, 2::4, 1::4] + big[:, 2::4, 2::4]) / 4
    np.testing.assert_allclose(shrink(big).reshape(2, 8, 8), taps / 255, atol=1e-6)
    column = np.zeros((1, 28, 28), np.uint8)
    column[0, :, 1] = 255
    # (0 + 0.5) * 28 / 8 - 0.5 = 1.25: a quarter from pixel 2, three quarters from pixel 1
    np.testing.assert_allclose(shrink(column).reshape(8, 8)[:, 0], 0.75, atol=1e-6)
    colour = rng.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_allclose(shrink(colour)[0], colour.astype(float).mean(-1).ravel() / 255, atol=1e-6)


def _npz(path, **arrays):
    good = {"a_images": np.zeros((70, 8, 8), np.uint16), "a_labels": np.zeros(70, np.uint8)}
    np.savez(path, **(good | arrays))
    return path


def test_image_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such image file"):
        load_npz(tmp_path / "none.npz")
    whole = _npz(tmp_path / "whole.npz")
    assert list(load_npz(whole)) == ["a"] and len(load_image_sets(str(whole))[0].images) == 70
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:-200])
    (tmp_path / "text.npz").write_text("no archive")
    _npz(tmp_path / "wide.npz", a_images=np.zeros((70, 9, 8), np.uint16))
    _npz(tmp_path / "float.npz", a_images=np.zeros((70, 8, 8), np.float32))
    _npz(tmp_path / "label.npz", a_labels=np.full(70, 12, np.uint8))
    np.savez(tmp_path / "lone.npz", a_images=np.zeros((70, 8, 8), np.uint16))
    for name in ("cut", "text", "wide", "float", "label", "lone"):
        with pytest.raises(ValueError, match=f"{name}.npz is not a readable image file"):
            load_npz(tmp_path / f"{name}.npz")


class _Table:
    """As much of a `datasets.Dataset` as the loader uses."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def select(self, rows):
        return _Table(self.images[list(rows)], self.labels[list(rows)])

    def shuffle(self, seed):
        order = np.random.default_rng(seed).permutation(len(self))
        return _Table(self.images[order], self.labels[order])

    def __getitem__(self, column):
        return list(self.images) if column in ("image", "img") else list(self.labels)


@pytest.mark.needs("datasets")
def test_official_sets_through_datasets(monkeypatch):
    def load_dataset(hub, config, split):
        assert split == "train"
        shape = (1000, 32, 32, 3) if "svhn" in hub or "cifar" in hub else (1000, 28, 28)
        assert (config == "cropped_digits") == ("svhn" in hub)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return _Table(images, np.arange(1000) % 10)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    sizes = {s.name: len(s.images) for s in load_official()}
    assert sizes == {"cifar10": 800, "fashion_mnist": 800, "mnist": 800, "svhn": 733}

    def fail(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(OSError, match=r"uoft-cs/cifar10 could not be loaded .*no route.*--data embedded"):
        load_image_sets("official")


def test_small_subset_is_fixed():
    images = np.random.default_rng(0).random((1000, 64)).astype(np.float32)
    whole = ImageSet("x", images, np.arange(1000) % 10)
    assert len(small_subset(whole).images) == images_module.SMALL_SET == 733
    assert small_subset(whole).sha256 == small_subset(whole).sha256
