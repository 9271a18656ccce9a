"""A window of the MLP's slots as one launch: `celo2.kernels.inner_loop`, a program a trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

from celo2.kernels.inner_loop import WARPS, inner_loop_kernel
from celo2.meta.inner_optimizer import MOMENTA, State
from celo2.meta.learned_rule import ThetaBatch
from celo2.meta.network import MATRICES, VECTORS
from celo2.meta.recipes import Recipe

# tensors of the kernel's table of addresses, in its order; a variant lacks some
MATRIX_PARTS = ("", *(f"/{moment}" for moment in MOMENTA), "/second_moment", "/row_factor", "/column_factor")
VECTOR_PARTS = ("", *(f"/{moment}" for moment in MOMENTA), "/second_moment", "/factor")
TABLE = (
    *(name + part for name in MATRICES for part in MATRIX_PARTS),
    *(name + part for name in VECTORS for part in VECTOR_PARTS),
    "scale",
    "iteration",
)


def packed(theta: ThetaBatch) -> Tensor:
    """Return the floats of each theta in the kernel's order, [P, floats]."""
    first = torch.cat([theta.element, theta.short.mT, theta.long.mT, theta.vector], dim=1)
    rest = (theta.bias0, theta.hidden, theta.bias1, theta.output, theta.bias2[:, None])
    return torch.cat([x.flatten(1) for x in (first, *rest)], dim=1)


class FusedLoop:
    """Advances the trajectories of `state` [P, ...] in place; pairs restart from their rows of `fresh` [N, ...].

    The tensors of both must stay where they are. `images` [n, 64] float32 and `labels` [n] are the bank of examples.
    On a CPU it runs in Triton's interpreter alone.
    """

    def __init__(self, recipe: Recipe, state: State, fresh: State, images: Tensor, labels: Tensor) -> None:
        self.recipe, self.images = recipe, images
        self.labels = labels.to(torch.int32)
        self.problems, self.device = len(state["scale"]), images.device
        addresses = [[x[name].data_ptr() if name in x else 0 for name in TABLE] for x in (state, fresh)]
        # the kernel reads four elements at once
        assert not any(address % 16 for row in addresses for address in row), "tensors begin at multiples of 16 bytes"
        self._table = torch.tensor(addresses, dtype=torch.int64, device=self.device)

    def __call__(
        self,
        theta: ThetaBatch,
        indices: Tensor,
        lr: Tensor,
        restarts: dict[int, list[int]],
        share: Tensor | None = None,
        expert_weight: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Advance by a window of K slots; return losses [K, P], and with an expert 1 - cosine to it [K, P].

        `indices` [K, N, 64] point into the bank, `lr` is [K, P], `share` [K, N, 64]; `restarts` are the pairs that
        begin anew at the end of a slot, each once at most.
        """
        recipe, slots = self.recipe, len(indices)
        restart = torch.full((self.problems // 2,), slots, dtype=torch.int32)
        for slot, pairs in restarts.items():
            restart[pairs] = slot
        losses = torch.empty(slots, self.problems, device=self.device)
        imitation = torch.empty_like(losses) if recipe.expert is not None else losses
        inner_loop_kernel[(self.problems,)](
            self._table,
            self.images,
            self.labels,
            indices.to(torch.int32).contiguous(),
            packed(theta),
            lr.contiguous(),
            lr if share is None else share.contiguous(),
            restart.to(self.device),
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
            SHARED=share is not None,
            PRECISION="ieee",
            num_warps=WARPS,
        )
        return losses, imitation if recipe.expert is not None else None
