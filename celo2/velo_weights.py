"""The weights of VeLO: a small value, its files, and where published ones come from.

An LSTM that reads statistics of every tensor, and a stack of small MLPs that it mixes into one for each tensor:
2,320,385 floats at the published sizes (LSTM of 512, 256 MLPs 30 -> 4 -> 4 -> 3). Arrays go by their paths in the
authors' `theta.state`, and are used as `x @ w`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from celo2 import flax_state, hub
from celo2.files import write_atomic
from celo2.theta import GROUP_COLUMNS, OUTPUTS

FEATURES = 30  # of a tensor, what the LSTM reads
_MLP = "ff_mod_stack/~"
_RNN = "rnn_params"
# in the order of the authors' file, which is alphabetical but for the LSTM's state
_TREE = {
    _MLP: ("b0", "b1", "b2", *sorted(f"w0__{group}" for group in range(14)), "w1", "w2"),
    "lstm_init_state": ("hidden", "cell"),
    f"{_RNN}/linear": ("b", "w"),
    f"{_RNN}/linear_1": ("b", "w"),
    f"{_RNN}/linear_2": ("b", "w"),
    f"{_RNN}/rnn/linear": ("b", "w"),
    f"{_RNN}/rnn_to_controls": ("b", "w"),
    f"{_RNN}/step_size": ("b", "w"),
}
PATHS = tuple(f"{module}/{name}" for module, names in _TREE.items() for name in names)
HOW_TO_GET = (
    "weights='amoudgl/velo-4000' or 'Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP' are fetched from the hub; a file, "
    "a folder and a VeLOWeights are taken too"
)

# names of the PyTorch files that PyLO publishes: one of the LSTM, one of the MLPs
_PYTORCH_LINEAR = {
    "mix_layer1": f"{_RNN}/linear",
    "mix_layer2": f"{_RNN}/linear_1",
    "final_mix_layer": f"{_RNN}/linear_2",
    "lstm.linear": f"{_RNN}/rnn/linear",
    "rnn_to_controls": f"{_RNN}/rnn_to_controls",
    "step_size": f"{_RNN}/step_size",
}
_PYTORCH_STATE = {"lstm_init_state.0": "lstm_init_state/hidden", "lstm_init_state.1": "lstm_init_state/cell"}
_PYTORCH_MLP = {
    "input_bias_": f"{_MLP}/b0",
    "hidden_weights_.0": f"{_MLP}/w1",
    "hidden_bias_.0": f"{_MLP}/b1",
    "output_weights_": f"{_MLP}/w2",
    "output_bias_": f"{_MLP}/b2",
}
_PYTORCH_RNN_NAMES = (*(f"{name}.{kind}" for name in _PYTORCH_LINEAR for kind in ("weight", "bias")), *_PYTORCH_STATE)
_PYTORCH_MLP_NAMES = ("input_weights_", *_PYTORCH_MLP)
# the mixed MLP of the last tensor that was stepped: no weights
_PYTORCH_SCRATCH = frozenset(name.replace("_.", ".").removesuffix("_") for name in _PYTORCH_MLP_NAMES)


def _expected_shapes(lstm: int, mlps: int, hidden: int, hidden2: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{_MLP}/w0__{group}": (mlps, columns, hidden) for group, columns in enumerate(GROUP_COLUMNS)
    }
    shapes |= {f"{_MLP}/b0": (mlps, hidden), f"{_MLP}/b1": (mlps, hidden2), f"{_MLP}/b2": (mlps, OUTPUTS)}
    shapes |= {f"{_MLP}/w1": (mlps, hidden, hidden2), f"{_MLP}/w2": (mlps, hidden2, OUTPUTS)}
    shapes |= {"lstm_init_state/hidden": (1, lstm), "lstm_init_state/cell": (1, lstm)}
    linears = {"linear": (FEATURES, lstm), "linear_1": (FEATURES, lstm), "linear_2": (FEATURES, lstm)}
    linears |= {"rnn/linear": (2 * lstm, 4 * lstm), "rnn_to_controls": (lstm, mlps), "step_size": (lstm, 1)}
    for name, (inputs, outputs) in linears.items():
        shapes |= {f"{_RNN}/{name}/w": (inputs, outputs), f"{_RNN}/{name}/b": (outputs,)}
    return shapes


@dataclass(frozen=True, eq=False)
class VeLOWeights:
    """The weights of VeLO: named float32 arrays, and a metadata card.

    Build one with `from_arrays` or `load`. Two are equal when their arrays are (`sha256`); the card does not count.
    """

    arrays: Mapping[str, NDArray[np.float32]]
    card: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, ArrayLike], card: Mapping[str, str] | None = None) -> VeLOWeights:
        """Build weights of arrays by their paths (`PATHS`), such as `rnn_params/rnn/linear/w` [2 LSTM, 4 LSTM].

        The widths of the LSTM and the MLPs and their number are read from the arrays. Raises ValueError for a missing
        or unknown path, a wrong shape, or a value that is not finite in float32.
        """
        missing, unknown = sorted(set(PATHS) - set(arrays)), sorted(set(arrays) - set(PATHS))
        if missing or unknown:
            raise ValueError(f"VeLO needs the arrays {', '.join(PATHS)}; missing {missing}, unknown {unknown}")
        converted: dict[str, NDArray[np.float32]] = {}
        for path in PATHS:
            array = np.array(arrays[path])
            if array.dtype.kind not in "fiu":
                raise ValueError(f"VeLO array {path!r} has dtype {array.dtype}: it must be real numbers")
            converted[path] = np.ascontiguousarray(array, dtype="<f4").reshape(array.shape)
        cell, b0, b1 = (converted[path] for path in ("lstm_init_state/cell", f"{_MLP}/b0", f"{_MLP}/b1"))
        for path, array in (("lstm_init_state/cell", cell), (f"{_MLP}/b0", b0), (f"{_MLP}/b1", b1)):
            if array.ndim != 2 or not array.size:
                raise ValueError(f"VeLO array {path!r} has shape {array.shape}: it must have two axes of at least 1")
        for path, shape in _expected_shapes(cell.shape[1], b0.shape[0], b0.shape[1], b1.shape[1]).items():
            if converted[path].shape != shape:
                raise ValueError(f"VeLO array {path!r} has shape {converted[path].shape}, expected {shape}")
            if not np.isfinite(converted[path]).all():
                raise ValueError(f"VeLO array {path!r} holds a value that is not finite in float32")
            converted[path].setflags(write=False)
        card = {str(key): str(value) for key, value in (card or {}).items()}
        return cls(MappingProxyType(converted), MappingProxyType(card))

    @property
    def name(self) -> str:
        return self.card.get("name", "velo")

    @property
    def lstm(self) -> int:
        """Width of the LSTM (512 as published)."""
        return int(self.arrays["lstm_init_state/cell"].shape[1])

    @property
    def mlps(self) -> int:
        """Number of MLPs that are mixed (256 as published)."""
        return int(self.arrays[f"{_MLP}/b0"].shape[0])

    @property
    def num_parameters(self) -> int:
        return sum(array.size for array in self.arrays.values())

    @property
    def sha256(self) -> str:
        """Hash of paths, shapes and little-endian float32 bytes, in the order of `PATHS`, without the card."""
        digest = hashlib.sha256()
        for path in PATHS:
            digest.update(f"{path}{self.arrays[path].shape}".encode())
            digest.update(self.arrays[path].tobytes())
        return digest.hexdigest()

    @property
    def label(self) -> str:
        """`name@` and the first 12 digits of `sha256`: what a state dict records."""
        return f"{self.name}@{self.sha256[:12]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VeLOWeights) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"VeLOWeights({self.label}, {self.num_parameters} floats, LSTM of {self.lstm}, {self.mlps} MLPs)"

    def __reduce__(self) -> tuple[object, ...]:
        return VeLOWeights.from_arrays, (dict(self.arrays), dict(self.card))

    def tensors(self, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the arrays as tensors of `dtype` on `device`."""
        return {path: torch.tensor(array, dtype=dtype, device=device) for path, array in self.arrays.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to `path`, atomically: `*.state` in the authors' format (no card), anything else as safetensors.

        Raises OSError naming the path, with any older file left as it was, when the disk refuses.
        """
        path = Path(path)
        if path.suffix == ".state":
            data = flax_state.write_tree(_tree(self.arrays))
        else:
            card = dict(self.card) | {"format": "velo-weights-v1", "sha256": self.sha256}
            data = save_safetensors(dict(self.arrays), metadata=card)
        write_atomic(path, [data])

    @classmethod
    def load(cls, path: str | os.PathLike[str], *more: str | os.PathLike[str]) -> VeLOWeights:
        """Read weights from safetensors, the authors' `theta.state`, or the two files of PyLO's PyTorch weights.

        Files are told apart by content. Raises FileNotFoundError, or ValueError that names the files when one is
        damaged, holds something else, or is half of PyLO's pair.
        """
        paths = [Path(path), *map(Path, more)]
        arrays, card = {}, {}
        for part in paths:
            found, its_card = _read(part)
            arrays.update(found)
            card.update(its_card)
        recorded = card.pop("sha256", None)
        card.pop("format", None)
        label = " and ".join(map(str, paths))
        try:
            weights = cls.from_arrays(_from_pytorch(arrays), {"name": paths[0].stem} | card)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{label}: no readable weights of VeLO ({error}); {HOW_TO_GET}") from error
        if recorded is not None and recorded != weights.sha256:
            raise ValueError(f"{label} is damaged: its arrays hash to {weights.sha256}, its card says {recorded}")
        return weights


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the arrays of a file by name, and its card; raises ValueError naming a damaged file."""
    data = path.read_bytes()
    try:
        if data[8:9] == b"{":
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return load_safetensors(data), dict(header.get("__metadata__") or {})
        return _flat(flax_state.read_tree(data)), {}
    except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        # the decoders answer a damaged byte with any of these
        raise ValueError(f"{path} is not a readable file of weights ({error}): fetch or save it again") from error


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the arrays of a tree by path; a pair is numbered."""
    if not isinstance(tree, dict):
        if not path:
            raise ValueError("no map of arrays")
        return {path: tree}
    flat = {}
    for name, entry in tree.items():
        key = f"{path}/{name}" if path else str(name)
        # a plain tuple of flax has numbers for names
        key = {"lstm_init_state/0": "lstm_init_state/hidden", "lstm_init_state/1": "lstm_init_state/cell"}.get(key, key)
        flat.update(_flat(entry, key))
    return flat


def _tree(arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
    """Return the authors' tree; a module of Haiku has one name, slashes and all."""
    tree: dict[str, Any] = {}
    for module, names in _TREE.items():
        top, _, rest = module.partition("/")
        branch = tree.setdefault(top, {})
        if rest:
            branch = branch.setdefault(rest, {})
        branch.update({name: arrays[f"{module}/{name}"] for name in names})
    return tree


def _from_pytorch(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return arrays by path where they have PyLO's names; others are left as they are.

    Raises ValueError for one of its two files alone, naming what was found and what is missing.
    """
    known = {*_PYTORCH_RNN_NAMES, *_PYTORCH_MLP_NAMES}
    if not known & set(arrays):
        return arrays
    missing, unknown = sorted(known - set(arrays)), sorted(set(arrays) - known - _PYTORCH_SCRATCH)
    if missing or unknown:
        half = (
            ""
            if set(_PYTORCH_RNN_NAMES) - set(missing) and set(_PYTORCH_MLP_NAMES) - set(missing)
            else ("; it is one of two files: join both by a plus, 'RNN+MLP', or give the folder that has both")
        )
        raise ValueError(f"of PyLO's arrays {missing} are missing, and {unknown} unknown{half}")
    for name in known:
        if np.ndim(arrays[name]) != (1 if name.endswith(".bias") else 3 if "weights_" in name else 2):
            raise ValueError(f"PyLO's array {name!r} has shape {np.shape(arrays[name])}")
    found = {path: arrays[name] for name, path in (_PYTORCH_STATE | _PYTORCH_MLP).items()}
    for path in (f"{_MLP}/w1", f"{_MLP}/w2"):
        found[path] = np.swapaxes(found[path], -1, -2)
    for name, path in _PYTORCH_LINEAR.items():
        found |= {f"{path}/w": arrays[f"{name}.weight"].T, f"{path}/b": arrays[f"{name}.bias"]}
    first = np.swapaxes(arrays["input_weights_"], -1, -2)
    if first.shape[1] != sum(GROUP_COLUMNS):
        raise ValueError(f"PyLO's array 'input_weights_' has {first.shape[1]} inputs, expected {sum(GROUP_COLUMNS)}")
    parts = np.split(first, np.cumsum(GROUP_COLUMNS)[:-1], axis=1)
    return found | {f"{_MLP}/w0__{group}": part for group, part in enumerate(parts)}


def load_velo_weights(weights: str | os.PathLike[str] | VeLOWeights | None) -> VeLOWeights:
    """Resolve what the `weights=` argument of `VeLO` accepts.

    A `VeLOWeights`; the path of a file, or of a folder that holds one (or PyLO's two); a hub id `owner/name` or
    `owner/name@revision`; or two of these joined by a plus, PyLO's pair: `Pauljanson002/VeLO_RNN` is the LSTM,
    `Pauljanson002/VeLO_MLP` the MLPs, and `amoudgl/velo-4000` has both. A path that exists wins over a hub id of the
    same spelling; `~` is the home folder. None are part of this package.
    Raises ValueError, TypeError, FileNotFoundError, ImportError or OSError, each naming `weights` and the fix.
    """
    if isinstance(weights, VeLOWeights):
        return weights
    if weights is None:
        raise ValueError(f"VeLO has no weights of its own, and weights= is missing: {HOW_TO_GET}")
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights={weights!r}: expected a path, a hub id or a VeLOWeights")
    name = os.fspath(weights)
    if Path(name).expanduser().exists() or not isinstance(weights, str):
        paths = _resolve(weights)
    else:
        paths = [path for part in name.split("+") for path in _resolve(part)]
    return VeLOWeights.load(*paths)


def _resolve(weights: str | os.PathLike[str]) -> list[Path]:
    """Return the file or files that a path or a hub id stands for."""
    name = os.fspath(weights)
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = hub.files_in(path)
        if not found:
            raise FileNotFoundError(f"weights={name!r}: the folder holds no .safetensors or .state file")
        names = [set(_names_of(file)) for file in found]
        halves = [
            next((file for file, there in zip(found, names, strict=True) if there >= set(wanted)), None)
            for wanted in (_PYTORCH_RNN_NAMES, _PYTORCH_MLP_NAMES)
        ]
        both = [file for file in halves if file is not None]
        return both if len(both) == 2 and not names[0] >= set(PATHS) else found[:1]
    if isinstance(weights, str) and name and (where := hub.parse_id(name)) is not None:
        return [hub.fetch(*where)]
    if "/" in name or name.endswith(hub.SUFFIXES) or not isinstance(weights, str):
        raise FileNotFoundError(f"weights={name!r}: no such file")
    raise ValueError(f"weights={name!r}: not a file, a folder or a hub id owner/name; {HOW_TO_GET}")


def _names_of(path: Path) -> list[str]:
    """Return the names of a safetensors file's arrays; none for another, or a damaged one."""
    try:
        with safetensors.safe_open(path, "np") as file:
            return list(file.keys())
    except (safetensors.SafetensorError, ValueError):
        return []
