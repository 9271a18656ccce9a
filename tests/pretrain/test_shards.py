import errno
import resource

import numpy as np
import pytest
import torch

from celo2.pretrain import shards as shards_module
from celo2.pretrain.shards import (
    HEADER_BYTES,
    MAGIC,
    VERSION,
    Loader,
    find_shards,
    open_shard,
    permute,
    shard_fingerprint,
    validation_batches,
    write_shard,
)

BYTES, GPT2 = 256, 0


def tokens_of(count: int, start: int = 0) -> np.ndarray:
    return (np.arange(start, start + count) % 257).astype(np.uint16)


# format


def test_round_trip_and_layout(tmp_path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, tokens_of(1000), BYTES)
    raw = path.read_bytes()
    header = np.frombuffer(raw[:HEADER_BYTES], dtype="<i4")
    assert header[:4].tolist() == [MAGIC, VERSION, 1000, BYTES]
    assert not header[4:].any()
    np.testing.assert_array_equal(np.frombuffer(raw[HEADER_BYTES:], dtype="<u2"), tokens_of(1000))
    mapped = open_shard(path, BYTES)
    assert isinstance(mapped, np.memmap)
    assert mapped.dtype == np.uint16
    np.testing.assert_array_equal(mapped, tokens_of(1000))
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_reads_a_public_dump(tmp_path) -> None:
    """A dump whose header has nothing after the count, as the public GPT-2 token files."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 3
    (tmp_path / "dump.bin").write_bytes(header.tobytes() + np.array([50256, 7, 9], dtype="<u2").tobytes())
    assert open_shard(tmp_path / "dump.bin", GPT2).tolist() == [50256, 7, 9]


def damage(raw: bytes, what: str) -> bytes:
    def word(index: int, value: int) -> bytes:
        return raw[: 4 * index] + np.array([value], dtype="<i4").tobytes() + raw[4 * index + 4 :]

    return {
        "empty": lambda: b"",
        "short": lambda: raw[:1000],
        "magic": lambda: word(0, 20240801),
        "version": lambda: word(1, 7),
        "negative": lambda: word(2, -1),
        "truncated": lambda: raw[:-10],
        "half": lambda: raw[:-1],
        "trailing": lambda: raw + b"\0\0",
        "vocabulary": lambda: word(3, GPT2),
    }[what]()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty", "the file is empty; delete it and make it again"),
        ("short", "1000 bytes, shorter than the header of 1024"),
        ("magic", "not a token shard: it starts with 20240801 instead of 20240520"),
        ("version", "shard version 7; only 1 is read"),
        ("negative", "the header says -1 tokens"),
        ("truncated", "truncated: the header says 100 tokens, 200 bytes, the file holds 190; delete it"),
        ("half", "truncated: the header says 100 tokens, 200 bytes, the file holds 199"),
        ("trailing", "2 bytes beyond the header's 100 tokens"),
        ("vocabulary", "vocabulary id 0, this model reads 256 .*--tokenizer bytes"),
    ],
)
def test_bad_shard_is_refused_by_name(tmp_path, what: str, message: str) -> None:
    path = tmp_path / "bad_train_000001.bin"
    write_shard(path, tokens_of(100), BYTES)
    path.write_bytes(damage(path.read_bytes(), what))
    with pytest.raises(ValueError, match=message) as caught:
        open_shard(path, BYTES)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=r"bad_train_000001\.bin"):
        Loader([path], 8, 0, BYTES)


def test_missing_shard(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.bin: no such shard; make it with"):
        open_shard(tmp_path / "gone.bin", GPT2)


def test_token_outside_vocabulary(tmp_path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(ValueError, match="token id 300 is outside the vocabulary 'bytes' of 257"):
        write_shard(path, np.array([1, 300], dtype=np.uint16), BYTES)
    write_shard(path, np.full(40, 300, dtype=np.uint16), GPT2)
    raw = bytearray(path.read_bytes())
    raw[12:16] = np.array([BYTES], dtype="<i4").tobytes()
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.bin: token id 300 .* another tokenizer's shard, or damaged"):
        Loader([path], 8, 0, BYTES).batch(0, 2)
    with pytest.raises(ValueError, match=r"a\.bin: token id 300"):
        next(validation_batches([path], 8, 16, 2, BYTES))


def test_write_refusals(tmp_path) -> None:
    with pytest.raises(TypeError, match="int64; give a numpy array of uint16"):
        write_shard(tmp_path / "a.bin", np.arange(4), BYTES)
    for bad in (np.zeros((2, 2), dtype=np.uint16), np.zeros(0, dtype=np.uint16)):
        with pytest.raises(ValueError, match=r"a shard holds \[n\] with 1 <= n"):
            write_shard(tmp_path / "a.bin", bad, BYTES)
    with pytest.raises(ValueError, match="vocab_id=5 is unknown"):
        write_shard(tmp_path / "a.bin", tokens_of(3), 5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch, call: str) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, tokens_of(10), BYTES)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards_module.os, call, full)
    with pytest.raises(OSError, match=r"cannot write .*a\.bin: No space left on device; free space") as caught:
        write_shard(path, tokens_of(20), BYTES)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    assert len(open_shard(path, BYTES)) == 10


def test_missing_folder_is_named(tmp_path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*nowhere.*No such file or directory"):
        write_shard(tmp_path / "nowhere" / "a.bin", tokens_of(10), BYTES)


def test_find_shards(tmp_path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no such data folder; make it with `python -m celo2\.pretrain\.prepare_data"
    ):
        find_shards(tmp_path / "none")
    for name in ("x_train_000002.bin", "x_train_000001.bin"):
        write_shard(tmp_path / name, tokens_of(10), BYTES)
    with pytest.raises(FileNotFoundError, match=r"no \*_val_NUMBER\.bin shard in this folder; make it with"):
        find_shards(tmp_path)
    write_shard(tmp_path / "x_val_000000.bin", tokens_of(10), BYTES)
    train, val = find_shards(tmp_path)
    assert [p.name for p in train] == ["x_train_000001.bin", "x_train_000002.bin"]
    assert [p.name for p in val] == ["x_val_000000.bin"]
    # a text whose own name says train or val
    write_shard(tmp_path / "my_train_part_val_000000.bin", tokens_of(10), BYTES)
    train, val = find_shards(tmp_path)
    assert len(train) == 2 and [p.name for p in val] == ["my_train_part_val_000000.bin", "x_val_000000.bin"]
    (tmp_path / "my_train_part_val_000000.bin").unlink()
    (tmp_path / "x_train_000001.bin").unlink()
    (tmp_path / "x_train_000002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*_train_NUMBER\.bin"):
        find_shards(tmp_path)


# permutation


def test_permutation_is_a_bijection_for_every_small_size() -> None:
    sizes = [*range(1, 300), 511, 512, 513, 1000, 1023, 1024, 1025, 2047, 2049, 3000, 4096, 4097, 5003, 65537]
    for n in sizes:
        image = permute(np.arange(n), n, seed=n, epoch=n % 3)
        assert image.dtype == np.int64
        assert np.array_equal(np.sort(image), np.arange(n)), n


def test_permutation_never_changes() -> None:
    """Pinned values: a run resumed by a later version must see the same order of samples."""
    assert permute(np.arange(10), 10, seed=1234, epoch=0).tolist() == [2, 1, 5, 4, 9, 8, 6, 7, 0, 3]
    assert permute(np.array([0, 1, 2, 9_999_999, 10_000_018]), 10_000_019, seed=7, epoch=3).tolist() == [
        9389363,
        8001562,
        7583103,
        7727966,
        4467546,
    ]


def test_permutation_of_a_large_range() -> None:
    n = 10_000_019
    image = permute(np.arange(n - 4096, n), n, seed=3, epoch=1)
    assert len(np.unique(image)) == 4096
    assert image.min() >= 0
    assert image.max() < n
    # uniform positions: the mean of 4096 draws has a standard deviation of 0.0045
    assert abs(image.mean() / n - 0.5) < 0.03


def test_permutation_differs_between_seeds_and_epochs() -> None:
    n = 1000
    orders = [permute(np.arange(n), n, seed, epoch) for seed in (0, 1, 2**40, -1) for epoch in range(4)]
    for i, one in enumerate(orders):
        # about one fixed point is expected of two independent permutations
        assert (one == np.arange(n)).sum() < 12
        for other in orders[:i]:
            assert (one == other).sum() < 12


def test_permutation_of_two_takes_both_orders() -> None:
    assert {tuple(permute(np.arange(2), 2, 0, epoch).tolist()) for epoch in range(20)} == {(0, 1), (1, 0)}


# loader


@pytest.fixture
def two_shards(tmp_path):
    paths = [tmp_path / "x_train_000001.bin", tmp_path / "x_train_000002.bin"]
    write_shard(paths[0], tokens_of(101), BYTES)
    write_shard(paths[1], tokens_of(60, start=120), BYTES)
    return paths


def test_loader_windows(two_shards) -> None:
    loader = Loader(two_shards, 10, 5, BYTES)
    assert loader.num_sequences == 10 + 5
    inputs, targets = loader.batch(0, 15)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (15, 10)
    assert torch.equal(targets, inputs + 1)
    starts = [*range(0, 100, 10), *range(120, 170, 10)]
    assert sorted(inputs[:, 0].tolist()) == starts
    assert inputs[:, 0].tolist() == [starts[i] for i in permute(np.arange(15), 15, 5, 0)]


def test_loader_each_sequence_once_an_epoch_and_a_new_order_each(two_shards) -> None:
    loader = Loader(two_shards, 10, 5, BYTES)
    epochs = [loader.batch(15 * epoch, 15)[0][:, 0].tolist() for epoch in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_loader_is_the_same_at_any_split_and_after_resume(two_shards) -> None:
    whole = Loader(two_shards, 10, 5, BYTES).batch(0, 48)
    for count in (1, 4, 7, 16):
        fresh = Loader(two_shards, 10, 5, BYTES)
        pieces = [fresh.batch(first, min(count, 48 - first)) for first in range(0, 48, count)]
        for i in range(2):
            assert torch.equal(torch.cat([piece[i] for piece in pieces]), whole[i])


def test_loader_skips_a_shard_without_a_window(tmp_path, two_shards) -> None:
    tiny = tmp_path / "tiny.bin"
    write_shard(tiny, tokens_of(10), BYTES)
    loader = Loader([tiny, two_shards[0], tiny, two_shards[1], tiny], 10, 5, BYTES)
    assert loader.num_sequences == 15
    assert torch.equal(loader.batch(0, 15)[0], Loader(two_shards, 10, 5, BYTES).batch(0, 15)[0])


def test_more_shards_than_file_descriptors(tmp_path) -> None:
    count = 300
    for number in range(count):
        write_shard(tmp_path / f"x_train_{number:06d}.bin", tokens_of(11, start=number), BYTES)
    paths = sorted(tmp_path.glob("*.bin"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        inputs, _ = Loader(paths, 10, 0, BYTES).batch(0, count)
        (validation, _), *_ = validation_batches(paths, 10, 10 * count, count, BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(inputs[:, 0].tolist()) == sorted(validation[:, 0].tolist()) == sorted(n % 257 for n in range(count))


def test_fingerprint_tells_data_apart(tmp_path) -> None:
    path = tmp_path / "a.bin"
    found = set()
    for change in (None, 0, 700_000, 1_399_999):
        tokens = tokens_of(1_400_000)
        if change is not None:
            tokens[change] += 1
        write_shard(path, tokens, GPT2)
        found.add(shard_fingerprint(path))
    # the middle of a large shard is not read
    assert len(found) == 3


def test_loader_context_plus_one_tokens_is_enough(tmp_path) -> None:
    write_shard(tmp_path / "a.bin", tokens_of(11), BYTES)
    inputs, targets = Loader([tmp_path / "a.bin"], 10, 0, BYTES).batch(0, 3)
    assert inputs.tolist() == [list(range(10))] * 3
    assert targets.tolist() == [list(range(1, 11))] * 3


def test_loader_refusals(tmp_path, two_shards) -> None:
    write_shard(tmp_path / "a.bin", tokens_of(10), BYTES)
    with pytest.raises(
        ValueError, match=r"a\.bin: the longest of 1 shard\(s\) has 10 tokens, fewer than context\+1=11"
    ):
        Loader([tmp_path / "a.bin"], 10, 0, BYTES)
    with pytest.raises(ValueError, match="no shard is given"):
        Loader([], 10, 0, BYTES)
    with pytest.raises(ValueError, match="context=0; give at least 1"):
        Loader(two_shards, 0, 0, BYTES)
    with pytest.raises(ValueError, match="first=-1, count=1"):
        Loader(two_shards, 10, 0, BYTES).batch(-1, 1)
    with pytest.raises(ValueError, match="first=0, count=0"):
        Loader(two_shards, 10, 0, BYTES).batch(0, 0)


# validation


def test_validation_is_sequential_and_fixed(two_shards) -> None:
    batches = list(validation_batches(two_shards, 10, 125, 5, BYTES))
    assert [len(inputs) for inputs, _ in batches] == [5, 5, 2]
    inputs = torch.cat([inputs for inputs, _ in batches])
    targets = torch.cat([targets for _, targets in batches])
    assert inputs[:, 0].tolist() == [*range(0, 100, 10), 120, 130]
    assert torch.equal(targets, inputs + 1)
    assert sum(len(i) for i, _ in validation_batches(two_shards, 10, 10**9, 4, BYTES)) == 15


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_ranks_share_the_validation_set_in_equal_rounds(two_shards, ranks: int) -> None:
    whole = torch.cat([inputs for inputs, _ in validation_batches(two_shards, 10, 125, 2, BYTES)])
    shares = [list(validation_batches(two_shards, 10, 125, 2, BYTES, rank, ranks)) for rank in range(ranks)]
    # six batches of two windows
    assert {len(share) for share in shares} == {-(-6 // ranks)}
    counted = [inputs[targets[:, 0] >= 0] for share in shares for inputs, targets in share]
    assert sorted(torch.cat(counted)[:, 0].tolist()) == whole[:, 0].tolist()
    padding = [targets for share in shares for _, targets in share if targets[0, 0] < 0]
    assert all((targets == -100).all() for targets in padding) and len(padding) == -(-6 // ranks) * ranks - 6


def test_validation_refusals_come_before_the_first_batch(tmp_path, two_shards) -> None:
    write_shard(tmp_path / "a.bin", tokens_of(10), BYTES)
    with pytest.raises(ValueError, match=r"fewer than context\+1=11"):
        validation_batches([tmp_path / "a.bin"], 10, 100, 4, BYTES)
    with pytest.raises(ValueError, match="max_tokens=9 is less than one window; give at least context=10"):
        validation_batches(two_shards, 10, 9, 4, BYTES)
    with pytest.raises(ValueError, match="batch=0; give at least 1"):
        validation_batches(two_shards, 10, 100, 0, BYTES)
