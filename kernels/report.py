"""What the kernels cost, read from the compiled code on a machine without a GPU.

    python -m celo2.kernels.report --target sm_90

Compiles every kernel ahead of time and prints registers, spills, shared memory, instructions an element by class, the
width of global accesses and the bytes an element; then the step: launches, bytes and state bytes a parameter, and what
a roofline model predicts beside fused AdamW. A prediction is not a measurement: `pytest bench/` measures on a GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from celo2.kernels import layout
from celo2.kernels.apply_update import apply_update_kernel
from celo2.kernels.feature_moments import feature_moments_kernel, normalisers_kernel
from celo2.kernels.gradient_moments import control_kernel, factors_kernel, gradient_moments_kernel
from celo2.kernels.inner_loop import WARPS as INNER_WARPS
from celo2.kernels.inner_loop import inner_loop_kernel
from celo2.kernels.learned_update import learned_update_kernel
from celo2.kernels.newton_schulz import (
    inner_block,
    small_block,
    small_orthogonalize_kernel,
    symmetric_product_kernel,
)
from celo2.kernels.reductions import sum_directions_kernel, sum_gradients_kernel, sum_moments_kernel
from celo2.kernels.roofline import ADAMW_BYTES, BYTES, DTYPES, GPUS, Dtypes, phase_bytes, roofline
from celo2.kernels.rounding import round_kernel
from celo2.kernels.sharing import (
    move_parts_kernel,
    share_gradient_sums_kernel,
    share_norm_kernel,
)
from celo2.kernels.vector_update import VECTOR_COLUMNS, vector_update_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# four elements a thread
THREADS = 128
UNITS = 8
# the launches of a step beside Newton-Schulz; with several batches all but control are repeated
STEP = (
    "gradient_moments_kernel",
    "sum_gradients_kernel",
    "control_kernel",
    "factors_kernel",
    "feature_moments_kernel",
    "sum_moments_kernel",
    "normalisers_kernel",
    "learned_update_kernel",
    "sum_directions_kernel",
    "apply_update_kernel",
)
PHASES = {
    "gradient_moments_kernel": 1,
    "feature_moments_kernel": 2,
    "learned_update_kernel": 3,
    "apply_update_kernel": 4,
}


# lengths and strides that large matrices have as multiples of 16
DIVISIBLE = ("size", "inner", "x_batch", "x_row", "y_batch", "y_row", "y_column", "m", "n", "d_batch", "d_row")
# the paper's meta-training: 100,001 windows of 50 slots, 4 tasks with 8 antithetic pairs
SLOTS = 100_001 * 50
TRAJECTORIES = 64


class Specialisation(NamedTuple):
    """One kernel as the optimizer launches it."""

    kernel: Any
    dtypes: Dtypes
    constants: dict[str, Any]
    options: dict[str, int]
    pointers: Mapping[str, str] = MappingProxyType({})
    """Dtypes of those that are not what their names say."""

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


def weights(count: int) -> tuple[float, ...]:
    """Constants that are neither 0 nor 1, nor equal: what a trained theta compiles to."""
    return tuple(0.1 + ((index * 37) % 101) / 211 for index in range(count))


def specialisations(
    dtypes: Dtypes, *, aligned: bool = True, columns: int = 128, clip: bool = True
) -> Iterator[Specialisation]:
    """Yield every kernel of a step for matrices of these dtypes, in the order of launches, then all others.

    Of a kernel with several forms the first is the one that is reported.
    """
    tile = {"ALIGNED": aligned, "BLOCK_ROWS": 64, "BLOCK_COLUMNS": columns}
    vector = {"ALIGNED": aligned, "BLOCK_COLUMNS": columns}
    step = {"STEP_ROWS": 512 // columns}
    mlp = {"HIDDEN": weights(UNITS * UNITS), "BIAS": weights(UNITS), "OUTPUT": weights(UNITS), "OUTPUT_BIAS": 0.1}
    constants: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
        (gradient_moments_kernel, {**tile, "CLIP": clip}, {}),
        (sum_gradients_kernel, {"CLIP": clip, "BLOCK": 1024}, {}),
        (control_kernel, {"SHARDED": False, "BLOCK": 1024}, {}),
        (factors_kernel, {**vector, "UNITS": UNITS, "PARTS": 16}, {}),
        (feature_moments_kernel, {**tile, **step, "UNITS": UNITS, "CLIP": clip}, {}),
        (sum_moments_kernel, {"BLOCK": 128}, {}),
        (normalisers_kernel, {**vector, "UNITS": UNITS}, {}),
        (
            learned_update_kernel,
            {**tile, **step, **mlp, "ELEMENT": weights(18 * UNITS), "UNITS": UNITS, "CLIP": clip},
            {"maxnreg": 128},
        ),
        (sum_directions_kernel, {"EPS": 1e-8, "BLOCK": 1024}, {}),
        (apply_update_kernel, {**tile, "STEP_ROWS": 8}, {}),
        *(
            (
                vector_update_kernel,
                {
                    **mlp,
                    "ELEMENT": weights(VECTOR_COLUMNS.value * UNITS),
                    "FIRST_BIAS": weights(UNITS),
                    "BLOCK": 256,
                    "FIRST": first,
                    "STOP": stop,
                },
                {},
            )
            for first, stop in ((0, 3), (0, 1), (1, 2), (2, 3))
        ),
        (round_kernel, {"BLOCK": 1024}, {}),
        (control_kernel, {"SHARDED": True, "BLOCK": 1024}, {}),
        (share_gradient_sums_kernel, {**tile, "PARTS": 16}, {}),
        (share_norm_kernel, {"BLOCK": 1024}, {}),
        *(
            (move_parts_kernel, {**tile, "BLOCK_ROWS": 16, "BACK": back, "SCALED": scaled}, {})
            for back, scaled in ((True, True), (True, False), (False, False))
        ),
    ]
    for kernel, values, options in constants:
        yield Specialisation(kernel, dtypes, values, options)
    # X X^T, and a polynomial of what it is
    for beta in (0.0, -4.775):
        inner = inner_block(BYTES[dtypes.d])
        product = {"ALPHA": 1.0, "BETA": beta, "DIAGONAL": 0.0, "LOW": False, "PRECISION": "ieee"}
        product |= {"BLOCK": 128, "BLOCK_INNER": inner}
        yield Specialisation(symmetric_product_kernel, dtypes, product, {"num_warps": 8})
        if beta == 0 and dtypes.d == "fp16":
            # the Gram matrix that ranks add up
            wide = {"add_ptr": "fp32", "out_ptr": "fp32"}
            yield Specialisation(symmetric_product_kernel, dtypes, product, {"num_warps": 8}, wide)
    if dtypes.d == "fp16":
        for rows in (128, 64):
            small: dict[str, Any] = {
                "A": 3.4445,
                "B": -4.775,
                "C": 2.0315,
                "EPS": 1e-8,
                "FIRST": 2,
                "REST": 3,
                **small_block(rows),
            }
            warps = {"num_warps": small.pop("num_warps")}
            yield Specialisation(small_orthogonalize_kernel, dtypes, small, warps)


def inner_loop(variant: str, units: int = UNITS, precision: str = "ieee") -> Specialisation:
    """Return the kernel of meta-training's inner loop as `celo2.meta.train` launches it for a recipe of the paper."""
    constants = {
        "UNITS": units,
        "ORTHOGONALIZE": variant == "celo2",
        "CLIP": False,
        "CORRECTED": False,
        "NORMALIZE": True,
        "EXPERT": "",
        "SHARED": False,
        "PRECISION": precision,
    }
    return Specialisation(inner_loop_kernel, DTYPES["float32"], constants, {"num_warps": INNER_WARPS})


