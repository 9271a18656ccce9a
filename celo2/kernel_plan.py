"""Which parameters of an optimizer the kernels step, and a step through them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from celo2.adamw import AdamWJob, round_on_host, step_adamw
from celo2.groups import group_view
from celo2.jobs import MatrixJob, VectorJob
from celo2.phases import gradient_moments
from celo2.state import is_dtensor, local, placing_of

if TYPE_CHECKING:
    from celo2.kernel_step import KernelStep
    from celo2.optimizer import FusedCelo2
    from celo2.sharded_step import ShardedStep

NS_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


class KernelPlan:
    """What the kernels step and what is left, for as long as `signature` stays."""

    def __init__(self, signature: list[object]) -> None:
        self.signature = signature
        self.step: KernelStep | None = None  # None: nothing goes through the kernels
        self.refused: dict[Tensor, str] = {}  # learned parameters that PyTorch steps, and why
        self.adam: list[list[Tensor]] = []
        self.shards: set[int] = set()  # positions of the sharded ones among them
        self.rounding = round_on_host
        self.skipped: Tensor | None = None  # skipped steps counted on the device, int64 [1]
        self.counted = 0  # how many of them the groups have already


def triton_is_installed() -> bool:
    """Whether the kernels can be imported."""
    return importlib.util.find_spec("triton") is not None


def take_kernels(optimizer: FusedCelo2) -> bool:
    """Whether this step goes through the kernels, and for which parameters: planned again when anything moved."""
    if optimizer.backend == "torch":
        return False
    signature = signature_of(optimizer)
    if optimizer._kernels is None or optimizer._kernels.signature != signature:
        old, optimizer._kernels = optimizer._kernels, None
        optimizer._kernels = plan_kernels(optimizer, signature, old)
    return optimizer._kernels.step is not None


def signature_of(optimizer: FusedCelo2) -> list[object]:
    """What the plan of the kernels depends on; gradients may move, unless their alignment changes."""
    parts: list[object] = []
    for group in optimizer.param_groups:
        parts += [group[key] for key in ("weights", "orthogonalize", "ns_steps", "max_grad_norm", "state_dtype")]
        parts += [group[key] for key in ("split", "heads", "axis", "flatten")]
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None or gradient.layout != torch.strided:
                parts.append(gradient)
                continue
            values: Iterable[Tensor] = optimizer.state[parameter].values()
            if is_dtensor(parameter):
                parts.append(getattr(gradient, "placements", None))
                parameter, gradient, values = local(parameter), local(gradient), map(local, values)
            parts.append((parameter.data_ptr(), parameter.dtype, parameter.stride()))
            parts.append((gradient.dtype, gradient.stride(), gradient.data_ptr() % 16))
            parts.append([value.data_ptr() for value in values])
    return parts


def plan_kernels(optimizer: FusedCelo2, signature: list[object], old: KernelPlan | None) -> KernelPlan:
    """Plan for what `signature` describes; counters of the `old` plan go on. Raises as `kernels_run_on`."""
    plan = KernelPlan(signature)
    skipped = None
    if old is not None:
        skipped, plan.counted = old.skipped, old.counted
        plan.skipped = skipped
        # its memory is free for the new one
        old.step = None
    learned, vectors, adam = optimizer._collect()
    # the collection may have moved state to its parameters
    plan.signature = signature_of(optimizer)
    jobs: list[MatrixJob | VectorJob] = [*learned, *vectors]
    # a split step never comes here
    sharded, everything = cast("ShardedStep | None", optimizer._sharded), optimizer._everything()
    devices = {job.parameter.device for job in jobs}
    devices |= {job.parameter.device for group in adam for job in group}
    if sharded is not None:
        devices.add(sharded.device)
        if refuse_whole_step(optimizer, plan, sharded):
            return plan
    if not (jobs or sharded) or not kernels_run_on(optimizer, devices):
        return plan
    from celo2 import kernel_step

    device = next(iter(devices))
    ns_dtype = NS_DTYPES[optimizer.ns_dtype] or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    taken = []
    for job in jobs:
        group, parameter = optimizer.param_groups[job.group], everything[job.position]
        kernel_job = kernel_step.LearnedJob(
            job.group,
            parameter,
            job.state,
            group_view(group),
            job.position,
            job.theta,
            group["orthogonalize"],
            group["ns_steps"],
            group["max_grad_norm"],
        )
        reason = kernel_step.refusal(kernel_job)
        if reason is None:
            taken.append(kernel_job)
        else:
            plan.refused[parameter] = reason
    plan.adam = [[everything[job.position] for job in group] for group in adam]
    if sharded is not None:
        parameters = [parameter for group in plan.adam for parameter in group if is_dtensor(parameter)]
        plan.shards = {optimizer._position(p) for p in parameters if placing_of(p) is not None}
    # an inference tensor could not be written in a later step outside of inference mode
    with torch.inference_mode(False):
        if sharded is not None:
            from celo2.sharded_kernel_step import ShardedKernelStep

            plan.step = ShardedKernelStep(sharded, taken, optimizer.param_groups, ns_dtype, skipped)
        elif taken:
            plan.step = kernel_step.KernelStep(taken, len(optimizer.param_groups), device, ns_dtype, skipped)
        if plan.step is not None:
            plan.step.compile()
    if plan.step is not None:
        plan.skipped = plan.step.skipped
        plan.rounding = kernel_step.round_on_device
    return plan


def refuse_whole_step(optimizer: FusedCelo2, plan: KernelPlan, sharded: ShardedStep) -> bool:
    """Whether PyTorch must step all parameters: ranks exchange sums of all sharded ones, so they go one way."""
    reason = optimizer._shards_refused
    if reason is None:
        from celo2.kernel_step import refused_limit

        limits = [optimizer.param_groups[member.job.group]["max_grad_norm"] for member in sharded.members]
        reason = next((refusal for limit in limits if (refusal := refused_limit(limit)) is not None), None)
    if reason is not None and kernels_run_on(optimizer, {sharded.device}):
        plan.refused = {member.job.parameter: reason for member in sharded.members}
    return reason is not None


def kernels_run_on(optimizer: FusedCelo2, devices: set[torch.device]) -> bool:
    """Whether the kernels step parameters on these devices; raises ValueError where they must and cannot."""
    automatic = optimizer.backend == "auto"
    if optimizer.backend == "torch" or (
        automatic and (len(devices) != 1 or next(iter(devices)).type != "cuda" or not triton_is_installed())
    ):
        return False
    from celo2 import kernel_step

    if len(devices) > 1:
        raise ValueError(f"backend='triton': parameters on several devices ({devices}); use backend='auto'")
    device = next(iter(devices))
    if device.type == "cuda" and kernel_step.interpreted():
        if automatic:
            return False
        raise ValueError(
            f"backend='triton' with parameters on {device}: TRITON_INTERPRET is set, and the interpreter reads the "
            "host's memory; unset it, or use backend='torch'"
        )
    if device.type != "cuda" and not kernel_step.interpreted():
        raise ValueError(
            f"backend='triton' with parameters on {device}: the kernels run on GPUs; set "
            "TRITON_INTERPRET=1 before Python starts to interpret them, or use backend='auto'"
        )
    if device.type != "cuda" and (fault := kernel_step.interpreter_fault()) is not None:
        raise ValueError(f"backend='triton' with parameters on {device}: {fault}; or use backend='auto'")
    return True


def step_with_kernels(optimizer: FusedCelo2) -> None:
    """Step all parameters by the plan that `take_kernels` has made."""
    plan = optimizer._kernels
    assert plan is not None and plan.step is not None
    step = plan.step
    rest: list[MatrixJob] = []
    rest_vectors: list[VectorJob] = []
    if plan.refused:
        learned, vectors, _ = optimizer._collect()
        refused = {optimizer._position(parameter) for parameter in plan.refused}
        rest = [job for job in learned if job.position in refused]
        rest_vectors = [job for job in vectors if job.position in refused]
    adam = [[adamw_job(optimizer, p) for p in parameters if p.grad is not None] for parameters in plan.adam]
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)

    def step_adam() -> None:
        for index, jobs in enumerate(adam):
            group = optimizer.param_groups[index]
            # a factor that is known to be 1 saves the scaled copies
            scaled = grad_scale is not None or group["max_grad_norm"] is not None
            scale = step.control[1 + index, 0] if scaled else 1.0
            step_adamw(jobs, group, scale, found_inf=step.skip, rounding=plan.rounding)

    others = [job.gradient for jobs in adam for job in jobs if job.position not in plan.shards]
    others += [job.matrices.g for job in rest] + [job.gradient for job in rest_vectors]
    if optimizer._sharded is not None:
        from celo2.sharded_kernel_step import ShardedKernelStep

        assert isinstance(step, ShardedKernelStep)
        shards = [job.gradient for jobs in adam for job in jobs if job.position in plan.shards]
        grad_scale, found_inf = (None if x is None else local(x) for x in (grad_scale, found_inf))
        step.run_sharded(optimizer.param_groups, others, shards, grad_scale, found_inf, step_adam)
    else:
        step.run(optimizer.param_groups, others, grad_scale, found_inf)
        step_adam()
    # the plan's own is overwritten by the next step
    optimizer._grad_norm = step.grad_norm.clone()
    optimizer._skips.look(step.skipped, scaled=grad_scale is not None)
    if (rest or rest_vectors) and not float(step.skip):
        scales = step.control[1:, 0].tolist()
        for job in rest:
            moments = gradient_moments(job.matrices.g, optimizer._workspace(job.parameter))
            optimizer._step_matrices(job, moments, scales[job.group])
        for vector in rest_vectors:
            optimizer._step_vector(vector, scales[vector.group])


def adamw_job(optimizer: FusedCelo2, parameter: Tensor) -> AdamWJob:
    """Return this rank's part of a parameter of the AdamW side."""
    gradient, state, position = parameter.grad, optimizer.state[parameter], optimizer._position(parameter)
    assert gradient is not None
    if is_dtensor(parameter):
        parameter, gradient = local(parameter), local(gradient)
        state = {key: local(value) for key, value in state.items()}
    return AdamWJob(parameter, gradient, state, position)
