"""The micro-batches of a run by their number, the next one read while the device computes."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from celo2.pretrain.shards import Loader


class Batch(NamedTuple):
    """Inputs and targets, int64 [B, T], pinned where they go to a GPU, and the bytes of text of the targets."""

    inputs_BT: Tensor
    targets_BT: Tensor
    text_bytes: int


class Batches:
    """One rank's micro-batches, addressed by their number since the start of training, as `Loader` addresses samples.

    With `device` a GPU, one thread reads and pins micro-batch n + 1 while n is computed; a CPU computes no faster for
    it, and reads where it is asked. What a read raises comes out of `read` for the micro-batch that has it. A context
    manager: leaving it ends the thread.
    """

    def __init__(
        self,
        loader: Loader,
        token_bytes: np.ndarray,
        micro_batch: int,
        *,
        device: torch.device,
        total: int,
        rank: int = 0,
        ranks: int = 1,
        ahead: bool | None = None,
    ) -> None:
        """`total` micro-batches are in the run; `ahead` says whether a thread reads, None: on a GPU."""
        self._loader, self._token_bytes, self._size = loader, token_bytes, micro_batch
        self._device, self._total, self._rank, self._ranks = device, total, rank, ranks
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[Batch]] | None = None
        if device.type == "cuda" if ahead is None else ahead:
            self._pool = ThreadPoolExecutor(1, "batches", initializer=self._start)

    def _start(self) -> None:
        if self._device.type == "cuda":
            # a thread begins at the first GPU, and pinning would make a context there
            torch.cuda.set_device(self._device)

    def _read(self, number: int) -> Batch:
        inputs_BT, targets_BT = self._loader.batch((number * self._ranks + self._rank) * self._size, self._size)
        text_bytes = int(self._token_bytes[targets_BT.numpy()].sum())
        if self._device.type == "cuda":
            inputs_BT, targets_BT = inputs_BT.pin_memory(), targets_BT.pin_memory()
        return Batch(inputs_BT, targets_BT, text_bytes)

    def read(self, number: int) -> Batch:
        """Micro-batch `number`; raises as `Loader.batch`."""
        if self._pool is None:
            return self._read(number)
        if self._next is None or self._next[0] != number:
            self._next = (number, self._pool.submit(self._read, number))
        batch = self._next[1].result()
        self._next = (number + 1, self._pool.submit(self._read, number + 1)) if number + 1 < self._total else None
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
