"""Theta in the layout of PyLO (arXiv 2506.10315), another implementation of learned optimizers in PyTorch.

Its network of Celo2 has the arrays `w0.0` .. `w0.13`, `b0`, `dense_w.0`, `dense_b.0`, `dense_w.1` and `dense_b.1`, all
used as `x @ W`. On a hub they are a `model.safetensors` beside a `config.json` with the network's sizes; PyLO's
`checkpoint_path=` takes a state dict that `torch.save` wrote. Another of its versions has `torch.nn.Linear` layers,
`first_layer`, `hidden` and `output`, with the first layer whole or in parts, `first_layer_weights.0` to `.13`: these
are read, not written.
Source: `pylo/models/CELO2_MLP.py` of Belilovsky-Lab/pylo at 38fa59c, and `Celo2_MLP.py` at da51c81.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.numpy import save as save_safetensors

from celo2.files import write_atomic

if TYPE_CHECKING:
    from celo2.theta import Theta

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_NAMES = {
    **{f"w0__{group}": f"w0.{group}" for group in range(14)},
    "b0": "b0",
    "w1": "dense_w.0",
    "b1": "dense_b.0",
    "w2": "dense_w.1",
    "b2": "dense_b.1",
}
_HERE = {there: here for here, there in _NAMES.items()}


def from_pylo(arrays: Mapping[str, Any], groups: Sequence[int]) -> Mapping[str, Any]:
    """Return arrays by the names of a theta where they have PyLO's; others are left as they are.

    `groups` are the numbers of columns of the 14 groups of inputs.
    """
    if "dense_w.0" in arrays:
        return {_HERE.get(name, name): array for name, array in arrays.items()}
    if "first_layer.weight" in arrays or "first_layer_weights.0" in arrays:
        return _from_linear_layers(dict(arrays), groups)
    return arrays


def _from_linear_layers(arrays: dict[str, Any], groups: Sequence[int]) -> dict[str, Any]:
    found = {}
    if "first_layer.weight" in arrays:
        ends = list(accumulate(groups))
        first = arrays.pop("first_layer.weight")
        parts = [first[:, begin:end] for begin, end in pairwise((0, *ends))]
    else:
        parts = [arrays.pop(f"first_layer_weights.{group}") for group in range(len(groups))]
    for group, part in enumerate(parts):
        found[f"w0__{group}"] = part.T
    for name, array in arrays.items():
        layer, _, kind = name.rpartition(".")
        if name == "first_layer_bias":
            layer, kind = "first_layer", "bias"
        place = {"first_layer": 0, "hidden": 1, "output": 2}.get(layer)
        known = place is not None and kind in ("weight", "bias")
        found[f"{kind[0]}{place}" if known else name] = array.T if known else array
    return found


def read_checkpoint(data: bytes) -> dict[str, Any]:
    """Return the arrays of a state dict that `torch.save` wrote; raises ValueError for anything else."""
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return {str(name): tensor.numpy(force=True) for name, tensor in state.items()}
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ValueError(f"no state dict of tensors: {str(error).splitlines()[0]}") from error


def fits_pylo(theta: Theta) -> bool:
    """Whether PyLO's network can have a theta's sizes: it has one width for both hidden layers."""
    return theta.arrays["b0"].size == theta.arrays["b1"].size


def save_pylo(theta: Theta, path: str | os.PathLike[str]) -> None:
    """Write a theta for PyLO: `*.pt` for its `checkpoint_path=`, anything else as a folder for its `from_pretrained`.

    A folder gets `model.safetensors`, with the theta's card as metadata, and `config.json`; each is written atomically.
    Raises ValueError for hidden layers of two widths, which PyLO does not have, and OSError naming the path when the
    disk refuses.
    """
    path = Path(path)
    if not fits_pylo(theta):
        widths = f"{theta.hidden} and {theta.arrays['b1'].size}"
        raise ValueError(f"{theta!r} has hidden layers of {widths}: PyLO's network has one width for both")
    arrays = {there: theta.arrays[here] for here, there in _NAMES.items()}
    if path.suffix == ".pt":
        file = io.BytesIO()
        torch.save({name: torch.tensor(array) for name, array in arrays.items()}, file)
        write_atomic(path, [file.getvalue()])
        return
    config = {
        "feature_dims": [arrays[f"w0.{group}"].shape[0] for group in range(14)],
        "hidden_size": theta.hidden,
        "hidden_layers": 2,
        "output_size": arrays["dense_b.1"].size,
        "activation": "relu",
    }
    path.mkdir(parents=True, exist_ok=True)
    card = {**theta.card, "format": "pt", "sha256": theta.sha256}
    write_atomic(path / WEIGHTS, [save_safetensors(arrays, metadata=card)])
    write_atomic(path / CONFIG, [json.dumps(config, indent=1).encode()])
