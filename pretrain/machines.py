"""GPUs and their links from data sheets, and how long work takes on them: predictions, none of them measured.

Every constant is here, with its source or the word "assumed".
"""

import math
from typing import NamedTuple

from celo2.kernels.roofline import ADAMW_BYTES, GPUS, INSTRUCTIONS, Dtypes, Gpu, roofline
from celo2.newton_schulz import GRAM_FROM, newton_schulz_flops, passes, summed_grams, takes_one_program
from celo2.pretrain.device import peak_flops

# of the peak, in model FLOPs; published runs of GPT-2 124M and 1.5B on 8 x H100 have 0.37 to 0.50
UTILISATION = 0.45
# of the bfloat16 peak, for a forward pass in float32; H100: 67 of 989 TFLOP/s
FLOAT32_RATE = 1 / 15
# of the peak, for symmetric float16 products that are counted by halves; assumed
NEWTON_SCHULZ_UTILISATION = 0.4
# of the links' data sheet; assumed
LINK_UTILISATION = 0.8
# seconds: a collective for each doubling of its ranks, a peer of an all-to-all, a launch; assumed
HOP, PEER, LAUNCH = 10e-6, 1e-6, 5e-6
# launches of the learned rule (`celo2.kernels.report.STEP`), and of Newton-Schulz for each shape: an iteration in the
# standard form and in the Gram form, and of small matrices all
RULE_LAUNCHES, ITERATION_LAUNCHES, GRAM_ITERATION_LAUNCHES, SMALL_LAUNCHES = 10, 3, 5, 1
# of the memory; the rest is the context, the libraries' buffers and fragmentation; assumed
USABLE = 0.92


class Machine(NamedTuple):
    """A GPU: GiB of memory, and bytes a second that it sends within its node of 8, and out of it."""

    chip: Gpu
    memory: int
    inside: float
    outside: float

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        peak = peak_flops(self.chip.name)
        assert peak is not None
        return peak

    def model_rate(self, dtype: str) -> float:
        """Model FLOP/s of a forward and backward pass."""
        return self.peak * UTILISATION * (1.0 if dtype == "bfloat16" else FLOAT32_RATE)

    def rule_seconds(self, orthogonalize: bool) -> float:
        """Seconds a float32 parameter of the learned rule, by the kernels' roofline; the direction is float16 where
        Newton-Schulz follows."""
        dtypes = Dtypes(d="fp16" if orthogonalize else "fp32")
        return sum(roofline(self.chip, INSTRUCTIONS[self.chip.target], dtypes).values())

    def adamw_seconds(self) -> float:
        """Seconds a float32 parameter of fused AdamW: its bytes over the bandwidth."""
        return ADAMW_BYTES / self.chip.bandwidth

    def newton_schulz_seconds(self, m: int, n: int, steps: int, parts: int = 1) -> float:
        """Seconds of one matrix of a large batch: the longer of its FLOPs and its bytes, which bind thin matrices.

        Of the rank with most where `parts` ranks share it; their messages are not in it.
        """
        flops = newton_schulz_flops(m, n, steps, parts) / (NEWTON_SCHULZ_UTILISATION * self.peak)
        return max(flops, passes(m, n, steps) * 2 * m * n / parts / self.chip.bandwidth)


def needs_workspace(m: int, n: int, steps: int) -> bool:
    """Whether Newton-Schulz on matrices of one shape needs memory beside them."""
    return not takes_one_program(min(m, n), steps)


def newton_schulz_launches(m: int, n: int, steps: int, parts: int = 1) -> int:
    """Launches for matrices of one shape, whatever their number; `parts` ranks share each."""
    m, n = min(m, n), max(m, n)
    if parts == 1 and takes_one_program(m, steps):
        return SMALL_LAUNCHES
    # sums over ranks, and their roundings
    shared = 0 if parts == 1 else 2 * summed_grams(m, n, steps) + 4
    return shared + steps * (GRAM_ITERATION_LAUNCHES if n >= GRAM_FROM * m else ITERATION_LAUNCHES)


_CHIPS = {chip.name.split()[0].lower(): chip for chip in GPUS}
# NVLink 3, 4, 5 or Infinity Fabric in one direction, and a network card of 200 or 400 Gbit/s for each GPU
_SHEETS = {
    "a100": (80, 300e9, 25e9),
    "h100": (80, 450e9, 50e9),
    "h200": (141, 450e9, 50e9),
    "b200": (180, 900e9, 50e9),
    "mi300x": (192, 448e9, 50e9),
}
MACHINES = {name: Machine(_CHIPS[name], *sheet) for name, sheet in _SHEETS.items()}


class Links(NamedTuple):
    """Collectives over `ranks` GPUs, `local` of them in each node."""

    machine: Machine
    ranks: int
    local: int

    def _latency(self) -> float:
        return HOP * math.log2(self.ranks)

    def ring(self, size: float, times: int = 1) -> tuple[float, float]:
        """Bytes that leave a rank, and seconds, of an all-gather to or a reduce-scatter from `size` bytes on each rank.

        An all-reduce is both, `times=2`. Every byte enters each GPU once, and each node once, over all of its cards.
        """
        sent = times * size * (self.ranks - 1) / self.ranks
        entering = times * size * max(0.0, 1 - self.local / self.ranks)
        inside = sent / self.machine.inside if self.local > 1 else 0.0
        seconds = max(inside, entering / (self.local * self.machine.outside))
        return sent, seconds / LINK_UTILISATION + self._latency()

    def exchange(self, size: float) -> float:
        """Seconds of an all-to-all whose busiest rank sends or receives `size` bytes, evenly to or from the others."""
        outside = size * max(0, self.ranks - self.local) / max(1, self.ranks - 1)
        seconds = max((size - outside) / self.machine.inside, outside / self.machine.outside)
        return seconds / LINK_UTILISATION + PEER * (self.ranks - 1) + self._latency()


ASSUMPTIONS = (
    "A model, nothing is measured. Peaks, bandwidths and links are the data sheets'.",
    f"Forward and backward: model FLOPs at {UTILISATION:.0%} of the peak (published runs: 37% to 50%), in "
    f"float32 at {FLOAT32_RATE:.0%} of that.",
    f"Assumed: Newton-Schulz at {NEWTON_SCHULZ_UTILISATION:.0%} of the peak, links at {LINK_UTILISATION:.0%}, "
    f"{HOP * 1e6:g} us a collective for each doubling of its ranks,",
    f"{PEER * 1e6:g} us a peer of an all-to-all, {LAUNCH * 1e6:g} us a launch; nothing of the optimizer overlaps.",
)
