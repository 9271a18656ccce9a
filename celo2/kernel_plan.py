"""Which parameters of an optimizer the kernels step, and a step through them.

A plan is made for each set of parameters that have gradients, and the last few are kept: where other gradients come in
every step, as with layers that are skipped or experts, none is made twice. They share the scratch memory and the count
of skipped steps. A CUDA graph that captured a step goes on reading its plan's tables: when a parameter or its state has
moved, or steps with `KEPT` other sets came in between, it must be captured again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from celo2.adamw import AdamWJob, round_on_host, step_adamw
from celo2.groups import group_view
from celo2.jobs import MatrixJob, VectorJob
from celo2.phases import gradient_moments
from celo2.scratch import Scratch, padded
from celo2.state import is_dtensor, local, placing_of

if TYPE_CHECKING:
    from celo2.kernel_step import KernelStep
    from celo2.optimizer import FusedCelo2
    from celo2.sharded_step import ShardedStep

NS_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
# plans of an optimizer, each with about 600 bytes a matrix of its own, and 12 a tile or chunk
KEPT = 8


class Signature(NamedTuple):
    """What a plan depends on; gradients may move, unless their alignment changes.

    Of each parameter with a gradient `memory` is where it is and its state, and `gradients` what its gradient is like.
    """

    options: list[object]
    memory: list[object]
    gradients: list[object]

    def contradicts(self, other: Signature) -> bool:
        """Whether a parameter that has a gradient in both, or its state, is not where it was."""
        pairs = zip(self.memory, other.memory, strict=False)
        return any(a is not None and b is not None and a != b for a, b in pairs)


class Shared:
    """What the plans of an optimizer have in common, and those that are kept, the last one that was taken first."""

    def __init__(self) -> None:
        self.plans: list[KernelPlan] = []
        self.scratch: Scratch | None = None
        self.skipped: Tensor | None = None  # skipped steps counted on the device, int64 [1]
        self._counted = 0  # how many of them the groups have already

    def take_skipped(self) -> int:
        """Return how many steps were skipped since this was last asked for; waits for the device."""
        if self.skipped is None:
            return 0
        before, self._counted = self._counted, int(self.skipped)
        return self._counted - before

    def move(self, device: torch.device) -> None:
        """Leave memory on other devices; what was counted there must be taken before."""
        if self.scratch is None or self.scratch.device != device:
            self.scratch = Scratch(device)
        if self.skipped is not None and self.skipped.device != device:
            self.skipped, self._counted = None, 0

    def find(self, signature: Signature) -> KernelPlan | None:
        """Return the plan for a signature, which is then the last one taken."""
        for index, plan in enumerate(self.plans):
            if plan.signature == signature:
                self.plans.insert(0, self.plans.pop(index))
                return plan
        return None

    def keep(self, plan: KernelPlan) -> None:
        """Add a new plan, and let go those that keep memory which is no parameter's any more, or were not taken."""
        signature = plan.signature
        kept = [old for old in self.plans if old.signature != signature and not old.signature.contradicts(signature)]
        self.plans = [plan, *kept[: KEPT - 1]]


class KernelPlan:
    """What the kernels step and what is left, wherever `signature` holds."""

    def __init__(self, signature: Signature, shared: Shared) -> None:
        self.signature, self.shared = signature, shared
        self.step: KernelStep | None = None  # None: nothing goes through the kernels
        self.refused: dict[Tensor, str] = {}  # learned parameters that PyTorch steps, and why
        self.adam: list[list[Tensor]] = []
        self.shards: set[int] = set()  # positions of the sharded ones among them
        self.rounding = round_on_host


def triton_is_installed() -> bool:
    """Whether the kernels can be imported."""
    return importlib.util.find_spec("triton") is not None


def take_kernels(optimizer: FusedCelo2) -> bool:
    """Whether this step goes through the kernels, and for which parameters: by a plan that was kept or a new one."""
    if optimizer.backend == "torch":
        return False
    signature, plan = signature_of(optimizer), optimizer._kernels
    if plan is None or plan.signature != signature:
        shared = Shared() if plan is None else plan.shared
        plan = shared.find(signature)
        if plan is None:
            plan = plan_kernels(optimizer, signature, shared)
            shared.keep(plan)
        optimizer._kernels = plan
    return plan.step is not None


def signature_of(optimizer: FusedCelo2) -> Signature:
    """Describe the present parameters, their state and gradients, and the options of their groups."""
    signature = Signature([], [], [])
    for group in optimizer.param_groups:
        options = ("weights", "orthogonalize", "ns_steps", "max_grad_norm", "state_dtype")
        signature.options.extend(group[key] for key in (*options, "split", "heads", "axis", "flatten"))
        for parameter in group["params"]:
            gradient, placements = parameter.grad, None
            if gradient is None or gradient.layout != torch.strided:
                signature.memory.append(None)
                signature.gradients.append(None if gradient is None else gradient.layout)
                continue
            values: Iterable[Tensor] = optimizer.state[parameter].values()
            if is_dtensor(parameter):
                placements = getattr(gradient, "placements", None)
                parameter, gradient, values = local(parameter), local(gradient), map(local, values)
            addresses = [value.data_ptr() for value in values]
            signature.memory.append(
                (parameter.data_ptr(), parameter.device, parameter.dtype, parameter.stride(), addresses)
            )
            signature.gradients.append((gradient.dtype, gradient.stride(), gradient.data_ptr() % 16, placements))
    return signature


def plan_kernels(optimizer: FusedCelo2, signature: Signature, shared: Shared) -> KernelPlan:
    """Plan for what `signature` describes. Raises as `kernels_run_on`."""
    plan = KernelPlan(signature, shared)
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
    if shared.skipped is not None and shared.skipped.device != device:
        optimizer._count_skipped()
    shared.move(device)
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
    most = most_directions(optimizer, ns_dtype)
    memory = shared.skipped, shared.scratch, most
    with torch.inference_mode(False):
        if sharded is not None:
            from celo2.sharded_kernel_step import ShardedKernelStep

            plan.step = ShardedKernelStep(sharded, taken, optimizer.param_groups, ns_dtype, *memory)
        elif taken:
            plan.step = kernel_step.KernelStep(taken, len(optimizer.param_groups), device, ns_dtype, *memory)
        if plan.step is not None:
            plan.step.compile()
    if plan.step is not None:
        shared.skipped = plan.step.skipped
        plan.rounding = kernel_step.round_on_device
    return plan


def most_directions(optimizer: FusedCelo2, ns_dtype: torch.dtype) -> dict[torch.dtype, int]:
    """Elements of the directions, by dtype, of all whole matrices: what a plan with more gradients could ask for."""
    most: dict[torch.dtype, int] = {}
    for group in optimizer.param_groups:
        dtype = ns_dtype if group["orthogonalize"] else torch.float32
        for parameter in group["params"]:
            is_sharded = is_dtensor(parameter) and placing_of(parameter) is not None
            is_taken = parameter.requires_grad and parameter.ndim > 1 and parameter.dtype != torch.float64
            if is_taken and not is_sharded and optimizer.rule_of(parameter) == "celo2":
                most[dtype] = most.get(dtype, 0) + padded(parameter.numel())
    return most


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
