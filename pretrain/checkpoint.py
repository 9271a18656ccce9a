"""Checkpoints of a run: `torch.distributed.checkpoint` in folders that are whole or do not count.

A checkpoint is written into a temporary folder, flushed, renamed to `step-00000120`, and then gets a `DONE` file: the
sizes of its files, and what the run is. A folder without `DONE`, or whose files have other sizes, is not a checkpoint.
"""

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from celo2.pretrain.model import GPT
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.shards import write_atomic

DONE = "DONE"
_NAME = re.compile(r"step-(\d{8})")
_TEMPORARY = re.compile(r"\.step-\d{8}\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds besides tensors."""

    step: int
    """Optimizer steps done, skipped ones included."""
    skipped: int
    """Steps skipped for a loss or gradient that was not finite."""
    run_id: str
    """Identity of the run, kept over resumes."""
    identity: dict[str, Any]
    """What decides the numbers (model, recipe, data, seed, theta), as JSON values; another identity is refused."""


class Checkpoints:
    """The checkpoints of one folder: the last `keep` and every `keep_every`-th step stay."""

    def __init__(self, folder: Path, *, keep: int = 2, keep_every: int | None = None) -> None:
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                f"keep={keep!r}, keep_every={keep_every!r}: keep at least one checkpoint, every 1 or more steps"
            )
        self.folder, self.keep, self.keep_every = Path(folder), keep, keep_every

    def save(self, model: GPT, optimizers: Optimizers, state: RunState) -> Path:
        """Write a checkpoint and remove those that are no longer kept; returns its folder.

        Raises OSError naming the folder and the fix when the disk is full or not writable; older checkpoints are
        untouched then.
        """
        path = self.folder / f"step-{state.step:08d}"
        temporary = self.folder / f".{path.name}.{secrets.token_hex(4)}.tmp"
        try:
            temporary.mkdir(parents=True)
            _quietly(save_distributed, _tensors(model, optimizers), temporary)
            sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
            if path.exists():
                # left by a run that was killed, or damaged: this run resumed from an older one
                shutil.rmtree(path)
            temporary.rename(path)
            _sync(self.folder)
            write_atomic(path / DONE, [json.dumps({"files": sizes, **vars(state)}, indent=1).encode()])
            _sync(path)
        except (OSError, RuntimeError, CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            reason = _root_cause(error)
            raise OSError(
                f"cannot save the checkpoint {path}: {reason}; free space or choose another --out-dir, then go on with "
                f"--resume auto (the last complete checkpoint is {next((p.name for p, _ in self._complete()), 'none')})"
            ) from error
        self._remove_old()
        return path

    def load(self, model: GPT, optimizers: Optimizers, identity: dict[str, Any]) -> tuple[RunState | None, list[str]]:
        """Load the newest complete checkpoint into the model and the optimizers.

        Returns its state (None when there is none) and a line for each newer folder that was passed over. Raises
        ValueError when it is of a run with another identity, naming what differs.
        """
        notes: list[str] = []
        for path in self._folders():
            try:
                state = _read_done(path)
                different = [
                    f"{key} is {state.identity.get(key)!r} there and {value!r} here"
                    for key, value in identity.items()
                    if state.identity.get(key) != value
                ]
                if different:
                    raise _OtherRunError(
                        f"{path} is a checkpoint of another run: {'; '.join(different)}; give the same options, or "
                        "another --out-dir"
                    )
                tensors = _tensors(model, optimizers)
                _quietly(load_distributed, tensors, path)
                set_optimizer_state_dict(model, optimizers.members, optim_state_dict=tensors["optimizer"])
            except (OSError, RuntimeError, ValueError, EOFError, CheckpointException) as error:
                if isinstance(error, _OtherRunError):
                    raise
                notes.append(f"{path.name} is not usable ({_root_cause(error)}): going back to the one before")
                continue
            torch.set_rng_state(tensors["rng"])
            return state, notes
        return None, notes

    def latest(self) -> RunState | None:
        """State of the newest complete checkpoint, without its tensors."""
        return next((state for _, state in self._complete()), None)

    def remove_temporary(self) -> None:
        """Remove what a killed save left behind."""
        for path in self.folder.glob(".step-*.tmp"):
            if _TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path)

    def _folders(self) -> list[Path]:
        found = [path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, reverse=True)

    def _complete(self) -> Iterator[tuple[Path, RunState]]:
        for path in self._folders():
            try:
                yield path, _read_done(path)
            except (OSError, ValueError):
                continue

    def _remove_old(self) -> None:
        for path, state in list(self._complete())[self.keep :]:
            if self.keep_every is None or state.step % self.keep_every:
                # DONE goes first: a removal that is interrupted leaves no checkpoint that looks whole
                (path / DONE).unlink()
                shutil.rmtree(path)


class _OtherRunError(ValueError):
    pass


def _tensors(model: GPT, optimizers: Optimizers) -> dict[str, Any]:
    """What `torch.distributed.checkpoint` stores; a tied weight is one entry."""
    return {
        "model": dict(model.named_parameters()),
        "optimizer": get_optimizer_state_dict(model, optimizers.members),
        "rng": torch.get_rng_state(),
    }


def _quietly(call: Any, tensors: dict[str, Any], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        call(tensors, checkpoint_id=path, no_dist=True)


def _read_done(path: Path) -> RunState:
    """Check a checkpoint's files against its `DONE`; raises ValueError or OSError for one that is not whole."""
    if not (path / DONE).is_file():
        raise ValueError(f"it has no {DONE} file: its saving was interrupted")
    try:
        done = json.loads((path / DONE).read_text(encoding="utf-8"))
        sizes = dict(done.pop("files"))
        state = RunState(**done)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its {DONE} file is damaged ({error})") from error
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise ValueError(
                f"{name} has {found} bytes instead of {size}" if found is not None else f"{name} is missing"
            )
    return state


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _root_cause(error: BaseException) -> str:
    """One line for an error: the rank's within a `CheckpointException`, the disk's within one of the tensor writer."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, ValueError):
        return str(error)
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
