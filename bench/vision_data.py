"""The images of `vision.py`: folders or a `datasets` id as ImageNet is kept, or the small ones in the package.

Batches have no state: sample `number` of a run is the image that (seed, its epoch) puts there, and what is drawn to
augment it follows from (seed, number). So a run goes on to the bit, with any number of workers. timm's `create_loader`
keeps a place in its samplers instead; its datasets and transforms are used, and batches are made here.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from celo2.meta.images import CLASSES, EMBEDDED, SIDE, load_npz
from celo2.pretrain import require
from celo2.pretrain.shards import permute

# every tenth embedded image is held out
HELD_OUT = 10
# what a draw is for, besides its place in the run
STEP, SAMPLE, SHIFT = range(3)
Batch = tuple[Tensor, Tensor]


def load_torchvision() -> None:
    """Import torchvision and timm; raises ImportError that says what to install when one of them does not load.

    Builds of torchvision for GPUs cannot load their library beside a PyTorch for CPUs, and then fail to be imported
    over the shapes of two operators. These are declared here, and never called: transforms need none of them.
    """
    require("timm", "torchvision", extra="vision")
    try:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            for name in ("nms", "qnms"):
                torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
            importlib.import_module("torchvision")
        importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ImportError(f"timm does not load ({reason}): pip install 'celo2[vision]'") from error


def seed_draws(*key: int) -> None:
    """Seed all three generators that timm draws from, of Python, NumPy and PyTorch, by a key of whole numbers."""
    words = np.random.SeedSequence([number % 2**64 for number in key]).generate_state(4)
    random.seed(int(words[0]))
    # timm draws from NumPy's global generator
    np.random.seed(words[1])  # noqa: NPY002
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


@dataclass(frozen=True)
class Share:
    """How a batch is split: micro-batches of `size` images on each of `ranks`, `count` of them a step."""

    size: int
    count: int
    rank: int = 0
    ranks: int = 1

    @property
    def batch(self) -> int:
        return self.size * self.count * self.ranks

    def first(self, step: int, index: int) -> int:
        """Number of the first sample of this rank's micro-batch `index` of a step."""
        return ((step * self.count + index) * self.ranks + self.rank) * self.size


