"""The phases of whole float32 matrices on a CPU, in C++ (`compiled.cpp`), compiled on the machine that runs it.

A phase goes over tiles of all matrices at once, on as many threads as PyTorch has. The compiler takes some seconds,
once a machine: the library is kept in `celo2` of the user's folder of caches (`XDG_CACHE_HOME`).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from enum import IntEnum
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celo2.folded import ELEMENT_COLUMNS, FoldedTheta
from celo2.newton_schulz import SMALL
from celo2.phases import Matrices, Workspace, apply_update, normalise_direction, within_clip
from celo2.plan import Slot

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
DIGEST = ".sha256"
# elements of the matrices that are stepped together, whose directions lie in memory at once
GROUP = 4 << 20
# of a matrix whose Newton-Schulz one thread does: larger ones have products that PyTorch's library does faster
SMALL_ELEMENTS = 1 << 20
# of a matrix that one thread steps alone, from its cache; larger ones are divided, and each phase ends with a wait
ALONE_ELEMENTS = 1 << 17

STRIDED = ("p", "g", "fast", "medium", "slow", "v")
# struct Matrix of compiled.cpp
MATRIX = np.dtype(
    [
        *((name, np.int64) for name in STRIDED),
        *((f"{name}_stride", np.int64) for name in STRIDED),
        *((name, np.int64) for name in ("row_factor", "column_factor", "theta", "rows", "columns")),
        *((name, np.int64) for name in ("row_sums", "column_sums", "squares", "features", "direction_squares")),
        *((name, np.int64) for name in ("row_terms", "column_terms", "direction")),
        *((name, np.float32) for name in ("scale", "lr", "weight_decay", "moves")),
        ("clip", np.int64),
        ("ns_steps", np.int64),
    ]
)


class Phase(IntEnum):
    """The first argument of `run` of compiled.cpp."""

    GRADIENT_MOMENTS = 0
    FACTORS = 1
    FEATURE_SUMS = 2
    LEARNED_UPDATE = 3
    NEWTON_SCHULZ = 4
    APPLY_UPDATE = 5
    # factors to update, a matrix on one thread
    STEP_ALONE = 6


class NoCompilerError(RuntimeError):
    """There is no C++ compiler, or it fails."""


def _processor() -> str:
    """What `-march=native` depends on, so that machines that share a folder of caches do not share a library."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _kept_folder() -> Path | None:
    """The folder of compiled libraries, of this user alone, for what lies in it is executed; None: there is none."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "celo2"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError) as error:
        logger.info("compiled code is not kept: %s", error)
        return None
    if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
        return folder
    logger.info("compiled code is not kept: %s is not a folder that only this user can write", folder)
    return None


def _command(hidden: tuple[int, int]) -> list[str]:
    """The compiler and its options; those of CXX come last, and hold. Raises NoCompilerError where there is none."""
    if os.name != "posix":
        raise NoCompilerError(f"not tried on {platform.system()}")
    compiler = os.environ.get("CXX") or next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        raise NoCompilerError(f"none of {', '.join(COMPILERS)} is on the PATH, and CXX is not set")
    words = compiler.split()
    programs, options = ([word for word in words if word.startswith("-") == is_option] for is_option in (False, True))
    return [*programs, *FLAGS, f"-DHIDDEN0={hidden[0]}", f"-DHIDDEN1={hidden[1]}", *options]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compile(command: list[str], path: Path) -> None:
    """Write the library, and its digest beside it; raises NoCompilerError where the compiler fails."""
    begun = time.monotonic()
    # renamed into place: other processes may do the same, and see a whole file or none
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        target = Path(temporary) / path.name
        try:
            result = subprocess.run(
                [*command, str(SOURCE), "-o", str(target)], capture_output=True, text=True, errors="replace"
            )
        except OSError as error:
            raise NoCompilerError(f"{command[0]}: {error.strerror}") from error
        if result.returncode != 0:
            lines = (result.stderr or result.stdout).strip().splitlines() or [f"status {result.returncode}"]
            raise NoCompilerError(f"{command[0]}: {next((x for x in lines if 'error' in x), lines[-1])}")
        digest = target.with_suffix(DIGEST)
        digest.write_text(_digest(target))
        target.replace(path)
        digest.replace(path.with_suffix(DIGEST))
    logger.info("%s compiled the CPU's step in %.1f s: %s", command[0], time.monotonic() - begun, path)


def _is_whole(path: Path) -> bool:
    """Whether a library is as it was written: one that was cut short would end the process."""
    try:
        return path.with_suffix(DIGEST).read_text() == _digest(path)
    except OSError:
        return False


def _load(hidden: tuple[int, int]) -> ctypes.CDLL:
    """Load the library for a theta with these widths, compiled where it is not kept; raises NoCompilerError."""
    command, kept = _command(hidden), _kept_folder()
    found = shutil.which(command[0])
    identity = (SOURCE.read_text(), *command, found, found and os.stat(found).st_mtime, _processor())
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:32] + ".so"
    with tempfile.TemporaryDirectory(prefix="celo2-") if kept is None else nullcontext(str(kept)) as folder:
        path = Path(folder) / name
        if not _is_whole(path):
            _compile(command, path)
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NoCompilerError(str(error)) from error
    for function in (library.run, library.sizes, library.tiles_along):
        function.restype = ctypes.c_int64
    library.run.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.tiles_along.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    matrix, theta = ctypes.c_int64(), ctypes.c_int64()
    library.sizes(ctypes.byref(matrix), ctypes.byref(theta))
    h, k = hidden
    assert (matrix.value, theta.value) == (MATRIX.itemsize, 4 * (31 * h + k * h + 2 * k + 1))
    return library


@cache
def _library(hidden: tuple[int, int]) -> ctypes.CDLL | str:
    """The library for these widths, or why there is none; tried once in a process, and said in the log."""
    try:
        return _load(hidden)
    except (NoCompilerError, OSError, RuntimeError) as error:
        # a full disk too: a step must not end for it
        logger.info("matrices on a CPU are stepped through PyTorch: no C++ can be compiled here (%s)", error)
        return str(error)


@cache
def can_compile() -> bool:
    """Whether matrices on a CPU can be stepped through C++; warns in the log where not."""
    library = _library((8, 8))
    if isinstance(library, str):
        logger.warning("backend='compiled' steps through PyTorch: no C++ can be compiled here (%s)", library)
    return not isinstance(library, str)


def widths(theta: FoldedTheta) -> tuple[int, int]:
    """Numbers of units of the two hidden layers: each pair has a library of its own."""
    return theta.element.shape[1], theta.hidden.shape[0]


def takes(matrices: Matrices, theta: FoldedTheta) -> bool:
    """Whether C++ can step these: float32 on a CPU, with elements, the columns of a row beside each other."""
    tensors = (matrices.p, matrices.g, *matrices.momenta, matrices.v)
    factors = (matrices.row_factor, matrices.column_factor)
    plain = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (*tensors, *factors))
    laid_out = all(x.stride(2) == 1 or x.shape[2] == 1 for x in tensors) and all(x.is_contiguous() for x in factors)
    return plain and laid_out and matrices.p.numel() > 0 and not isinstance(_library(widths(theta)), str)


def kind(slot: Slot, matrices: Matrices, theta: FoldedTheta) -> tuple[object, ...]:
    """What the parameters of one `CompiledSteps` have in common: the widths of their thetas, and small matrices."""
    _, m, n = matrices.p.shape
    alone = m * n <= ALONE_ELEMENTS and (not slot.orthogonalize or min(m, n) <= SMALL)
    return *widths(theta), alone


def _flat(theta: FoldedTheta) -> Tensor:
    """Theta as struct Theta of compiled.cpp."""
    parts = (theta.element, theta.short, theta.long, theta.bias0, theta.hidden, theta.bias1, theta.output)
    return torch.cat(
        [*(part.reshape(-1) for part in parts), torch.tensor([theta.bias2], dtype=torch.float32, device="cpu")]
    )


class Member(NamedTuple):
    """One parameter of a step: B matrices [m, n]."""

    slot: Slot
    matrices: Matrices
    theta: FoldedTheta


class Tiles(NamedTuple):
    """Into how many tiles a matrix is cut."""

    all: int
    of_rows: int
    of_columns: int


class CompiledSteps:
    """The step of some whole parameters that `takes` takes, of one `kind`.

    `workspace` keeps the scratch memory from step to step: the directions of some matrices, and sums by row and column.
    """

    def __init__(self, members: Sequence[Member], workspace: Workspace) -> None:
        self.members, self.workspace = members, workspace
        self.kind = kind(*members[0])
        self.widths = widths(members[0].theta)
        library = _library(self.widths)
        assert not isinstance(library, str)
        self.library = library
        ends = list(accumulate(len(member.matrices.p) for member in members))
        self.table = np.zeros(ends[-1], MATRIX)
        # views: what is written to them is in the table
        self.rows = [self.table[begin:end] for begin, end in pairwise((0, *ends))]
        self.bounds = list(pairwise((0, *ends)))
        # kept: the table has their addresses
        self.thetas = {key: _flat(theta) for key, theta in {id(m.theta): m.theta for m in members}.items()}
        for (slot, matrices, theta), rows in zip(members, self.rows, strict=True):
            index = np.arange(len(rows))
            for name, tensor in zip(STRIDED, (matrices.p, matrices.g, *matrices.momenta, matrices.v), strict=True):
                rows[name] = tensor.data_ptr() + 4 * tensor.stride(0) * index
                rows[f"{name}_stride"] = tensor.stride(1)
            rows["rows"], rows["columns"] = m, n = matrices.p.shape[1:]
            rows["row_factor"] = matrices.row_factor.data_ptr() + 12 * m * index
            rows["column_factor"] = matrices.column_factor.data_ptr() + 12 * n * index
            rows["theta"] = self.thetas[id(theta)].data_ptr()
            rows["scale"] = 1.0
            if slot.orthogonalize:
                rows["ns_steps"] = slot.ns_steps if min(m, n) <= SMALL and m * n <= SMALL_ELEMENTS else -1
        self.squares = self._place()

    def _place(self) -> list[Tensor]:
        """Give every matrix its scratch memory; returns where each parameter's sums of g^2 come to lie, float64."""
        layouts = []
        for member in self.members:
            _, m, n = member.matrices.p.shape
            tiles, wide = self._tiles(m, n), 3 + self.widths[0]
            # in float32 elements, the float64 ones first
            layout = {"squares": 2 * tiles.all, "features": 2 * tiles.all * ELEMENT_COLUMNS}
            layout |= {"direction_squares": 2 * tiles.all, "row_sums": tiles.of_columns * m}
            layout |= {"column_sums": tiles.of_rows * n, "row_terms": m * wide, "column_terms": n * wide}
            layouts.append(layout)
        sizes = [sum(layout.values()) + sum(layout.values()) % 2 for layout in layouts]
        total = sum(size * len(rows) for size, rows in zip(sizes, self.rows, strict=True))
        scratch = self.workspace.take(f"compiled {self.kind}", total)
        squares, begin = [], 0
        for layout, size, rows in zip(layouts, sizes, self.rows, strict=True):
            here = scratch[begin : begin + size * len(rows)].view(len(rows), size)
            squares.append(here.view(torch.float64)[:, : layout["squares"] // 2])
            place = here.data_ptr() + 4 * size * np.arange(len(rows))
            for name, length in layout.items():
                rows[name] = place
                place = place + 4 * length
            begin += size * len(rows)
        return squares

    def _tiles(self, m: int, n: int) -> Tiles:
        of_rows, of_columns = ctypes.c_int64(), ctypes.c_int64()
        count = self.library.tiles_along(m, n, ctypes.byref(of_rows), ctypes.byref(of_columns))
        return Tiles(count, of_rows.value, of_columns.value)

    def _run(self, phase: Phase, first: int, last: int) -> None:
        """Run a phase on the members from `first` to before `last`."""
        table = self.table[self.bounds[first][0] : self.bounds[last - 1][1]]
        if self.library.run(phase, table.ctypes.data, len(table), torch.get_num_threads()):
            raise MemoryError("no memory for the lists and the scratch of a step")

    def gradient_moments(self) -> list[float]:
        """Phase 1; returns each parameter's sum of g^2."""
        self._run(Phase.GRADIENT_MOMENTS, 0, len(self.members))
        self.totals = [float(squares.sum()) for squares in self.squares]
        return self.totals

    def step(self, groups: Sequence[Mapping[str, Any]], scales: Sequence[float]) -> None:
        """Phases 2 to 4, after phase 1; gradients are multiplied by the `scales` of their groups."""
        for index, (member, rows) in enumerate(zip(self.members, self.rows, strict=True)):
            group = groups[member.slot.group]
            scale = scales[member.slot.group]
            rows["scale"], rows["lr"], rows["weight_decay"] = scale, float(group["lr"]), group["weight_decay"]
            # a sum of squares of at most 1e6 rules out an element above the clip of 1000
            if not within_clip(self.totals[index], scale):
                rows["clip"] = 1
                self._run(Phase.GRADIENT_MOMENTS, index, index + 1)
        for first, last in self._groups():
            self._step_group(first, last)

    def _groups(self) -> Iterator[tuple[int, int]]:
        """Members that are stepped together, from first to before last."""
        first, elements = 0, 0
        for index, member in enumerate(self.members):
            size = member.matrices.p.numel()
            if index > first and elements + size > GROUP:
                yield first, index
                first, elements = index, 0
            elements += size
        yield first, len(self.members)

    def _step_group(self, first: int, last: int) -> None:
        members = self.members[first:last]
        sizes = [member.matrices.p.numel() for member in members]
        directions = torch.split(self.workspace.take("directions", sum(sizes)), sizes)
        for rows, direction in zip(self.rows[first:last], directions, strict=True):
            rows["direction"] = direction.data_ptr() + 4 * len(direction) // len(rows) * np.arange(len(rows))
        for member in members:
            member.slot.state["step"] += 1
            if not member.slot.shard.is_inference():
                # autograd refuses a backward pass through what was written since, as after any operation in place
                torch.autograd.graph.increment_version(member.slot.shard)
        if self.kind[-1]:
            self._run(Phase.STEP_ALONE, first, last)
            return
        for phase in (Phase.FACTORS, Phase.FEATURE_SUMS, Phase.LEARNED_UPDATE, Phase.NEWTON_SCHULZ):
            self._run(phase, first, last)
        for member, rows, flat in zip(members, self.rows[first:last], directions, strict=True):
            if rows["ns_steps"][0] < 0:
                self._orthogonalize(member, rows, flat.view(member.matrices.p.shape))
        self._run(Phase.APPLY_UPDATE, first, last)

    def _orthogonalize(self, member: Member, rows: NDArray[Any], direction: Tensor) -> None:
        """Newton-Schulz of larger matrices and phase 4, through PyTorch."""
        moves = torch.from_numpy(rows["moves"].copy()).view(-1, 1, 1)
        direction, rms_scale = normalise_direction(direction, moves, orthogonalize=True, ns_steps=member.slot.ns_steps)
        lr, weight_decay = float(rows["lr"][0]), float(rows["weight_decay"][0])
        apply_update(member.matrices.p, direction, rms_scale, lr=lr, weight_decay=weight_decay)
