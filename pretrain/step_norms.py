"""How far an optimizer step moves the parameters of each kind, beside how large they are.

For the parameters p of a kind, n elements, before and after a step:

    weight_rms   = sqrt(sum(p_before ** 2) / n)
    update_rms   = sqrt(sum((p_after - p_before) ** 2) / n)
    update_ratio = update_rms / weight_rms

The update is all that the step does: learning rate, weight decay and rounding included. The kinds are those that
`FusedCelo2` routes by (`celo2.routes`), whichever optimizer steps them, so runs of different optimizers compare:
`matrix` (the learned rule's, or Muon's), `embedding`, `head`, `vector`, `table`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from celo2.norms import foreach_norm
from celo2.pretrain.model import GPT
from celo2.pretrain.parallel import World
from celo2.routes import route_module
from celo2.routing import kind_of_route
from celo2.state import local


class StepNorms:
    """Measures a step between `before` and `after`; nothing is held or computed between `after` and `before`.

    `replicas` is how many ranks have each element of the parameters: 1, or those of DDP or HSDP. A copy of this rank's
    parameters, 4 bytes an element, lives while the optimizer steps, when no activations do. Elements that are padding
    of the vocabulary do not count; they are zero, and stay so but under `celo2-base`.
    """

    def __init__(self, model: nn.Module, world: World, replicas: int) -> None:
        self._world, self._replicas = world, replicas
        padding = model.padding() if isinstance(model, GPT) else {}
        self._parameters: dict[str, list[Tensor]] = {}
        self._counts: dict[str, int] = {}
        for route in route_module(model):
            if route.parameter.requires_grad:
                kind = kind_of_route(route, route.rule)
                self._parameters.setdefault(kind, []).append(route.parameter)
                count = route.parameter.numel() - padding.get(route.parameter, 0)
                self._counts[kind] = self._counts.get(kind, 0) + count
        self._copies: list[Tensor] = []
        self._weights: list[Tensor] = []

    def _local(self) -> list[Tensor]:
        return [local(parameter).detach() for found in self._parameters.values() for parameter in found]

    @torch.no_grad()
    def before(self) -> None:
        """Copy this rank's parameters; nothing waits for a GPU."""
        self._copies = [part.to(torch.float32, copy=True) for part in self._local()]
        self._weights = foreach_norm(self._copies)

    @torch.no_grad()
    def after(self) -> dict[str, float]:
        """What the step did, by `NAME/KIND`; collective, one message, and it waits for the step."""
        for copy, part in zip(self._copies, self._local(), strict=True):
            # one parameter at a time: the copy becomes the difference
            copy.sub_(part)
        norms = torch.stack([*self._weights, *foreach_norm(self._copies)]).tolist()
        self._copies, self._weights = [], []
        squares = iter([norm**2 for norm in norms])
        sums = [sum(next(squares) for _ in found) for _ in range(2) for found in self._parameters.values()]
        means = [total / self._replicas for total in self._world.all_reduce_sum(*sums)]
        weights, updates = means[: len(self._counts)], means[len(self._counts) :]
        found: dict[str, float] = {}
        for (kind, count), weight, update in zip(self._counts.items(), weights, updates, strict=True):
            found[f"weight_rms/{kind}"] = math.sqrt(weight / count)
            found[f"update_rms/{kind}"] = math.sqrt(update / count)
            found[f"update_ratio/{kind}"] = math.sqrt(update / weight) if weight else math.nan
        return found
