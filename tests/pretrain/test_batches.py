"""Micro-batches by number: read ahead they are the same, errors come out where they belong, and no thread is left."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from celo2.pretrain.batches import Batches
from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.shards import Loader, find_shards
from celo2.pretrain.tokenizer import get_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    train, _ = find_shards(prepare_embedded("bytes", tmp_path_factory.mktemp("data") / "bytes"))
    return Loader(train, 64, 7, 256)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def batches(loader: Loader, ahead: bool, total: int = 100, rank: int = 0, ranks: int = 1) -> Batches:
    token_bytes = get_tokenizer("bytes").token_bytes()
    return Batches(loader, token_bytes, 3, device=CPU, total=total, rank=rank, ranks=ranks, ahead=ahead)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_number_is_a_batch_of_the_loader(loader: Loader, ahead: bool) -> None:
    token_bytes = get_tokenizer("bytes").token_bytes()
    # as of a run that begins at 5, and goes on elsewhere
    with batches(loader, ahead, rank=1, ranks=2) as of_rank:
        for number in (5, 6, 7, 2, 3, 99):
            inputs_BT, targets_BT, text_bytes = of_rank.read(number)
            expected = loader.batch((2 * number + 1) * 3, 3)
            assert torch.equal(inputs_BT, expected[0]) and torch.equal(targets_BT, expected[1])
            assert text_bytes == token_bytes[targets_BT.numpy()].sum() > 0
        assert len(threads()) == ahead
    assert threads() == []


class Recorder:
    """Stands for a loader: notes what is read, and fails at one place."""

    def __init__(self, fails_at: int = -1) -> None:
        self.read: list[int] = []
        self.changed = threading.Condition()
        self.fails_at = fails_at

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        with self.changed:
            self.read.append(first // count)
            self.changed.notify_all()
        if self.read[-1] == self.fails_at:
            raise ValueError("shard 3 is damaged")
        tokens = torch.full((count, 4), first // count)
        return tokens, tokens


def recorded(loader: Recorder, total: int) -> Batches:
    return Batches(loader, np.ones(300), 2, device=CPU, total=total, ahead=True)  # type: ignore[arg-type]


def test_the_next_one_is_read_meanwhile_and_none_beyond_the_end() -> None:
    loader = Recorder()
    with recorded(loader, 3) as ahead:
        for number in range(3):
            assert int(ahead.read(number).inputs_BT[0, 0]) == number
            with loader.changed:
                # nobody has asked for the next one
                assert loader.changed.wait_for(lambda n=number: len(loader.read) == min(n + 2, 3), timeout=30)
    assert loader.read == [0, 1, 2]


def test_an_error_comes_out_of_the_batch_that_has_it() -> None:
    loader = Recorder(fails_at=2)
    with recorded(loader, 9) as ahead:
        ahead.read(0)
        ahead.read(1)
        with pytest.raises(ValueError, match="shard 3 is damaged"):
            ahead.read(2)
    assert threads() == []


def test_what_ends_a_run_ends_its_thread() -> None:
    with pytest.raises(KeyboardInterrupt), recorded(Recorder(fails_at=1), 9) as ahead:
        ahead.read(0)
        raise KeyboardInterrupt
    assert threads() == []


def test_a_gpu_reads_ahead_by_default(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    token_bytes = get_tokenizer("bytes").token_bytes()
    gpu = torch.device("cuda", 3)
    with Batches(loader, token_bytes, 3, device=gpu, total=9) as ahead:
        assert torch.equal(ahead.read(4).inputs_BT, loader.batch(12, 3)[0])
        # the thread works for the GPU of its rank
        assert threads() and chosen == [gpu]
