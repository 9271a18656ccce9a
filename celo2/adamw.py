"""The AdamW side: `torch.optim.adamw` with the fused kernel, in the memory layout that it needs.

The fused kernel walks raw memory: parameter, gradient and moments must have the same strides and no gaps. What has not
is copied into that form, and low-precision parameters are widened, a bounded number of elements at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.adamw import adamw

from celo2.stochastic_rounding import round_stochastically_

# elements of parameters that may be copied at once
COPY_LIMIT = 1 << 22


class AdamWJob(NamedTuple):
    """One parameter, its gradient (any float dtype and strides), its state, and the seed of its rounding."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    seed: int


def step_adamw(jobs: list[AdamWJob], group: dict[str, Any], scale: float) -> None:
    """Step the parameters of one group; gradients are multiplied by `scale` first and left as they were."""
    plain = [job for job in jobs if scale == 1.0 and _fits(job)]
    _step(plain, [job.parameter for job in plain], [job.gradient for job in plain], group)
    for chunk in _chunks([job for job in jobs if scale != 1.0 or not _fits(job)]):
        wide = [job.parameter if _is_wide(job) else _like(job.state["exp_avg"]).copy_(job.parameter) for job in chunk]
        gradients = [_like(job.state["exp_avg"]).copy_(job.gradient).mul_(scale) for job in chunk]
        _step(chunk, wide, gradients, group)
        for job, target in zip(chunk, wide, strict=True):
            if target is not job.parameter:
                round_stochastically_(job.parameter, target, job.seed)


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty_strided(tensor.shape, tensor.stride())


def _is_wide(job: AdamWJob) -> bool:
    moment = job.state["exp_avg"]
    return job.parameter.dtype == moment.dtype and job.parameter.stride() == moment.stride()


def _fits(job: AdamWJob) -> bool:
    moment = job.state["exp_avg"]
    return _is_wide(job) and job.gradient.dtype == moment.dtype and job.gradient.stride() == moment.stride()


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


def _step(jobs: list[AdamWJob], parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
    if not jobs:
        return
    beta1, beta2 = group["adam_betas"]
    decay = group["weight_decay"] if group["adam_weight_decay"] is None else group["adam_weight_decay"]
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
        lr=float(group["lr"]) * group["adam_lr_mult"],
        weight_decay=decay,
        eps=group["adam_eps"],
        maximize=False,
    )
