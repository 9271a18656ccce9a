"""The authors' `theta.state` without flax: one MessagePack map of maps of arrays.

Celo2's is {"ff_mod_stack": {"~": {name: array}}}; `read_tree` and `write_tree` take any (`celo2.velo_weights`).

An array is MessagePack extension type 1 whose payload is again MessagePack: [shape, dtype name, little-endian bytes]
(`flax.serialization.to_bytes`). Only the types that such a file holds are implemented; anything else is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ARRAY_EXTENSION = 1


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        chunk = self.data[self.at : self.at + count]
        if len(chunk) != count:
            raise ValueError(f"theta.state ends at byte {len(self.data)}, in the middle of a value at byte {self.at}")
        self.at += count
        return chunk

    def number(self, layout: str) -> int:
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def value(self) -> Any:
        tag = self.number("B")
        if tag < 0x80:
            return tag
        if tag < 0x90 or tag in (0xDE, 0xDF):
            count = tag & 0x0F if tag < 0x90 else self.number(">H" if tag == 0xDE else ">I")
            return {self.value(): self.value() for _ in range(count)}
        if tag < 0xA0 or tag in (0xDC, 0xDD):
            count = tag & 0x0F if tag < 0xA0 else self.number(">H" if tag == 0xDC else ">I")
            return [self.value() for _ in range(count)]
        if tag < 0xC0:
            return self.take(tag & 0x1F).decode()
        if tag in (0xC4, 0xC5, 0xC6):
            return self.take(self.number({0xC4: "B", 0xC5: ">H", 0xC6: ">I"}[tag]))
        if tag in (0xC7, 0xC8, 0xC9):
            length = self.number({0xC7: "B", 0xC8: ">H", 0xC9: ">I"}[tag])
            return self.extension(self.number("b"), self.take(length))
        if 0xD4 <= tag <= 0xD8:
            return self.extension(self.number("b"), self.take(1 << (tag - 0xD4)))
        if tag in (0xCC, 0xCD, 0xCE):
            return self.number({0xCC: "B", 0xCD: ">H", 0xCE: ">I"}[tag])
        if tag in (0xD9, 0xDA):
            return self.take(self.number("B" if tag == 0xD9 else ">H")).decode()
        raise ValueError(f"theta.state holds MessagePack type 0x{tag:02x} at byte {self.at - 1}, which no theta has")

    def extension(self, kind: int, payload: bytes) -> NDArray[Any]:
        if kind != _ARRAY_EXTENSION:
            raise ValueError(
                f"theta.state holds extension type {kind}; only arrays (type {_ARRAY_EXTENSION}) are known"
            )
        content = _Reader(payload).value()
        if not (isinstance(content, list) and len(content) == 3 and isinstance(content[2], bytes)):
            raise ValueError("theta.state holds an array that is not [shape, dtype, bytes]")
        shape, dtype, raw = content
        if dtype != "float32":
            raise ValueError(f"theta.state holds an array of dtype {dtype!r}; a theta is float32")
        return np.frombuffer(raw, "<f4").reshape(shape)


def read_tree(data: bytes) -> Any:
    """Read maps of maps of arrays; raises ValueError when the file is damaged or something else."""
    reader = _Reader(data)
    content = reader.value()
    if reader.at != len(data):
        raise ValueError(f"theta.state has {len(data) - reader.at} bytes after its end")
    return content


def loads(data: bytes) -> dict[str, NDArray[Any]]:
    """Read the named arrays of a `theta.state`; raises ValueError when it is damaged or something else."""
    content = read_tree(data)
    try:
        arrays = content["ff_mod_stack"]["~"]
    except (KeyError, TypeError) as error:
        raise ValueError("theta.state has no ff_mod_stack/~ entry: it is not a Celo2 theta") from error
    if not (isinstance(arrays, dict) and all(isinstance(array, np.ndarray) for array in arrays.values())):
        raise ValueError("theta.state: ff_mod_stack/~ is not a map of arrays")
    return arrays


def _pack_length(length: int, tags: tuple[int, ...]) -> bytes:
    """Pack a length behind the tag of its width; the tags are for 1 (where there are three), 2 and 4 bytes."""
    widths = ("B", ">H", ">I")[-len(tags) :]
    for tag, width in zip(tags, widths, strict=True):
        if length < 1 << (8 * struct.calcsize(width)):
            return bytes([tag]) + struct.pack(width, length)
    raise ValueError(f"{length} bytes are too many for one value of a theta.state")


def _pack_text(text: str) -> bytes:
    raw = text.encode("ascii")
    return (bytes([0xA0 | len(raw)]) if len(raw) < 32 else _pack_length(len(raw), (0xD9, 0xDA, 0xDB))) + raw


def _pack_array(array: NDArray[Any]) -> bytes:
    raw = np.ascontiguousarray(array, "<f4").tobytes()
    shape = b"".join(bytes([size]) if size < 128 else _pack_length(size, (0xCC, 0xCD, 0xCE)) for size in array.shape)
    header = b"\x93" + bytes([0x90 | array.ndim]) + shape + _pack_text("float32")
    payload = header + _pack_length(len(raw), (0xC4, 0xC5, 0xC6)) + raw
    if len(payload) in (1, 2, 4, 8, 16):  # MessagePack's fixed-size extension headers
        return bytes([0xD4 + len(payload).bit_length() - 1, _ARRAY_EXTENSION]) + payload
    return _pack_length(len(payload), (0xC7, 0xC8, 0xC9)) + bytes([_ARRAY_EXTENSION]) + payload


def write_tree(tree: Mapping[str, Any] | NDArray[Any]) -> bytes:
    """Serialise maps of maps of float32 arrays, in the order of their entries."""
    if not isinstance(tree, Mapping):
        return _pack_array(tree)
    size = bytes([0x80 | len(tree)]) if len(tree) < 16 else _pack_length(len(tree), (0xDE, 0xDF))
    return size + b"".join(_pack_text(name) + write_tree(entry) for name, entry in tree.items())


def dumps(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Serialise named float32 arrays as the authors' loader expects them (1,833 bytes at the published sizes)."""
    largest = max(array.nbytes for array in arrays.values())
    if largest > 60_000:
        raise ValueError(f"an array of {largest} bytes is too large for theta.state; save as .safetensors instead")
    return write_tree({"ff_mod_stack": {"~": arrays}})
