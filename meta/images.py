"""The image sets of meta-training: 8 x 8 grey pictures in [0, 1], ten classes each.

Three sources. `official`: the four sets of the paper, through `datasets` (needs a network or its cache). `embedded`:
what this package carries, Fashion-MNIST, 5,000 MNIST digits and the 733 UCI digits that play the part of SVHN's 733
images, with crops of the photographs that ship in scikit-image in CIFAR-10's part. Or a path of an `.npz` in the
embedded layout.

Source of sizes and preprocessing: the meta-training code of the Celo2 paper, arXiv 2602.19142.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from celo2.meta.randomness import Purpose, generator

SIDE = 8
PIXELS = SIDE * SIDE
CLASSES = 10
# the official recipe keeps 1 % of SVHN: a set small enough to be memorised
SMALL_SET = 733
ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ASSETS / "images_8x8.npz"

# hub id, configuration, image and label columns, part of the training split kept (0.8, or a number of images)
OFFICIAL = {
    "cifar10": ("uoft-cs/cifar10", None, "img", "label", 0.8),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", None, "image", "label", 0.8),
    "mnist": ("ylecun/mnist", None, "image", "label", 0.8),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits", "image", "label", SMALL_SET),
}

# ten photographs of scikit-image, one class each; the crops are its own pixels and are never stored
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "rocket.jpg",
)
CROPS_PER_PHOTOGRAPH = 1000
CROP = 32


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A named set: `images` [n, 64] float32 in [0, 1], a picture's rows one after another, and `labels` [n] int64."""

    name: str
    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.images.ndim != 2 or self.images.shape[1] != PIXELS or len(self.images) != len(self.labels):
            raise ValueError(
                f"image set {self.name!r}: images {self.images.shape} and labels {self.labels.shape}, expected "
                f"[n, {PIXELS}] and [n]"
            )
        if not len(self.images) or not np.isfinite(self.images).all() or self.images.min() < 0 or self.images.max() > 1:
            raise ValueError(f"image set {self.name!r}: pixels must be finite and in [0, 1], at least one image")
        if self.labels.min() < 0 or self.labels.max() >= CLASSES:
            raise ValueError(f"image set {self.name!r}: labels must be 0 .. {CLASSES - 1}")

    @property
    def inputs(self) -> NDArray[np.float32]:
        return self.images

    @property
    def targets(self) -> NDArray[np.int64]:
        return self.labels

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(self.name.encode())
        digest.update(np.ascontiguousarray(self.images, "<f4").tobytes())
        digest.update(np.ascontiguousarray(self.labels, "<i8").tobytes())
        return digest.hexdigest()


def shrink(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Resize [n, H, W] or [n, H, W, 3] of 0 .. 255 to [n, 64] of 0 .. 1: bilinear, no antialias, mean of colours."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).float()
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False) / 255
    return x.mean(1).reshape(-1, PIXELS).numpy()


def small_subset(image_set: ImageSet, size: int = SMALL_SET) -> ImageSet:
    """Keep a fixed random subset of `size` images."""
    keep = generator(0, Purpose.SUBSET).permutation(len(image_set.images))[:size]
    return ImageSet(image_set.name, image_set.images[keep], image_set.labels[keep])


def load_npz(path: Path) -> dict[str, ImageSet]:
    """Read every set of an `.npz` with `<set>_images` uint16 [n, 8, 8] (65535 = 1.0) and `<set>_labels` [n].

    Raises FileNotFoundError, or ValueError naming the file when it is damaged or laid out otherwise.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image file; pass --data embedded, --data official or an .npz")
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
        sets = {}
        for key in arrays:
            if key.endswith("_images"):
                name = key.removesuffix("_images")
                images, labels = arrays[key], arrays[f"{name}_labels"]
                if images.dtype != np.uint16 or images.shape[1:] != (SIDE, SIDE):
                    raise ValueError(f"{key} is {images.dtype} {images.shape}, expected uint16 [n, {SIDE}, {SIDE}]")
                pixels = (images.reshape(-1, PIXELS) / np.float32(65535)).astype(np.float32)
                sets[name] = ImageSet(name, pixels, labels.astype(np.int64))
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable image file ({error}): fetch or copy it again") from error
    if not sets:
        raise ValueError(f"{path} holds no <set>_images array")
    return sets


def photo_patches() -> ImageSet:
    """Crop the photographs of scikit-image: 1,000 grey 32 x 32 crops of each, the class is the photograph.

    Raises ImportError when scikit-image is missing (`pip install 'celo2[meta]'`).
    """
    try:
        from skimage.data import data_dir
        from skimage.io import imread
    except ImportError as error:
        raise ImportError("the photograph crops need scikit-image: pip install 'celo2[meta]'") from error
    rng = generator(0, Purpose.PHOTOGRAPHS)
    crops = []
    for name in PHOTOGRAPHS:
        picture = np.asarray(imread(Path(data_dir) / name))
        picture = picture if picture.ndim == 3 else picture[..., None].repeat(3, -1)
        rows = rng.integers(0, picture.shape[0] - CROP + 1, CROPS_PER_PHOTOGRAPH)
        columns = rng.integers(0, picture.shape[1] - CROP + 1, CROPS_PER_PHOTOGRAPH)
        crops += [picture[r : r + CROP, c : c + CROP, :3] for r, c in zip(rows, columns, strict=True)]
    labels = np.repeat(np.arange(CLASSES), CROPS_PER_PHOTOGRAPH)
    return ImageSet("photo_patches", shrink(np.stack(crops)), labels)


def load_official() -> list[ImageSet]:
    """Load the paper's four sets through `datasets`, in the paper's order.

    Raises ImportError without `datasets`, OSError naming the set when it cannot be fetched.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("--data official needs datasets: pip install 'celo2[meta]'") from error
    sets = []
    for name, (hub, config, image_column, label_column, kept) in OFFICIAL.items():
        try:
            table = load_dataset(hub, config, split="train")
        except (OSError, ValueError) as error:
            raise OSError(
                f"the image set {hub} could not be loaded ({type(error).__name__}: {error}); check the network or "
                "use --data embedded"
            ) from error
        count = round(kept * len(table)) if kept < 1 else int(kept)
        rows = table.select(range(count)) if kept < 1 else table.shuffle(seed=0).select(range(count))
        pictures = np.stack([np.asarray(picture) for picture in rows[image_column]])
        sets.append(ImageSet(name, shrink(pictures), np.asarray(rows[label_column], np.int64)))
    return sets


def load_image_sets(source: str = "embedded") -> list[ImageSet]:
    """Load the four sets of `source`: `"embedded"`, `"official"` or the path of an `.npz`.

    From a file, the sets `photo_patches`, `fashion_mnist`, `mnist5k` and 733 images of `digits` are taken when it has
    them all, otherwise every set it holds. Raises what the loaders raise, each naming the file or the set and the fix.
    """
    if source == "official":
        return load_official()
    if source == "embedded":
        sets = load_npz(EMBEDDED)
        return [photo_patches(), sets["fashion_mnist"], sets["mnist5k"], sets["digits"]]
    sets = load_npz(Path(source))
    wanted = ("photo_patches", "fashion_mnist", "mnist5k", "digits")
    if not set(wanted) <= set(sets):
        return list(sets.values())
    photographs, fashion, mnist, digits = (sets[name] for name in wanted)
    return [photographs, fashion, mnist, small_subset(digits)]
