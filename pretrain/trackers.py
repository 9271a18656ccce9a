"""Trackers of experiments beside `metrics.jsonl`: Weights & Biases, TensorBoard and trackio behind one interface.

All get the same scalars under the same names, `KIND/KEY` of the records in `TRACKED`, and the same description of the
run: its arguments, what decides its numbers, versions and the git revision. What they keep is a copy: a tracker that
fails is a warning, and the run goes on without it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

TRACKED = ("train", "val", "norms", "final")
PROJECT = "celo2"
TENSORBOARD = "tensorboard"
# by tracker: the package, the extra of celo2 that has it, and the flag that asked for it
_PACKAGES = {
    "wandb-online": ("wandb", "train", "--wandb online"),
    "wandb-offline": ("wandb", "train", "--wandb offline"),
    "tensorboard": ("tensorboard", "train", "--tensorboard"),
    "trackio": ("trackio", "trackio", "--trackio"),
}


@dataclass(frozen=True)
class Start:
    """A start of a run, as its trackers need to know it."""

    folder: Path
    run_id: str
    """The same at every start of a run."""
    name: str
    resume_step: int | None
    """None: from the start."""
    config: Mapping[str, Any]
    """JSON values."""


class Tracker(Protocol):
    """Where the scalars of a run go."""

    kept: float
    """Of what earlier starts of the run have logged, it has the steps up to this one."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def flush(self) -> None:
        """Make what is logged survive the end of this process."""

    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases: a run goes on under its id, and has no way back to an earlier step.

    Offline, every start has a folder of its own; what was in a killed one's last 32 KiB is lost, so each gets the whole
    run.
    """

    def __init__(self, start: Start, mode: str) -> None:
        wandb = _package(f"wandb-{mode}")
        try:
            self._run = wandb.init(
                project=PROJECT,
                id=start.run_id,
                name=start.name,
                resume="allow",
                mode=mode,
                dir=str(start.folder),
                config=dict(start.config),
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"--wandb {mode} cannot start: {reason}; run `wandb login`, or use --wandb offline"
            ) from error
        # what the server has; offline nothing is resumed
        self.kept: float = self._run.starting_step - 1 if self._run.resumed else -1

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def flush(self) -> None:
        """Nothing: a process of its own writes what it was given."""

    def close(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard: event files in `tensorboard/` of the run's folder, a new one at every start.

    `purge_step` in the new file takes later steps of the older ones out of what is shown.
    """

    def __init__(self, start: Start) -> None:
        _package("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        folder, resumed_at = start.folder / TENSORBOARD, -1 if start.resume_step is None else start.resume_step
        self.kept: float = resumed_at if any(folder.glob("events.*")) else -1
        self._writer: Any = SummaryWriter(str(folder), purge_step=int(self.kept) + 1, flush_secs=10)
        # indented by four: a block of code in the Markdown that TensorBoard shows
        text = json.dumps({"name": start.name, **start.config}, indent=1)
        self._writer.add_text("run", "\n".join(f"    {line}" for line in text.splitlines()), max(0, resumed_at))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class TrackioTracker:
    """trackio: a run goes on under its name, and has no way back to an earlier step.

    Its data are in `TRACKIO_DIR`, by default in the cache of Hugging Face; `TRACKIO_SPACE_ID` sends them to a Space. A
    thread of its own writes every half second.
    """

    def __init__(self, start: Start) -> None:
        trackio = _package("trackio")
        self.kept = math.inf
        try:
            if not any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")):
                with contextlib.suppress(ValueError):
                    # no project of this name yet: nothing is there
                    self.kept = -1
                    known = {run.name for run in trackio.Api().runs(PROJECT)}
                    self.kept = math.inf if start.name in known else -1
            self._run = trackio.init(
                project=PROJECT, name=start.name, config=dict(start.config), resume="allow", embed=False
            )
        except Exception as error:  # of its database, of the hub: all before the training begins
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(
                f"--trackio cannot start: {type(error).__name__}: {reason}; look at TRACKIO_DIR and TRACKIO_SPACE_ID "
                "in the environment, or drop --trackio"
            ) from error

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def flush(self) -> None:
        """Nothing: its thread writes within half a second."""

    def close(self) -> None:
        self._run.finish()


def tracker_names(arguments: argparse.Namespace) -> list[str]:
    """The trackers that the flags of `options.add_trackers` ask for."""
    names = [] if arguments.wandb == "off" else [f"wandb-{arguments.wandb}"]
    return names + [name for name in ("tensorboard", "trackio") if getattr(arguments, name)]


def check_packages(names: Sequence[str]) -> None:
    """Raise ImportError that says what to install, unless the packages of these trackers are here."""
    for name in names:
        if find_spec(_PACKAGES[name][0]) is None:
            raise _missing(name)


def _missing(name: str) -> ImportError:
    package, extra, flag = _PACKAGES[name]
    return ImportError(f"{flag} needs the package {package}: pip install 'celo2[{extra}]', or drop {flag.split()[0]}")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(_PACKAGES[name][0])
    except ImportError as error:
        raise _missing(name) from error


def _open(name: str, start: Start) -> Tracker:
    if name.startswith("wandb-"):
        return WandbTracker(start, name.removeprefix("wandb-"))
    return TensorBoardTracker(start) if name == "tensorboard" else TrackioTracker(start)


class Trackers:
    """The trackers of a run, each until it fails.

    `sent` is the last step of each kind that earlier starts have logged: what is made again after a resume goes only to
    trackers that have dropped it. `earlier` are the records that the run goes on from: those that a tracker lacks it
    gets now.
    """

    def __init__(
        self,
        names: Sequence[str],
        start: Start,
        sent: Mapping[str, int],
        earlier: Callable[[], Iterable[Mapping[str, Any]]] = tuple,
    ) -> None:
        self._sent = dict(sent)
        self._open: dict[str, Tracker] = {}
        try:
            for name in names:
                self._open[name] = _open(name, start)
        except BaseException:
            self.close()
            raise
        if start.resume_step is not None and any(each.kept < start.resume_step for each in self._open.values()):
            for record in earlier():
                if record["kind"] in TRACKED:
                    self.log(record["kind"], {key: value for key, value in record.items() if key != "kind"})

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        """Log the numbers of a record, with its step among them."""
        step = values["step"]
        # a flag is a curve of 0 and 1
        numbers = {
            f"{kind}/{key}": int(value) if isinstance(value, bool) else value
            for key, value in values.items()
            if isinstance(value, (int, float))
        }
        for name, tracker in list(self._open.items()):
            if step > min(self._sent.get(kind, -1), tracker.kept):
                self._attempt(name, lambda tracker=tracker: tracker.log(numbers, step))

    def flush(self) -> None:
        for name, tracker in list(self._open.items()):
            self._attempt(name, tracker.flush)

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._attempt(name, tracker.close)
        self._open.clear()

    def _attempt(self, name: str, act: Any) -> None:
        try:
            act()
        except Exception as error:  # whatever a tracker raises: it is not the run
            del self._open[name]
            reason = (str(error).strip().splitlines() or [""])[0]
            print(
                f"warning: {name} failed and gets nothing more of this run: {type(error).__name__}: {reason}; "
                "all of it is in metrics.jsonl",
                file=sys.stderr,
            )
