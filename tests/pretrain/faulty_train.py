"""`train_gpt.py` with a fault on one rank, from the environment: FAULT=kind, FAULT_RANK, FAULT_AT (0 is the first)."""

from __future__ import annotations

import math
import os
import signal
import sys

from celo2.pretrain import checkpoint, train_gpt
from celo2.pretrain.model import GPT
from celo2.pretrain.runlog import RunLog

KIND, RANK, AT = os.environ["FAULT"], int(os.environ["FAULT_RANK"]), int(os.environ["FAULT_AT"])


def install() -> None:
    calls = iter(range(10**6))
    if KIND in ("kill", "disk"):
        real = checkpoint._fingerprint

        def fingerprint(path):
            # of the files of a save, each rank's own
            if ".tmp" in str(path) and next(calls) == AT:
                if KIND == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(28, "No space left on device")
            return real(path)

        checkpoint._fingerprint = fingerprint
    elif KIND in ("sync", "remove"):
        owner, name = (RunLog, "sync") if KIND == "sync" else (checkpoint.Checkpoints, "_remove_old")
        method = getattr(owner, name)

        def fail_once(self):
            if next(calls) == AT:
                raise OSError(39, "Directory not empty")
            method(self)

        setattr(owner, name, fail_once)
    elif KIND == "loss":
        real_forward = GPT.forward

        def forward(self, tokens, targets=None, reduction="mean"):
            loss = real_forward(self, tokens, targets, reduction)
            if targets is not None and reduction == "mean" and next(calls) == AT:
                return loss * math.inf
            return loss

        GPT.forward = forward
    else:
        raise ValueError(KIND)


if __name__ == "__main__":
    if int(os.environ["RANK"]) == RANK:
        install()
    status = train_gpt.main()
    sys.stdout.flush()
    os._exit(status)
