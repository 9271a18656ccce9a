"""Which parameters the kernels step, and the backends that were made for sets of parameters with gradients.

A backend is made for each set of parameters that have gradients, and the last few are kept: where other gradients come
in every step, as with layers that are skipped or experts, none is made twice. They share the scratch memory and the
count of skipped steps. A CUDA graph that captured a step goes on reading its backend's tables: when a parameter or its
state has moved, or steps with `KEPT` other sets came in between, it must be captured again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from celo2.plan import Plan, Slot
from celo2.scratch import Scratch, padded
from celo2.state import is_dtensor, local

if TYPE_CHECKING:
    from celo2.backends.triton import TritonBackend

NS_DTYPES = {"auto": None, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# backends of an optimizer, each with about 600 bytes a matrix of its own, and 12 a tile or chunk
KEPT = 8
# of a group, that decide what its parameters' kernels are
OPTIONS = ("weights", "orthogonalize", "ns_steps", "max_grad_norm", "state_dtype", "split", "heads", "axis", "flatten")


class Signature(NamedTuple):
    """What a backend depends on; gradients may move, unless their alignment changes.

    Of each parameter with a gradient `memory` is where it is and its state, and `gradients` what its gradient is like.
    """

    options: list[object]
    memory: list[object]
    gradients: list[object]

    @classmethod
    def of(cls, groups: Iterable[dict[str, Any]], states: Any, *, zero1: bool) -> Signature:
        """Describe the present parameters, their state and gradients, and the options of their groups."""
        signature = cls([], [], [])
        for group in groups:
            signature.options.extend(group[key] for key in OPTIONS)
            for parameter in group["params"]:
                gradient, placements = parameter.grad, None
                if gradient is None or gradient.layout != torch.strided:
                    signature.memory.append(None)
                    signature.gradients.append(None if gradient is None else gradient.layout)
                    continue
                values: Iterable[Tensor] = states[parameter].values()
                if is_dtensor(parameter):
                    placements = getattr(gradient, "placements", None)
                    parameter, gradient = local(parameter), local(gradient)
                if zero1 or placements is not None:
                    values = map(local, values)
                addresses = [value.data_ptr() for value in values]
                signature.memory.append(
                    (parameter.data_ptr(), parameter.device, parameter.dtype, parameter.stride(), addresses)
                )
                signature.gradients.append((gradient.dtype, gradient.stride(), gradient.data_ptr() % 16, placements))
        return signature

    def contradicts(self, other: Signature) -> bool:
        """Whether a parameter that has a gradient in both, or its state, is not where it was."""
        pairs = zip(self.memory, other.memory, strict=False)
        return any(a is not None and b is not None and a != b for a, b in pairs)


class Watch:
    """Finds out whether a plan still holds, in about half a microsecond a parameter: what `Signature` describes.

    State tensors are compared by identity and by the address of one of each parameter's, gradients by the alignment of
    their address, and by strides and dtype unless they are the same objects where they were.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], states: dict[Tensor, dict[str, Tensor]]) -> None:
        self._groups, self._states = groups, states
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        # local tensors are asked for where there are some: it costs as much as the rest
        self._locals = _locals if any(is_dtensor(parameter) for parameter in self._parameters) else _as_they_are
        self._dicts = list(states.values())
        self._values = list(chain.from_iterable(map(dict.values, self._dicts)))
        self._marks = [next(reversed(state.values())) for state in self._dicts if state]
        gradients = self._gradients()
        addresses, self._seen = self._look(gradients)
        self._same = list(map(id, gradients)), addresses
        self._forms = _forms(gradients)

    def unchanged(self) -> bool:
        """Whether nothing is seen to have changed since this was made; in doubt it is False."""
        states = self._states
        if len(states) != len(self._dicts) or not all(map(is_, states.values(), self._dicts)):
            return False
        if not all(map(is_, chain.from_iterable(map(dict.values, self._dicts)), self._values)):
            return False
        gradients = self._gradients()
        addresses, seen = self._look(gradients)
        if seen != self._seen:
            return False
        same = list(map(id, gradients)), addresses
        if same != self._same:
            self._same = same
            return _forms(gradients) == self._forms
        return True

    def _gradients(self) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self._parameters]
        self._missing = [gradient is None for gradient in gradients]
        return self._locals([gradient for gradient in gradients if gradient is not None])

    def _look(self, gradients: list[Tensor]) -> tuple[list[int], list[list[Any]]]:
        """Addresses of the gradients, and what must not change."""
        try:
            addresses = [gradient.data_ptr() for gradient in gradients]
        except RuntimeError:  # a sparse one has none
            return [], [[object()]]
        return addresses, [
            self._missing,
            [address & 15 for address in addresses],
            [parameter.data_ptr() for parameter in self._locals(self._parameters)],
            [mark.data_ptr() for mark in self._locals(self._marks)],
            [group[key] for group in self._groups for key in OPTIONS],
        ]


