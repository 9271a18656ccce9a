"""Which parameters of an optimizer ranks step together, and a step of them.

What loads `torch.distributed`, half of the time of `import celo2`, is imported inside of functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from celo2 import kernel_plan
from celo2.adamw import step_adamw
from celo2.groups import group_view, named_parameters
from celo2.norms import global_norm
from celo2.phases import gradient_moments
from celo2.state import is_dtensor, local, placing_of

if TYPE_CHECKING:
    from celo2.optimizer import FusedCelo2
    from celo2.sharded_step import ShardedStep
    from celo2.sharding import Placing
    from celo2.split_step import SplitStep


# options of a group that all ranks must give alike: they decide what is exchanged, or what replicas become
COMPARED = (
    *("lr", "weight_decay", "adam_betas", "adam_eps", "max_grad_norm", "ns_steps", "orthogonalize"),
    *("rule", "state_dtype", "weights", "split", "heads", "axis", "flatten"),
)


def _plain(value: object) -> object:
    """Return an option as it is compared; a rate on a device is not waited for."""
    if isinstance(value, Tensor):
        return float(value) if value.device.type == "cpu" else None
    return list(value) if isinstance(value, tuple) else value


def step_sharded(optimizer: FusedCelo2) -> None:
    """Step all parameters, the sharded or split ones together with the other ranks; collective."""
    from celo2.sharded_step import ShardedStep

    if optimizer._sharded is None:
        optimizer._collect()  # what can be refused is refused before any rank waits for another
        if optimizer.split_over is not None:
            from celo2.split_step import check_replicas

            named = [pair for group in optimizer.param_groups for pair in named_parameters(group)]
            check_replicas(named, optimizer.split_over)
        optimizer._sharded = plan_sharded(optimizer)
        if isinstance(optimizer._sharded, ShardedStep):
            optimizer._shards_refused = refuse_shards(optimizer, optimizer._sharded)
    optimizer._sharded.check_flags()
    if isinstance(optimizer._sharded, ShardedStep) and kernel_plan.take_kernels(optimizer):
        kernel_plan.step_with_kernels(optimizer)
        return
    step = optimizer._sharded
    learned, vectors, adam = optimizer._collect()
    whole = [job.matrices.g for job in learned] + [job.gradient for job in vectors]
    sharded: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and optimizer.rule_of(parameter) == "adamw":
                is_sharded = is_dtensor(parameter) and placing_of(parameter) is not None
                (sharded if is_sharded else whole).append(local(parameter.grad))
    if optimizer.split_over is not None:
        from celo2.split_step import shares

        sharded, whole = shares(whole, optimizer.split_over), []
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    inverse_scale = 1.0 if grad_scale is None else 1.0 / float(local(grad_scale))

    def meanwhile(scales: Sequence[float], norm: float) -> None:
        for job in learned:
            moments = gradient_moments(job.matrices.g, optimizer._workspace(job.parameter))
            optimizer._step_matrices(job, moments, scales[job.group])
        for vector in vectors:
            optimizer._step_vector(vector, scales[vector.group])
        for index, jobs in enumerate(adam):
            step_adamw(jobs, optimizer.param_groups[index], scales[index])

    norm, scales = step.run(
        optimizer.param_groups,
        sharded,
        global_norm([], whole) ** 2,
        found_inf is not None and float(local(found_inf)) != 0,
        inverse_scale,
        meanwhile,
    )
    if any(parameter.grad is not None for parameter in optimizer._everything()):
        optimizer._grad_norm = torch.tensor(norm, dtype=torch.float32)
    if scales is None:
        optimizer._skip()
    else:
        optimizer._skips.note(False)


def plan_sharded(optimizer: FusedCelo2) -> ShardedStep | SplitStep:
    """Make the step of the parameters that ranks step together; collective.

    Raises ValueError for parameters on several meshes, RuntimeError when ranks have different ones.
    """
    from celo2.sharded_step import ShardedJob, ShardedStep
    from celo2.sharding import agree

    jobs, process_groups = [], []
    device = optimizer.param_groups[0]["params"][0].device
    for index, group in enumerate(optimizer.param_groups):
        for name, parameter in named_parameters(group):
            placing = placing_in(optimizer, parameter)
            if placing is None or not parameter.requires_grad:
                continue
            device = parameter.device
            if placing.group not in process_groups:
                process_groups.append(placing.group)
            if optimizer.rule_of(parameter) == "celo2":
                theta = optimizer._theta(group["weights"])
                jobs.append(
                    ShardedJob(
                        name,
                        index,
                        parameter,
                        optimizer.state[parameter],
                        group_view(group),
                        placing,
                        optimizer._position(parameter),
                        theta,
                        group["orthogonalize"] and parameter.ndim > 1,
                        group["ns_steps"],
                    )
                )
    if optimizer.split_over is not None:
        process_groups = [optimizer.split_over.get_group(0)]
    if len(process_groups) == 1:
        # a rank that clips makes a message more than one that does not
        agree(
            [[_plain(group[key]) for key in COMPARED] for group in optimizer.param_groups],
            process_groups[0],
            "an option of the parameter groups",
        )
    wire_dtype = optimizer.wire_dtype
    if wire_dtype == "auto":
        wire_dtype = "float32" if device.type == "cpu" else "bfloat16"
    if optimizer.split_over is not None:
        from celo2.split_step import SplitStep

        return SplitStep(jobs, optimizer.split_over, wire_dtype, device)
    if len(process_groups) != 1:
        raise ValueError(
            f"parameters are sharded over {len(process_groups)} process groups: one optimizer needs one mesh"
        )
    return ShardedStep(jobs, process_groups[0], wire_dtype, device)


def placing_in(optimizer: FusedCelo2, parameter: Tensor) -> Placing | None:
    """Return how the step of a parameter is split over ranks, None when each takes it whole."""
    if optimizer.split_over is None:
        return placing_of(parameter) if is_dtensor(parameter) else None
    if not optimizer._is_split(parameter, optimizer.rule_of(parameter)):
        return None
    from celo2.split_step import placing_on

    return placing_on(optimizer.split_over)


def refuse_shards(optimizer: FusedCelo2, sharded: ShardedStep) -> str | None:
    """Return why the kernels of some rank do not take its shards, None when all do; collective."""
    from celo2.sharding import gather

    reason = None
    if not kernel_plan.kernels_run_on(optimizer, {sharded.device}):
        reason = f"backend={optimizer.backend!r} on {sharded.device}"
    else:
        from celo2.sharded_kernel_step import refused_shard

        for member in sharded.members:
            refusal = refused_shard(member.job, sharded.ranks, sharded.rank)
            reason = reason or (refusal and f"{member.job.name}: {refusal}")
    return next((other for other in gather(reason, sharded.group) if other is not None), None)
