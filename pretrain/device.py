"""The device of a run: which one, its peak FLOP rate, its precision."""

import os
import platform
import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

# dense bfloat16 tensor-core FLOP/s by device name, the most specific first; source: the vendors' data sheets
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
    ("MI250X", 383e12),
)
DEVICES = ("cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def select_device(name: str) -> torch.device:
    """Device of `"auto"` (a GPU when there is one, else the CPU) or of a name as PyTorch takes it.

    Raises ValueError when the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in DEVICES:
            raise RuntimeError(f"a {device.type} device does not train")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not usable here ({reason}); use auto, {', '.join(DEVICES)}") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """Name of the device as its vendor gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
        return f"{model or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return device.type


def peak_flops(name: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device by its name; None for a device that the table lacks."""
    return next((flops for key, flops in PEAK_FLOPS if key in name), None)


def precision(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """Context in which the forward pass runs: autocast to bfloat16, or nothing for float32."""
    return torch.autocast(device.type, DTYPES[dtype]) if dtype == "bfloat16" else nullcontext()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to the device, without waiting where that is a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def memory_gib(device: torch.device) -> float:
    """GiB of memory: on a GPU the most that PyTorch has allocated there so far, on a CPU what the process has now.

    Nothing waits for a GPU.
    """
    gib = 2**30
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / gib
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / gib
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / gib
    # the most so far; macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / gib


class OptimizerTimer:
    """Milliseconds spent between `start` and `stop`: events on a GPU, so that nothing waits, else the clock.

    `elapsed_ms` on a GPU waits for the work; read it after the loss has been read.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.Event(device, enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._times = [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def _mark(self, index: int) -> None:
        if self._events:
            self._events[index].record()
        else:
            self._times[index] = time.perf_counter()

    def elapsed_ms(self) -> float:
        if self._events:
            self._events[1].synchronize()
            return float(self._events[0].elapsed_time(self._events[1]))
        return 1000 * (self._times[1] - self._times[0])
