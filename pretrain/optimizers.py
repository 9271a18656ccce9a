"""`--opt`: the optimizers of the harness behind one interface, routed alike.

Hidden matrices go to the method, embeddings, head and vectors to AdamW (`celo2.param_groups`); `adamw` and `celo2-base`
treat every parameter alike.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Muon, Optimizer

from celo2 import (
    FusedCelo2,
    MatrixView,
    Theta,
    VeLO,
    VeLOWeights,
    load_velo_weights,
    load_weights,
    param_groups,
)
from celo2.pretrain.model import GPT
from celo2.pretrain.recipes import OPTS, Tuning
from celo2.state import local
from celo2.tables import format_table
from celo2.theta import DEFAULT_WEIGHTS, VARIANTS


class Optimizers:
    """The torch optimizers of one run, stepped together, for a GPT or any other module.

    `num_steps`, of the whole training, is what velo needs, beside `weights`. `views` are the matrices that parameters
    split into, by name; those of a GPT are known. Every group carries `initial_lr`, its peak learning rate; `set_lr`
    scales them all. The model may be sharded by `fully_shard`; `comm_dtype` is then celo2's, and so are `zero1_mesh`, a
    mesh of the ranks that have a model whole, `backend` and `ranks_per_node`.
    Raises ValueError for an unknown `opt`, and for `weights` or `zero1_mesh` given to an optimizer that has none.
    """

    def __init__(
        self,
        opt: str,
        tuning: Tuning,
        model: nn.Module,
        weights: str | Theta | VeLOWeights | None = None,
        *,
        num_steps: int | None = None,
        views: Mapping[str, MatrixView] | None = None,
        comm_dtype: str = "auto",
        zero1_mesh: DeviceMesh | None = None,
        backend: str = "auto",
        ranks_per_node: int | None = None,
    ) -> None:
        if opt not in OPTS:
            raise ValueError(f"unknown optimizer {opt!r}: choose one of {', '.join(OPTS)}")
        if weights is not None and opt not in (*VARIANTS, "velo"):
            raise ValueError(
                f"--weights {weights} belongs to --opt celo2, celo2-base or velo; --opt {opt} has no weights"
            )
        if zero1_mesh is not None and opt not in VARIANTS:
            raise ValueError(f"--zero1 belongs to --opt celo2 or celo2-base, not to {opt}")
        self.theta: Theta | VeLOWeights | None = None
        self._max_grad_norm = tuning.max_grad_norm
        self._padding = model.padding() if isinstance(model, GPT) else {}
        if views is None and isinstance(model, GPT):
            views = model.matrix_views()
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.members: list[Optimizer] = []
        if opt in VARIANTS:
            if isinstance(weights, VeLOWeights):
                raise TypeError(f"weights={weights.label}: those of VeLO do not fit --opt {opt}")
            theta = self.theta = load_weights(weights or DEFAULT_WEIGHTS[opt])
            orthogonalize = None if opt == "celo2" else False
            if tuning.newton_schulz != "auto":
                orthogonalize = tuning.newton_schulz == "on"
            self.members.append(
                FusedCelo2(
                    param_groups(model, variant=opt, views=views),
                    tuning.lr,
                    weights=theta,
                    weight_decay=tuning.weight_decay,
                    orthogonalize=orthogonalize,
                    adam_lr_mult=tuning.adam_lr_mult,
                    adam_betas=tuning.betas,
                    max_grad_norm=tuning.max_grad_norm,
                    comm_dtype=comm_dtype,
                    zero1_mesh=zero1_mesh,
                    backend=backend,
                    ranks_per_node=ranks_per_node,
                )
            )
        elif opt == "velo":
            if isinstance(weights, Theta):
                raise TypeError(f"weights={weights.label}: a theta of Celo2 does not fit --opt velo")
            self.theta = load_velo_weights(weights)
            self.members.append(
                VeLO(
                    model.named_parameters(),
                    num_steps,
                    weights=self.theta,
                    lr=tuning.lr,
                    weight_decay=tuning.weight_decay,
                    module=model,
                )
            )
        elif opt == "adamw":
            self.members.append(_adamw(model.named_parameters(), tuning.lr, tuning))
        else:
            rules = {name: group["rule"] for group in param_groups(model) for name, _ in group["params"]}
            pairs = list(model.named_parameters())
            # PyTorch's Muon takes matrices alone: kernels of convolutions are AdamW's
            hidden = [pair for pair in pairs if rules[pair[0]] == "celo2" and pair[1].ndim == 2]
            names = {name for name, _ in hidden}
            rest = [pair for pair in pairs if pair[0] not in names]
            self.members.append(Muon(hidden, lr=tuning.lr, momentum=tuning.momentum, weight_decay=tuning.weight_decay))
            self.members.append(_adamw(rest, tuning.adam_lr or tuning.lr, tuning))
        for group in self._groups():
            group["initial_lr"] = group["lr"]
        for member in self.members:
            _create_state(member)

    def _groups(self) -> list[dict[str, object]]:
        return [group for member in self.members for group in member.param_groups]

    def set_lr(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its peak."""
        for group in self._groups():
            group["lr"] = factor * group["initial_lr"]  # type: ignore[operator]

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def step(self, loss: Tensor | None = None) -> Tensor:
        """Clip and step; return the gradient norm before clipping, float32 0-d.

        When the norm or the loss (0-d, the same on every rank) is not finite, nothing is stepped: parameters and state
        are as they were. On a GPU that is decided there, without waiting for it, by the optimizers that can (FusedCelo2
        and fused AdamW).
        """
        bad = None if loss is None else (~torch.isfinite(loss)).float()
        if isinstance(self.members[0], FusedCelo2):
            # it clips by itself, in the pass that reads the gradients anyway
            celo2 = self.members[0]
            celo2.found_inf = bad  # type: ignore[attr-defined]
            celo2.step()
            assert celo2.grad_norm is not None
            return celo2.grad_norm
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self._max_grad_norm is not None:
            clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm)
        bad_norm = (~torch.isfinite(norm)).float()
        bad = bad_norm if bad is None else torch.maximum(bad, bad_norm)
        if all(isinstance(member, AdamW) and member.defaults["fused"] for member in self.members):
            for member in self.members:
                member.found_inf, member.grad_scale = bad, None  # type: ignore[attr-defined]
                member.step()
        elif not bad:
            for member in self.members:
                if isinstance(member, VeLO):
                    member.step(loss=loss)
                else:
                    member.step()
        return norm

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank."""
        states = (state for member in self.members for state in member.state.values())
        return sum(local_bytes(tensor) for state in states for tensor in state.values())

    def table(self) -> str:
        """The routing as text, with the numbered blocks on one line: name, shape, matrices, rule, lr, decay."""
        if isinstance(self.members[0], FusedCelo2):
            return self.members[0].table(collapse=True)
        rows: list[tuple[str, ...]] = []
        for member in self.members:
            for group in member.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    shape, rule = str(list(parameter.shape)), type(member).__name__.lower()
                    rows.append((name, shape, rule, f"{group['initial_lr']:.3g}", f"{group['weight_decay']:g}"))
        return format_table(("parameter", "shape", "rule", "lr", "weight decay"), rows, collapse=True)

    def parameters_by_rule(self) -> dict[str, int]:
        """Number of parameters that each rule steps, those that are padding left out."""
        counts: dict[str, int] = {}
        for member in self.members:
            for group in member.param_groups:
                rule = group.get("rule", type(member).__name__.lower())
                size = sum(parameter.numel() - self._padding.get(parameter, 0) for parameter in group["params"])
                counts[rule] = counts.get(rule, 0) + size
        return counts


def local_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor on this rank."""
    return local(tensor).nbytes


def _create_state(member: Optimizer) -> None:
    """Create the state that optimizers make in their first step, so that a checkpoint before it has it too."""
    for group in member.param_groups:
        for parameter in group["params"]:
            if isinstance(member, Muon):
                member.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
            elif isinstance(member, FusedCelo2):
                # makes it
                member.state[parameter]
            elif isinstance(member, AdamW):
                step = torch.zeros((), dtype=torch.float32, device=parameter.device if group["fused"] else "cpu")
                moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
                member.state[parameter] = {"step": step, **moments}


def _adamw(parameters: Iterable[tuple[str, nn.Parameter]], lr: float, tuning: Tuning) -> AdamW:
    """AdamW with decay on matrices only, as nanoGPT and llm.c do."""
    named = list(parameters)
    groups = [
        {"params": [pair for pair in named if pair[1].ndim >= 2], "weight_decay": tuning.weight_decay},
        {"params": [pair for pair in named if pair[1].ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for _, parameter in named)
    return AdamW([group for group in groups if group["params"]], lr=lr, betas=tuning.betas, fused=fused)
