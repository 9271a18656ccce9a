"""Stores that round without bias: bfloat16 and 8 bits by 16 random bits an element, replayable from seed and step.

A bfloat16 is the upper half of a float32: random bits added to the lower half, which is then cut off, round to the
next value above with the probability that keeps the expectation. A momentum of 0.999 needs it: its increments are
smaller than half a bfloat16's last bit, and round to nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from celo2.kernels import layout

LARGEST = tl.constexpr(127.0)


@triton.jit
def mix(x):
    """Mix the bits of a uint32 (the finaliser of murmur3, Austin Appleby, public domain)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def seed_at(seed, step):
    """Return the seed, uint32, of a stream of bits at a step (float32)."""
    return mix(seed ^ mix(step.to(tl.uint32) + 0x9E3779B9))


@triton.jit
def seed_of(table_ptr, matrix):
    """Return the seed of a matrix at the present step of its parameter."""
    step = tl.load(layout.entry(table_ptr, matrix, layout.COUNTER).to(tl.pointer_type(tl.float32)))
    return seed_at(layout.entry(table_ptr, matrix, layout.SEED).to(tl.uint32), step)


@triton.jit
def noise_of(seed, base, offset, STREAM: tl.constexpr):
    """Return 32 random bits an element, two tensors' worth: uint32, of the shape of `offset`.

    They depend on `seed`, on the element's number `base` (int64) + `offset` (int32) in the matrix, and on STREAM.
    """
    key = mix(seed ^ mix((base >> 32).to(tl.uint32) * 4 + STREAM))
    return mix((base.to(tl.uint32) + offset.to(tl.uint32)) ^ key)


@triton.jit
def store(pointer, value, mask, noise, HALF: tl.constexpr, FINITE: tl.constexpr):
    """Store float32 `value` as what `pointer` points to: a bfloat16 stochastically, all else to nearest.

    HALF says which 16 bits of `noise` to use. Unless FINITE, infinities and NaNs keep their bits.
    """
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        random = (noise >> 16) if HALF else (noise & 0xFFFF)
        rounded = ((bits + random) & 0xFFFF0000).to(tl.float32, bitcast=True)
        if not FINITE:
            rounded = tl.where((bits & 0x7F800000) == 0x7F800000, value, rounded)
        tl.store(pointer, rounded.to(tl.bfloat16), mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def scaled(x, scale):
    """Return [rows, columns] times the scale [rows, quanta] of its quantum of columns."""
    blocks = tl.reshape(x, [x.shape[0], x.shape[1] // layout.QUANTUM, layout.QUANTUM])
    return tl.reshape(blocks * scale[:, :, None], [x.shape[0], x.shape[1]])


@triton.jit
def scaled_momenta(momenta, scales_ptr):
    """Return three momenta times their scales, which lie side by side."""
    return (
        scaled(momenta[0], tl.load(scales_ptr)),
        scaled(momenta[1], tl.load(scales_ptr + 1)),
        scaled(momenta[2], tl.load(scales_ptr + 2)),
    )


@triton.jit
def store_8_bits(pointer, value, mask, noise, HALF: tl.constexpr, scale_ptr, scale_mask):
    """Store float32 `value` as 8 bits, stochastically rounded multiples of a scale: the largest of a quantum / 127."""
    inside = tl.abs(tl.where(mask, value, 0.0))
    blocks = tl.reshape(inside, [value.shape[0], value.shape[1] // layout.QUANTUM, layout.QUANTUM])
    largest = tl.max(blocks, axis=2)
    tl.store(scale_ptr, largest / LARGEST, mask=scale_mask)
    random = (noise >> 16) if HALF else (noise & 0xFFFF)
    level = scaled(value, tl.where(largest > 0, LARGEST / largest, 0.0)) + random.to(tl.float32) * (1.0 / 65536)
    # the largest may come out a little above 127
    level = tl.clamp(tl.floor(level), -LARGEST, LARGEST)
    tl.store(pointer, level.to(tl.int8), mask=mask)


@triton.jit(do_not_specialize=["seed", "size"])
def round_kernel(target_ptr, value_ptr, counter_ptr, seed, size, BLOCK: tl.constexpr):
    """Round float32 values into a tensor of the same strides, by the bits of `seed`, int32, at the counter's step."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    mask = start + offset < size
    value = tl.load(value_ptr + start + offset, mask=mask, other=0.0)
    seed = seed_at(seed.to(tl.uint32), tl.load(counter_ptr))
    noise = noise_of(seed, start, offset, 2)
    store(target_ptr + start + offset, value, mask, noise, False, False)