def images_at(first: int, count: int, total: int, seed: int) -> np.ndarray:
    """Which images the samples `first..first+count-1` are, of `total` that every epoch visits once: int64 [count]."""
    epochs, positions = np.divmod(np.arange(first, first + count, dtype=np.int64), total)
    found = np.empty(count, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        found[here] = permute(positions[here], total, seed, epoch)
    return found


class EmbeddedImages:
    """Fashion-MNIST at 8 x 8 pixels, grey, as the package carries it; a tenth is held out.

    Training images are mirrored and shifted by up to a pixel. Batches are float32 [B, 1, 8, 8] and int64 [B].
    """

    classes, channels, side = CLASSES, 1, SIDE

    def __init__(self, seed: int) -> None:
        images = load_npz(EMBEDDED)["fashion_mnist"]
        pixels = torch.from_numpy(images.images).view(-1, 1, SIDE, SIDE)
        labels = torch.from_numpy(images.labels)
        held_out = torch.arange(len(labels)) % HELD_OUT == 0
        self._train, self._val = (pixels[~held_out], labels[~held_out]), (pixels[held_out], labels[held_out])
        self._mean, self._std = float(self._train[0].mean()), float(self._train[0].std())
        self.seed = seed
        self.train_images, self.val_images = len(self._train[1]), len(self._val[1])
        self.identity = {"source": "embedded", "sha256": images.sha256}
        self.augmentation = "mirrored with probability 0.5, shifted by up to a pixel along each axis"

    def __str__(self) -> str:
        return "the embedded Fashion-MNIST, 8 x 8 grey pixels: a test of the path, not of the paper's claim"

    def batches(self, step: int, end: int, share: Share) -> Iterator[Batch]:
        """This rank's micro-batches of the steps `step..end-1`."""
        padded = F.pad(self._train[0], (1, 1, 1, 1))
        offsets = torch.arange(SIDE)
        for number in range(step, end):
            first = number * share.batch
            draws = np.random.default_rng([self.seed % 2**64, SHIFT, number]).integers(0, (2, 3, 3), (share.batch, 3))
            for index in range(share.count):
                at = share.first(number, index)
                chosen = torch.from_numpy(images_at(at, share.size, self.train_images, self.seed))
                mirror, down, right = torch.from_numpy(draws[at - first : at - first + share.size]).T
                rows_BY = down[:, None] + offsets
                columns_BX = right[:, None] + torch.where(mirror[:, None] > 0, offsets.flip(0), offsets)
                yield (
                    padded[chosen[:, None, None], 0, rows_BY[:, :, None], columns_BX[:, None, :]][:, None],
                    self._train[1][chosen],
                )

    def validation(self, size: int, rank: int, ranks: int) -> Iterator[Batch]:
        """This rank's share of the held-out images."""
        mine = slice(rank, None, ranks)
        yield from zip(*(part[mine].split(size) for part in self._val), strict=True)

    def prepare(self, images: Tensor, training: bool) -> Tensor:
        """Normalise a batch on its device."""
        return (images - self._mean) / self._std


@dataclass(frozen=True)
class Augmentation:
    """What timm's transforms do to an image; the names are those of timm's training script."""

    aa: str | None
    """Policy of `auto_augment`, as `rand-m10-n2`; None for none."""
    color_jitter: float
    """Of brightness, contrast and saturation; timm leaves it out beside a policy."""
    reprob: float
    """Probability that a rectangle is erased."""
    crop_pct: float
    """Part of the side that validation crops."""

    def __post_init__(self) -> None:
        for name, low, high in (("color_jitter", 0.0, 1.0), ("reprob", 0.0, 1.0), ("crop_pct", 0.05, 1.0)):
            if not low <= getattr(self, name) <= high:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {getattr(self, name)}: must be within {low:g}..{high:g}")


class _Samples(Dataset[tuple[Any, int]]):
    """Images by (index, number): draws of the transform are seeded by the number; None draws nothing of its own."""

    def __init__(self, images: Any, seed: int) -> None:
        self._images, self._seed = images, seed

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Any, int]:
        index, number = key
        if number is not None:
            seed_draws(self._seed, SAMPLE, number)
        return self._images[index]


class _Keys:
    """The keys of each batch in turn, of the steps from `step` on."""

    def __init__(self, steps: range, share: Share, total: int, seed: int) -> None:
        self._steps, self._share, self._total, self._seed = steps, share, total, seed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self._steps:
            for index in range(self._share.count):
                first = self._share.first(step, index)
                found = images_at(first, self._share.size, self._total, self._seed)
                yield [(int(image), first + place) for place, image in enumerate(found)]


