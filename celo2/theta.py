"""Theta: the learned MLP's weights as a small value, its files, and its names.

347 floats in 19 arrays at the published sizes (30 -> 8 -> 8 -> 3). Files are safetensors with a metadata card, the
authors' `theta.state` (`celo2.flax_state`), or PyLO's (`celo2.pylo`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import safetensors
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from celo2 import flax_state, hub, pylo
from celo2.files import write_atomic

# columns of each of the 14 feature groups, in the order of the rule
GROUP_COLUMNS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
OUTPUTS = 3
NAMES = (*(f"w0__{group}" for group in range(14)), "b0", "w1", "b1", "w2", "b2")
VARIANTS = ("celo2", "celo2-base")
# Nesterov on normalised columns: 0.9 m + 0.1 g, where the rms of g is 4.4 times that of m for white noise
NESTEROV = {"momentum": 2 / 3, "gradient": 1 / 3}
# weights of columns: of fast momentum, the gradient, and fast momentum times q
CLOSED_FORMS = {
    "momentum": {"w0__3": 1.0},
    "nesterov": {"w0__3": NESTEROV["momentum"], "w0__0": NESTEROV["gradient"]},
    "adam": {"w0__5": 1.0},
}
# names of the bundled files
TRAINED = ("celo2", "celo2-lm", "celo2-base")
# of each variant, what language models ended lowest with (docs/results.md)
DEFAULT_WEIGHTS = {"celo2": "celo2-lm", "celo2-base": "celo2-base"}
BUNDLED = Path(__file__).parent / "weights"


def _expected_shapes(hidden: int, hidden2: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"w0__{group}": (columns, hidden) for group, columns in enumerate(GROUP_COLUMNS)
    }
    return shapes | {
        "b0": (hidden,),
        "w1": (hidden, hidden2),
        "b1": (hidden2,),
        "w2": (hidden2, OUTPUTS),
        "b2": (OUTPUTS,),
    }


@dataclass(frozen=True, eq=False)
class Theta:
    """The weights of the learned optimizer: 19 named float32 arrays, all used as `x @ W`, and a metadata card.

    Build one with `from_arrays` or `load`. Two thetas are equal when their arrays are (`sha256`); the card does not
    count.
    """

    arrays: Mapping[str, NDArray[np.float32]]
    card: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, ArrayLike], card: Mapping[str, str] | None = None) -> Theta:
        """Build a theta of the arrays `w0__0` .. `w0__13` [rows, hidden], `b0`, `w1`, `b1`, `w2` [hidden, 3] and `b2`.

        Hidden sizes other than the published 8 and 8 are read from `b0` and `b1`. Raises ValueError for a missing or
        unknown name, a wrong shape, or a value that is not finite in float32.
        """
        missing, unknown = sorted(set(NAMES) - set(arrays)), sorted(set(arrays) - set(NAMES))
        if missing or unknown:
            raise ValueError(f"theta needs exactly the arrays {', '.join(NAMES)}; missing {missing}, unknown {unknown}")
        converted = {}
        for name in NAMES:
            array = np.array(arrays[name])
            if array.dtype.kind not in "fiu":
                raise ValueError(f"theta array {name!r} has dtype {array.dtype}: it must be real numbers")
            converted[name] = np.ascontiguousarray(array, dtype="<f4")
        if (
            converted["b0"].ndim != 1
            or converted["b1"].ndim != 1
            or not converted["b0"].size
            or not converted["b1"].size
        ):
            raise ValueError("theta arrays 'b0' and 'b1' must be vectors of the two hidden sizes, at least 1 each")
        for name, shape in _expected_shapes(converted["b0"].size, converted["b1"].size).items():
            if converted[name].shape != shape:
                raise ValueError(f"theta array {name!r} has shape {converted[name].shape}, expected {shape}")
            if not np.isfinite(converted[name]).all():
                raise ValueError(f"theta array {name!r} holds a value that is not finite in float32")
            converted[name].setflags(write=False)
        card = {str(key): str(value) for key, value in (card or {}).items()}
        if card.get("variant", "celo2") not in VARIANTS:
            raise ValueError(f"theta card: variant={card['variant']!r}, allowed: {', '.join(VARIANTS)}")
        if card.get("orthogonalize", "true") not in ("true", "false"):
            raise ValueError(f"theta card: orthogonalize={card['orthogonalize']!r}, allowed: true, false")
        return cls(MappingProxyType(converted), MappingProxyType(card))

    @property
    def name(self) -> str:
        return self.card.get("name", "theta")

    @property
    def variant(self) -> str:
        """`"celo2"` (the rule on hidden matrices, AdamW on the rest) or `"celo2-base"` (the rule everywhere)."""
        return self.card.get("variant", "celo2")

    @property
    def orthogonalize(self) -> bool:
        """Whether the weights were trained with Newton-Schulz; True for a file without a card (`theta.state`)."""
        return self.card.get("orthogonalize", "true" if self.variant == "celo2" else "false") == "true"

    @property
    def hidden(self) -> int:
        """Width of the first hidden layer (8 as published)."""
        return self.arrays["b0"].size

    @property
    def num_parameters(self) -> int:
        return sum(array.size for array in self.arrays.values())

    @cached_property
    def sha256(self) -> str:
        """Hash of names, shapes and little-endian float32 bytes, in the order of `NAMES`, without the card."""
        digest = hashlib.sha256()
        for name in NAMES:
            digest.update(f"{name}{self.arrays[name].shape}".encode())
            digest.update(self.arrays[name].tobytes())
        return digest.hexdigest()

    @cached_property
    def label(self) -> str:
        """`name@` and the first 12 digits of `sha256`: what a state dict records."""
        return f"{self.name}@{self.sha256[:12]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Theta) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"Theta({self.label}, {self.num_parameters} floats, variant={self.variant!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return Theta.from_arrays, (dict(self.arrays), dict(self.card))

    def tensors(self, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the arrays as tensors of `dtype` on `device`."""
        return {name: torch.tensor(array, dtype=dtype, device=device) for name, array in self.arrays.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to `path`, atomically: `*.state` in the authors' format (no card), anything else as safetensors.

        Raises OSError naming the path, with any older file left as it was, when the disk refuses.
        """
        path = Path(path)
        if path.suffix == ".state":
            data = flax_state.dumps(self.arrays)
        else:
            card = dict(self.card) | {"format": "celo2-theta-v1", "sha256": self.sha256}
            data = save_safetensors(dict(self.arrays), metadata=card)
        write_atomic(path, [data])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Theta:
        """Read a theta from safetensors, the authors' `theta.state` or PyLO's files, told apart by content.

        Raises FileNotFoundError, or ValueError that names the file when it is damaged or holds something else.
        """
        path = Path(path)
        data = path.read_bytes()
        try:
            if data[8:9] == b"{":
                arrays = load_safetensors(data)
                header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
                card = dict(header.get("__metadata__", {}))
            elif data[:2] == b"PK":
                arrays, card = pylo.read_checkpoint(data), {}
            else:
                arrays, card = flax_state.loads(data), {}
            recorded = card.pop("sha256", None)
            card.pop("format", None)
            theta = cls.from_arrays(pylo.from_pylo(arrays, GROUP_COLUMNS), {"name": path.stem} | card)
        except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
            # the decoders answer a damaged byte with any of these
            raise ValueError(
                f"{path} is not a readable theta ({error}); it must be safetensors or a theta.state with the arrays "
                "w0__0 .. w0__13, b0, w1, b1, w2, b2, or a file of PyLO: fetch or save it again"
            ) from error
        if recorded is not None and recorded != theta.sha256:
            raise ValueError(f"{path} is damaged: its arrays hash to {theta.sha256}, its card says {recorded}")
        return theta


def closed_form(name: str) -> Theta:
    """Return a theta that computes a known direction: `"momentum"` m_0, `"nesterov"` 0.9 m_0 + 0.1 g, `"adam"` m_0 q.

    One pair of ReLUs carries +x and -x through both layers. q is 1 / sqrt(v + 1e-8). With Newton-Schulz, `"momentum"`
    is Muon with an exponential-average momentum of 0.9, and `"nesterov"` the same in Nesterov's form, for a gradient of
    white noise.
    """
    if name not in CLOSED_FORMS:
        raise ValueError(f"unknown closed form {name!r}, allowed: {', '.join(CLOSED_FORMS)}")
    arrays = {key: np.zeros(shape, np.float32) for key, shape in _expected_shapes(8, 8).items()}
    for column, weight in CLOSED_FORMS[name].items():
        arrays[column][0, :2] = weight, -weight
    arrays["w1"][0, 0] = arrays["w1"][1, 1] = 1
    arrays["w2"][:2, 0] = 1, -1
    card = {
        "name": name,
        "recipe": "closed form, not trained",
        "orthogonalize": "false" if name == "adam" else "true",
    }
    return Theta.from_arrays(arrays, card)


def load_weights(weights: str | os.PathLike[str] | Theta) -> Theta:
    """Resolve what the `weights=` argument of `FusedCelo2` accepts.

    A `Theta`; a name (`"celo2"`, `"celo2-lm"` and `"celo2-base"`, the bundled trained weights; `"momentum"`,
    `"nesterov"` and `"adam"`, closed forms); the path of a file, or of a folder that holds one (a run of
    meta-training); or a hub id `owner/name` or `owner/name@revision`, without a network from the cache. A path that
    exists wins over a hub id of the same spelling; `~` is the home folder.
    Raises ValueError, FileNotFoundError, ImportError or OSError, each naming `weights` and the fix.
    """
    if isinstance(weights, Theta):
        return weights
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights={weights!r}: expected a name, a path, a hub id or a Theta")
    name = os.fspath(weights)
    if name in CLOSED_FORMS:
        return closed_form(name)
    if name in TRAINED:
        return Theta.load(BUNDLED / f"{name}.safetensors")
    path = Path(name).expanduser()
    if path.is_file():
        return Theta.load(path)
    if path.is_dir():
        found = hub.files_in(path)
        if not found:
            raise FileNotFoundError(f"weights={name!r}: the folder holds no .safetensors or .state file")
        return Theta.load(found[0])
    if isinstance(weights, str) and (where := hub.parse_id(name)) is not None:
        return Theta.load(hub.fetch(*where))
    if "/" in name or name.endswith(hub.FILES) or not isinstance(weights, str):
        raise FileNotFoundError(f"weights={name!r}: no such file")
    raise ValueError(
        f"weights={name!r}: not a known name ({', '.join((*TRAINED, *CLOSED_FORMS))}), a file, or a hub id owner/name"
    )