def _forms(gradients: list[Tensor]) -> list[Any]:
    if any(gradient.layout != torch.strided for gradient in gradients):
        return [object()]
    return [[gradient.stride() for gradient in gradients], [gradient.dtype for gradient in gradients]]


def _as_they_are(tensors: list[Tensor]) -> list[Tensor]:
    return tensors


def _locals(tensors: list[Tensor]) -> list[Tensor]:
    """The local parts of DTensors without new views of them, and other tensors."""
    return [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]


class KernelPlan:
    """What the kernels step and what is left, wherever `signature` holds."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.backend: TritonBackend | None = None  # None: nothing goes through the kernels
        self.refused: dict[Tensor, str] = {}  # parameters of the learned rule that PyTorch steps, and why
        self.vectors: list[Slot] = []  # whole ones that the kernels step
        self.adam: list[list[Slot]] = []


class KernelPlans:
    """The plans of an optimizer that are kept, the last one that was taken first, and what they share."""

    def __init__(self) -> None:
        self.kept: list[KernelPlan] = []
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
        for index, plan in enumerate(self.kept):
            if plan.signature == signature:
                self.kept.insert(0, self.kept.pop(index))
                return plan
        return None

    def keep(self, plan: KernelPlan) -> None:
        """Add a new plan, and let go those that keep memory which is no parameter's any more, or were not taken."""
        signature = plan.signature
        kept = [old for old in self.kept if old.signature != signature and not old.signature.contradicts(signature)]
        self.kept = [plan, *kept[: KEPT - 1]]

    def make_backend(
        self,
        plan: KernelPlan,
        slots: Sequence[Slot],
        groups: int,
        device: torch.device,
        ns_dtype: str,
        ranks_plan: Plan | None,
        most: Sequence[tuple[bool, int]],
    ) -> None:
        """Give a plan its backend, for the whole slots that the kernels take and the entries of `ranks_plan`.

        `most` has the elements of every whole matrix that may come to have a gradient, and whether it is
        orthogonalised.
        """
        from celo2.backends.parts import unsupported_reason
        from celo2.backends.triton import TritonBackend

        self.move(device)
        dtype = NS_DTYPES[ns_dtype] or (torch.float16 if device.type == "cuda" else torch.float32)
        taken = []
        for slot in slots:
            reason = unsupported_reason(slot)
            if reason is None:
                taken.append(slot)
            else:
                plan.refused[slot.parameter] = reason
        if not taken and ranks_plan is None:
            return
        directions: dict[torch.dtype, int] = {}
        for orthogonalize, size in most:
            of = dtype if orthogonalize else torch.float32
            directions[of] = directions.get(of, 0) + padded(size)
        # an inference tensor could not be written in a later step outside of inference mode
        with torch.inference_mode(False):
            plan.backend = TritonBackend(
                taken,
                groups,
                device,
                dtype,
                plan=ranks_plan,
                skipped=self.skipped,
                scratch=self.scratch,
                most=directions,
            )
            plan.backend.compile()
        plan.vectors = [slot for slot in taken if slot.is_vector]
        self.skipped = plan.backend.skipped


def triton_is_installed() -> bool:
    """Whether the kernels can be imported."""
    return importlib.util.find_spec("triton") is not None


def kernels_run_on(devices: set[torch.device], backend: str) -> bool:
    """Whether the kernels step parameters on these devices; raises ValueError where `backend` asks what they cannot."""
    automatic = backend == "auto"
    if backend == "torch" or (
        automatic and (len(devices) != 1 or next(iter(devices)).type != "cuda" or not triton_is_installed())
    ):
        return False
    from celo2.backends import parts

    if len(devices) > 1:
        raise ValueError(f"backend='triton': parameters on several devices ({devices}); use backend='auto'")
    device = next(iter(devices))
    if device.type == "cuda" and parts.interpreted():
        if automatic:
            return False
        raise ValueError(
            f"backend='triton' with parameters on {device}: TRITON_INTERPRET is set, and the interpreter reads the "
            "host's memory; unset it, or use backend='torch'"
        )
    if device.type != "cuda" and not parts.interpreted():
        raise ValueError(
            f"backend='triton' with parameters on {device}: the kernels run on GPUs; set "
            "TRITON_INTERPRET=1 before Python starts to interpret them, or use backend='auto'"
        )
    if device.type != "cuda" and (fault := parts.interpreter_fault()) is not None:
        raise ValueError(f"backend='triton' with parameters on {device}: {fault}; or use backend='auto'")
    return True