def _leave_signals(worker: int) -> None:
    """In a worker: what stops or saves a run is its process's, and finds the worker in a group of its own."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


class RealImages:
    """Images of a folder with `train/` and `val/`, a folder a class in each, or `hf:` and an id of `datasets`.

    Images are read and transformed by timm, in `workers` processes (0: in this one). Batches are uint8
    [B, 3, side, side] and int64 [B]; `prepare` normalises them where they are. Raises ValueError for a source that is
    not laid out like this, OSError or ImportError with what to do about it.
    """

    channels = 3

    def __init__(self, source: str, side: int, augmentation: Augmentation, workers: int, seed: int) -> None:
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
        from timm.data.random_erasing import RandomErasing

        self.source, self.side, self.workers, self.seed = source, side, workers, seed
        self._train, self._val = _open(source)
        classes = [dataset.reader.class_to_idx for dataset in (self._train, self._val)]
        if classes[0] != classes[1]:
            raise ValueError(
                f"--data {source}: {len(classes[0])} classes to train on and {len(classes[1])} to validate on, which "
                f"differ ({', '.join(map(str, sorted(classes[0].items() ^ classes[1].items())[:3]))}, ...): both "
                "need the same folders"
            )
        self.classes = len(classes[0])
        try:
            self._train.transform = create_transform(
                side,
                is_training=True,
                auto_augment=augmentation.aa,
                color_jitter=augmentation.color_jitter,
                interpolation="bicubic",
                use_prefetcher=True,
            )
        except (AssertionError, ValueError) as error:
            raise ValueError(f"--aa {augmentation.aa}: timm knows no such policy; as rand-m10-n2, or none") from error
        self._val.transform = create_transform(
            side, interpolation="bicubic", crop_pct=augmentation.crop_pct, use_prefetcher=True
        )
        self._erase = RandomErasing(augmentation.reprob, mode="pixel", device="cpu") if augmentation.reprob else None
        self._mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1) * 255
        self._std = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1) * 255
        self.train_images, self.val_images = len(self._train), len(self._val)
        name = source if source.startswith("hf:") else Path(source).resolve().name
        counts = {"classes": self.classes, "images": self.train_images, "held_out": self.val_images}
        self.identity = {"source": name, **counts, "side": side, **vars(augmentation)}
        jitter = (
            f", colours by {augmentation.color_jitter:g}" if augmentation.color_jitter and not augmentation.aa else ""
        )
        self.augmentation = (
            f"crops of 8 to 100 %, mirrored with probability 0.5, policy {augmentation.aa or 'none'}{jitter}, erased "
            f"with probability {augmentation.reprob:g}; validation crops {augmentation.crop_pct:g} of the side"
        )

    def __str__(self) -> str:
        return f"{self.source}, {self.classes} classes, read by {self.workers or 'no'} workers"

    def _loader(self, images: Any, keys: Any) -> DataLoader[Any]:
        from timm.data.loader import fast_collate

        # a worker is begun when the first batch is asked for, and ends with the last
        return DataLoader(
            _Samples(images, self.seed),
            batch_sampler=keys,
            num_workers=self.workers,
            collate_fn=fast_collate,
            worker_init_fn=_leave_signals,
        )

    def batches(self, step: int, end: int, share: Share) -> Iterator[Batch]:
        """This rank's micro-batches of the steps `step..end-1`."""
        yield from self._loader(self._train, _Keys(range(step, end), share, self.train_images, self.seed))

    def validation(self, size: int, rank: int, ranks: int) -> Iterator[Batch]:
        """This rank's share of the validation images."""
        mine: Sequence[int] = range(rank, self.val_images, ranks)
        keys = [[(index, None) for index in mine[at : at + size]] for at in range(0, len(mine), size)]
        yield from self._loader(self._val, keys) if keys else ()

    def prepare(self, images: Tensor, training: bool) -> Tensor:
        """Normalise a batch on its device, and erase rectangles when training."""
        images = (images.float() - self._mean.to(images.device)) / self._std.to(images.device)
        if training and self._erase is not None:
            self._erase.device = images.device
            images = self._erase(images)
        return images


Images = EmbeddedImages | RealImages


def _open(source: str) -> tuple[Any, Any]:
    """timm's datasets to train and to validate on."""
    from timm.data import create_dataset

    if source.startswith("hf:"):
        require("datasets", extra="vision")
        name = f"hfds/{source.removeprefix('hf:')}"
        try:
            return create_dataset(name, split="train"), create_dataset(name, split="validation")
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(
                f"--data {source} could not be loaded ({type(error).__name__}: {reason}): look at the id, the network "
                "and whether it asks for a login (`hf auth login`); it needs an image and a label column, and splits "
                "train and validation"
            ) from error
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"--data {source}: no such folder; give one with train/ and val/, hf:ID, or leave it out")
    found = []
    for name in ("train", "val"):
        if not (folder / name).is_dir():
            raise ValueError(
                f"--data {source}: has no folder {name}/; it needs train/ and val/, a folder a class in each"
            )
        try:
            found.append(create_dataset("", root=str(folder / name), search_split=False))
        except RuntimeError as error:
            raise ValueError(f"--data {source}: {name}/ has no images in folders of classes ({error})") from error
    return found[0], found[1]