def compile_for(specialisation: Specialisation, target: GPUTarget) -> Any:
    """Compile for a GPU that need not be there; raises what Triton's compiler raises."""
    kernel, dtypes, constants, options, pointers = specialisation
    short = {
        "p_like": dtypes.p,
        "g_like": dtypes.g,
        "m_like": dtypes.m,
        "v_like": dtypes.v,
        "state_like": "fp32" if dtypes.m == "i8" else dtypes.m,
        "d_like": dtypes.d,
    }
    short |= {"x_ptr": dtypes.d, "add_ptr": dtypes.d, "out_ptr": dtypes.d, "target_ptr": dtypes.p}
    short |= dict.fromkeys(("directions_ptr", "matrices_ptr", "d_ptr", "y_ptr", "low_ptr"), dtypes.d)
    short |= pointers
    tables = {"table_ptr": "i64", "gradients_ptr": "i64", "skipped_ptr": "i64", "tiles_ptr": "i32", "chunks_ptr": "i32"}
    tables |= {"labels_ptr": "i32", "index_ptr": "i32", "restart_ptr": "i32"}
    if kernel is move_parts_kernel:
        tables["parts_ptr"] = "i64"
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith(("_ptr", "_like")):
            signature[name] = "*" + (short | tables).get(name, "fp32")
            # what the launcher finds out from the address of a whole allocation
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in ("adam_lr_mult", "clip_norm", "expert_weight"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name in DIVISIBLE:
                attributes[(index,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # of contiguous rows; X^T has contiguous columns
    of_gram = kernel is symmetric_product_kernel and constants["BETA"] == 0
    for name in {"x_column", "y_row" if of_gram else "y_column", "d_column"} & set(signature):
        signature[name] = "constexpr"
        values[(kernel.arg_names.index(name),)] = 1
        attributes.pop((kernel.arg_names.index(name),), None)
    # as `celo2.compilation.launch`
    options = {"num_warps": 4, **options}
    if target.backend == "hip":
        options.pop("maxnreg", None)
        options["num_warps"] //= 2
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=target, options=options)


@dataclass
class Code:
    """Figures of one compiled kernel; `loop` is its longest loop, `rest` what runs once a tile."""

    name: str
    registers: int
    spills: int  # bytes on NVIDIA, registers on AMD
    shared: int
    nested: int = 0  # instructions of the loops within the longest one
    loop: Counter[str] = field(default_factory=Counter)
    rest: Counter[str] = field(default_factory=Counter)
    accesses: Counter[str] = field(default_factory=Counter)

    def per_element(self, specialisation: Specialisation) -> Counter[str]:
        """Instructions a thread issues for each of its elements in a full tile, by class."""
        constants = specialisation.constants
        tile = constants["BLOCK_ROWS"] * constants["BLOCK_COLUMNS"] / THREADS
        step = constants.get("STEP_ROWS", constants["BLOCK_ROWS"]) * constants["BLOCK_COLUMNS"] / THREADS
        counts: Counter[str] = Counter()
        for name, count in self.loop.items():
            counts[name] += count / step
        for name, count in self.rest.items():
            counts[name] += count / tile
        return counts


CLASSES = {
    "multiply-add": ("FFMA", "v_fma", "v_pk_fma", "v_fmac", "v_mac"),
    "other float": (
        "FMUL",
        "FADD",
        "FMNMX",
        "FSEL",
        "FSETP",
        "v_mul_f",
        "v_add_f",
        "v_sub_f",
        "v_max",
        "v_min",
        "v_pk_mul",
        "v_pk_add",
        "v_med3",
    ),
    "special": ("MUFU", "v_rsq", "v_rcp", "v_sqrt"),
    "memory": ("LDG", "STG", "LDS", "STS", "LDL", "STL", "global_", "buffer_", "ds_", "scratch_", "s_load"),
}


def class_of(opcode: str) -> str:
    for name, prefixes in CLASSES.items():
        if opcode.startswith(prefixes):
            return name
    return "integer, moves, control"


def _loops(code: list[tuple[str, str]], labels: dict[str, int]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of the backward branches in a list of (opcode, whole line)."""
    for index, (opcode, line) in enumerate(code):
        if opcode.startswith(("BRA", "s_cbranch", "s_branch")):
            for label in re.findall(r"\.L[\w.$]+", line):
                # the end of the code is a branch to itself
                if (start := labels.get(label, index)) < index:
                    yield start, index + 1


def _longest_loop(code: list[tuple[str, str]], labels: dict[str, int]) -> tuple[int, int]:
    return max(_loops(code, labels), key=lambda loop: loop[1] - loop[0], default=(0, 0))


def _tool(name: str) -> str:
    return str(getattr(triton.knobs.nvidia, name).path)


def inspect(name: str, compiled: Any, target: GPUTarget) -> Code:
    """Read a compiled kernel: SASS by the tools in the Triton wheel, or AMD's assembly."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    if target.backend == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(compiled.asm["cubin"])
            usage = subprocess.run([_tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True)
            sass = subprocess.run([_tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True).stdout
        match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout)
        assert match is not None, usage.stdout
        registers, spills = int(match[1]), int(match[2]) + int(match[3])
        for line in sass.splitlines():
            if label := re.match(r"\s*(\.L[\w.]+):", line):
                labels[label[1]] = len(code)
            elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)(.*);", line):
                code.append((instruction[1], line))
    else:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])  # type: ignore[index]
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1])  # type: ignore[index]
        for line in text.splitlines():
            if label := re.match(r"(\.L[\w$]+):", line):
                labels[label[1]] = len(code)
            elif instruction := re.match(r"\s+([a-z]+_[a-z0-9_]+)(\s.*)?$", line):
                code.append((instruction[1], line))
    start, stop = _longest_loop(code, labels)
    nested = sum(last - first for first, last in _loops(code, labels) if start < first and last < stop)
    accesses = Counter(
        opcode.replace(".E", "").replace(".CONSTANT", "")
        for opcode, _ in code
        if opcode.startswith(("LDG", "STG", "global_", "buffer_load", "buffer_store"))
    )
    return Code(
        name,
        registers,
        spills,
        int(compiled.metadata.shared),
        nested,
        loop=Counter(class_of(opcode) for opcode, _ in code[start:stop]),
        rest=Counter(class_of(opcode) for opcode, _ in code[:start] + code[stop:]),
        accesses=accesses,
    )


