"""What a step takes, from the groups and the state of an optimizer: which parameters, by which backend, with whom.

`Planner.step` collects the parameters that have gradients as slots, takes a backend for them, and runs `celo2.step`.
What loads `torch.distributed`, half of the time of `import celo2`, is imported inside of functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from celo2.adamw import AdamWJob, step_adamw
from celo2.backends.compiled import can_compile
from celo2.backends.slices import Memory
from celo2.backends.torch import TorchBackend
from celo2.comm import Local, Ranks
from celo2.groups import check_gradient, group_view, named_parameters
from celo2.kernel_plans import KernelPlan, KernelPlans, Signature, Watch, kernels_run_on
from celo2.parameters import Host, Parameters
from celo2.plan import Plan, Slot, resolved_comm_dtype
from celo2.skips import SkipWatch
from celo2.state import follow_parameter, is_dtensor, local, shard_spec_of
from celo2.step import Inputs, take_step

if TYPE_CHECKING:
    import torch.distributed as dist

    from celo2.backends.triton import TritonBackend
    from celo2.sharding import Team

# options of a group that all ranks must give alike: they decide what is exchanged, or what replicas become
COMPARED = (
    *("lr", "weight_decay", "adam_betas", "adam_eps", "max_grad_norm", "ns_steps", "orthogonalize"),
    *("rule", "state_dtype", "weights", "split", "heads", "axis", "flatten"),
)


@dataclass
class Collected:
    """What has gradients and this rank steps by itself: by the learned rule, and each group's AdamW side."""

    whole: list[Slot] = field(default_factory=list)
    adam: list[list[Slot]] = field(default_factory=list)


