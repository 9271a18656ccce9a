"""The parameters of an optimizer: where each is, how its step is divided among ranks, and its state."""

from __future__ import annotations

import weakref
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from celo2.groups import group_view, named_parameters
from celo2.plan import Slot
from celo2.state import LazyStates, check_state, create_state, is_dtensor, shard_spec_of
from celo2.theta import Theta

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from celo2.sharding import ShardSpec


class Host(Protocol):
    """What of an optimizer is read here and by `celo2.planner`: `FusedCelo2`."""

    param_groups: list[dict[str, Any]]
    state: Any
    backend: str
    ns_dtype: str
    comm_dtype: str
    ns_over_replicas: bool
    ranks_per_node: int | None
    zero1_mesh: DeviceMesh | None

    def theta_of(self, weights: Any) -> Theta: ...


class Place(NamedTuple):
    """Where a parameter is, and the rule of its group; `position` is its number among all."""

    group: int
    name: str
    rule: str
    position: int


class Parameters:
    """The index of an optimizer's parameters; `forget` when groups or parameters have changed."""

    def __init__(self, host: Host) -> None:
        # a proxy: the memory of an optimizer is free when its last user lets go
        self.host: Host = weakref.proxy(host)
        self._places: dict[Tensor, Place] = {}
        # whose state was made last, and which of them want gradients
        self._known: list[Tensor] = []
        self._wanted: list[bool] = []
        self._made = 0

    def forget(self) -> None:
        self._places = {}

    def place(self, parameter: Tensor) -> Place | None:
        """Return where a parameter is among the groups and which rule that gives it; None for somebody else's."""
        if not self._places:
            position = 0
            for index, group in enumerate(self.host.param_groups):
                for name, member in named_parameters(group):
                    self._places[member] = Place(index, name, group["rule"], position)
                    position += 1
        return self._places.get(parameter)

    def is_divided(self, parameter: Tensor, rule: str) -> bool:
        """Whether the step of a whole parameter is divided among replicas (ZeRO-1)."""
        mesh = self.host.zero1_mesh
        return mesh is not None and rule == "celo2" and parameter.ndim > 1 and parameter.numel() > 0

    def spec_of(self, parameter: Tensor, rule: str) -> ShardSpec | None:
        """Return how the step of a parameter is divided among ranks, None when each takes it whole."""
        if is_dtensor(parameter):
            return shard_spec_of(parameter)
        if not self.is_divided(parameter, rule):
            return None
        from celo2.zero1 import spec_on

        assert self.host.zero1_mesh is not None
        return spec_on(self.host.zero1_mesh)

    def slot(self, parameter: Tensor, spec: ShardSpec | None) -> Slot:
        """Return a parameter as a step takes it, with the present options of its group."""
        place = self.place(parameter)
        assert place is not None
        group = self.host.param_groups[place.group]
        return Slot(
            place.name,
            place.group,
            place.position,
            parameter,
            self.host.state[parameter],
            group_view(group),
            self.host.theta_of(group["weights"]),
            bool(group["orthogonalize"]) and parameter.ndim > 1,
            group["ns_steps"],
            group,
            spec,
        )

    # state

    def check_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Raise ValueError for a parameter of a group whose state could not be made."""
        rule, view, dtype = group["rule"], group_view(group), group["state_dtype"]
        if self.host.zero1_mesh is not None:
            from celo2 import zero1

            zero1.check_parameter(parameter, self.host.zero1_mesh)
            if self.is_divided(parameter, rule):
                zero1.check_order(parameter, view)
        check_state(parameter, rule, view, dtype)

    def new_state(self, parameter: Tensor) -> dict[str, Tensor] | None:
        """Return the state of a parameter before its first step; None for somebody else's. Raises as `check_state`."""
        place = self.place(parameter)
        if place is None:
            return None
        group = self.host.param_groups[place.group]
        self.check_state(parameter, group)
        like = parameter
        if self.is_divided(parameter, place.rule):
            from celo2.zero1 import sharded_like

            assert self.host.zero1_mesh is not None
            like = sharded_like(parameter, self.host.zero1_mesh)
        # an inference tensor could not be written in a later step outside of inference mode
        with torch.inference_mode(False):
            return create_state(like, place.rule, group_view(group), group["state_dtype"])

    def lazy_states(self, states: Any) -> LazyStates:
        """Return `states` as a dict that makes the state of a parameter when it is first asked for."""
        this = weakref.ref(self)

        def make(parameter: Tensor) -> dict[str, Tensor] | None:
            parameters = this()
            return None if parameters is None else parameters.new_state(parameter)

        return LazyStates(make, states)

    def changed(self) -> bool:
        """Whether the groups have other parameters than when this was last asked: a wrapper may replace them."""
        known = [parameter for group in self.host.param_groups for parameter in group["params"]]
        wanted = [parameter.requires_grad for parameter in known]
        same = len(known) == len(self._known) and all(map(is_, known, self._known)) and wanted == self._wanted
        self._known, self._wanted = known, wanted
        return not same

    def make_states(self, changed: bool) -> None:
        """Make the state that is missing, and let go that of parameters which are gone.

        Also where no gradient comes, so that every rank has the same keys; not where none is wanted.
        """
        if not changed and len(self.host.state) == self._made:
            return
        for parameter in [parameter for parameter in self.host.state if self.place(parameter) is None]:
            del self.host.state[parameter]
        for group in self.host.param_groups:
            for name, parameter in named_parameters(group):
                if parameter.requires_grad and not self.host.state.get(parameter):
                    self.host.state.pop(parameter, None)
                    try:
                        self.host.state[parameter]  # makes it
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from error
        self._made = len(self.host.state)