def scratch_bytes(columns: int = 128, rows: int = 64, units: int = UNITS) -> float:
    """Bytes an element of partial sums and vectors, written and read once, for a large square matrix.

    A tile has a sum for each of its rows and columns, twice, 18 moments and three totals. Vectors are read by every
    tile, from the second-level cache: they are counted where they first come from memory, which is nothing here.
    """
    return 2 * 4 * (rows + columns + layout.ELEMENT_STRIDE.value + 3) / (rows * columns)


def _examine(work: tuple[Dtypes, str, str]) -> Code:
    dtypes, name, target = work
    specialisation = next(s for s in specialisations(dtypes) if s.name == name)
    return inspect(name, compile_for(specialisation, TARGETS[target]), TARGETS[target])


def _examine_inner_loop(work: tuple[str, str]) -> Code:
    variant, target = work
    return inspect(variant, compile_for(inner_loop(variant), TARGETS[target]), TARGETS[target])


def examine_inner_loop(target: str, workers: int) -> dict[str, Code]:
    """Compile and read the inner loop of both variants; a minute each."""
    work = [(variant, target) for variant in ("celo2", "celo2-base")]
    if workers == 1:
        return {variant: _examine_inner_loop((variant, target)) for variant, _ in work}
    with ProcessPoolExecutor(workers) as pool:
        return {code.name: code for code in pool.map(_examine_inner_loop, work)}


