"""Errors that a flag cures, in a line: no memory, and no compiler for `torch.compile`."""

import os
import shutil
import sys
from importlib.util import find_spec

import torch

_COMPILER = ("torch._dynamo.", "torch._inductor.")


def require_compiler(device: torch.device, cure: str) -> None:
    """Raise ValueError, ending with the cure, unless there is a compiler for `torch.compile` on this device.

    On a CPU that is CXX or g++, on a GPU, where Triton builds its launchers, CC, gcc or clang.
    """
    if device.type == "cpu":
        kind, names = "C++", [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    else:
        kind, names = "C", [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if device.type != "cpu" and find_spec("triton") is None:
        raise ValueError(f"no Triton is here, which torch.compile needs on a GPU: install celo2[triton], or {cure}")
    if not any(map(shutil.which, names)):
        raise ValueError(
            f"no {kind} compiler is here ({' or '.join(map(repr, names))}), which torch.compile needs: install one, or "
            f"{cure}"
        )


def resolve_compile(asked: bool | None, device: torch.device) -> tuple[bool, str | None]:
    """Whether to compile, as asked or by default on a GPU, and a line where the default finds no compiler.

    Raises ValueError where it is asked for and there is none.
    """
    if asked is False or (asked is None and device.type != "cuda"):
        return False, None
    try:
        require_compiler(device, "leave --compile out" if asked else "give --no-compile")
    except ValueError as error:
        if asked:
            raise
        return False, str(error)
    return True, None


def explain(error: BaseException, *, memory: str, compiler: str) -> str | None:
    """A line for an error that a flag cures, ending with its cure; None for any other error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if type(error).__module__.startswith(_COMPILER):
        cause = next((line for line in lines if "Error" in line or "error:" in line), lines[0])
        return f"torch.compile failed ({cause}); {compiler}"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{lines[0]}; {memory}"
    if isinstance(error, MemoryError):
        return f"out of memory on the CPU; {memory}"
    if isinstance(error, RuntimeError) and any(text in str(error) for text in ("DefaultCPUAllocator", "bad_alloc")):
        asked = next((int(word) for word in str(error).split() if word.isdigit() and int(word) > 1 << 16), None)
        size = "" if asked is None else f", asked for {asked / 2**30:.2f} GiB at once"
        return f"out of memory on the CPU{size}; {memory}"
    return None
