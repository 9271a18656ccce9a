"""Learning rates and decays of groups as a step finds them, which loops and schedulers write to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from celo2.groups import use_plain_numbers
from celo2.skips import warn_caller


class Rates:
    """Checks the rates of an optimizer's groups before a step, and warns once of a loop that gives all the same one."""

    def __init__(self) -> None:
        self._warned = False

    def make_plain(self, groups: Sequence[dict[str, Any]]) -> None:
        """Make floats of rates, and plain numbers of NumPy's, which `torch.load` would not read by default."""
        for group in groups:
            use_plain_numbers(group)
            if type(group["lr"]) is not float and not isinstance(group["lr"], Tensor):
                group["lr"] = float(group["lr"])

    def check(self, groups: Sequence[dict[str, Any]]) -> None:
        """Make rates plain; raise ValueError for one that cannot be used. Those on a GPU are not read."""
        self.make_plain(groups)
        learned, derived = set(), set()
        for index, group in enumerate(groups):
            lr = group["lr"]
            if not isinstance(lr, Tensor) and not 0 <= lr < math.inf:
                raise ValueError(f"lr={lr!r} of group {index}: must be finite and at least 0")
            _check_finite(group)
            if isinstance(lr, Tensor):
                continue
            if group["rule"] == "celo2":
                learned.add(lr)
            elif group.get("lr_mult", 1.0) != 1.0:
                derived.add(lr)
        same = (learned & derived) - {0.0}
        if same and not self._warned:
            self._warned = True
            warn_caller(
                f"all groups have lr={same.pop():g}: those of AdamW were made to step at a multiple of the learned "
                'rule\'s. In a loop that sets rates write group["lr"] = lr * group["lr_mult"]'
            )


def _check_finite(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "adam_eps", "max_grad_norm"):
        value = group[name]
        if isinstance(value, Tensor):
            if value.device.type != "cpu":
                continue
            value = float(value)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name}={value!r} in a parameter group: must be finite; nothing was stepped")