def examine(dtypes: Dtypes, target: str, workers: int) -> dict[str, Code]:
    """Compile and read every kernel of a step, in order."""
    names = list(dict.fromkeys(s.name for s in specialisations(dtypes)))
    if workers == 1:
        codes = [_examine((dtypes, name, target)) for name in names]
    else:
        with ProcessPoolExecutor(workers) as pool:
            codes = list(pool.map(_examine, [(dtypes, name, target) for name in names]))
    return {code.name: code for code in codes}


def print_kernels(target: str, dtypes: Dtypes, codes: dict[str, Code]) -> dict[int, float]:
    """Print a line a kernel; return the instructions an element of each phase."""
    spills = "B spilled" if target.startswith("sm_") else "registers spilled"
    print(f"\n{target}, {dtypes}")
    instructions: dict[int, float] = {}
    reported = set()
    for specialisation in specialisations(dtypes):
        if specialisation.name in reported:
            continue
        reported.add(specialisation.name)
        code = codes[specialisation.name]
        line = f"  {code.name:25} {code.registers:4} registers {code.spills:3} {spills} {code.shared:6} B shared"
        phase = PHASES.get(code.name)
        if phase is not None:
            counts = code.per_element(specialisation)
            instructions[phase] = sum(counts.values())
            classes = ", ".join(f"{count:.1f} {name}" for name, count in counts.most_common())
            line += f"  phase {phase}: {instructions[phase]:6.1f} instructions an element ({classes})"
            line += f", {phase_bytes(phase, dtypes):g} B an element"
        print(line)
        print("    " + ", ".join(f"{count} {name}" for name, count in sorted(code.accesses.items())))
    return instructions


