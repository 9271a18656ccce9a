"""`FusedCelo2`: the learned rule and its AdamW side behind the `torch.optim.Optimizer` interface."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from celo2.groups import (
    DERIVING,
    WITHOUT_EFFECT,
    check_foreign_options,
    check_options,
    check_parameters,
    group_view,
    list_parameters,
    named_parameters,
    renamed,
    split_group,
    use_plain_numbers,
)
from celo2.kernel_plans import NS_DTYPES, triton_is_installed
from celo2.loading import match
from celo2.matrices import MatrixView
from celo2.planner import Planner
from celo2.rates import Rates
from celo2.routes import Route, route_module, route_name
from celo2.routing import param_groups, view_options
from celo2.state import check_saved_state, copy_saved_state
from celo2.tables import format_table
from celo2.theta import Theta, load_weights

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# set by learning-rate schedulers (lr_scale: timm's, and its layer decay) and by torch.optim itself
_FOREIGN_KEYS = frozenset(
    {"params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr", "lr_scale", "kind", "lr_mult", "reasons"}
)


BACKENDS = ("auto", "triton", "torch", "compiled")
COMM_DTYPES = ("auto", "float16", "bfloat16", "float32")


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
        weights: a name (`"celo2-lm"`, the default, `"celo2"`, `"celo2-base"`, a closed form), a path, a hub id or a
            `Theta`: `celo2.load_weights`.
        weight_decay: decoupled, `p <- p - lr * weight_decay * p`.
        orthogonalize: Newton-Schulz on the direction of each matrix; None takes what the weights were trained with.
        adam_lr_mult: the AdamW side's learning rate is `adam_lr_mult * lr`.
        adam_weight_decay: decay of embeddings, heads and tables on the AdamW side, None for `weight_decay`.
        vector_weight_decay: decay of gains, biases and other vectors under either rule; None decays them as the
            matrices of their rule, as the authors do.
        max_grad_norm: scale a group's gradients when the norm over all parameters of the optimizer exceeds this.
        ns_steps: Newton-Schulz iterations.
        ns_dtype: what the kernels keep directions and iterate in: `"float16"`, `"bfloat16"`, `"float32"` or `"auto"`,
            float16 on a GPU, float32 on a CPU. Through PyTorch the rule's own precision. See docs/newton-schulz.md.
        state_dtype: of the learned rule's momenta and second moment: `"float32"`, 16 bytes a parameter; `"bfloat16"`, 8
            bytes; `"int8"`, momenta of 8 bits with a scale for 64 columns and a bfloat16 second moment, 5.2 bytes. All
            but the first are rounded stochastically.
        backend: `"triton"` steps the learned rule by the kernels of `celo2.kernels`, `"torch"` by `celo2.phases`;
            `"compiled"` is `"torch"` with whole float32 matrices on a CPU stepped in C++, which the machine's compiler
            makes of `celo2/backends/compiled.cpp` in a few seconds, once. `"auto"` takes the kernels for parameters on
            a GPU where Triton is installed, and is `"compiled"` on a CPU, or `"torch"` where there is no compiler. On
            a CPU `"triton"` needs `TRITON_INTERPRET=1` in the environment, for tests.
        comm_dtype: what directions of sharded parameters travel in to the rank that orthogonalises them and back:
            `"float16"`, `"bfloat16"`, `"float32"`, or `"auto"`: float16 on a GPU, where the kernels keep directions in
            it anyway, and float32 on a CPU. What rounding it does that one process would not, Newton-Schulz amplifies.
        ns_over_replicas: with HSDP, divide Newton-Schulz among the ranks of all replicas too, where each replica does
            all of it otherwise: less work for each rank, and directions that cross replicas.
        ranks_per_node: how many ranks that follow each other are close, in a node: they share matrices that would keep
            one of them busy longer than the others, and pass on what goes to other nodes. Needs parameters on all ranks
            of the job. Default: on GPUs torchrun's `LOCAL_WORLD_SIZE`; else 1: no sharing, one all-to-all over all.
        zero1_mesh: a mesh of one axis, of ranks that have the parameters whole and equal gradients
            (DistributedDataParallel): the learned rule's work on parameters of two axes or more, and their state, are
            split over them by rows.
        module: routes tensors or groups that have no names, from a trainer that hands over nothing else: each group is
            split by the rule that the module gives its members, and keeps its options.
        overrides: patterns of names to rules, `{"*.router.*": "adamw"}`, for a module (either way): `param_groups`.
        views: patterns of names to matrix views, `{"h.*.c_attn.weight": MatrixView(split=3)}`, of the module that is
            `params`: `param_groups`.

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

    Parameters sharded by `fully_shard` (FSDP2, HSDP), after tensor parallelism as well, are stepped by their ranks
    together: `step` is collective then, and its results do not depend on the number of ranks but for the order of sums
    and `comm_dtype`. All must be on one mesh, or on slices of it. They go through the
    kernels when every rank can take all of its shards so, else through PyTorch. When ranks disagree on which parameters
    have gradients, nothing is changed and every rank raises RuntimeError: at once through PyTorch, and through the
    kernels at the next step, or when `grad_norm` or `skipped_steps` is read.

    With `zero1_mesh` all its ranks step together, by the same rules, and have the same parameters afterwards, to the
    bit. Their state is sharded as FSDP2 shards it, and moves between both, one process and other numbers of ranks
    through `torch.distributed.checkpoint`. Before their first step all parameters and gradients are compared by a hash:
    one that differs between ranks raises RuntimeError on all.

    Raises ValueError or TypeError for options out of range, unknown rules, duplicate, sparse, complex or integer
    parameters or gradients, 8-bit state where columns are sharded, and with `zero1_mesh` for sharded parameters.
    """

    # GradScaler hands over `grad_scale` and `found_inf` instead of unscaling the gradients itself
    _step_supports_amp_scaling = True
    # of those that were pickled before
    ns_over_replicas = False
    ranks_per_node: int | None = None
    _routes: dict[Tensor, Route] | None  # while the optimizer is constructed with module=

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        weights: str | os.PathLike[str] | Theta = "celo2-lm",
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
        comm_dtype: str = "auto",
        ns_over_replicas: bool = False,
        ranks_per_node: int | None = None,
        zero1_mesh: DeviceMesh | None = None,
        module: nn.Module | None = None,
        overrides: Mapping[str, str] | None = None,
        views: Mapping[str, MatrixView] | None = None,
        **others: Any,
    ) -> None:
        comm_dtype = renamed(others, "wire_dtype", "comm_dtype", comm_dtype)
        zero1_mesh = renamed(others, "split_over", "zero1_mesh", zero1_mesh)
        check_foreign_options(others)
        if comm_dtype not in COMM_DTYPES:
            raise ValueError(f"comm_dtype={comm_dtype!r}, allowed: {', '.join(COMM_DTYPES)}")
        self.comm_dtype, self.ns_over_replicas = comm_dtype, ns_over_replicas
        if ranks_per_node is not None and ranks_per_node < 1:
            raise ValueError(f"ranks_per_node={ranks_per_node}, must be at least 1")
        self.ranks_per_node = ranks_per_node
        if ns_dtype not in NS_DTYPES:
            raise ValueError(f"ns_dtype={ns_dtype!r}, allowed: {', '.join(NS_DTYPES)}")
        if ns_dtype in ("float16", "bfloat16") and backend in ("torch", "compiled"):
            raise ValueError(
                f"ns_dtype={ns_dtype!r} with backend={backend!r}: the kernels alone iterate in it; use 'auto'"
            )
        self.ns_dtype = ns_dtype
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}, allowed: {', '.join(BACKENDS)}")
        self.backend = backend
        if backend == "triton" and not triton_is_installed():
            raise ValueError("backend='triton' needs Triton: pip install 'celo2[triton]', or use backend='auto'")
        if zero1_mesh is not None:
            from celo2.zero1 import check_mesh

            check_mesh(zero1_mesh)
        self.zero1_mesh = zero1_mesh
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
            params = param_groups(params, variant=theta.variant, views=views, overrides=overrides)
        elif views is not None:
            raise ValueError(
                "views= goes by the names of a module that is given first; in groups set split, heads and axis"
            )
        elif module is not None:
            self._routes = {route.parameter: route for route in route_module(module, overrides=overrides)}
        elif overrides is not None:
            raise ValueError("overrides= goes by a module's names: pass the module, or module= as well")
        super().__init__(params, defaults)
        self.state = self.planner.parameters.lazy_states(self.state)
        # a wrapper may replace the parameters: what is left of these must be free then
        self._routes = None
        if theta.variant == "celo2" and self._bare > 1:
            warnings.warn(
                f"{self._bare} matrices came without names: embeddings and output heads among them go through the "
                "learned rule, at a twentieth of their rate. Pass the module, module.named_parameters(), or "
                "module=model as well; for groups of hidden matrices say so: 'rule': 'celo2'",
                stacklevel=2,
            )

    def _reset_caches(self) -> None:
        self._routes = None
        self._bare = 0  # matrices of which nothing is known but the shape
        self._rates = Rates()
        self.planner = Planner(self)
        self._loading: dict[str, Any] | None = None

    @property
    def grad_norm(self) -> Tensor | None:
        """Global gradient norm of the last step, before clipping; 0-d, on the parameters' device with the kernels."""
        self.planner.check_flags()
        return self.planner.grad_norm

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped for a non-finite gradient; part of the state dict."""
        self.planner.check_flags()
        self.planner.count_skipped()
        return max(int(group["skipped_steps"]) for group in self.param_groups)

    # groups and state

    def theta_of(self, weights: str | os.PathLike[str] | Theta) -> Theta:
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
        theta = self.theta_of(options["weights"])
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
            self.planner.forget()
        if group_view(options) != MatrixView() and all(part["rule"] == "adamw" for part in parts):
            name = named_parameters(self.param_groups[before])[0][0]
            warnings.warn(f"the matrix view of {name} is not used: AdamW steps it whole", stacklevel=3)
        self.planner.count_skipped()

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
        for name, parameter in named_parameters(added):
            if added["rule"] == "celo2":
                group_view(added).check(parameter.shape, name)
            try:
                self.planner.parameters.check_state(parameter, added)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the groups' options, as `torch.optim.Optimizer` does.

        After a first step there is state for every parameter that is not frozen, and before it none.
        """
        self.planner.count_skipped()
        self._rates.make_plain(self.param_groups)
        if self.state:
            self.planner.follow_groups()
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
        self.planner.count_skipped()
        kept = (
            "_thetas",
            "_reasons",
            "backend",
            "comm_dtype",
            "ns_dtype",
            "ns_over_replicas",
            "ranks_per_node",
            "zero1_mesh",
        )
        return {**super().__getstate__(), "state": dict(self.state), **{key: getattr(self, key) for key in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # pickled under their names before
        names = {"wire_dtype": "comm_dtype", "split_over": "zero1_mesh"}
        state = {names.get(key, key): value for key, value in state.items()}
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
        self.state = self.planner.parameters.lazy_states(self.state)

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
        self._rates.check(self.param_groups)
        self.planner.follow_groups()
        # the rule's precision is its own, wherever the step is called
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            self.planner.step(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return loss

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
        kernels = self.planner.kernels
        refused = {} if kernels is None else kernels.refused
        notes = [
            f"{name}: stepped by PyTorch, {refused[parameter]}"
            for group in self.param_groups
            for name, parameter in named_parameters(group)
            if parameter in refused
        ]
        return "\n".join([format_table(header, rows, collapse=collapse), *notes])

    def rule_of(self, parameter: Tensor) -> str:
        """Return the rule that steps a parameter of this optimizer, `"celo2"` or `"adamw"`; else raise ValueError."""
        place = self.planner.parameters.place(parameter)
        if place is None:
            raise ValueError(f"a tensor of shape {tuple(parameter.shape)} is not a parameter of this optimizer")
        return place.rule
