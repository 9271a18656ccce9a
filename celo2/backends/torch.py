"""The phases of a step in PyTorch, a block of a matrix at a time (`celo2.phases`).

Whole parameters take phases 2 to 4 one after another, in one scratch memory. Those that are divided among ranks are
slices of matrices: each phase goes over all of them, and leaves its sums in the messages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from celo2 import reference
from celo2.backends.compiled import CompiledSteps, Member, kind, takes
from celo2.backends.slices import Memory, Slices, vector_state, write_vector_state
from celo2.comm import Comm
from celo2.norms import foreach_norm, global_norm
from celo2.phases import (
    GradientMoments,
    Matrices,
    MatrixStep,
    apply_update,
    gradient_moments,
    normalise_direction,
    within_clip,
)
from celo2.plan import HEADER, Plan, Slot
from celo2.state import MOMENTUM_KEYS, read_momenta, write_momenta
from celo2.step import Inputs, Messages
from celo2.stochastic_rounding import mix64, round_stochastically_, rounding_seed


def matrices_of(slot: Slot) -> Matrices:
    """View a whole parameter, its gradient and its state as batches of matrices; only the gradient may be copied."""
    parameter, gradient, state, view = slot.shard, slot.gradient, slot.state, slot.view
    order = view.order(parameter)
    try:
        if order is None and view.order(gradient) is not None:
            raise ValueError("its columns lie in another order")
        g = view.matrices(gradient, order)
    except ValueError:
        copy = gradient.contiguous() if order is None else torch.empty_like(parameter, dtype=gradient.dtype)
        g = view.matrices(copy if order is None else copy.copy_(gradient), order)
    fast, medium, slow = (view.matrices(state[name]) for name in MOMENTUM_KEYS)
    factors = [view.factors(state[name], g.shape[0]) for name in ("row_factor", "column_factor")]
    v = view.matrices(state["second_moment"])
    return Matrices(view.matrices(parameter), g, (fast, medium, slow), v, *factors)


class TorchBackend:
    """One step in PyTorch of the entries of `plan` (None: there are none) and of `whole` slots.

    With `compiled` those of the whole that can be go through C++ (`celo2.backends.compiled`).
    Raises ValueError, with its name, for a parameter that is no batch of matrices in memory.
    """

    def __init__(
        self,
        plan: Plan | None,
        whole: Sequence[Slot],
        memory: Memory,
        device: torch.device,
        *,
        compiled: bool = False,
    ) -> None:
        self.plan, self.memory, self.device = plan, memory, device
        self.vectors = [slot for slot in whole if slot.is_vector]
        self.matrices: list[tuple[Slot, Matrices]] = []
        members: dict[tuple[object, ...], list[Member]] = {}
        for slot in whole:
            if not slot.is_vector:
                try:
                    matrices = matrices_of(slot)
                except ValueError as error:
                    raise ValueError(f"{slot.name}: {error}") from error
                theta = memory.folded(slot)
                if compiled and takes(matrices, theta):
                    members.setdefault(kind(slot, matrices, theta), []).append(Member(slot, matrices, theta))
                else:
                    self.matrices.append((slot, matrices))
        self.compiled = [CompiledSteps(some, memory.workspace(some[0].slot)) for some in members.values()]
        self.moments: list[GradientMoments] = []
        self.slices = None if plan is None else Slices(plan, memory)
        self.norm = math.nan
        self.scales: Sequence[float] = ()
        self.clip = False

    # what the step is given and decides

    def begin(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.inverse_scale = 1.0 if inputs.grad_scale is None else 1.0 / float(inputs.grad_scale)
        self.found = inputs.found_inf is not None and float(inputs.found_inf) != 0
        self.scales = [1.0] * len(inputs.groups)
        lengths, sizes, dtype = (0, 0, 0), (0, 0), torch.float32
        if self.plan is not None:
            lengths = self.plan.lengths if self.plan.shares_directions else (*self.plan.lengths[:2], 0)
            sizes = sum(self.plan.part_counts), sum(self.plan.receive_counts)
            dtype = self.plan.comm_dtype
        sums = [torch.zeros(length, dtype=torch.float32, device=self.device) for length in lengths]
        # every rank sends all parts; those without gradients come back to nobody
        self.messages = Messages(*sums, *(torch.zeros(size, dtype=dtype, device=self.device) for size in sizes))
        if self.slices is not None:
            self.slices.messages, self.slices.scales = self.messages, self.scales

    def decide(self, comm: Comm) -> bool:
        norm = self.whole_norm
        if self.plan is None:
            finite = math.isfinite(norm * self.inverse_scale) and not self.found
        else:
            message = self.messages.gradients
            comm.note_flags(message[HEADER : HEADER + len(self.plan.entries)])
            comm.check_flags()
            square = float(message[0]) + norm**2
            norm = math.sqrt(square) if square >= 0 else math.nan
            finite = math.isfinite(float(message[0])) and float(message[1]) == 0
        self.norm = norm * self.inverse_scale
        if not finite:
            return False
        self.scales = []
        for group in self.inputs.groups:
            limit = group["max_grad_norm"]
            self.scales.append(self.inverse_scale * (1.0 if limit is None else min(1.0, limit / (self.norm + 1e-6))))
        # a global norm of at most 1000 rules out an element above the clip
        self.clip = norm * max(self.scales, default=0.0) > reference.GRADIENT_CLIP
        if self.slices is not None:
            self.slices.scales, self.slices.clip = self.scales, self.clip
        return True

    def must_clip(self) -> bool:
        return self.plan is not None and self.clip

    # phase 1

    def gradient_moments(self, *, clipped: bool = False) -> None:
        message = self.messages.gradients
        if clipped:
            message.zero_()
        else:
            totals = self._whole_moments()
            matrices = [*(member.matrices for steps in self.compiled for member in steps.members)]
            matrices += [m for _, m in self.matrices]
            self.whole_norm = global_norm(totals, [*(m.g for m in matrices), *self.inputs.whole])
        if self.slices is None:
            return
        self.slices.gradient_moments(clipped=clipped)
        if not clipped:
            square = self.slices.square + sum(float(norm) ** 2 for norm in foreach_norm(self.inputs.shards))
            # what is not sharded may differ between ranks: all must skip when one has to
            message[0], message[1] = square, float(self.found or not math.isfinite(self.whole_norm))
            for index in self.slices.sliced:
                message[HEADER + index] = 1.0

    # divided parameters

    def feature_moments(self) -> None:
        if self.slices is not None:
            self.slices.feature_moments()

    def learned_update(self) -> None:
        if self.slices is not None:
            self.slices.learned_update()

    def orthogonalize(self, comm: Comm) -> None:
        assert self.slices is not None
        self.slices.orthogonalize(comm)

    def apply(self) -> None:
        if self.slices is not None:
            self.slices.apply(self.inputs.groups)

    # whole parameters

    def step_alone(self, inputs: Inputs, scales: Sequence[float]) -> None:
        """Step the whole slots, whose gradients are to be multiplied by `scales` of their groups."""
        self.inputs, self.scales = inputs, scales
        self._whole_moments()
        self.step_whole()

    def _whole_moments(self) -> list[float]:
        """Phase 1 of whole matrices; returns their sums of g^2, those that go through C++ first."""
        totals = [total for steps in self.compiled for total in steps.gradient_moments()]
        self.moments = [gradient_moments(m.g, self.memory.workspace(slot)) for slot, m in self.matrices]
        return [*totals, *(moment.total for moment in self.moments)]

    def step_whole(self) -> None:
        for steps in self.compiled:
            steps.step(self.inputs.groups, self.scales)
        for (slot, matrices), moments in zip(self.matrices, self.moments, strict=True):
            self._step_matrices(slot, matrices, moments)
        for slot in self.vectors:
            self._step_vector(slot)

    def _step_matrices(self, slot: Slot, matrices: Matrices, moments: GradientMoments) -> None:
        group, state, workspace = self.inputs.groups[slot.group], slot.state, self.memory.workspace(slot)
        scale = self.scales[slot.group]
        # a sum of squares of at most 1e6 rules out an element above the clip of 1000
        clip = not within_clip(moments.total, scale)
        if clip:
            moments = gradient_moments(matrices.g, workspace, scale=scale, clip=True)
        seed = mix64(mix64(slot.position) ^ int(state["step"]))
        values = None
        if "momentum_scale" in state:
            values = read_momenta(state, slot.view)
            fast, medium, slow = (slot.view.matrices(value) for value in values)
            matrices = dataclasses.replace(matrices, momenta=(fast, medium, slow))
        step = MatrixStep(matrices, moments, self.memory.folded(slot), workspace, scale=scale, clip=clip, seed=seed)
        direction = step.learned_update(step.feature_scales())
        step.commit_factors()
        if values is not None:
            write_momenta(state, slot.view, values, seed)
        direction, rms_scale = normalise_direction(
            direction, step.moves, orthogonalize=slot.orthogonalize, ns_steps=slot.ns_steps
        )
        options = {"lr": float(group["lr"]), "weight_decay": group["weight_decay"]}
        state["step"] += 1
        if matrices.p.dtype == workspace.dtype:
            apply_update(matrices.p, direction, rms_scale, **options)
        else:
            wide = matrices.p.to(workspace.dtype)
            apply_update(wide, direction, rms_scale, **options)
            round_stochastically_(matrices.p, wide, _rounding_seed(slot))

    def _step_vector(self, slot: Slot) -> None:
        group, state, parameter = self.inputs.groups[slot.group], slot.state, slot.shard
        wide = parameter.reshape(-1).to(slot.compute_dtype)
        gradient = slot.gradient.reshape(-1).to(wide.dtype) * self.scales[slot.group]
        old = vector_state(state, wide.dtype)
        update, new = reference.vector_update(self.memory.unfolded(slot), wide, gradient, old)
        write_vector_state(state, new, mix64(mix64(slot.position) ^ int(state["step"])))
        state["factor"].copy_(new.factor)
        state["step"] += 1
        wide = wide - float(group["lr"]) * (update + group["weight_decay"] * wide)
        round_stochastically_(parameter, wide.view(parameter.shape), _rounding_seed(slot))


def _rounding_seed(slot: Slot) -> int:
    """Seed of a parameter's stochastic rounding: its position and its step, so that a resumed run replays it."""
    return rounding_seed(slot.position, int(slot.states["step"])) if slot.parameter.dtype == torch.bfloat16 else 0
