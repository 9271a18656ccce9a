"""The AdamW side: `torch.optim.adamw` with the fused kernel, in the memory layout that it needs.

The fused kernel walks raw memory: parameter, gradient and moments must have the same strides and no gaps. What has not
is copied into that form a bounded number of elements at a time, and low-precision parameters are widened, one whole
parameter at the least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from celo2.stochastic_rounding import round_stochastically_, rounding_seed

# elements of parameters that may be copied at once
COPY_LIMIT = 1 << 22


class AdamWJob(NamedTuple):
    """One parameter, its gradient (any float dtype and strides), its state, and its number in the optimizer."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    position: int


# writes a wide value into the parameter of a job; the job's step counter has advanced
Round = Callable[[AdamWJob, Tensor], None]


def round_on_host(job: AdamWJob, wide: Tensor) -> None:
    """Round by a generator seeded on the host, which waits for the device."""
    seed = rounding_seed(job.position, int(job.state["step"])) if job.parameter.dtype == torch.bfloat16 else 0
    round_stochastically_(job.parameter, wide, seed)


def step_adamw(
    jobs: list[AdamWJob],
    group: dict[str, Any],
    scale: float | Tensor = 1.0,
    *,
    found_inf: Tensor | None = None,
    rounding: Round = round_on_host,
) -> None:
    """Step the parameters of one group; gradients are multiplied by `scale` first and left as they were.

    On a device `scale` may be a 0-d tensor, and `found_inf`, float32, skips the step when it is not 0.
    """
    as_they_are = not isinstance(scale, Tensor) and scale == 1.0
    plain = [job for job in jobs if as_they_are and _fits(job)]
    _step(plain, [job.parameter for job in plain], [job.gradient for job in plain], group, found_inf)
    copied = [piece for job in jobs if not (as_they_are and _fits(job)) for piece in _pieces(job)]
    for chunk in _chunks(copied):
        wide = [job.parameter if _is_wide(job) else _like(job.state["exp_avg"]).copy_(job.parameter) for job in chunk]
        gradients = [_like(job.state["exp_avg"]).copy_(job.gradient).mul_(scale) for job in chunk]
        _step(chunk, wide, gradients, group, found_inf)
        for job, target in zip(chunk, wide, strict=True):
            if target is not job.parameter:
                rounding(job, target)


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty_strided(tensor.shape, tensor.stride())


def _is_wide(job: AdamWJob) -> bool:
    moment = job.state["exp_avg"]
    return job.parameter.dtype == moment.dtype and job.parameter.stride() == moment.stride()


def _fits(job: AdamWJob) -> bool:
    moment = job.state["exp_avg"]
    return _is_wide(job) and job.gradient.dtype == moment.dtype and job.gradient.stride() == moment.stride()


def _pieces(job: AdamWJob) -> list[AdamWJob]:
    """A job, or views of its parts when more than `COPY_LIMIT` elements of a gradient would be copied at once.

    The parts are along the axis of the largest stride, so that they have no gaps either. A parameter of low precision
    stays whole: how it is rounded depends on the place of an element.
    """
    parameter, moment = job.parameter, job.state["exp_avg"]
    if parameter.numel() <= COPY_LIMIT or not _is_wide(job):
        return [job]
    axis = max(range(parameter.ndim), key=lambda k: (parameter.shape[k] > 1, moment.stride(k)))
    length = max(1, COPY_LIMIT * parameter.shape[axis] // parameter.numel())
    parts = []
    for first in range(0, parameter.shape[axis], length):
        count = min(length, parameter.shape[axis] - first)
        state = {key: job.state[key].narrow(axis, first, count) for key in ("exp_avg", "exp_avg_sq")}
        # all parts take the same step, and the last one counts it
        state["step"] = job.state["step"].clone()
        pair = parameter.narrow(axis, first, count), job.gradient.narrow(axis, first, count)
        parts.append(AdamWJob(*pair, state, job.position))
    parts[-1].state["step"] = job.state["step"]
    # a slice may be too large still
    return [piece for part in parts for piece in _pieces(part)]


def _chunks(jobs: list[AdamWJob]) -> Iterator[list[AdamWJob]]:
    chunk: list[AdamWJob] = []
    size = 0
    for job in jobs:
        if chunk and size + job.parameter.numel() > COPY_LIMIT:
            yield chunk
            chunk, size = [], 0
        chunk.append(job)
        size += job.parameter.numel()
    if chunk:
        yield chunk


def _step(
    jobs: list[AdamWJob],
    parameters: list[Tensor],
    gradients: list[Tensor],
    group: dict[str, Any],
    found_inf: Tensor | None,
) -> None:
    if not jobs:
        return
    lr = group["lr"]
    beta1, beta2 = group["adam_betas"]
    adamw(
        parameters,
        gradients,
        [job.state["exp_avg"] for job in jobs],
        [job.state["exp_avg_sq"] for job in jobs],
        [],
        [job.state["step"] for job in jobs],
        fused=parameters[0].device.type in ("cpu", "cuda"),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        # a rate on a device stays there
        lr=lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr),
        weight_decay=group["weight_decay"],
        eps=group["adam_eps"],
        maximize=False,
        found_inf=found_inf,
    )