def nested_instructions(code: Code) -> int:
    """Instructions a thread issues in a slot: the loop's, and those of Newton-Schulz's loops four times more."""
    return sum(code.loop.values()) + 4 * code.nested


def print_inner_loop(target: str, codes: dict[str, Code]) -> None:
    """Print what a slot of the inner loop costs, and how many inner steps a second that predicts."""
    spills = "B spilled" if target.startswith("sm_") else "registers spilled"
    print(f"\n{target}, the inner loop of meta-training: a program of {INNER_WARPS * 32} threads a trajectory")
    for variant, code in codes.items():
        issued = nested_instructions(code)
        print(
            f"  {variant:10} {code.registers:4} registers {code.spills:4} {spills} {code.shared:6} B shared, "
            f"{issued:,} instructions a thread and slot"
        )
        for gpu in GPUS:
            if gpu.target != target:
                continue
            # one trajectory a multiprocessor: its 128 lanes, and as many trajectories at once as there are of them
            slot = issued * INNER_WARPS * 32 / (gpu.issue / gpu.multiprocessors)
            print(
                f"    predicted for {gpu.name}: {slot * 1e6:.0f} us a slot at least, {TRAJECTORIES / slot / 1e6:.1f}M "
                f"inner steps a second with {TRAJECTORIES} trajectories, {slot * SLOTS / 60:.1f} minutes for the "
                f"paper's {SLOTS / 1e6:.0f}M slots"
            )


def print_step(target: str, dtypes: Dtypes, instructions: dict[int, float]) -> None:
    total = sum(phase_bytes(phase, dtypes) for phase in range(1, 5))
    print(f"  a step: {len(STEP)} launches for a batch of any number of matrices, beside Newton-Schulz")
    print(
        f"    {total:g} B a parameter ({' + '.join(f'{phase_bytes(phase, dtypes):g}' for phase in range(1, 5))}) and "
        f"{scratch_bytes():.2f} B of scratch; state {dtypes.state_bytes:g} B a parameter"
    )
    for gpu in GPUS:
        if gpu.target != target:
            continue
        phases = roofline(gpu, instructions, dtypes)
        ours, adamw = sum(phases.values()), ADAMW_BYTES / gpu.bandwidth
        parts = " + ".join(f"{seconds * 1e12:.1f}" for seconds in phases.values())
        print(
            f"    predicted for {gpu.name}: {ours * 1e12:.1f} ps a parameter ({parts}), fused AdamW "
            f"{adamw * 1e12:.1f}: ratio {ours / adamw:.2f}"
        )
        for model, size in (("GPT-2 124M hidden matrices", 84.9e6), ("GPT-3 XL hidden matrices", 1.208e9)):
            print(
                f"      {model}, {size / 1e6:.0f}M: {ours * size * 1e3:.2f} ms, fused AdamW {adamw * size * 1e3:.2f} ms"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description="What the kernels cost, from their compiled code.")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float32-ns", "bfloat16-state"])
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="compilers at once")
    parser.add_argument("--only", choices=("step", "inner-loop"), help="default: both; the inner loop takes minutes")
    arguments = parser.parse_args(argv)
    if not isinstance(learned_update_kernel, triton.JITFunction):
        print("error: TRITON_INTERPRET is set; the report needs the compiler", file=sys.stderr)
        return 2
    print(f"triton {triton.__version__}; compiled ahead of time, nothing here ran on a GPU")
    print(
        "model: a phase takes the longer of its bytes over the data sheet's bandwidth and its instructions over "
        "SMs x 128 lanes x boost clock; no launch overhead, no scratch, full tiles"
    )
    for target in arguments.target:
        for name in arguments.dtypes if arguments.only != "inner-loop" else ():
            dtypes = DTYPES[name]
            instructions = print_kernels(target, dtypes, examine(dtypes, target, arguments.workers))
            print_step(target, dtypes, instructions)
        if arguments.only != "step":
            print_inner_loop(target, examine_inner_loop(target, arguments.workers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
