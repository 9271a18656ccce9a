"""Token shards in the `.bin` v1 format, and a loader addressed by the sample index.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, vocabulary id, zeros),
then the tokens as little-endian uint16. This is the format of llm.c's GPT-2 dumps; the fourth header word is
0 there, which means GPT-2 BPE here, and 256 means bytes.
"""

import functools
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from celo2.files import PathLike, write_atomic
from celo2.pretrain.loss import IGNORED
from celo2.pretrain.tokenizer import vocabulary
from celo2.stochastic_rounding import mix64

MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
MAX_SHARD_TOKENS = 2**31 - 1
MAPPED_SHARDS = 128

_PREPARE = "python -m celo2.pretrain.prepare_data"
_MASK64 = (1 << 64) - 1
_ROUNDS = 8


def write_shard(path: PathLike, tokens: np.ndarray, vocab_id: int) -> None:
    """Write one shard atomically.

    tokens: uint16 [n], 1 <= n < 2**31, ids of the vocabulary `vocab_id`. Raises TypeError for another dtype,
    ValueError for another shape or an id outside the vocabulary, OSError as `write_atomic`.
    """
    name, size = vocabulary(vocab_id)
    if not isinstance(tokens, np.ndarray) or tokens.dtype != np.uint16:
        kind = getattr(tokens, "dtype", type(tokens).__name__)
        raise TypeError(f"{path}: tokens are {kind}; give a numpy array of uint16, as Tokenizer.encode returns")
    if tokens.ndim != 1 or not 1 <= tokens.size <= MAX_SHARD_TOKENS:
        raise ValueError(f"{path}: tokens of shape {tokens.shape}; a shard holds [n] with 1 <= n <= {MAX_SHARD_TOKENS}")
    if int(tokens.max()) >= size:
        raise ValueError(
            f"{path}: token id {int(tokens.max())} is outside the vocabulary {name!r} of {size} ids; "
            "give the vocab_id of the tokenizer that made the tokens"
        )
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:4] = MAGIC, VERSION, tokens.size, vocab_id
    body = np.ascontiguousarray(tokens, dtype="<u2")
    write_atomic(path, [header.tobytes(), memoryview(body.view(np.uint8).data)])


def open_shard(path: PathLike, vocab_id: int) -> np.memmap:
    """Map the tokens of a shard, uint16 [n], read-only, after checking its header and length.

    Raises FileNotFoundError for a missing file, ValueError that names the file and the fix for an empty,
    foreign, truncated or overlong one, or one of another vocabulary. Token ids are checked where they are
    read.
    """
    path = Path(path)
    expected, _ = vocabulary(vocab_id)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such shard; make it with `{_PREPARE}` or correct the path")
    again = f"delete it and make it again with `{_PREPARE}`, or download it again"
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: the file is empty; {again}")
    if size < HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes, shorter than the header of {HEADER_BYTES}; {again}")
    header = np.fromfile(path, dtype="<i4", count=HEADER_WORDS)
    magic, version, count, found_id = (int(word) for word in header[:4])
    if magic != MAGIC:
        raise ValueError(
            f"{path}: not a token shard: it starts with {magic} instead of {MAGIC}; "
            f"give `.bin` v1 shards, which `{_PREPARE}` writes"
        )
    if version != VERSION:
        raise ValueError(f"{path}: shard version {version}; only {VERSION} is read; write it again with `{_PREPARE}`")
    if found_id != vocab_id:
        raise ValueError(
            f"{path}: the shard holds vocabulary id {found_id}, this model reads {vocab_id} ({expected!r}); "
            f"give a folder made with `{_PREPARE} --tokenizer {expected}`"
        )
    held = size - HEADER_BYTES
    if count < 1:
        raise ValueError(f"{path}: the header says {count} tokens, a shard has at least 1; {again}")
    if held < 2 * count:
        raise ValueError(
            f"{path}: truncated: the header says {count} tokens, {2 * count} bytes, the file holds {held}; {again}"
        )
    if held > 2 * count:
        raise ValueError(f"{path}: {held - 2 * count} bytes beyond the header's {count} tokens: damaged; {again}")
    return _map_tokens(path, count)


def _map_tokens(path: Path, count: int) -> np.memmap:
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def shard_fingerprint(path: PathLike) -> str:
    """Size and checksum of the first and last MiB of a shard: tells data apart without reading all of it."""
    with open(path, "rb") as file:
        checksum = zlib.crc32(file.read(1 << 20))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 20)))
        checksum = zlib.crc32(file.read(), checksum)
    return f"{size}-{checksum:08x}"


def find_shards(data_dir: PathLike) -> tuple[list[Path], list[Path]]:
    """Training and validation shards of a folder: the sorted `*_train_000001.bin` and `*_val_000000.bin`.

    Raises FileNotFoundError that says what is missing and the command that makes it.
    """
    folder = Path(data_dir)
    command = f"make it with `{_PREPARE} --embedded --tokenizer bytes|gpt2 --out {folder}` (or --text, --dataset)"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such data folder; {command}")
    files = sorted(folder.glob("*.bin"))
    # the end of the name decides: the text's own name may say train or val as well
    train, val = ([path for path in files if re.search(rf"_{kind}_\d+\.bin$", path.name)] for kind in ("train", "val"))
    for kind, paths in (("train", train), ("val", val)):
        if not paths:
            raise FileNotFoundError(f"{folder}: no *_{kind}_NUMBER.bin shard in this folder; {command}")
    return train, val


