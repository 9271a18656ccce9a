"""Tasks beside images: the next byte of a text, and a memory of Zipf's frequencies."""

from __future__ import annotations

import numpy as np
import pytest

from celo2.meta import texts, train
from celo2.meta.recipes import get_recipe
from celo2.meta.texts import CONTEXT, next_byte, zipf_memory
from celo2.meta.transformer import ByteWindows


def test_a_text_is_ten_classes_of_windows() -> None:
    # bytes 0 to 13 in turn, five of them more often
    tokens = np.concatenate([np.tile(np.arange(14), 100), np.repeat(np.arange(5), 50)]).astype(np.uint16)
    text = next_byte("counting", tokens, examples=500)
    assert text.images.shape == (500, 64) and text.name == "counting"
    assert set(text.labels) == set(range(10)) and (text.labels == 9).mean() == pytest.approx(0.3, abs=0.1)
    assert next_byte("counting", tokens, examples=500).sha256 == text.sha256
    with pytest.raises(ValueError, match="text 'short' has 8 bytes: give more than 8"):
        next_byte("short", tokens[:CONTEXT])


def test_every_window_gives_the_byte_after_it(monkeypatch) -> None:
    # a table in which a byte's row says which byte it is
    monkeypatch.setattr(texts, "generator", lambda *place: Readable(np.random.default_rng(0)))
    tokens = np.random.default_rng(1).integers(0, 200, 3000).astype(np.uint16)
    text = next_byte("random", tokens, examples=400)
    windows = np.round(text.images.reshape(400, CONTEXT, 8)[..., 0] * 256).astype(np.uint16)
    common = np.argsort(-np.bincount(tokens), kind="stable")[:9].tolist()
    places = {tuple(tokens[start : start + CONTEXT]): start for start in range(len(tokens) - CONTEXT)}
    for window, label in zip(windows, text.labels, strict=True):
        following = int(tokens[places[tuple(window)] + CONTEXT])
        assert label == (common.index(following) if following in common else 9)


class Readable:
    """A generator whose tables have a row's number, over 256, in every column."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.integers = rng.integers

    def random(self, shape: tuple[int, int], dtype: type) -> np.ndarray:
        return np.repeat(np.arange(shape[0], dtype=dtype)[:, None] / 256, shape[1], 1)


def test_the_memory_has_zipfs_frequencies() -> None:
    memory = zipf_memory(items=100, examples=50_000)
    keys, index, counts = np.unique(memory.images, axis=0, return_inverse=True, return_counts=True)
    assert len(keys) <= 100
    # a key is always of one class
    for key in range(len(keys)):
        assert len(set(memory.labels[index.ravel() == key])) == 1
    harmonic = (1 / np.arange(1, 101)).sum()
    frequent = np.sort(counts)[::-1] / counts.sum()
    assert frequent[:3] == pytest.approx(1 / (np.arange(1, 4) * harmonic), rel=0.1)


def test_recipes_choose_their_tasks(image_sets, monkeypatch) -> None:
    monkeypatch.setattr(train, "load_image_sets", lambda source: list(image_sets))
    monkeypatch.setattr(train, "embedded_text", lambda: next_byte("text", np.arange(100, dtype=np.uint16), 100))
    windows = ByteWindows.of_text("windows", np.arange(300, dtype=np.uint16) % 50)
    monkeypatch.setattr(train, "embedded_windows", lambda: windows)
    assert train.load_tasks(get_recipe("celo2-lm"), "embedded") == [windows]
    assert train.load_tasks(get_recipe("celo2-transformer"), "embedded")[-1] is windows
    names = [task.name for task in train.load_tasks(get_recipe("celo2-text"), "embedded")]
    assert names == ["stripes0", "stripes1", "text", "zipf_memory"]
    assert [task.name for task in train.load_tasks(get_recipe("celo2"), "embedded")] == ["stripes0", "stripes1"]


def test_what_is_chosen_on_and_reported_is_not_trained_on(tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(texts, "next_byte", lambda name, tokens: seen.append(tokens))
    texts.embedded_text()
    windows = texts.embedded_windows()
    from celo2.meta.language_model import selection_shards
    from celo2.pretrain.shards import find_shards, open_shard
    from celo2.pretrain.tokenizer import get_tokenizer

    vocab_id = get_tokenizer("bytes").vocab_id
    chosen_on = selection_shards(tmp_path / "data" / "wikipedia-bytes", tmp_path / "selection")
    (train_shard,), _ = find_shards(chosen_on)
    kept = open_shard(train_shard, vocab_id)
    assert 0 < len(seen[0]) < len(kept)
    np.testing.assert_array_equal(seen[0], kept[: len(seen[0])])
    # so are the transformer's windows, all of them
    assert windows.inputs.size == (len(seen[0]) - 1) // 32 * 32
    common = np.argsort(-np.bincount(seen[0]), kind="stable")[:63]
    assert (np.append(common, 0)[windows.inputs[-1]] == seen[0][windows.inputs.size - 32 : windows.inputs.size])[
        windows.inputs[-1] < 63
    ].all()
