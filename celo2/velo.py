"""`VeLO`: the learned optimizer of arXiv 2211.09760, inference only, behind the `torch.optim.Optimizer` interface."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from celo2.groups import (
    check_gradient,
    check_number,
    check_parameters,
    list_parameters,
    named_parameters,
    use_plain_numbers,
)
from celo2.skips import SkipWatch, warn_caller
from celo2.state import is_dtensor, local
from celo2.stochastic_rounding import mix64
from celo2.velo_ranks import VeLORanks, groups_of_ranks
from celo2.velo_rule import (
    LossDecays,
    Networks,
    advance_loss_buffer,
    axis_order,
    constant,
    loss_tensor,
    lstm_features,
    step_scale,
)
from celo2.velo_state import (
    SHARED_KEYS,
    copy_saved_velo_state,
    create_shared,
    create_velo_state,
    follow_velo_parameter,
    is_on_host,
    match_velo_state,
    names_of,
    split_square_weights,
)
from celo2.velo_step import Job, add_up, rates_of, stack_jobs, sum_dtype
from celo2.velo_weights import VeLOWeights, load_velo_weights

# set by learning-rate schedulers and by torch.optim itself
_FOREIGN_KEYS = frozenset({"params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr"})


class VeLO(Optimizer):
    """VeLO (arXiv 2211.09760): an LSTM looks at every tensor and at the training loss, and sets the steps.

    `params` is a module, tensors, (name, tensor) pairs, or groups of them. All parameters with gradients go through the
    LSTM together, in the order of their names, or of position where they have none: what it sees of one tensor depends
    on all. A parameter whose gradient is None is left as it is, and is not among them in that step.

    `step(loss=...)` takes the training loss of the step, a float or a tensor of one element, `step(closure)` what the
    closure returns. Without it the rule has no step. With replicas (DistributedDataParallel) every rank must give the
    same loss, averaged over ranks, or their parameters part; sharded parameters take the mean over ranks by themselves.

    Args:
        num_steps: steps of the whole training. VeLO needs the horizon in advance: how much of it is left decides how it
            steps. Steps after it are taken as the last ones are, with one warning.
        weights: a file, a folder, a hub id (`"amoudgl/velo-4000"`) or a `VeLOWeights`: `celo2.load_velo_weights`. None
            come with this package.
        lr: a plain factor on the step, at least 0; a float or a 0-d tensor. VeLO has no learning rate: 1.0 is the
            published rule, and schedulers of learning rates are not needed.
        weight_decay: of L2, as the authors have it: `weight_decay * p` is added to the gradient, and
            `weight_decay * sum(p^2)` over what is stepped to the loss. One value for all groups.
        module: names tensors or groups that have none, and tells which of them are weights of `nn.Linear`.

    Where the two largest axes of a tensor are equal, the rule goes by the authors' layout of weights, [in, out]. The
    square weights of a module's `nn.Linear`, which are [out, in], keep these roles: they are put into a group of their
    own, with `linear=True`, which a group may also say itself. All other tensors, embeddings among them, are taken as
    they are.

    Parameters are float32, float64, bfloat16 (written with stochastic rounding) or float16; the rule computes in
    float32 (float64 for float64), the LSTM in float64 where one of them is. State is 16 bytes a parameter, made when
    the optimizer is. A step with a loss or a gradient that is not finite leaves parameters and state untouched and is
    counted in `skipped_steps`. On a GPU no step waits for the device, but for one with sharded parameters.

    Parameters sharded along one axis by `fully_shard` (FSDP2, HSDP) are stepped by their ranks together: `step` is
    collective then, and its results do not depend on the number of ranks but for the order of sums. When ranks disagree
    on which parameters have gradients, nothing is changed and every rank raises RuntimeError.

    Raises ValueError or TypeError for options out of range, duplicate, sparse, complex or integer parameters or
    gradients, parameters sharded on two axes, sharded over several meshes, or offloaded, and a step without a loss.
    """

    # GradScaler hands over `grad_scale` and `found_inf` instead of unscaling the gradients itself
    _step_supports_amp_scaling = True
    weights: VeLOWeights
    _named: dict[Tensor, tuple[str, bool]] | None  # while the optimizer is constructed with a module

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        num_steps: int | None = None,
        *,
        weights: str | os.PathLike[str] | VeLOWeights | None = None,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        module: nn.Module | None = None,
    ) -> None:
        if isinstance(num_steps, bool) or not isinstance(num_steps, (int, np.integer)):
            raise TypeError(
                f"num_steps={num_steps!r}: VeLO needs the number of steps of the whole training in advance, a whole "
                "number: how much is left decides how it steps"
            )
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: VeLO needs the number of steps of the whole training, at least 1")
        self.weights = load_velo_weights(weights)
        self._reset_caches()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "linear": False,
            "weights": self.weights.label,
            "num_steps": int(num_steps),
            "calls": 0,
        }
        use_plain_numbers(defaults)
        if isinstance(params, nn.Module):
            module, params = params, list(params.parameters())
        self._named = None if module is None else names_of(module)
        try:
            super().__init__(params, defaults)
        finally:
            # a wrapper may replace the parameters: what is left of these must be free then
            self._named = None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and not parameter.is_meta:
                    self._state_of(parameter)

    def _reset_caches(self) -> None:
        self._named = None
        self._warned = False
        self._skips = SkipWatch()
        self._networks: dict[tuple[torch.dtype, torch.device], Networks] = {}
        self._orders: dict[Tensor, tuple[int, ...]] = {}
        self._shared: dict[str, Tensor] = {}
        self._ranks = VeLORanks()
        self._loading: dict[str, Any] | None = None

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        return int(self.param_groups[0]["num_steps"])

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped for a loss or gradient that is not finite; part of the state dict."""
        return int(self._shared_state()["skipped"])

    # groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a copy of a group after checking its options and parameters; a module's square weights as another."""
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group must be a dict, got {type(param_group).__name__}")
        group = dict(param_group)
        for key in group:
            if key not in {*self.defaults, *_FOREIGN_KEYS}:
                warnings.warn(f"parameter group option {key!r} is not used by VeLO", stacklevel=3)
        group["params"] = list_parameters(group)
        use_plain_numbers(group)
        options = {**self.defaults, **group}
        for key in ("lr", "weight_decay"):
            check_number(key, options[key])
        if not isinstance(options["linear"], bool):
            raise TypeError(f"linear={options['linear']!r}: must be True or False")
        for key in ("weights", "num_steps"):
            if options[key] != self.defaults[key]:
                raise ValueError(f"{key}={options[key]!r} in a parameter group: all have {self.defaults[key]!r}")
        check_parameters(group["params"])
        if self.param_groups:
            group.setdefault("calls", self.param_groups[0]["calls"])
        before = len(self.param_groups)
        try:
            for part in split_square_weights(group, self._named):
                super().add_param_group(part)
            self._check_decay()
            groups_of_ranks(self.param_groups)
        except BaseException:
            del self.param_groups[before:]
            raise
        finally:
            self._orders, self._ranks = {}, VeLORanks()

    def _check_decay(self) -> None:
        decays = {float(group["weight_decay"]) for group in self.param_groups}
        if len(decays) > 1:
            raise ValueError(
                f"weight_decay of the groups: {sorted(decays)}; VeLO's is a part of the loss, one value for all groups"
            )

    def _shared_state(self) -> dict[str, Tensor]:
        """Return what all parameters share, on the device of the first one."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        wide = any(parameter.dtype == torch.float64 for parameter in parameters)
        dtype, device = torch.float64 if wide else torch.float32, parameters[0].device
        if not self._shared:
            self._shared = create_shared(dtype, device)
        if self._shared["loss_buffer"].device != device or self._shared["loss_buffer"].dtype != dtype:
            moved = {key: value.to(device) for key, value in self._shared.items()}
            self._shared = {**moved, "loss_buffer": moved["loss_buffer"].to(dtype)}
            for state in self.state.values():
                state.update(self._shared)
        return self._shared

    def _network(self) -> Networks:
        buffer = self._shared_state()["loss_buffer"]
        key = (buffer.dtype, buffer.device)
        if key not in self._networks:
            self._networks[key] = Networks.of(self.weights.tensors(*key))
        return self._networks[key]

    def _order(self, parameter: Tensor) -> tuple[int, ...]:
        if parameter not in self._orders:
            # a wrapper may have replaced the parameters
            self._orders = {
                member: axis_order(member.shape, linear=group["linear"])
                for group in self.param_groups
                for member in group["params"]
            }
        return self._orders[parameter]

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a parameter's state, made when it is first needed."""
        state = self.state[parameter]
        if not state:
            shared = self._shared_state()
            dtype, device = shared["loss_buffer"].dtype, shared["loss_buffer"].device
            # an inference tensor could not be written in a later step outside of inference mode
            with torch.inference_mode(False), torch.no_grad():
                lstm = {
                    name: torch.tensor(self.weights.arrays[f"lstm_init_state/{name}"], dtype=dtype, device=device)
                    for name in ("hidden", "cell")
                }
                state.update(create_velo_state(parameter, self._order(parameter), lstm))
            state.update(shared)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of `state_dict()`: by name where both sides have names, else by position.

        Raises ValueError when it was saved with other weights, another `num_steps` or `linear`, or for parameters of
        other names or shapes; then nothing has changed.
        """
        # the last pre-hook: what the caller's hooks made of the state dict is checked, and kept before torch casts it
        handle = self.register_load_state_dict_pre_hook(lambda _, last: self._prepare_load(last))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def _prepare_load(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._loading = match_velo_state(state_dict, self.param_groups, self._state_of)
        return self._loading

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling and copying keep: groups, state, defaults and the weights."""
        return {**super().__getstate__(), "weights": self.weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loading = self.__dict__.get("_loading")
        if loading is not None:
            # torch cast the values to the parameters' dtype; take the exact ones, into the tensors that are there
            position = 0
            for group, there in zip(state["param_groups"], self.param_groups, strict=True):
                for parameter in group["params"]:
                    if position in loading["state"]:
                        copy_saved_velo_state(loading["state"][position], self._state_of(parameter))
                    position += 1
                if isinstance(there["lr"], Tensor):
                    there["lr"].fill_(group["lr"])
                    group["lr"] = there["lr"]
            state = {**state, "state": self.state}
        super().__setstate__(state)
        self._reset_caches()
        for own in self.state.values():
            # the same tensors for all, also after they were copied one by one
            self._shared = self._shared or {key: own[key] for key in SHARED_KEYS}
            own.update(self._shared)

    # the step

    @overload
    def step(self, closure: None = None, *, loss: float | Tensor | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, loss: None = None) -> float: ...

    # blocks and collectives are planned here: a compiler would trace the planning
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, loss: float | Tensor | None = None) -> float | None:
        """Update every parameter that has a gradient, given the training loss or a closure that returns it.

        Returns the closure's loss when there is one. Raises ValueError without a loss.
        """
        if (closure is None) == (loss is None):
            raise ValueError(
                "VeLO steps by the training loss: call step(loss=loss), or step(closure) with a closure that returns it"
            )
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = loss = closure()
        # the rule's precision is its own, wherever the step is called
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            self._step(loss_tensor(loss, self._shared_state()["loss_buffer"]))
        return returned

    def _collect(self) -> list[tuple[Job, Any]]:
        """Return what to step, in the order of names, with each group's rate."""
        found = []
        for group in self.param_groups:
            use_plain_numbers(group)
            lr = group["lr"]
            if not isinstance(lr, Tensor) and not 0 <= lr < math.inf:
                raise ValueError(f"lr={lr!r}: must be finite and at least 0")
            for name, parameter in named_parameters(group):
                gradient = parameter.grad
                if gradient is None or parameter.numel() == 0:
                    continue
                check_gradient(name, parameter, gradient)
                state = self._state_of(parameter)
                try:
                    follow_velo_parameter(state, parameter)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                order, shape, cut, ranks = self._order(parameter), parameter.shape, None, 1
                if is_dtensor(parameter):
                    from celo2.sharding import same_placements, shard_spec_of

                    if not same_placements(parameter, gradient):
                        raise ValueError(f"{name}: its gradient is not placed on the mesh as the parameter is")
                    if (placing := shard_spec_of(parameter)) is not None:
                        cut, ranks = placing.axes[0], placing.ranks
                    state = {key: local(value) for key, value in state.items()}
                job = Job(name, shape, order, local(parameter), local(gradient), state, cut, ranks)
                found.append((job, lr))
        if all("param_names" in group for group in self.param_groups):
            found.sort(key=lambda pair: pair[0].name)
        return found

    def _step(self, loss: Tensor) -> None:
        self._check_decay()
        groups = groups_of_ranks(self.param_groups)
        jobs = self._collect()
        calls = self.param_groups[0]["calls"] + 1
        for group in self.param_groups:
            group["calls"] = calls
        if not jobs and not groups:
            return
        shared, networks, device = self._shared_state(), self._network(), loss.device
        decay = float(self.param_groups[0]["weight_decay"])
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        inverse_scale = 1.0 if grad_scale is None else 1.0 / grad_scale
        stacks = stack_jobs(
            [job for job, _ in jobs], inverse_scale=inverse_scale, weight_decay=decay, seed=mix64(calls)
        )

        # everything is read, and all that can be refused is refused, before anything is written
        gathered = [stack.gather_sums() for stack, _ in stacks]
        bad = torch.zeros((), dtype=sum_dtype(device), device=device)
        for _, count in gathered:
            bad += count.to(device)
        if found_inf is not None:
            bad += found_inf.reshape(()).to(device)
        if groups:
            active = [job.name for job, _ in jobs if job.cut is not None]
            loss = self._ranks.agree(self.param_groups, self._order, loss, bad, groups, active)
            if not jobs:
                return
        accepted = (bad == 0) & torch.isfinite(loss)
        mask: Tensor | None = accepted
        if groups or is_on_host(accepted):
            if not bool(accepted):
                self._finish(shared, accepted)
                return
            mask = None

        sharded = [
            (stack, sums) for (stack, _), (sums, _) in zip(stacks, gathered, strict=True) if stack.cut is not None
        ]
        if sharded:
            for stack, _ in sharded:
                stack.advance_rows()
            add_up([part for stack, sums in sharded for part in (sums, *stack.exchanged)], groups[0])
        positions = tuple(position for _, chosen in stacks for position in chosen)
        inverse = constant(tuple(positions.index(p) for p in range(len(positions))), torch.int64, device)
        sums = torch.cat([sums.to(device) for sums, _ in gathered])[inverse]
        sizes = constant(tuple(job.shape.numel() for job, _ in jobs), sums.dtype, device)
        ranks = constant(tuple(sum(size > 1 for size in job.shape) for job, _ in jobs), torch.int64, device)
        if decay:
            loss = loss + decay * sums[:, 0].sum().to(loss.dtype)
        decays = LossDecays.of(self.num_steps, loss.dtype, device)
        buffer, loss_features = advance_loss_buffer(shared["loss_buffer"], shared["step"], loss, decays)
        features = lstm_features(sums, sizes, ranks, shared["step"], self.num_steps, loss_features)
        states = [job.state for job, _ in jobs]
        old = {key: torch.stack([state[key].to(device, loss.dtype) for state in states]) for key in ("hidden", "cell")}
        mlps, step_size, hidden, cell = networks.advance(features, old["hidden"], old["cell"])
        scale = step_scale(step_size, sums[:, 0], sizes) * rates_of([lr for _, lr in jobs], loss)

        if sharded:
            for stack, _ in sharded:
                stack.advance_factors()
            squares = [stack.columns_squared(keep=False) for stack, _ in sharded]
            add_up(squares, groups[0])
            of_sharded = iter(squares)
        for stack, chosen in stacks:
            if stack.cut is None:
                stack.advance_factors()
                columns = stack.columns_squared(keep=True)
            else:
                columns = next(of_sharded)
            index = constant(tuple(chosen), torch.int64, device)
            mixed, its_scale = (x[index].to(stack.device, stack.dtype) for x in (mlps, scale))
            stack.update(columns, networks.split(mixed), its_scale, None if mask is None else mask.to(stack.device))
        for key, value in (("hidden", hidden), ("cell", cell)):
            value = value if mask is None else torch.where(mask, value, old[key])
            torch._foreach_copy_([state[key] for state in states], list(value.unbind()))
        shared["loss_buffer"].copy_(buffer if mask is None else torch.where(mask, buffer, shared["loss_buffer"]))
        self._warn_after_the_end(calls, shared)
        self._finish(shared, accepted)

    def _finish(self, shared: dict[str, Tensor], accepted: Tensor) -> None:
        """Count a step that was taken or skipped."""
        shared["step"] += accepted
        shared["skipped"] += ~accepted
        self._skips.look(shared["skipped"], scaled=getattr(self, "grad_scale", None) is not None)

    def _warn_after_the_end(self, calls: int, shared: dict[str, Tensor]) -> None:
        # a device is asked only when the calls say that it may be so
        if calls > self.num_steps and not self._warned and int(shared["step"]) >= self.num_steps:
            self._warned = True
            warn_caller(
                f"step {calls} of a training of num_steps={self.num_steps}: VeLO steps on as at the end of it; "
                "construct it with the number of steps that you take"
            )
