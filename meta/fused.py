"""A window of the inner network's slots as one launch of `celo2.kernels.inner_loop`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from celo2.kernels.inner_loop import inner_loop_kernel
from celo2.meta.inner_optimizer import MOMENTA, State
from celo2.meta.learned_rule import ThetaBatch, theta_size
from celo2.meta.recipes import Recipe
from celo2.meta.tasks import MATRICES, VECTORS

# tensors of the kernel's table of addresses, in its order; a variant lacks some
MATRIX_PARTS = ("", *(f"/{moment}" for moment in MOMENTA), "/second_moment", "/row_factor", "/column_factor")
VECTOR_PARTS = ("", *(f"/{moment}" for moment in MOMENTA), "/second_moment", "/factor")
TABLE = (
    *(name + part for name in MATRICES for part in MATRIX_PARTS),
    *(name + part for name in VECTORS for part in VECTOR_PARTS),
    "scale",
    "iteration",
)
NUM_WARPS = 8


@cache
def theta_order(hidden: int) -> Tensor:
    """Return where the kernel's floats of a theta [347] come from in the order of `learned_rule.flatten`."""
    batch = ThetaBatch.from_vectors(torch.arange(theta_size(hidden), dtype=torch.float64)[None], hidden)
    first = torch.cat([batch.element, batch.short.mT, batch.long.mT, batch.vector], dim=1)
    rest = (batch.bias0, batch.hidden, batch.bias1, batch.output, batch.bias2)
    return torch.cat([x.flatten() for x in (first, *rest)]).long()


class FusedWindow:
    """Advances the trajectories of `state` [P, ...] in place; `fresh`, of the same layout, is what others begin with.

    The tensors of both must stay where they are. `images` [n, 64] float32 and `labels` [n] are the image bank.
    """

    def __init__(self, recipe: Recipe, state: State, fresh: State, images: Tensor, labels: Tensor) -> None:
        self.recipe, self.images = recipe, images
        self.labels = labels.to(torch.int32)
        self.problems, self.device = len(state["scale"]), images.device
        self._kept = state, fresh
        addresses = [[x[name].data_ptr() if name in x else 0 for name in TABLE] for x in (state, fresh)]
        self._table = torch.tensor(addresses, dtype=torch.int64, device=self.device)
        self._order = theta_order(recipe.hidden).to(self.device)

    def __call__(
        self, theta: Tensor, indices: Tensor, lr: Tensor, restart: Tensor, expert_weight: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        """Advance by a window of K slots; return losses [K, P], and with an expert 1 - cosine to it [K, P].

        `theta` is [P, 347], `indices` [K, P / 2, 64] into the image bank, `lr` [K, P], and `restart` [P] the slot at
        whose end a trajectory begins, or K.
        """
        recipe, slots = self.recipe, len(indices)
        losses = torch.empty(slots, self.problems, device=self.device)
        imitation = torch.empty_like(losses) if recipe.expert is not None else losses
        inner_loop_kernel[(self.problems,)](
            self._table,
            self.images,
            self.labels,
            indices.to(torch.int32).contiguous(),
            theta.index_select(1, self._order),
            lr.contiguous(),
            restart.to(torch.int32),
            losses,
            imitation,
            slots,
            self.problems,
            self.problems // 2,
            float(recipe.adam_lr_mult),
            float(recipe.inner_clip_norm or 0.0),
            float(expert_weight),
            UNITS=recipe.hidden,
            ORTHOGONALIZE=recipe.variant == "celo2",
            CLIP=recipe.inner_clip_norm is not None,
            CORRECTED=recipe.bias_correction,
            NORMALIZE=recipe.normalize_update,
            EXPERT=recipe.expert or "",
            PRECISION="ieee",
            num_warps=NUM_WARPS,
        )
        return losses, imitation if recipe.expert is not None else None