def _mix64_array(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Images of `positions` under the permutation of 0..n-1 that belongs to (seed, epoch).

    positions: integers [k] in 0..n-1; returns int64 [k]. No table: a Feistel network on the bits of n-1,
    halves of unequal width allowed, repeated on the values that fall outside 0..n-1 (cycle walking; Black and
    Rogaway, CT-RSA 2002). The map is part of the format: a resumed run relies on it, so it never changes.
    """
    bits = (n - 1).bit_length()
    low_bits = (bits + 1) // 2
    shift = np.uint64(low_bits)
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    key = mix64(mix64(seed & _MASK64) ^ (epoch & _MASK64))
    keys = [np.uint64(mix64(key ^ round_)) for round_ in range(_ROUNDS)]

    def network(x: np.ndarray) -> np.ndarray:
        low, high = x & low_mask, x >> shift
        for i in range(0, _ROUNDS, 2):
            low = low ^ (_mix64_array(high ^ keys[i]) & low_mask)
            high = high ^ (_mix64_array(low ^ keys[i + 1]) & high_mask)
        return (high << shift) | low

    x = network(np.atleast_1d(np.asarray(positions)).astype(np.uint64))
    outside = np.flatnonzero(x >= np.uint64(n))
    while outside.size:
        x[outside] = network(x[outside])
        outside = outside[x[outside] >= np.uint64(n)]
    return x.astype(np.int64)


class _Windows:
    """Non-overlapping windows of `context` targets within each shard, numbered through all shards."""

    def __init__(self, paths: Sequence[PathLike], context: int, vocab_id: int) -> None:
        if context < 1:
            raise ValueError(f"context={context!r}; give at least 1 token")
        if not paths:
            raise ValueError("no shard is given; pass at least one path, as find_shards returns")
        self.paths = [Path(path) for path in paths]
        self.context = context
        self.vocab_name, self.vocab_size = vocabulary(vocab_id)
        self.tokens = [len(open_shard(path, vocab_id)) for path in self.paths]
        self.ends = np.cumsum([(count - 1) // context for count in self.tokens])
        # a map holds a file descriptor, and a thousand shards are more than a process may have
        self._mapped = functools.lru_cache(maxsize=MAPPED_SHARDS)(_map_tokens)
        self.count = int(self.ends[-1])
        if self.count == 0:
            longest = max(self.tokens)
            raise ValueError(
                f"{self.paths[0]}: the longest of {len(self.paths)} shard(s) has {longest} tokens, fewer "
                f"than context+1={context + 1}; prepare more text or choose a shorter context"
            )

    def read(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.empty((len(indices), self.context + 1), dtype=np.int64)
        which = np.searchsorted(self.ends, indices, side="right")
        for row, index, i in zip(rows, indices.tolist(), which.tolist(), strict=True):
            start = (index - (int(self.ends[i - 1]) if i else 0)) * self.context
            row[:] = self._mapped(self.paths[i], self.tokens[i])[start : start + self.context + 1]
        if rows.size and int(rows.max()) >= self.vocab_size:
            bad = int(rows.max(axis=1).argmax())
            raise ValueError(
                f"{self.paths[int(which[bad])]}: token id {int(rows[bad].max())} is outside the vocabulary "
                f"{self.vocab_name!r} of {self.vocab_size} ids: another tokenizer's shard, or damaged; "
                f"make it again with `{_PREPARE} --tokenizer {self.vocab_name}`"
            )
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Loader:
    """Training batches addressed by the global sample index: no state, so resume is exact at any world size.

    Each epoch visits every window of `context` tokens once, in the order that (seed, epoch) gives. Opens and
    checks all shards; raises as `open_shard`, and ValueError when they hold no window of context+1 tokens.
    """

    def __init__(self, paths: Sequence[PathLike], context: int, seed: int, vocab_id: int) -> None:
        self._windows = _Windows(paths, context, vocab_id)
        self.context = context
        self.seed = seed

    @property
    def num_sequences(self) -> int:
        """Windows an epoch: the sum over shards of (tokens - 1) // context."""
        return self._windows.count

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (shifted by one) of the samples first..first+count-1, int64 [count, context].

        first: sample index since the start of training (step * global batch + offset of this rank in it).
        Raises ValueError for a negative first, a count below 1, or a token id outside the vocabulary, naming
        the shard.
        """
        if first < 0 or count < 1:
            raise ValueError(f"first={first!r}, count={count!r}; give first >= 0 and count >= 1")
        epochs, positions = np.divmod(np.arange(first, first + count, dtype=np.int64), self.num_sequences)
        indices = np.empty(count, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            indices[here] = permute(positions[here], self.num_sequences, self.seed, epoch)
        return self._windows.read(indices)


def validation_batches(
    paths: Sequence[PathLike], context: int, max_tokens: int, batch: int, vocab_id: int, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Iterate over the first `max_tokens` target tokens (whole windows) in order, or over a rank's share of them.

    Yields inputs, targets (shifted by one), int64 [<=batch, context]. The last batch may be smaller; shards
    with fewer tokens give them all. Batches go to the ranks in turn; one that has none left in the last round gets the
    first window with targets of -100, `cross_entropy`'s index to ignore, so that all ranks run the same number of
    forward passes. Checks before the first batch; raises as `Loader`, and ValueError for max_tokens < context or
    batch < 1.
    """
    if batch < 1:
        raise ValueError(f"batch={batch!r}; give at least 1 sequence")
    if max_tokens < context:
        raise ValueError(f"max_tokens={max_tokens!r} is less than one window; give at least context={context}")
    windows = _Windows(paths, context, vocab_id)
    count = min(windows.count, max_tokens // context)
    starts = range(0, count, batch)

    def share() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in range(rank, -(-len(starts) // ranks) * ranks, ranks):
            if number < len(starts):
                yield windows.read(np.arange(starts[number], min(starts[number] + batch, count)))
            else:
                inputs, targets = windows.read(np.arange(1))
                yield inputs, torch.full_like(targets, IGNORED)

    return share()
