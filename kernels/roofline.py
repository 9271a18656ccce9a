"""The kernels' roofline model: bytes and instructions an element of each phase, over what a GPU's data sheet promises.

Nothing here needs Triton or a GPU. `celo2.kernels.report` compiles the kernels and prints what the model says of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# columns that share a scale of an 8-bit momentum
QUANTUM = 64
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "i8": 1}


class Dtypes(NamedTuple):
    """Element types of parameters, gradients, momenta, second moment and direction, in Triton's short names."""

    p: str = "fp32"
    g: str = "fp32"
    m: str = "fp32"
    v: str = "fp32"
    d: str = "fp32"

    def __str__(self) -> str:
        return f"p {self.p}, g {self.g}, momenta {self.m}, v {self.v}, d {self.d}"

    @property
    def state_bytes(self) -> float:
        """Bytes of state a parameter, with the scales of 8-bit momenta and without the factors."""
        scales = 3 * 4 / QUANTUM if self.m == "i8" else 0
        return 3 * BYTES[self.m] + BYTES[self.v] + scales


DTYPES = {
    "float32": Dtypes(),
    # what a GPU takes by default where Newton-Schulz follows
    "float32-ns": Dtypes(d="fp16"),
    # a bfloat16 state and the float32 gradients that autocast leaves
    "bfloat16-state-wide": Dtypes("fp32", "fp32", "bf16", "bf16", "fp32"),
    "bfloat16-state": Dtypes("fp32", "bf16", "bf16", "bf16", "bf16"),
    "int8-state": Dtypes("fp32", "bf16", "i8", "bf16", "bf16"),
    "bfloat16": Dtypes("bf16", "bf16", "bf16", "bf16", "bf16"),
    "mixed": Dtypes("bf16", "bf16", "fp32", "fp32", "bf16"),
    "float16": Dtypes("fp16", "fp16", "fp32", "fp32", "fp32"),
}


def phase_bytes(phase: int, dtypes: Dtypes) -> float:
    """Bytes of tensors an element moves in a phase, scratch left out."""
    p, g, _, _, d = (BYTES[name] for name in dtypes)
    state = dtypes.state_bytes
    read = {1: g, 2: g + p + state, 3: g + p + state, 4: p + d}
    written = {1: 0, 2: 0, 3: state + d, 4: p}
    return read[phase] + written[phase]


class Gpu(NamedTuple):
    """Data sheet: bytes a second of memory, and instructions of threads a second (SMs x 128 lanes x boost clock; AMD:
    compute units x 64 lanes)."""

    name: str
    target: str
    bandwidth: float
    issue: float
    multiprocessors: int


GPUS = (
    Gpu("A100 SXM 80 GB", "sm_80", 2.04e12, 108 * 128 * 1.41e9, 108),
    Gpu("H100 SXM", "sm_90", 3.35e12, 132 * 128 * 1.98e9, 132),
    Gpu("H200 SXM", "sm_90", 4.8e12, 132 * 128 * 1.98e9, 132),
    Gpu("B200", "sm_100", 8.0e12, 148 * 128 * 1.97e9, 148),
    Gpu("MI300X", "gfx942", 5.3e12, 304 * 64 * 2.1e9, 304),
)
ADAMW_BYTES = 28


# instructions an element of the four phases, as `celo2.kernels.report --dtypes float32` reads them from what this
# version of Triton compiles
INSTRUCTIONS_BY = "3.7.1"
INSTRUCTIONS: dict[str, dict[int, float]] = {
    "sm_80": {1: 16.2, 2: 73.7, 3: 322.2, 4: 9.8},
    "sm_90": {1: 16.0, 2: 73.9, 3: 318.7, 4: 9.7},
    "sm_100": {1: 16.0, 2: 75.7, 3: 303.9, 4: 9.7},
    "gfx942": {1: 19.0, 2: 81.3, 3: 322.2, 4: 11.7},
}


def roofline(gpu: Gpu, instructions: Mapping[int, float], dtypes: Dtypes) -> dict[int, float]:
    """Seconds a parameter of each phase: the longer of its bytes over bandwidth and its instructions over issue."""
    return {
        phase: max(phase_bytes(phase, dtypes) / gpu.bandwidth, instructions[phase] / gpu.issue) for phase in range(1, 5)
    }
