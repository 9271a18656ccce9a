"""Checkpoints of a run: `torch.distributed.checkpoint` in folders that are whole or do not count.

All ranks write into a temporary folder; a `DONE` file comes last (sizes and checksums of the others, and what the run
is), all is flushed, and the folder renamed to `step-00000120`. A folder whose files are not those of its `DONE` is no
checkpoint. Nothing in it depends on the number of ranks. Several machines need a folder that all of them see.
"""

import json
import os
import re
import secrets
import shutil
import threading
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from celo2.files import remove_temporary, write_atomic
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.parallel import World

DONE = "DONE"
# of an identity: what changes numbers by rounding alone
SETTING = "setting"
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
    """The checkpoints of one folder: the last `keep` and every `keep_every`-th step stay.

    With several ranks `save`, `wait` and `load` are collective. With `background`, `save` returns when the tensors are
    copied to the host's memory, and a thread writes them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        world: World | None = None,
        background: bool = False,
    ) -> None:
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                f"keep={keep!r}, keep_every={keep_every!r}: keep at least one checkpoint, every 1 or more steps"
            )
        self.folder, self.keep, self.keep_every = Path(folder), keep, keep_every
        self.world = World(0, 1, 0, 1, torch.device("cpu")) if world is None else world
        self.background = background
        self._writer: threading.Thread | None = None
        self._failure: OSError | None = None

    def save(
        self, model: nn.Module, optimizers: Optimizers, state: RunState, *, before: Callable[[], None] = lambda: None
    ) -> Path:
        """Write a checkpoint and remove those that are no longer kept; returns its folder.

        `before` is called first, on each rank, and its OSError is one of the save. Raises OSError on every rank, naming
        the folder and the fix, when the disk is full or not writable; older checkpoints are untouched then. In the
        background, the next `wait` or `save` raises it.
        """
        self.wait()
        path = self.folder / f"step-{state.step:08d}"
        temporary = self.world.broadcast_object(self._temporary(path))
        problem, tensors = None, {}
        try:
            before()
            if self.world.main:
                temporary.mkdir(parents=True)
            tensors = _tensors(model, optimizers)
            if self.background:
                stager = DefaultStager(StagingOptions(False, False, False, False))
                staged = stager.stage(tensors)
                stager.close()
                assert isinstance(staged, dict)
                tensors = staged
        except (OSError, RuntimeError) as error:
            problem = _describe(error)
        self._agree(path, temporary, problem)
        if self.background:
            self._writer = threading.Thread(target=self._write, args=(tensors, path, temporary, state), daemon=True)
            self._writer.start()
        else:
            self._write_and_commit(tensors, path, temporary, state)
        return path

    def _write(self, *arguments: Any) -> None:
        """In the background: write, and keep what fails for `wait`."""
        try:
            if self.world.device.type == "cuda":
                # a thread begins on the first GPU
                torch.cuda.set_device(self.world.device)
            self._write_and_commit(*arguments)
        except OSError as error:
            self._failure = error
        except BaseException as error:
            self._failure = OSError(f"cannot save in the background: {_describe(error)}")

    def _write_and_commit(self, tensors: dict[str, Any], path: Path, temporary: Path, state: RunState) -> None:
        group, problem = self.world.background if self.background else self.world.control, None
        # staged tensors are on the host: no stream of a GPU need copy ahead
        ahead = 0 if self.background else 10_000_000
        writer = FileSystemWriter(temporary, per_thread_copy_ahead=ahead)
        try:
            _quietly(save_distributed, tensors, storage_writer=writer, process_group=group, no_dist=group is None)
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = _describe(error)
        self._commit(path, temporary, state, problem)

    def wait(self) -> None:
        """Wait for a save in the background; raises its OSError."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if (failure := self._failure) is not None:
            self._failure = None
            raise failure

    def _commit(self, path: Path, temporary: Path, state: RunState, problem: str | None) -> None:
        """Make a checkpoint of a folder whose tensors are written, or remove it."""
        mine: dict[str, list[int]] = {}
        if problem is None:
            try:
                names = [name for name in os.listdir(temporary) if name.startswith(f"__{self.world.rank}_")]
                names += [".metadata"] if self.world.main else []
                mine = {name: _fingerprint(temporary / name) for name in sorted(names)}
            except OSError as error:
                problem = _describe(error)
        gathered = self.world.gather((mine, problem), background=self.background)
        problem = next((text for _, text in gathered if text is not None), None)
        if problem is None and self.world.main:
            files = dict(sorted(entry for part, _ in gathered for entry in part.items()))
            try:
                write_atomic(temporary / DONE, [json.dumps({"files": files, **vars(state)}, indent=1).encode()])
                _sync(temporary)
                if path.exists():
                    # not whole, or this run would have gone on from it: keep it, out of the way
                    path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.bad"))
                temporary.rename(path)
                _sync(self.folder)
            except OSError as error:
                problem = _describe(error)
        self._agree(path, temporary, problem)
        if self.world.main:
            try:
                self._remove_old()
            except OSError as error:
                # the checkpoint counts; `remove_temporary` takes what is left
                warnings.warn(f"cannot remove an old checkpoint: {_describe(error)}", stacklevel=2)

    def _agree(self, path: Path, temporary: Path, problem: str | None) -> None:
        """Raise on every rank when one has a problem, after removing what was written."""
        problems = self.world.gather(problem, background=self._writer_is_here())
        problem = next((text for text in problems if text is not None), None)
        if problem is None:
            return
        if self.world.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"cannot save the checkpoint {path}: {problem}; free space or choose another --out-dir, then "
            "go on with --resume auto (the last complete checkpoint is "
            f"{next((p.name for p, _ in self._complete()), 'none')})"
        )

    def _writer_is_here(self) -> bool:
        return threading.current_thread() is self._writer

    def load(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        identity: dict[str, Any],
        *,
        may_differ: Collection[str] = (),
        aside: Collection[str] = (),
    ) -> tuple[RunState | None, list[str]]:
        """Load the newest complete checkpoint into the model and the optimizers.

        Returns its state (None when the folder has no checkpoint) and a line for whatever deserves one: each newer
        folder that was passed over, each entry of the identity in `may_differ` that does, and each of its `SETTING`,
        where both have one. Those in `aside` are not compared. Raises ValueError when the
        checkpoint is of a run with another identity or of tensors with other shapes, naming what differs, or when there
        are checkpoints and none is usable; OSError when one cannot be read.
        """
        notes: list[str] = []
        folders = self.world.broadcast_object(self._folders())
        for path in folders:
            state, problem = self._checked(path)
            if state is None:
                notes.append(f"{path.name} is not usable ({problem}): going back to the one before")
                continue
            there, here = (_without(one, {*aside, SETTING}) for one in (state.identity, identity))
            different = _differences(there, here)
            if refused := [text for key, text in different.items() if key not in may_differ]:
                raise ValueError(
                    f"{path} is a checkpoint of another run: {'; '.join(refused)}; give the same options, or another "
                    "--out-dir"
                )
            tensors = _tensors(model, optimizers)
            group = self.world.control
            try:
                _quietly(load_distributed, tensors, checkpoint_id=path, process_group=group, no_dist=group is None)
                set_optimizer_state_dict(model, optimizers.members, optim_state_dict=tensors["optimizer"])
            except (RuntimeError, ValueError, OSError, CheckpointException) as error:
                problem = _describe(error)
                if "Size mismatch" in problem:
                    raise ValueError(
                        f"{path} is of a model with other shapes, as from before the vocabulary was padded: {problem}; "
                        "give another --out-dir"
                    ) from error
                raise OSError(f"{path} is whole but cannot be read: {problem}; run the same again") from error
            torch.set_rng_state(tensors["rng"])
            there, here = (_renamed(one.get(SETTING, {})) for one in (state.identity, identity))
            known = [key for key in there if None not in (there[key], here.get(key))]
            different |= _differences({key: there[key] for key in known}, {key: here[key] for key in known})
            notes += [f"{text}: the run goes on, no longer to the bit" for text in different.values()]
            return state, notes
        if folders:
            raise ValueError(
                f"{self.folder} has {len(folders)} checkpoints and none is usable: {'; '.join(notes)}; move them away "
                "to start again, or give another --out-dir"
            )
        return None, notes

    def _checked(self, path: Path) -> tuple[RunState | None, str | None]:
        """The state of a checkpoint, whose contents all ranks check together; or None, and what is wrong."""
        state, problem = None, None
        try:
            state = _read_done(path, share=(self.world.rank, self.world.ranks))
        except ValueError as error:
            problem = str(error)
        problem = next((text for text in self.world.gather(problem) if text is not None), None)
        return (state, None) if problem is None else (None, problem)

    def load_weights(self, model: nn.Module, source: Path, config: dict[str, Any]) -> str:
        """Load the model alone, of a checkpoint or of the newest whole one in a run's folder; collective.

        `config` is this model's, as JSON values. Returns which it was, as `run 0123abcd, step 120`. Raises ValueError
        when there is none, when it is damaged or of another model, naming what differs; OSError when it cannot be read.
        """
        path, state = self.find(source, "--init-from")
        if different := _differences(state.identity.get("model", {}), config):
            raise ValueError(f"--init-from {path} is of another model: {'; '.join(different.values())}")
        self.read_weights(model, path, "--init-from")
        return f"run {state.run_id}, step {state.step}"

    def find(self, source: Path, flag: str) -> tuple[Path, RunState]:
        """A checkpoint, or the newest whole one in a run's folder, checked, and its state; collective.

        `flag` is the option that messages name. Raises ValueError when there is none, or when it is damaged.
        """
        candidates = [source] if _NAME.fullmatch(source.name) else Checkpoints(source)._folders()
        candidates = self.world.broadcast_object([path for path in candidates if (path / DONE).is_file()])
        if not candidates:
            raise ValueError(
                f"{flag} {source}: holds no complete checkpoint; give the --out-dir of a run, or one of its "
                "step-* folders"
            )
        path = candidates[0]
        state, problem = self._checked(path)
        if state is None:
            raise ValueError(f"{flag} {path} is not usable: {problem}; give another checkpoint of the run")
        return path, state

    def read_weights(self, model: nn.Module, path: Path, flag: str) -> None:
        """Read a model's parameters from a checkpoint of it; collective. Raises OSError when it cannot be read."""
        tensors = {"model": dict(model.named_parameters())}
        group = self.world.control
        try:
            _quietly(load_distributed, tensors, checkpoint_id=path, process_group=group, no_dist=group is None)
        except (RuntimeError, ValueError, OSError, CheckpointException) as error:
            raise OSError(f"{flag} {path} cannot be read: {_describe(error)}") from error

    def latest(self) -> RunState | None:
        """State of the newest complete checkpoint, without its tensors."""
        return next((state for _, state in self._complete()), None)

    def remove_temporary(self) -> None:
        """Remove what a killed save, removal or write of a file left behind; nobody may be writing there."""
        remove_temporary(self.folder)
        for path in self.folder.glob(".step-*.tmp"):
            if _TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path)

    def _temporary(self, path: Path) -> Path:
        return self.folder / f".{path.name}.{secrets.token_hex(4)}.tmp"

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
                # renamed first: a removal that is interrupted leaves nothing that looks like a checkpoint
                removed = self._temporary(path)
                path.rename(removed)
                shutil.rmtree(removed)


