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
import pickle
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

NAMES = {
    **{f"w0__{group}": f"w0.{group}" for group in range(14)},
    "b0": "b0",
    "w1": "dense_w.0",
    "b1": "dense_b.0",
    "w2": "dense_w.1",
    "b2": "dense_b.1",
}
_HERE = {there: here for here, there in NAMES.items()}


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