class Planner:
    """Plans of one optimizer, and what a step leaves; `forget` when its parameters or groups have changed."""

    def __init__(self, host: Host) -> None:
        self.parameters = Parameters(host)
        self.host = self.parameters.host
        self.grad_norm: Tensor | None = None
        self.skips = SkipWatch()
        self.memory = Memory()
        self.kernels: KernelPlan | None = None  # the last plan that was taken
        self._watch: Watch | None = None  # of what it depends on
        self.kernel_plans = KernelPlans()
        self.ranks: Ranks | None = None
        self._group: tuple[tuple[int, ...], dist.ProcessGroup] | None = None  # of which ranks; kept when plans go
        self._unsupported: str | None = None  # why the kernels do not take the sharded parameters

    def forget(self) -> None:
        """Let go of all plans: the groups have changed."""
        self.count_skipped()
        self.parameters.forget()
        self.kernels, self._watch, self.kernel_plans, self.ranks = None, None, KernelPlans(), None

    def follow_groups(self) -> None:
        """Go by the parameters that are in the groups now, and make their state. Raises as `Parameters.check_state`."""
        changed = self.parameters.changed()
        if changed:
            self.forget()
        self.parameters.make_states(changed)

    def count_skipped(self) -> None:
        """Add what the kernels have counted on the device to the groups."""
        skipped = self.kernel_plans.take_skipped()
        for group in self.host.param_groups:
            group["skipped_steps"] += skipped

    def check_flags(self) -> None:
        """Raise RuntimeError when ranks did not agree on the gradients of the last step."""
        if self.ranks is not None:
            self.ranks.check_flags()

    # what a step takes

    def collect(self) -> Collected:
        """Return what this rank steps by itself; raises, naming the parameter, for all that can be refused."""
        collected = Collected(adam=[[] for _ in self.host.param_groups])
        for index, group in enumerate(self.host.param_groups):
            view = group_view(group)
            group["weights"] = self.host.theta_of(group["weights"]).label
            for name, parameter in named_parameters(group):
                gradient, rule = parameter.grad, group["rule"]
                if gradient is None or parameter.numel() == 0:
                    continue
                check_gradient(name, parameter, gradient)
                state = self.host.state[parameter]
                try:
                    if self.parameters.is_divided(parameter, rule):
                        from celo2.zero1 import check_divided

                        check_divided(parameter, state, view)
                        continue
                    follow_parameter(state, parameter, rule, view, group["state_dtype"])
                    spec = None
                    if is_dtensor(parameter):
                        from celo2.sharding import same_placements

                        if not same_placements(parameter, gradient):
                            raise ValueError("its gradient is not placed on the mesh as the parameter is")
                        spec = shard_spec_of(parameter)
                    if rule == "adamw":
                        collected.adam[index].append(self.parameters.slot(parameter, spec))
                    elif spec is None:
                        collected.whole.append(self.parameters.slot(parameter, None))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        return collected

    # ranks

    def plan_ranks(self) -> Ranks:
        """Plan the parameters that ranks step together; collective.

        Raises ValueError for parameters on several meshes, RuntimeError when ranks have different ones.
        """
        from celo2.sharding import Team, agree

        mesh = self.host.zero1_mesh
        meshes = [] if mesh is None else [mesh]
        slots, device = [], self.host.param_groups[0]["params"][0].device
        for group in self.host.param_groups:
            for parameter in group["params"]:
                spec = self.parameters.spec_of(parameter, group["rule"]) if parameter.requires_grad else None
                if spec is None:
                    continue
                device = parameter.device
                if spec.mesh not in meshes:
                    meshes.append(spec.mesh)
                if group["rule"] == "celo2":
                    slots.append(self.parameters.slot(parameter, spec))
        team = Team(meshes)
        if self._group is None or self._group[0] != team.members:
            self._group = team.members, team.group()
        process_group = self._group[1]
        # a rank that clips makes a message more than one that does not
        options = [[_plain(group[key]) for key in COMPARED] for group in self.host.param_groups]
        agree(options, process_group, "an option of the parameter groups")
        comm_dtype = resolved_comm_dtype(self.host.comm_dtype, device)
        ranks_per_node = self._ranks_per_node(team, process_group, device)
        plan = Plan(slots, team, comm_dtype, self.host.ns_over_replicas, ranks_per_node)
        if plan.sharers > 1:
            # they decide how often ranks add up the matrices that they share
            settings = self.host.ns_dtype, plan.exact_products
            agree(settings, process_group, "ns_dtype or torch.get_float32_matmul_precision()")
        return Ranks(plan, process_group, device, mesh)

    def _ranks_per_node(self, team: Team, group: dist.ProcessGroup, device: torch.device) -> int:
        """Return how many ranks that follow each other are close; 1 where they differ in that by themselves."""
        from celo2.sharding import agree, gather

        given = self.host.ranks_per_node
        agree(given, group, "ranks_per_node")
        if given is None and device.type == "cpu":
            # on one machine they share its processors: nothing is gained
            return 1
        found = team.ranks_per_node(given)
        return found if len(set(gather(str(found), group))) == 1 else 1

    def _unsupported_shards(self, ranks: Ranks) -> str | None:
        """Return why the kernels of some rank do not take its shards, None when all do; collective."""
        from celo2.sharding import gather

        reason = None
        if not kernels_run_on({ranks.device}, self.host.backend):
            reason = f"backend={self.host.backend!r} on {ranks.device}"
        else:
            from celo2.backends.parts import unsupported_shard

            for entry in ranks.plan.entries:
                found = unsupported_shard(entry, ranks.plan.rank)
                reason = reason or (found and f"{entry.slot.name}: {found}")
        return next((other for other in gather(reason, ranks.group) if other is not None), None)

    def _take_ranks(self) -> Ranks | None:
        """Return the ranks that step together, planned at the first step; None for a process by itself."""
        if self.ranks is None:
            over = self.host.zero1_mesh
            parameters = [p for group in self.host.param_groups for p in group["params"]]
            if over is None and not any(is_dtensor(p) and shard_spec_of(p) is not None for p in parameters):
                return None
            self.collect()  # what can be refused is refused before any rank waits for another
            if over is not None:
                from celo2.zero1 import check_replicas

                named = [pair for group in self.host.param_groups for pair in named_parameters(group)]
                check_replicas(named, over)
            ranks = self.plan_ranks()
            self._unsupported = self._unsupported_shards(ranks)
            self.ranks = ranks
        self.ranks.check_flags()
        return self.ranks

    # kernels

    def take_kernels(self, ranks: Ranks | None) -> KernelPlan:
        """Return the plan of the kernels for the present gradients: one that was kept, or a new one."""
        plan = self.kernels
        if plan is not None and self._watch is not None and self._watch.unchanged():
            return plan
        zero1 = self.host.zero1_mesh is not None
        signature = Signature.of(self.host.param_groups, self.host.state, zero1=zero1)
        if plan is None or plan.signature != signature:
            plan = self.kernel_plans.find(signature)
            if plan is None:
                plan = self.plan_kernels(ranks)
                self.kernel_plans.keep(plan)
            self.kernels = plan
        self._watch = Watch(self.host.param_groups, self.host.state)
        return plan

    def plan_kernels(self, ranks: Ranks | None) -> KernelPlan:
        """Plan for what has gradients now. Raises as `kernels_run_on`."""
        collected, groups = self.collect(), self.host.param_groups
        # the collection may have moved state to its parameters
        zero1 = self.host.zero1_mesh is not None
        plan = KernelPlan(Signature.of(groups, self.host.state, zero1=zero1))
        plan.adam = collected.adam
        devices = {slot.shard.device for slot in (*collected.whole, *(s for some in collected.adam for s in some))}
        if ranks is not None:
            devices.add(ranks.device)
            reason = self._unsupported or self._unsupported_limit(ranks)
            if reason is not None:
                # ranks exchange sums of all sharded parameters, so that they go one way
                if kernels_run_on({ranks.device}, self.host.backend):
                    plan.refused = {entry.slot.parameter: reason for entry in ranks.plan.entries}
                return plan
        if not (collected.whole or ranks) or not kernels_run_on(devices, self.host.backend):
            return plan
        device = next(iter(devices))
        if self.kernel_plans.skipped is not None and self.kernel_plans.skipped.device != device:
            self.count_skipped()
        self.kernel_plans.make_backend(
            plan,
            collected.whole,
            len(groups),
            device,
            self.host.ns_dtype,
            None if ranks is None else ranks.plan,
            [
                (bool(group["orthogonalize"]), parameter.numel())
                for group in groups
                for parameter in group["params"]
                if self._may_be_taken(parameter, group["rule"])
            ],
        )
        return plan

    def _unsupported_limit(self, ranks: Ranks) -> str | None:
        from celo2.backends.parts import unsupported_limit

        limits = [self.host.param_groups[entry.slot.group]["max_grad_norm"] for entry in ranks.plan.entries]
        return next((reason for limit in limits if (reason := unsupported_limit(limit)) is not None), None)

    def _may_be_taken(self, parameter: Tensor, rule: str) -> bool:
        """Whether the kernels could come to step a parameter as whole matrices."""
        fits = parameter.requires_grad and parameter.ndim > 1 and parameter.dtype != torch.float64
        return fits and rule == "celo2" and self.parameters.spec_of(parameter, rule) is None

    # the step

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Step all parameters that have gradients; collective where ranks step some together."""
        ranks = self._take_ranks()
        kernels = None if self.host.backend in ("torch", "compiled") else self.take_kernels(ranks)
        if kernels is not None and kernels.backend is not None:
            self._step_with_kernels(kernels, kernels.backend, ranks, grad_scale, found_inf)
        else:
            self._step_with_torch(ranks, grad_scale, found_inf)

    def _step_with_kernels(
        self,
        kernels: KernelPlan,
        backend: TritonBackend,
        ranks: Ranks | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        rest = [slot for slot in self.collect().whole if slot.parameter in kernels.refused] if kernels.refused else []
        backend.rest = TorchBackend(None, rest, self.memory, backend.device) if rest else None
        inputs = self._inputs(ranks, [*kernels.vectors, *rest], kernels.adam, grad_scale, found_inf)
        scaled = inputs.grad_scale is not None

        def step_adam() -> None:
            for group, slots in zip(inputs.groups, kernels.adam, strict=True):
                # a factor that is known to be 1 saves the scaled copies
                factor = scaled or group["max_grad_norm"] is not None
                scale = backend.control[1 + slots[0].group, 0] if factor and slots else 1.0
                step_adamw(_jobs(slots), group, scale, found_inf=backend.skip, rounding=backend.round)

        take_step(backend, ranks or Local(), inputs, step_adam)
        if ranks is not None and ranks.device.type == "cpu":
            ranks.check_flags()
        # the backend's own is overwritten by the next step
        self.grad_norm = backend.grad_norm.clone()
        self.skips.look(backend.skipped, scaled=scaled)

    def _step_with_torch(self, ranks: Ranks | None, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        collected = self.collect()
        slots = [*collected.whole, *(slot for some in collected.adam for slot in some)]
        if ranks is None and not slots:
            self.grad_norm = None
            return
        device = slots[0].shard.device if ranks is None else ranks.device
        plan = None if ranks is None else ranks.plan
        # where it was asked for and cannot be had, that is said
        compiled = self.host.backend == "auto" or (self.host.backend == "compiled" and can_compile())
        backend = TorchBackend(plan, collected.whole, self.memory, device, compiled=compiled)
        inputs = self._inputs(ranks, backend.vectors, collected.adam, grad_scale, found_inf)

        def step_adam() -> None:
            for group, slots, scale in zip(inputs.groups, collected.adam, backend.scales, strict=True):
                step_adamw(_jobs(slots), group, scale)

        stepped = take_step(backend, ranks or Local(), inputs, step_adam)
        if slots or (backend.slices is not None and backend.slices.sliced):
            self.grad_norm = torch.tensor(backend.norm, dtype=torch.float32)
        for group in self.host.param_groups:
            group["skipped_steps"] += not stepped
        self.skips.note(not stepped, scaled=inputs.grad_scale is not None)

    def _inputs(
        self,
        ranks: Ranks | None,
        others: list[Slot],
        adam: list[list[Slot]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Inputs:
        """What a backend is given: `others` are the slots of the learned rule whose gradients it does not add up."""
        adamw = [slot for slots in adam for slot in slots]
        whole, shards = [slot.gradient for slot in (*others, *adamw) if slot.spec is None], []
        if ranks is not None:
            shards = [slot.gradient for slot in adamw if slot.spec is not None and ranks.plan.team.counts(slot.spec)]
            for entry in ranks.plan.entries:
                if entry.layout is None and entry.counts and entry.slot.parameter.grad is not None:
                    shards.append(entry.slot.gradient)
            whole, shards = ranks.shares(whole, shards)
        grad_scale, found_inf = (None if x is None else local(x) for x in (grad_scale, found_inf))
        return Inputs(self.host.param_groups, whole, shards, grad_scale, found_inf)


def _jobs(slots: list[Slot]) -> list[AdamWJob]:
    return [AdamWJob(slot.shard, slot.gradient, slot.state, slot.position) for slot in slots]


def _plain(value: object) -> object:
    """Return an option as it is compared; a rate on a device is not waited for."""
    if isinstance(value, Tensor):
        return float(value) if value.device.type == "cpu" else None
    return list(value) if isinstance(value, tuple) else value
