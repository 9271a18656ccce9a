"""`FusedCelo2`: the learned rule and its AdamW side behind the `torch.optim.Optimizer` interface."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from celo2 import kernel_plan, reference, sharded_plan
from celo2.adamw import AdamWJob, step_adamw
from celo2.groups import (
    DERIVING,
    WITHOUT_EFFECT,
    check_foreign_options,
    check_gradient,
    check_options,
    check_parameters,
    check_rates,
    group_view,
    list_parameters,
    named_parameters,
    split_group,
    use_plain_numbers,
)
from celo2.jobs import MatrixJob, VectorJob, matrices_of
from celo2.kernel_plan import NS_DTYPES, KernelPlan, triton_is_installed
from celo2.loading import match
from celo2.matrices import MatrixView
from celo2.norms import global_norm
from celo2.phases import (
    FoldedTheta,
    GradientMoments,
    MatrixStep,
    Workspace,
    apply_update,
    gradient_moments,
    normalise_direction,
)
from celo2.routes import Route, route_module, route_name
from celo2.routing import format_table, param_groups, view_options
from celo2.skips import SkipWatch, warn_caller
from celo2.state import (
    MOMENTUM_KEYS,
    LazyStates,
    check_saved_state,
    check_state,
    compute_dtype,
    copy_saved_state,
    create_state,
    follow_parameter,
    is_dtensor,
    local,
    placing_of,
    read_momenta,
    write_momenta,
)
from celo2.stochastic_rounding import mix64, round_stochastically_, rounding_seed
from celo2.theta import Theta, load_weights

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from celo2.sharded_step import ShardedStep
    from celo2.split_step import SplitStep

# set by learning-rate schedulers and by torch.optim itself
_FOREIGN_KEYS = frozenset(
    {"params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr", "kind", "lr_mult", "reasons"}
)


BACKENDS = ("auto", "triton", "torch")
WIRE_DTYPES = ("auto", "bfloat16", "float32")


class Place(NamedTuple):
    """Where a parameter is, and the rule of its group."""

    group: int
    name: str
    rule: str


class FusedCelo2(Optimizer):
    """Celo2 (arXiv 2602.19142) as a drop-in for `torch.optim.AdamW`.

    `params` is a module (routed by `celo2.param_groups`, following the theta's variant), tensors, (name, tensor) pairs,
    or groups. A group may override every option below and set `rule`: `"celo2"`, `"adamw"`, or `"auto"` (the default:
    by name and shape, AdamW for embeddings, output heads and vectors and the learned rule for the rest, or for
    everything with a theta of variant `"celo2-base"`), and its matrix view: `split`, `heads`, `axis`, `flatten`.

    Every group is split by rule and kind when it is added, the learned rule's parts first, and `lr` and `weight_decay`
    of `param_groups` are those that its parameters step with. In a group with `rule="adamw"` they are taken as given;
    else AdamW's parts get `adam_lr_mult * lr`. `lr_mult` of a group is that factor, for a loop that sets the rate
    itself: `group["lr"] = lr * group["lr_mult"]`. Schedulers scale every group's own rate.

    Args:
        lr: learning rate on Adam's scale, at least 0; a float or a 0-d tensor.
        weights: a name (`"celo2"`, `"celo2-base"`, a closed form), a path, a hub id or a `Theta`: `celo2.load_weights`.
        weight_decay: decoupled, `p <- p - lr * weight_decay * p`.
        orthogonalize: Newton-Schulz on the direction of each matrix; None takes what the weights were trained with.
        adam_lr_mult: the AdamW side's learning rate is `adam_lr_mult * lr`.
        adam_weight_decay: decay of embeddings, heads and tables on the AdamW side, None for `weight_decay`.
        vector_weight_decay: decay of gains, biases and other vectors under either rule; None decays them as the
            matrices of their rule, as the authors do.
        max_grad_norm: scale a group's gradients when the norm over all parameters of the optimizer exceeds this.
        ns_steps: Newton-Schulz iterations.
        ns_dtype: what the kernels keep directions and iterate in: `"bfloat16"`, `"float32"`, or `"auto"`: bfloat16 on a
            GPU, float32 on a CPU. Through PyTorch it is the rule's own precision.
        state_dtype: of the learned rule's momenta and second moment: `"float32"`, 16 bytes a parameter; `"bfloat16"`, 8
            bytes; `"int8"`, momenta of 8 bits with a scale for 64 columns and a bfloat16 second moment, 5.2 bytes. All
            but the first are rounded stochastically.
        backend: `"triton"` steps the learned rule by the kernels of `celo2.kernels`, `"torch"` by `celo2.phases`;
            `"auto"` takes the kernels for parameters on a GPU where Triton is installed. On a CPU `"triton"` needs
            `TRITON_INTERPRET=1` in the environment, for tests.
        wire_dtype: what directions of sharded parameters travel in to the rank that orthogonalises them and back:
            `"bfloat16"`, `"float32"`, or `"auto"`: bfloat16 on a GPU, where the kernels keep directions in it anyway,
            and float32 on a CPU. Where a wire rounds what one process would not, Newton-Schulz amplifies it.
        split_over: a mesh of one axis, of ranks that have the parameters whole and equal gradients
            (DistributedDataParallel): the learned rule's work on parameters of two axes or more, and their state, are
            split over them by rows.
        module: routes tensors or groups that have no names, from a trainer that hands over nothing else: each group is
            split by the rule that the module gives its members, and keeps its options.
        overrides: patterns of names to rules, `{"*.router.*": "adamw"}`, for a module (either way): `param_groups`.

    `fused=` and `foreach=` of PyTorch's optimizers are accepted, and make no difference.

    Parameters are float32, float64, bfloat16 (written with stochastic rounding) or float16; the rule computes in
    float32 (float64 for float64). A step with a non-finite gradient leaves parameters and state untouched and is
    counted in `skipped_steps`. `grad_norm` is the global gradient norm of the last step, before clipping. The kernels
    keep both on the device, and reading them waits for it; no step does. They count a norm that overflows float32 as
    not finite. A parameter that they cannot take (float64, contiguous along no axis, `max_grad_norm` above 1000) goes
    through PyTorch, which does wait; `table()` names it. Learning-rate schedulers that cycle a
    momentum as well (`OneCycleLR`, `CyclicLR`) need `cycle_momentum=False`: the rule's momenta are part of what was
    learned.

    A matrix (each of a batch or view) that never had a gradient but zeros does not move, nor does a vector; weight
    decay acts on it as AdamW's does. One whose gradients end does not stop: the momenta and the parameter itself are
    features, and the update has an RMS of `lr` whatever they are. At lr=1e-3 a [32, 32] of norm 1.9 that had gradients
    for 100 steps goes 5.1 in 200 steps of zeros with `"celo2"`, and 6.0 with `"celo2-base"`, where 6.4 is the most
    (norm 1.6 after one gradient: 6.0 and 5.9). A gradient of None stops it.

    Parameters sharded by `fully_shard` (FSDP2, HSDP) are stepped by their ranks together: `step` is collective then,
    and its results do not depend on the number of ranks but for the order of sums and `wire_dtype`. They go through the
    kernels when every rank can take all of its shards so, else through PyTorch. When ranks disagree on which parameters
    have gradients, nothing is changed and every rank raises RuntimeError: at once through PyTorch, and through the
    kernels at the next step, or when `grad_norm` or `skipped_steps` is read.

    Parameters that are split over replicas go through PyTorch: all ranks of `split_over` step together, and have the
    same parameters afterwards, to the bit. Their state is sharded as FSDP2 shards it, and moves between both, one
    process and other numbers of ranks through `torch.distributed.checkpoint`. Before their first step
    all parameters and gradients are compared by a hash: one that differs between ranks raises RuntimeError on all.

    Raises ValueError or TypeError for options out of range, unknown rules, duplicate, sparse, complex or integer
    parameters or gradients, parameters sharded on two axes, and with `split_over` for sharded parameters, for
    `backend="triton"` and for 8-bit state.
    """

    # GradScaler hands over `grad_scale` and `found_inf` instead of unscaling the gradients itself
    _step_supports_amp_scaling = True
    _routes: dict[Tensor, Route] | None  # while the optimizer is constructed with module=

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        weights: str | os.PathLike[str] | Theta = "celo2",
        weight_decay: float = 0.0,
        orthogonalize: bool | None = None,
        adam_lr_mult: float = 20.0,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        adam_weight_decay: float | None = None,
        vector_weight_decay: float | None = 0.0,
        max_grad_norm: float | None = None,
        ns_steps: int = 5,
        ns_dtype: str = "auto",
        state_dtype: str = "float32",
        backend: str = "auto",
        wire_dtype: str = "auto",
        split_over: DeviceMesh | None = None,
        module: nn.Module | None = None,
        overrides: Mapping[str, str] | None = None,
        **others: Any,
    ) -> None:
        check_foreign_options(others)
        if wire_dtype not in WIRE_DTYPES:
            raise ValueError(f"wire_dtype={wire_dtype!r}, allowed: {', '.join(WIRE_DTYPES)}")
        self.wire_dtype = wire_dtype
        if ns_dtype not in NS_DTYPES:
            raise ValueError(f"ns_dtype={ns_dtype!r}, allowed: {', '.join(NS_DTYPES)}")
        if ns_dtype == "bfloat16" and backend == "torch":
            raise ValueError("ns_dtype='bfloat16' with backend='torch': the kernels alone iterate in it; use 'auto'")
        self.ns_dtype = ns_dtype
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}, allowed: {', '.join(BACKENDS)}")
        self.backend = backend
        if backend == "triton" and not triton_is_installed():
            raise ValueError("backend='triton' needs Triton: pip install 'celo2[triton]', or use backend='auto'")
        if split_over is not None:
            from celo2.split_step import check_mesh

            check_mesh(split_over)
            if backend == "triton":
                raise ValueError(
                    "backend='triton' with split_over: the kernels do not step split parameters; use backend='auto' or "
                    "'torch', or leave split_over out to step everything on every rank by the kernels"
                )
        self.split_over = split_over
        theta = load_weights(weights)
        self._reasons: dict[str, str] = {}  # by name, for the table
        self._thetas: dict[str, Theta] = {theta.label.rpartition("@")[2]: theta}
        self._reset_caches()
        defaults = {
            "lr": lr,
            "weights": theta.label,
            "weight_decay": weight_decay,
            "orthogonalize": orthogonalize,
            "adam_lr_mult": adam_lr_mult,
            "adam_betas": adam_betas,
            "adam_eps": adam_eps,
            "adam_weight_decay": adam_weight_decay,
            "vector_weight_decay": vector_weight_decay,
            "max_grad_norm": max_grad_norm,
            "ns_steps": ns_steps,
            "state_dtype": state_dtype,
            "rule": "auto",
            **view_options(MatrixView()),
            "skipped_steps": 0,
        }
        use_plain_numbers(defaults)
        if isinstance(params, nn.Module):
            params = param_groups(params, variant=theta.variant, overrides=overrides)
        elif module is not None:
            self._routes = {route.parameter: route for route in route_module(module, overrides=overrides)}
        elif overrides is not None:
            raise ValueError("overrides= goes by a module's names: pass the module, or module= as well")
        super().__init__(params, defaults)
        self._own_states()
        # a wrapper may replace the parameters: what is left of these must be free then
        self._routes = None
        if theta.variant == "celo2" and self._bare > 1:
            warnings.warn(
                f"{self._bare} matrices came without names: embeddings and output heads among them go through the "
                "learned rule, at a twentieth of their rate. Pass the module, module.named_parameters(), or "
                "module=model as well; for groups of hidden matrices say so: 'rule': 'celo2'",
                stacklevel=2,
            )

    def _own_states(self) -> None:
        """Make the state of a parameter when it is first needed."""
        this = weakref.ref(self)

        def make(parameter: Tensor) -> dict[str, Tensor] | None:
            optimizer = this()
            return None if optimizer is None else optimizer._new_state(parameter)

        self.state = LazyStates(make, self.state)

    def _reset_caches(self) -> None:
        self._routes = None
        self._bare = 0  # matrices of which nothing is known but the shape
        self._warned_of_rates = False
        self._skips = SkipWatch()
        self._grad_norm: Tensor | None = None
        self._folded: dict[tuple[str, torch.dtype, torch.device], FoldedTheta] = {}
        self._unfolded: dict[tuple[str, torch.dtype, torch.device], dict[str, Tensor]] = {}
        self._workspaces: dict[tuple[torch.dtype, torch.device], Workspace] = {}
        self._positions: dict[Tensor, int] = {}
        self._places: dict[Tensor, Place] = {}
        self._known: list[tuple[int, bool]] = []  # of the parameters whose state was made last
        self._made = 0
        self._loading: dict[str, Any] | None = None
        self._kernels: KernelPlan | None = None
        self._sharded: ShardedStep | SplitStep | None = None
        self._shards_refused: str | None = None  # why the kernels do not take the sharded parameters

    @property
    def grad_norm(self) -> Tensor | None:
        """Global gradient norm of the last step, before clipping; 0-d, on the parameters' device with the kernels."""
        if self._sharded is not None:
            self._sharded.check_flags()
        return self._grad_norm

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped for a non-finite gradient; part of the state dict."""
        if self._sharded is not None:
            self._sharded.check_flags()
        self._count_skipped()
        return max(int(group["skipped_steps"]) for group in self.param_groups)

    def _count_skipped(self) -> None:
        """Add what the kernels have counted on the device to the groups."""
        if self._kernels is not None:
            skipped = self._kernels.shared.take_skipped()
            for group in self.param_groups:
                group["skipped_steps"] += skipped

    # groups and state

    def _theta(self, weights: str | os.PathLike[str] | Theta) -> Theta:
        """Return the theta of a group's `weights`: the label of one that is loaded, or what `load_weights` takes."""
        digest = weights.rpartition("@")[2] if isinstance(weights, str) else None
        if digest in self._thetas:
            return self._thetas[digest]
        theta = load_weights(weights)
        self._thetas.setdefault(theta.label.rpartition("@")[2], theta)
        return theta

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a copy of a group after checking its options and parameters, as a group for each rule and kind in it.

        When the other groups have names and this one has none, its parameters are named by position.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group must be a dict, got {type(param_group).__name__}")
        # "fused" and the like make no difference in a group either
        group = {key: value for key, value in param_group.items() if key not in WITHOUT_EFFECT}
        known = {*self.defaults, *_FOREIGN_KEYS}
        for key in group:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                warnings.warn(f"parameter group option {key!r} is not used by FusedCelo2{hint}", stacklevel=3)
        group["params"] = list_parameters(group)
        use_plain_numbers(group)
        options = {**self.defaults, **group}
        check_options(options)
        check_parameters(group["params"])
        theta = self._theta(options["weights"])
        group["weights"] = theta.label
        if options["orthogonalize"] is None:
            group["orthogonalize"] = theta.orthogonalize
        if "skipped_steps" not in group and self.param_groups:
            group["skipped_steps"] = self.skipped_steps
        if self._routes is None and self.param_groups and "param_names" in self.param_groups[0]:
            index = len(self.param_groups)
            group["params"] = [
                entry if isinstance(entry, tuple) else (f"group {index}, parameter {position}", entry)
                for position, entry in enumerate(group["params"])
            ]
        if options["rule"] == "auto" and self._routes is None:
            self._bare += sum(not isinstance(entry, tuple) and entry.ndim > 1 for entry in group["params"])
        parts = split_group(group, self.defaults, theta.variant, self._routes) or [group]
        before = len(self.param_groups)
        try:
            for part in parts:
                self._add_part(part)
        except BaseException:
            del self.param_groups[before:]
            raise
        finally:
            self._forget_places()
        if group_view(options) != MatrixView() and all(part["rule"] == "adamw" for part in parts):
            name = named_parameters(self.param_groups[before])[0][0]
            warnings.warn(f"the matrix view of {name} is not used: AdamW steps it whole", stacklevel=3)
        self._count_skipped()

    def _add_part(self, part: dict[str, Any]) -> None:
        """Add a group of one rule; raises ValueError for a parameter that it cannot step, naming it."""
        self._reasons.update(part.pop("reasons", {}))
        super().add_param_group(part)
        added = self.param_groups[-1]
        for key in DERIVING:
            del added[key]
        if any(added["lr"] is other["lr"] for other in self.param_groups[:-1]) and isinstance(added["lr"], Tensor):
            # schedulers write into a tensor: every group needs its own
            added["lr"] = added["lr"].clone()
        rule, view = added["rule"], group_view(added)
        for name, parameter in named_parameters(added):
            if rule == "celo2":
                view.check(parameter.shape, name)
            try:
                if self.split_over is not None:
                    from celo2 import split_step

                    split_step.check_parameter(parameter, self.split_over)
                    if self._is_split(parameter, rule):
                        split_step.check_split_state(parameter, view, added["state_dtype"])
                check_state(parameter, rule, view, added["state_dtype"])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def _forget_places(self) -> None:
        self._positions, self._places, self._kernels, self._sharded = {}, {}, None, None

    def _place(self, parameter: Tensor) -> Place | None:
        """Return where a parameter is among the groups and which rule that gives it; None for somebody else's."""
        if not self._places:
            for index, group in enumerate(self.param_groups):
                for name, member in named_parameters(group):
                    self._places[member] = Place(index, name, group["rule"])
        return self._places.get(parameter)

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor] | None:
        place = self._place(parameter)
        if place is None:
            return None
        group = self.param_groups[place.group]
        view, state_dtype = group_view(group), group["state_dtype"]
        # an inference tensor could not be written in a later step outside of inference mode
        with torch.inference_mode(False):
            if self.split_over is not None:
                from celo2 import split_step

                split_step.check_parameter(parameter, self.split_over)
                if self._is_split(parameter, place.rule):
                    return split_step.create_split_state(parameter, view, state_dtype, self.split_over)
            return create_state(parameter, place.rule, view, state_dtype)

    def _follow_groups(self) -> None:
        """Go by the parameters that are in the groups now, which a wrapper may have replaced, and make their state.

        Also where no gradient comes, so that every rank has the same keys; not where none is wanted.
        """
        known = [(id(p), p.requires_grad) for group in self.param_groups for p in group["params"]]
        if known == self._known and len(self.state) == self._made:
            return
        if known != self._known:
            self._count_skipped()
            self._forget_places()
            self._known = known
            gone = [parameter for parameter in self.state if self._place(parameter) is None]
            for parameter in gone:
                del self.state[parameter]
        for group in self.param_groups:
            for name, parameter in named_parameters(group):
                if parameter.requires_grad and not self.state.get(parameter):
                    self.state.pop(parameter, None)
                    try:
                        self.state[parameter]  # makes it
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from error
        self._made = len(self.state)

    def _is_split(self, parameter: Tensor, rule: str) -> bool:
        return self.split_over is not None and rule == "celo2" and parameter.ndim > 1 and parameter.numel() > 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the groups' options, as `torch.optim.Optimizer` does.

        After a first step there is state for every parameter that is not frozen, and before it none.
        """
        self._count_skipped()
        self._plain_rates()
        if self.state:
            self._follow_groups()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of `state_dict()`: by name where both sides have names, else by position.

        State keeps its own dtype, also where it was saved in another, and a tensor `lr` stays the same tensor. Raises
        ValueError when it was saved with other weights, rules or views, or for parameters of other names or shapes;
        then nothing has changed.
        """
        # the last pre-hook: what the caller's hooks made of the state dict is checked, and kept before torch casts it
        handle = self.register_load_state_dict_pre_hook(lambda _, last: self._prepare_load(last))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def _prepare_load(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        loading = match(state_dict, self.param_groups, self.defaults)
        for saved, group in zip(loading["param_groups"], self.param_groups, strict=True):
            for position, (name, parameter) in zip(saved["params"], named_parameters(group), strict=True):
                if not loading["state"] or (not parameter.requires_grad and position not in loading["state"]):
                    # saved before the first step, or of a frozen parameter
                    continue
                check_saved_state(name, parameter, loading["state"].get(position), self.state[parameter])
        self._loading = loading
        return loading

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling and copying keep: groups, state, defaults and the thetas, not the scratch memory."""
        self._count_skipped()
        return {
            **super().__getstate__(),
            "state": dict(self.state),
            "_thetas": self._thetas,
            "backend": self.backend,
            "wire_dtype": self.wire_dtype,
            "ns_dtype": self.ns_dtype,
            "_reasons": self._reasons,
            "split_over": self.split_over,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        loading = self.__dict__.get("_loading")
        if loading is not None:
            # torch cast the values to the parameters' dtype; take the exact ones, into the tensors that are there
            if not loading["state"]:
                self.state.clear()
            position = 0
            for group, there in zip(state["param_groups"], self.param_groups, strict=True):
                for parameter in group["params"]:
                    if position in loading["state"]:
                        copy_saved_state(loading["state"][position], self.state[parameter], group_view(there))
                    position += 1
                if isinstance(there["lr"], Tensor):
                    # a captured graph reads this one
                    there["lr"].fill_(group["lr"])
                    group["lr"] = there["lr"]
                elif isinstance(group["lr"], Tensor):
                    group["lr"] = float(group["lr"])
            state = {**state, "state": self.state}
        super().__setstate__(state)
        self._reset_caches()
        self._own_states()

    # the step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # launches and collectives are planned here: a compiler would trace the planning
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns the closure's loss when there is one.

        `torch.compile` leaves it as it is, and a function compiled with `fullgraph=True` cannot have it within.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # the rule's precision is its own, wherever the step is called
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            self._step()
        return loss

    def _plain_rates(self) -> None:
        """Make floats of rates, and plain numbers of NumPy's, which `torch.load` would not read by default."""
        for group in self.param_groups:
            use_plain_numbers(group)
            if type(group["lr"]) is not float and not isinstance(group["lr"], Tensor):
                group["lr"] = float(group["lr"])

    def _check_rates(self) -> None:
        """Raise ValueError for a rate that cannot be used; warn of a loop that gives all groups the same one."""
        learned, derived = set(), set()
        for index, group in enumerate(self.param_groups):
            lr = group["lr"]
            if not isinstance(lr, Tensor) and not 0 <= lr < math.inf:
                raise ValueError(f"lr={lr!r} of group {index}: must be finite and at least 0")
            check_rates(group)
            if isinstance(lr, Tensor):
                continue
            if group["rule"] == "celo2":
                learned.add(lr)
            elif group.get("lr_mult", 1.0) != 1.0:
                derived.add(lr)
        same = (learned & derived) - {0.0}
        if same and not self._warned_of_rates:
            self._warned_of_rates = True
            warn_caller(
                f"all groups have lr={same.pop():g}: those of AdamW were made to step at a multiple of the learned "
                'rule\'s. In a loop that sets rates write group["lr"] = lr * group["lr_mult"]'
            )

    def _step(self) -> None:
        self._plain_rates()
        self._check_rates()
        self._follow_groups()
        dtensors = [p for group in self.param_groups for p in group["params"] if is_dtensor(p)]
        together = self.split_over is not None or self._sharded is not None
        if together or any(placing_of(parameter) is not None for parameter in dtensors):
            sharded_plan.step_sharded(self)
            return
        if not dtensors and kernel_plan.take_kernels(self):
            kernel_plan.step_with_kernels(self)
            return
        # all that can be refused is refused here, and every statistic is known, before anything is written
        learned, vectors, adam = self._collect()
        gradients = [job.matrices.g for job in learned]
        gradients += [job.gradient for job in vectors]
        gradients += [job.gradient for jobs in adam for job in jobs]
        if not gradients:
            self._grad_norm = None
            return
        moments = [gradient_moments(job.matrices.g, self._workspace(job.parameter)) for job in learned]
        norm = global_norm([moment.total for moment in moments], gradients)

        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        inverse_scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        norm *= inverse_scale
        self._grad_norm = torch.tensor(norm, dtype=torch.float32)
        if not math.isfinite(norm) or (found_inf is not None and float(found_inf) != 0):
            self._skip()
            return

        self._skips.note(False)
        scales = []
        for group in self.param_groups:
            limit = group["max_grad_norm"]
            scales.append(inverse_scale * (1.0 if limit is None else min(1.0, limit / (norm + 1e-6))))
        for job, moment in zip(learned, moments, strict=True):
            self._step_matrices(job, moment, scales[job.group])
        for vector in vectors:
            self._step_vector(vector, scales[vector.group])
        for index, jobs in enumerate(adam):
            step_adamw(jobs, self.param_groups[index], scales[index])

    def _skip(self) -> None:
        """Count a step that was skipped, as known on the host."""
        for group in self.param_groups:
            group["skipped_steps"] += 1
        self._skips.note(True, scaled=getattr(self, "grad_scale", None) is not None)

    def _collect(self) -> tuple[list[MatrixJob], list[VectorJob], list[list[AdamWJob]]]:
        """Return what to step: matrices and vectors by the learned rule, and each group's parameters by AdamW."""
        learned: list[MatrixJob] = []
        vectors: list[VectorJob] = []
        adam: list[list[AdamWJob]] = [[] for _ in self.param_groups]
        for index, group in enumerate(self.param_groups):
            view, theta = group_view(group), self._theta(group["weights"])
            group["weights"] = theta.label
            for name, parameter in named_parameters(group):
                gradient = parameter.grad
                if gradient is None or parameter.numel() == 0:
                    continue
                check_gradient(name, parameter, gradient)
                state, rule, position = self.state[parameter], self.rule_of(parameter), self._position(parameter)
                try:
                    if self._is_split(parameter, rule):
                        _check_split(parameter, state, view)
                        continue
                    follow_parameter(state, parameter, rule, view, group["state_dtype"])
                    if is_dtensor(parameter):
                        if not _same_placing(parameter, gradient):
                            raise ValueError("its gradient is not placed on the mesh as the parameter is")
                        if rule == "celo2" and placing_of(parameter) is not None:
                            continue
                        parameter, gradient = local(parameter), local(gradient)
                        state = {key: local(value) for key, value in state.items()}
                    if rule == "adamw":
                        adam[index].append(AdamWJob(parameter, gradient, state, position))
                    elif parameter.ndim < 2:
                        vectors.append(VectorJob(index, parameter, gradient, state, theta, position))
                    else:
                        matrices = matrices_of(parameter, gradient, state, view)
                        learned.append(MatrixJob(index, parameter, matrices, state, theta, position))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        return learned, vectors, adam

    def _workspace(self, parameter: Tensor) -> Workspace:
        key = (compute_dtype(parameter), parameter.device)
        if key not in self._workspaces:
            self._workspaces[key] = Workspace(*key)
        return self._workspaces[key]

    def _step_matrices(self, job: MatrixJob, moments: GradientMoments, scale: float) -> None:
        group, workspace, p = self.param_groups[job.group], self._workspace(job.parameter), job.matrices.p
        key = (job.theta.sha256, workspace.dtype, workspace.device)
        if key not in self._folded:
            self._folded[key] = FoldedTheta.from_theta(job.theta, workspace.dtype, workspace.device)
        # a sum of squares of at most 1e6 rules out an element above the clip of 1000
        clip = not moments.total * scale * scale <= reference.GRADIENT_CLIP**2
        if clip:
            moments = gradient_moments(job.matrices.g, workspace, scale=scale, clip=True)
        seed = mix64(mix64(job.position) ^ int(job.state["step"]))
        matrices, values = job.matrices, None
        if "momentum_scale" in job.state:
            view = group_view(group)
            values = read_momenta(job.state, view)
            fast, medium, slow = (view.matrices(value) for value in values)
            matrices = dataclasses.replace(matrices, momenta=(fast, medium, slow))
        step = MatrixStep(matrices, moments, self._folded[key], workspace, scale=scale, clip=clip, seed=seed)
        direction = step.learned_update(step.feature_scales())
        step.commit_factors()
        if values is not None:
            write_momenta(job.state, group_view(group), values, seed)
        direction, rms_scale = normalise_direction(
            direction, step.moves, orthogonalize=group["orthogonalize"], ns_steps=group["ns_steps"]
        )
        options = {"lr": float(group["lr"]), "weight_decay": group["weight_decay"]}
        job.state["step"] += 1
        if p.dtype == workspace.dtype:
            apply_update(p, direction, rms_scale, **options)
        else:
            wide = p.to(workspace.dtype)
            apply_update(wide, direction, rms_scale, **options)
            round_stochastically_(p, wide, _rounding_seed(p, job))

    def _step_vector(self, job: VectorJob, scale: float) -> None:
        group, state, parameter, dtype = (
            self.param_groups[job.group],
            job.state,
            job.parameter,
            compute_dtype(job.parameter),
        )
        key = (job.theta.sha256, dtype, parameter.device)
        if key not in self._unfolded:
            self._unfolded[key] = job.theta.tensors(dtype, parameter.device)
        wide = parameter.reshape(-1).to(dtype)
        momentum = torch.stack([state[name].reshape(-1).to(dtype) for name in MOMENTUM_KEYS], dim=-1)
        old = reference.VectorState(momentum, state["second_moment"].reshape(-1).to(dtype), state["factor"])
        gradient = job.gradient.reshape(-1).to(dtype) * scale
        update, new = reference.vector_update(self._unfolded[key], wide, gradient, old)
        seed = mix64(mix64(job.position) ^ int(state["step"]))
        for index, name in enumerate(MOMENTUM_KEYS):
            round_stochastically_(state[name], new.momentum[:, index].view(parameter.shape), mix64(seed + index) >> 32)
        round_stochastically_(state["second_moment"], new.second_moment.view(parameter.shape), mix64(seed + 3) >> 32)
        state["factor"].copy_(new.factor)
        state["step"] += 1
        wide = wide - float(group["lr"]) * (update + group["weight_decay"] * wide)
        round_stochastically_(parameter, wide.view(parameter.shape), _rounding_seed(parameter, job))

    def _everything(self) -> list[Tensor]:
        """All parameters, by position."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _position(self, parameter: Tensor) -> int:
        if not self._positions:
            self._positions = {parameter: position for position, parameter in enumerate(self._everything())}
        return self._positions[parameter]

    def table(self, *, collapse: bool = False) -> str:
        """Return the routing as text: a line a parameter with its rule, rate and decay, and why that is its rule.

        `lr * decay` is the part of a parameter that a step takes off. With `collapse`, numbered blocks that are alike
        share a line. Below it is what the kernels could not take in the last step, and why.
        """
        header = ("parameter", "shape", "matrices", "rule", "lr", "weight decay", "lr * decay", "why")
        rows: list[tuple[str, ...]] = []
        for group in self.param_groups:
            rule, lr, decay = group["rule"], float(group["lr"]), group["weight_decay"]
            for name, parameter in named_parameters(group):
                matrices = "-"
                if rule == "celo2" and parameter.ndim > 1:
                    batch, m, n = group_view(group).shape(parameter.shape)
                    matrices = f"{batch} x [{m}, {n}]"
                numbers = (f"{lr:.3g}", f"{decay:g}", f"{lr * decay:.3g}")
                why = self._reasons.get(name) or route_name("", parameter.shape)[2]
                rows.append((name, str(list(parameter.shape)), matrices, rule, *numbers, why))
        refused = {} if self._kernels is None else self._kernels.refused
        notes = [
            f"{name}: stepped by PyTorch, {refused[parameter]}"
            for group in self.param_groups
            for name, parameter in named_parameters(group)
            if parameter in refused
        ]
        return "\n".join([format_table(header, rows, collapse=collapse), *notes])

    def rule_of(self, parameter: Tensor) -> str:
        """Return the rule that steps a parameter of this optimizer, `"celo2"` or `"adamw"`; else raise ValueError."""
        place = self._place(parameter)
        if place is None:
            raise ValueError(f"a tensor of shape {tuple(parameter.shape)} is not a parameter of this optimizer")
        return place.rule


def _rounding_seed(target: Tensor, job: MatrixJob | VectorJob) -> int:
    """Seed of a parameter's stochastic rounding: its position and its step, so that a resumed run replays it."""
    return rounding_seed(job.position, int(job.state["step"])) if target.dtype == torch.bfloat16 else 0


def _same_placing(parameter: Tensor, gradient: Tensor) -> bool:
    from celo2 import sharding

    return sharding.same_placing(parameter, gradient)


def _check_split(parameter: Tensor, state: dict[str, Tensor], view: MatrixView) -> None:
    from celo2 import split_step

    split_step.check_split(parameter, state, view)
