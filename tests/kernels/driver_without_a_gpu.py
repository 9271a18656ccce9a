"""The path of compiled kernels over a driver that launches nothing: what a first step compiles, and when.

Prints JSON: kernels compiled before the first launch, in the first step, and for another learning rate, clipping limit
and number of parameters; and kernels that round, for several seeds and sizes.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from celo2 import FusedCelo2, batched_newton_schulz, blocks
from celo2.backends import triton as triton_backend
from celo2.blocks import Blocks
from celo2.comm import Local
from celo2.step import Inputs, take_step


class NoDriver(DriverBase):
    """An H100 on which kernels load and launch without doing anything."""

    def __init__(self) -> None:
        self.launched: Counter[str] = Counter()
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (name, name, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

    def launcher_cls(self, src, metadata):
        return lambda *args, **kwargs: self.launched.update([metadata.name])

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0


def make(shapes, **options):
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = FusedCelo2([{"params": params, "rule": "celo2"}], **options)
    slots = optimizer.planner.collect().whole
    backend = triton_backend.TritonBackend(slots, len(optimizer.param_groups), torch.device("cpu"), torch.float16)
    return backend, optimizer


def run(backend, optimizer, others=(), grad_scale=None, found_inf=None):
    take_step(backend, Local(), Inputs(optimizer.param_groups, list(others), [], grad_scale, found_inf), lambda: None)


def main() -> None:
    driver = NoDriver()
    triton.runtime.driver.set_active(driver)
    triton.knobs.cache.dir = tempfile.mkdtemp()
    compiled: Counter[str] = Counter()
    triton.knobs.runtime.jit_post_compile_hook = lambda **figures: compiled.update([figures["fn"].name])
    # tiles of a GPU, and its products
    choose = Blocks.choose.__func__
    Blocks.choose = classmethod(lambda cls, columns, _: choose(cls, columns, torch.device("cuda")))
    blocks._target = lambda _: "sm_90"
    batched_newton_schulz.takes_symmetric_products = lambda rows, device: rows >= 96
    batched_newton_schulz.takes_one_program = lambda d, _: min(d.shape[-2:]) < 96
    shapes = [(128, 256), (256, 128), (128, 64), (30, 7), (9,)]
    report = {}

    step, optimizer = make(shapes, orthogonalize=True)
    step.compile()
    report["ahead"], report["launched ahead"] = sum(compiled.values()), sum(driver.launched.values())
    compiled.clear()
    run(step, optimizer)
    report["in the first step"], report["launched"] = dict(compiled), len(driver.launched)
    compiled.clear()
    # other rates, limits, counts of matrices and of gradients: nothing of it is part of the code
    optimizer.param_groups[0]["lr"] = 3e-4
    run(step, optimizer, [torch.ones(5)] * 17, torch.tensor(2.0), torch.tensor(0.0))
    more, other = make([*shapes, *shapes, *shapes[:3]], orthogonalize=True, weight_decay=0.1)
    more.compile()
    run(more, other)
    report["for another model"] = dict(compiled)
    compiled.clear()
    wide = torch.zeros(4096)
    for position, size in ((0, 4096), (1, 4096), (2, 16), (3, 4095)):
        job = SimpleNamespace(
            parameter=nn.Parameter(wide[:size].bfloat16()), position=position, state={"step": torch.zeros(())}
        )
        triton_backend.round_on_device(job, wide[:size])
    report["roundings"] = sum(compiled.values())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
    assert Path(triton.knobs.cache.dir).exists()