def _without(identity: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key not in keys}


def _renamed(setting: dict[str, Any]) -> dict[str, Any]:
    """A setting by the names of today."""
    names = {"wire_dtype": "comm_dtype", "split_step": "zero1"}
    return {names.get(key, key): value for key, value in setting.items()}


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """What differs between two identities, by dotted key: a text for each."""
    found: dict[str, str] = {}
    for key in [*there, *(key for key in here if key not in there)]:
        name, one, two = f"{prefix}{key}", there.get(key), here.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            found |= _differences(one, two, f"{name}.")
        elif one != two:
            found[name] = f"{name} is {one!r} there and {two!r} here"
    return found


def _tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    """What `torch.distributed.checkpoint` stores; a tied weight is one entry."""
    tensors = {
        "model": dict(model.named_parameters()),
        "optimizer": get_optimizer_state_dict(model, optimizers.members),
        "rng": torch.get_rng_state(),
    }
    persistent = model.state_dict().keys()
    # a GPT has none; running means of a network with batch norm are as much part of it as its weights
    if buffers := {name: buffer for name, buffer in model.named_buffers() if name in persistent}:
        tensors["buffers"] = buffers
    return tensors


def _quietly(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        return call(*arguments, **options)


def _fingerprint(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return [path.stat().st_size, checksum]


def _read_done(path: Path, *, share: tuple[int, int] | None = None) -> RunState:
    """Check a checkpoint's files against its `DONE`; with a share of them, (rank, ranks), those and their contents.

    Raises ValueError for one that is not whole.
    """
    if not (path / DONE).is_file():
        raise ValueError(f"it has no {DONE} file: it is incomplete")
    try:
        done = json.loads((path / DONE).read_text(encoding="utf-8"))
        files = dict(done.pop("files"))
        state = RunState(**done)
        sizes = {name: (int(size), int(checksum)) for name, (size, checksum) in files.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its {DONE} file is damaged ({error})") from error
    for number, (name, (size, checksum)) in enumerate(sizes.items()):
        if share is not None and number % share[1] != share[0]:
            continue
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes instead of {size}")
        if share is not None and _fingerprint(path / name)[1] != checksum:
            raise ValueError(f"{name} is damaged: its checksum differs")
    return state


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _describe(error: BaseException) -> str:
    """One line for an error: the rank's within a `CheckpointException`, the disk's within one of the tensor writer."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
