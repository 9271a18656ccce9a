"""`FusedCelo2`: the learned rule and its AdamW side behind the `torch.optim.Optimizer` interface."""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from celo2 import reference
from celo2.groups import (
    check_gradient,
    check_options,
    check_parameters,
    group_rule,
    group_view,
    named_parameters,
)
from celo2.matrices import MatrixView
from celo2.phases import (
    FoldedTheta,
    GradientMoments,
    Matrices,
    MatrixStep,
    Workspace,
    apply_update,
    gradient_moments,
    normalise_direction,
)
from celo2.routing import format_table, param_groups, view_options
from celo2.stochastic_rounding import round_stochastically_
from celo2.theta import Theta, load_weights

_MOMENTUM_KEYS = ("momentum_fast", "momentum_medium", "momentum_slow")
# set by learning-rate schedulers and by torch.optim itself
_FOREIGN_KEYS = frozenset({"params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr"})


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


class FusedCelo2(Optimizer):
    """Celo2 (arXiv 2602.19142) as a drop-in for `torch.optim.AdamW`.

    `params` is a module (routed by `celo2.param_groups`, following the theta's variant), tensors, (name, tensor) pairs,
    or groups. A group may override every option below and set `rule`: `"celo2"`, `"adamw"`, or `"auto"` (the default:
    AdamW for fewer than two axes, else the learned rule), and its matrix view: `split`, `heads`, `axis`, `flatten`.

    Args:
        lr: learning rate on Adam's scale, at least 0; a float or a 0-d tensor.
        weights: a name (`"momentum"`, `"adam"`), a path, a hub id or a `Theta`; see `celo2.load_weights`.
        weight_decay: decoupled, `p <- p - lr * weight_decay * p`.
        orthogonalize: Newton-Schulz on the direction of each matrix; None takes what the weights were trained with.
        adam_lr_mult: the AdamW side's learning rate is `adam_lr_mult * lr`.
        adam_weight_decay: decay of the AdamW side, None for `weight_decay`.
        max_grad_norm: scale a group's gradients when the norm over all parameters of the optimizer exceeds this.
        ns_steps: Newton-Schulz iterations.

    Parameters are float32, float64, bfloat16 (written with stochastic rounding) or float16; the accumulators are
    float32 (float64 for float64). A step with a non-finite gradient leaves parameters and state untouched and is
    counted in `skipped_steps`. `grad_norm` is the global gradient norm of the last step, before clipping. Both are read
    on the host; on a CPU that costs nothing.

    Raises ValueError or TypeError for options out of range, unknown rules, duplicate, sparse, complex, integer or
    sharded parameters or gradients.
    """

    # GradScaler hands over `grad_scale` and `found_inf` instead of unscaling the gradients itself
    _step_supports_amp_scaling = True

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
        max_grad_norm: float | None = None,
        ns_steps: int = 5,
    ) -> None:
        theta = load_weights(weights)
        self._thetas: dict[str, Theta] = {theta.label: theta}
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
            "max_grad_norm": max_grad_norm,
            "ns_steps": ns_steps,
            "rule": "auto",
            **view_options(MatrixView()),
            "skipped_steps": 0,
        }
        if isinstance(params, nn.Module):
            params = param_groups(params, variant=theta.variant)
        super().__init__(params, defaults)

    def _reset_caches(self) -> None:
        self.grad_norm: Tensor | None = None
        self._folded: dict[tuple[str, torch.dtype, torch.device], FoldedTheta] = {}
        self._workspaces: dict[tuple[torch.dtype, torch.device], Workspace] = {}

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped for a non-finite gradient; part of the state dict."""
        return max(int(group["skipped_steps"]) for group in self.param_groups)

    # groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options and parameters, and create its state."""
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group must be a dict, got {type(param_group).__name__}")
        known = {*self.defaults, *_FOREIGN_KEYS}
        for key in param_group:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                warnings.warn(f"parameter group option {key!r} is not used by FusedCelo2{hint}", stacklevel=3)
        group = dict(param_group)
        if "weights" in group and group["weights"] not in self._thetas:
            theta = load_weights(group["weights"])
            self._thetas[theta.label] = theta
            group["weights"] = theta.label
        if isinstance(group["params"], (set, frozenset)):
            raise TypeError("parameters come in a set, whose order changes between runs; pass a list")
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        check_options({**self.defaults, **group})
        check_parameters(group["params"])
        if "skipped_steps" not in group and self.param_groups:
            group["skipped_steps"] = self.skipped_steps
        super().add_param_group(group)
        try:
            added = self.param_groups[-1]
            view = group_view(added)
            for name, parameter in named_parameters(added):
                if group_rule(added, parameter) == "celo2":
                    view.check(parameter.shape, name)
                self._create_state(parameter, added)
        except ValueError:
            self.param_groups.pop()
            raise

    def _create_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Create the accumulators, all zero, also where no gradient ever comes (equal keys on every rank)."""
        dtype, device = _state_dtype(parameter), parameter.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def zeros_like() -> Tensor:
            return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)

        state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32)}
        if group_rule(group, parameter) == "adamw":
            state |= {"exp_avg": zeros_like(), "exp_avg_sq": zeros_like()}
        else:
            state |= {key: zeros_like() for key in _MOMENTUM_KEYS}
            state["second_moment"] = zeros_like()
            if parameter.ndim < 2:
                state["factor"] = zeros(parameter.numel(), 3)
            else:
                batch, rows, columns = group_view(group).matrices(parameter.detach()).shape
                lead = () if batch == 1 else (batch,)
                state["row_factor"] = zeros(*lead, rows, 3)
                state["column_factor"] = zeros(*lead, columns, 3)
        self.state[parameter] = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of `state_dict()`; state keeps its dtype (the float32 momentum of a bfloat16 parameter).

        Raises ValueError when it was saved with other weights, other rules or views, or for parameters of other shapes.
        """
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) == len(self.param_groups):
            for index, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
                self._check_saved_group(index, saved, group, state_dict["state"])
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        keys = [key for group in saved_groups for key in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                device = value.device if name == "step" else parameter.device
                self.state[parameter][name] = value.detach().clone().to(device=device)

    def _check_saved_group(
        self, index: int, saved: dict[str, Any], group: dict[str, Any], state: dict[Any, Any]
    ) -> None:
        for key in ("weights", "rule", "split", "heads", "axis", "flatten"):
            if saved.get(key) != group[key]:
                raise ValueError(
                    f"state dict of another optimizer: group {index} was saved with {key}={saved.get(key)!r}, this "
                    f"optimizer has {group[key]!r}; construct FusedCelo2 with the saved value"
                )
        if len(saved["params"]) != len(group["params"]):
            return  # torch.optim.Optimizer.load_state_dict has the message for this
        for key, (name, parameter) in zip(saved["params"], named_parameters(group), strict=True):
            if key not in state:
                raise ValueError(f"state dict has no state for parameter {name} (group {index}): it is incomplete")
            for entry, value in self.state[parameter].items():
                shape = tuple(state[key][entry].shape) if entry in state[key] else None
                if shape != tuple(value.shape):
                    raise ValueError(
                        f"state dict of another model: {entry} of {name} has shape {shape}, "
                        f"expected {tuple(value.shape)}"
                    )

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling and copying keep: groups, state, defaults and the thetas, not the scratch memory."""
        return {**super().__getstate__(), "_thetas": self._thetas}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_caches()

    # the step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns the closure's loss when there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        learned: list[tuple[dict[str, Any], Tensor, Tensor]] = []
        adam: list[tuple[dict[str, Any], Tensor, Tensor]] = []
        for group in self.param_groups:
            for name, parameter in named_parameters(group):
                if parameter.grad is None or parameter.numel() == 0:
                    continue
                check_gradient(name, parameter, parameter.grad)
                side = adam if group_rule(group, parameter) == "adamw" else learned
                side.append((group, parameter, parameter.grad))
        if not learned and not adam:
            return loss

        # phase 1 and the AdamW side's norms: every statistic is known before anything is written
        moments: list[GradientMoments | None] = []
        sum_of_squares = 0.0
        for group, parameter, gradient in learned:
            if parameter.ndim < 2:
                moments.append(None)
                sum_of_squares += float(gradient.to(torch.float64).square().sum())
            else:
                statistics = gradient_moments(group_view(group).matrices(gradient), self._workspace(parameter))
                moments.append(statistics)
                sum_of_squares += statistics.total
        if adam:
            norms = torch._foreach_norm([gradient for _, _, gradient in adam])
            sum_of_squares += sum(float(norm) ** 2 for norm in norms)
        if not math.isfinite(sum_of_squares):
            # a non-finite element, or finite ones whose squares overflow
            gradients = [gradient for _, _, gradient in (*learned, *adam)]
            if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
                sum_of_squares = sum(float(gradient.to(torch.float64).square().sum()) for gradient in gradients)

        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        inverse_scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        norm = math.sqrt(sum_of_squares) * inverse_scale if sum_of_squares >= 0 else math.nan
        self.grad_norm = torch.tensor(norm, dtype=torch.float32)
        if not math.isfinite(norm) or (found_inf is not None and float(found_inf) != 0):
            for group in self.param_groups:
                group["skipped_steps"] += 1
            return loss

        scales = {}
        for group in self.param_groups:
            limit = group["max_grad_norm"]
            scales[id(group)] = inverse_scale * (1.0 if limit is None else min(1.0, limit / (norm + 1e-6)))

        for (group, parameter, gradient), moment in zip(learned, moments, strict=True):
            self.state[parameter]["step"] += 1
            if moment is None:
                self._step_vector(group, parameter, gradient, scales[id(group)])
            else:
                self._step_matrices(group, parameter, gradient, moment, scales[id(group)])
        for group in self.param_groups:
            pairs = [(parameter, gradient) for other, parameter, gradient in adam if other is group]
            if pairs:
                self._step_adamw(group, pairs, scales[id(group)])
        return loss

    def _workspace(self, parameter: Tensor) -> Workspace:
        key = (_state_dtype(parameter), parameter.device)
        if key not in self._workspaces:
            self._workspaces[key] = Workspace(*key)
        return self._workspaces[key]

    def _theta(self, group: dict[str, Any]) -> Theta:
        return self._thetas[group["weights"]]

    def _step_matrices(
        self, group: dict[str, Any], parameter: Tensor, gradient: Tensor, moments: GradientMoments, scale: float
    ) -> None:
        state, view, workspace = self.state[parameter], group_view(group), self._workspace(parameter)
        key = (group["weights"], workspace.dtype, workspace.device)
        if key not in self._folded:
            self._folded[key] = FoldedTheta.from_theta(self._theta(group), workspace.dtype, workspace.device)
        p, g = view.matrices(parameter), view.matrices(gradient)
        fast, medium, slow = (view.matrices(state[name]) for name in _MOMENTUM_KEYS)
        factors = [
            state[name] if state[name].ndim == 3 else state[name][None] for name in ("row_factor", "column_factor")
        ]
        matrices = Matrices(p, g, (fast, medium, slow), view.matrices(state["second_moment"]), *factors)
        # a sum of squares of at most 1e6 rules out an element above the clip of 1000
        clip = not moments.total * scale * scale <= reference.GRADIENT_CLIP**2
        if clip:
            moments = gradient_moments(g, workspace, scale=scale, clip=True)
        step = MatrixStep(matrices, moments, self._folded[key], workspace, scale=scale, clip=clip)
        direction = step.learned_update(step.feature_scales())
        orthogonalize = group["orthogonalize"]
        direction, rms_scale = normalise_direction(
            direction,
            orthogonalize=self._theta(group).orthogonalize if orthogonalize is None else orthogonalize,
            ns_steps=group["ns_steps"],
        )
        options = {"lr": float(group["lr"]), "weight_decay": group["weight_decay"]}
        if p.dtype == workspace.dtype:
            apply_update(p, direction, rms_scale, **options)
        else:
            wide = p.to(workspace.dtype)
            apply_update(wide, direction, rms_scale, **options)
            round_stochastically_(p, wide, self._rounding_seed(parameter))

    def _step_vector(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor, scale: float) -> None:
        state, dtype = self.state[parameter], _state_dtype(parameter)
        theta = self._theta(group).tensors(dtype, parameter.device)
        wide = parameter.reshape(-1).to(dtype)
        momentum = torch.stack([state[name].reshape(-1) for name in _MOMENTUM_KEYS], dim=-1)
        old = reference.VectorState(momentum, state["second_moment"].reshape(-1), state["factor"])
        update, new = reference.vector_update(theta, wide, gradient.reshape(-1).to(dtype) * scale, old)
        for index, name in enumerate(_MOMENTUM_KEYS):
            state[name].copy_(new.momentum[:, index].view(parameter.shape))
        state["second_moment"].copy_(new.second_moment.view(parameter.shape))
        state["factor"].copy_(new.factor)
        wide = wide - float(group["lr"]) * (update + group["weight_decay"] * wide)
        round_stochastically_(parameter, wide.view(parameter.shape), self._rounding_seed(parameter))

    def _step_adamw(self, group: dict[str, Any], pairs: list[tuple[Tensor, Tensor]], scale: float) -> None:
        parameters = [parameter for parameter, _ in pairs]
        states = [self.state[parameter] for parameter in parameters]
        wide = [parameter.to(_state_dtype(parameter)) for parameter in parameters]  # itself, unless of low precision
        gradients = [gradient.to(target.dtype) for (_, gradient), target in zip(pairs, wide, strict=True)]
        if scale != 1.0:
            gradients = [gradient * scale for gradient in gradients]
        decay = group["weight_decay"] if group["adam_weight_decay"] is None else group["adam_weight_decay"]
        beta1, beta2 = group["adam_betas"]
        adamw(
            wide,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=parameters[0].device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]) * group["adam_lr_mult"],
            weight_decay=decay,
            eps=group["adam_eps"],
            maximize=False,
        )
        for parameter, target in zip(parameters, wide, strict=True):
            if parameter is not target:
                round_stochastically_(parameter, target, self._rounding_seed(parameter))

    def _rounding_seed(self, parameter: Tensor) -> int:
        """Seed of a parameter's stochastic rounding: its position and its step, so that a resumed run replays it."""
        if parameter.dtype != torch.bfloat16:
            return 0
        position = next(i for i, other in enumerate(self._parameters()) if other is parameter)
        return position * 2**32 + int(self.state[parameter]["step"])

    def _parameters(self) -> Iterable[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def table(self, *, collapse: bool = False) -> str:
        """Return the routing as text: a line a parameter with name, shape, matrices, rule, learning rate and decay.

        With `collapse`, numbered blocks that are alike share a line.
        """
        header = ("parameter", "shape", "matrices", "rule", "lr", "weight decay")
        rows: list[tuple[str, ...]] = []
        for group in self.param_groups:
            for name, parameter in named_parameters(group):
                rule, lr, decay = group_rule(group, parameter), float(group["lr"]), group["weight_decay"]
                matrices = "-"
                if rule == "adamw":
                    lr *= group["adam_lr_mult"]
                    decay = decay if group["adam_weight_decay"] is None else group["adam_weight_decay"]
                elif parameter.ndim > 1:
                    batch, m, n = group_view(group).matrices(parameter.detach()).shape
                    matrices = f"{batch} x [{m}, {n}]"
                rows.append((name, str(list(parameter.shape)), matrices, rule, f"{lr:.3g}", f"{decay:g}"))
        return format_table(header, rows, collapse=collapse)
