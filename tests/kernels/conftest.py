"""Kernels run on a GPU where there is one, else in Triton's interpreter; NaN poisons what nobody has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.kernels)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned_empties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every new float tensor of the step with NaN: what is read before it is written shows."""
    from celo2.backends import triton

    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(triton.torch, "empty", poisoned)


@pytest.fixture
def gpu_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Cut matrices in the interpreter as on a GPU: several tiles a matrix, several steps a tile."""
    from celo2.blocks import Blocks

    def use(columns: int = 64) -> None:
        monkeypatch.setattr(
            Blocks, "choose", classmethod(lambda cls, _columns, _device: cls(columns=columns, step_rows=512 // columns))
        )

    return use
