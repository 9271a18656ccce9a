"""Inner tasks of what a language model learns from: the next byte of a text, and a memory of Zipf's frequencies.

Both have the layout of an image set, 64 numbers in [0, 1] and ten classes, so that they train the same network in the
same batch; the transformer's windows are of the same text. Their classes are as unequal as bytes are: those of images
are balanced, and what suits them need not suit a language model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from celo2.meta.images import CLASSES, PIXELS, ImageSet
from celo2.meta.randomness import Purpose, generator
from celo2.meta.transformer import ByteWindows
from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.shards import find_shards, open_shard
from celo2.pretrain.tokenizer import get_tokenizer

CONTEXT = 8
"""Bytes that the next one is guessed from, each through a fixed table of 64 / 8 numbers."""
EXAMPLES = 60_000
ITEMS = 2_000
# the part of the training text that nothing is chosen or reported on
TRAINING_PART = 0.8


def next_byte(name: str, tokens: NDArray[np.integer], examples: int = EXAMPLES) -> ImageSet:
    """Return windows of a text, [examples, 64], and the class of the byte after each: the nine commonest, or another.

    Raises ValueError for a text shorter than a window and its next byte.
    """
    if len(tokens) <= CONTEXT:
        raise ValueError(f"text {name!r} has {len(tokens)} bytes: give more than {CONTEXT}")
    rng = generator(0, Purpose.TEXT)
    size = int(tokens.max()) + 1
    table = rng.random((size, PIXELS // CONTEXT), np.float32)
    starts = rng.integers(0, len(tokens) - CONTEXT, examples)
    windows = tokens[starts[:, None] + np.arange(CONTEXT)]
    common = np.argsort(-np.bincount(tokens, minlength=size), kind="stable")[: CLASSES - 1]
    classes = np.full(size, CLASSES - 1)
    classes[common] = np.arange(len(common))
    return ImageSet(name, table[windows].reshape(examples, PIXELS), classes[tokens[starts + CONTEXT]].astype(np.int64))


def zipf_memory(items: int = ITEMS, examples: int = EXAMPLES) -> ImageSet:
    """Return an associative memory: random keys that come with frequency 1 / rank, in classes of frequency 1 / rank.

    Muon's advantage over Adam shows in one layer that learns such outer products (arXiv 2509.26030).
    """
    rng = generator(0, Purpose.MEMORY)
    keys = rng.random((items, PIXELS), np.float32)
    labels = rng.choice(CLASSES, items, p=_zipf(CLASSES))
    drawn = rng.choice(items, examples, p=_zipf(items))
    return ImageSet("zipf_memory", keys[drawn], labels[drawn].astype(np.int64))


def _zipf(count: int) -> NDArray[np.float64]:
    frequencies = 1 / np.arange(1, count + 1)
    return np.asarray(frequencies / frequencies.sum())


def embedded_text() -> ImageSet:
    """Return `next_byte` of the training part of the embedded Wikipedia articles."""
    return next_byte("wikipedia", _training_part())


def embedded_windows() -> ByteWindows:
    """Return the training part of the embedded Wikipedia articles in windows of the transformer."""
    return ByteWindows.of_text("wikipedia_windows", _training_part())


def _training_part() -> NDArray[np.integer]:
    """Return the articles that are for training, without those at the end.

    On these `celo2.meta.select` and `celo2.meta.evaluate` choose.
    """
    train, _ = find_shards(prepare_embedded("bytes", Path("data/wikipedia-bytes")))
    vocab_id = get_tokenizer("bytes").vocab_id
    tokens = np.concatenate([open_shard(path, vocab_id) for path in train])
    return tokens[: int(TRAINING_PART * len(tokens))]
