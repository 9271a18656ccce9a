"""How a parameter is seen as a batch of matrices.

The rule takes every mean, norm and orthogonalisation per matrix. The authors of Celo2 store attention weights per head,
so for them one head's slice is a matrix; a fused `[3 * heads * head_dim, width]` projection is the same algorithm only
when it is split into those slices first. `MatrixView` says how.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixView:
    """How a parameter of two or more axes splits into matrices `[matrices, rows, columns]`.

    `split * heads` equal blocks are cut along `axis` (0: a fused q, k, v or per-head input projection; 1: an output
    projection whose input is the concatenated heads), of every matrix of a batch along 0 alone. `flatten` folds all
    axes but the first into columns (a convolution kernel `[out, in, kh, kw]` becomes `[out, in * kh * kw]`); None, the
    default, does so from four axes on.
    Otherwise the two trailing axes are the matrix and the leading ones batch matrices. Source: the authors' code of
    Celo2, whose attention shapes are `[3, heads, width, head_dim]` and `[heads, head_dim, width]`.
    """

    split: int = 1
    heads: int = 1
    axis: int = 0
    flatten: bool | None = None

    def __post_init__(self) -> None:
        for name in ("split", "heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: a matrix view needs a whole number of at least 1")
        if self.axis not in (0, 1):
            raise ValueError(f"axis={self.axis!r}: a matrix view splits along axis 0 or 1")
        if self.flatten is not None and not isinstance(self.flatten, bool):
            raise ValueError(f"flatten={self.flatten!r}: must be True, False or None")

    @property
    def blocks(self) -> int:
        return self.split * self.heads

    def flattens(self, axes: int) -> bool:
        """Whether a parameter of that many axes is folded into one matrix of rows and columns."""
        return axes > 2 and (axes > 3 if self.flatten is None else self.flatten)

    def batches(self, axes: int) -> bool:
        """Whether the leading of that many axes batch matrices."""
        return axes > 2 and not self.flattens(axes)

    def check(self, shape: torch.Size, name: str = "parameter") -> None:
        """Raise ValueError when a parameter of `shape` cannot be viewed like this."""
        if len(shape) < 2:
            if self != MatrixView():
                raise ValueError(
                    f"{name} of shape {tuple(shape)} has fewer than two axes: it takes no matrix view ({self})"
                )
            return
        if self.blocks > 1:
            if self.batches(len(shape)) and self.axis == 1:
                raise ValueError(
                    f"{name} of shape {tuple(shape)}: a batch of matrices is cut into blocks along axis 0; the columns "
                    "of one (axis=1) lie too far apart for a view"
                )
            matrix = shape[-2:] if self.batches(len(shape)) else torch.Size((shape[0], shape[1:].numel()))
            length = matrix[self.axis]
            if length % self.blocks:
                raise ValueError(
                    f"{name} of shape {tuple(shape)}: axis {self.axis} of length {length} does not divide into "
                    f"split * heads = {self.split} * {self.heads} = {self.blocks} equal blocks"
                )

    def shape(self, shape: torch.Size) -> tuple[int, int, int]:
        """Return the shape [matrices, rows, columns] of a parameter of `shape` seen like this."""
        if self.batches(len(shape)):
            return shape[:-2].numel() * self.blocks, shape[-2] // self.blocks, shape[-1]
        rows, columns = shape[0], shape[1:].numel()
        if self.axis == 0:
            return self.blocks, rows // self.blocks, columns
        return self.blocks, rows, columns // self.blocks

    def order(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Return the axes of a flattened parameter as they lie in memory, None where that is how they are numbered.

        The columns of a kernel in `channels_last` are viewed in its own order: the rule treats all columns alike, so
        that its update is permuted as they are.
        """
        if not self.flattens(tensor.ndim) or tensor.is_contiguous():
            return None
        inner = sorted(range(1, tensor.ndim), key=tensor.stride, reverse=True)
        numbered = [axis for axis in range(1, tensor.ndim) if tensor.shape[axis] > 1]
        return None if [axis for axis in inner if tensor.shape[axis] > 1] == numbered else (0, *inner)

    def matrices(self, tensor: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
        """View `tensor` as `[matrices, rows, columns]` on the same storage.

        A gradient is viewed in the `order` of its parameter. Raises ValueError when the memory layout allows no such
        view.
        """
        order = self.order(tensor) if order is None else order
        if order is not None and self.blocks > 1 and self.axis == 1:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} cannot be cut along "
                "its columns, which lie in another order; store it contiguously "
                "(module.to(memory_format=torch.contiguous_format))"
            )
        try:
            if self.flattens(tensor.ndim):
                tensor = (tensor if order is None else tensor.permute(order)).view(tensor.shape[0], -1)
            if tensor.ndim > 2:
                m, n = tensor.shape[-2:]
                if self.blocks > 1:
                    tensor = tensor.view(*tensor.shape[:-2], self.blocks, m // self.blocks, n)
                return tensor.view(tensor.shape[:-2].numel(), *tensor.shape[-2:])
        except RuntimeError as error:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} has no matrix view without a "
                "copy; store the parameter contiguously (module.to(memory_format=torch.contiguous_format))"
            ) from error
        if self.blocks == 1:
            return tensor.unsqueeze(0)
        rows, columns = tensor.shape
        if self.axis == 0:
            return tensor.view(self.blocks, rows // self.blocks, columns)
        return tensor.view(rows, self.blocks, columns // self.blocks).transpose(0, 1)

    def factor_shapes(self, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the row and column factors of a parameter, [..., rows, 3] and [..., columns, 3].

        They have the parameter's own axes where they can, so that they shard as it does: an axis that is cut into
        blocks stays whole, and leading axes stay.
        """
        if self.batches(len(shape)):
            if self.blocks == 1:
                return (*shape[:-1], 3), (*shape[:-2], shape[-1], 3)
            return (*shape[:-1], 3), (*shape[:-2], self.blocks, shape[-1], 3)
        rows, columns = shape[0], shape[1:].numel()
        if self.blocks == 1:
            return (rows, 3), (columns, 3)
        if self.axis == 0:
            return (rows, 3), (self.blocks, columns, 3)
        return (self.blocks, rows, 3), (columns, 3)

    @staticmethod
    def factors(factor: Tensor, batch: int) -> Tensor:
        """View a row or column factor as [matrices, rows or columns, 3], in the order of its memory."""
        if not factor.is_contiguous():
            # of a parameter in channels_last
            factor = factor.permute(*sorted(range(factor.ndim - 1), key=factor.stride, reverse=True), -1)
        return factor.view(batch, -1, 3) if batch else factor.view(0, factor.shape[-2], 3)
