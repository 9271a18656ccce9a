"""The phases of a step through the Triton kernels: their memory, made once, and the order of their launches.

Parameters that share dtypes, theta, options and the width of their tiles form a batch, and a batch is stepped by ten
launches whatever its number of matrices. Four go over the elements: gradient moments, feature moments, learned update,
and after Newton-Schulz the new parameters. Between them small ones add up what the tiles have left, decide on clipping
and skipping (once for all batches), and make the factors and normalisers. Nothing waits for the device: the global norm
and the decision to skip a step stay there. Addresses of gradients are refreshed when they move; all else is built
anew when a parameter, its state or its layout changes, and once for each set of parameters that have gradients
(`celo2.planner`).

Of parameters that are divided among ranks the tables have the addresses of the messages: what a rank adds to a sum over
a whole matrix is written there by one small launch for all matrices, an all-reduce adds it up, and the next kernel
reads it there. Phase 3 writes directions into the all-to-all's message itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celo2.adamw import AdamWJob, round_on_host
from celo2.backends.batches import MatrixBatch, VectorBatch, batches_of, totals_of, vector_batches
from celo2.backends.owner import Move, Moves, Owner
from celo2.backends.parts import Part, parts_of_entry, seeds_of, seeds_of_shard, send, upload
from celo2.backends.torch import TorchBackend
from celo2.blocks import CONTROL_BLOCK
from celo2.comm import Comm
from celo2.compilation import can_rehearse, launch, rehearsal
from celo2.exchanges import Transfer, padded
from celo2.kernels import layout, sharing
from celo2.kernels.gradient_moments import control_kernel
from celo2.kernels.learned_update import learned_update_kernel
from celo2.kernels.rounding import round_kernel
from celo2.norms import foreach_norm
from celo2.plan import HEADER, Entry, Plan, Slot
from celo2.scratch import Scratch
from celo2.shard_layout import Slice
from celo2.step import Inputs, Messages, on

assert layout.FLAGS.value == HEADER


class TritonBackend:
    """All parameters of one device that the kernels step, and what they share: control, rates and counters.

    `whole` are the slots that this rank takes whole; the entries of `plan` that have a gradient now are stepped with
    the other ranks. Making one is not collective: addresses may change on one rank alone. A step of it is.

    A step leaves on the device `grad_norm` (float32, before clipping), `skip` (float32, 1 when the step was skipped),
    `skipped` (int64 [1], how often that was) and `control`, whose row 1 + i has what the gradients of group i are
    multiplied by. Directions that Newton-Schulz takes are kept in `ns_dtype`. Other backends of the same parameters may
    share `skipped` and `scratch`; `most` says how many elements all directions of a dtype could have. `rest` steps what
    the kernels do not take, once the host has read whether to.
    """

    def __init__(
        self,
        whole: Sequence[Slot],
        groups: int,
        device: torch.device,
        ns_dtype: torch.dtype,
        *,
        plan: Plan | None = None,
        skipped: Tensor | None = None,
        scratch: Scratch | None = None,
        most: Mapping[torch.dtype, int] | None = None,
    ) -> None:
        self.device, self.plan = device, plan
        self.scratch = Scratch(device) if scratch is None else scratch
        self.rest: TorchBackend | None = None
        self.round = round_on_device
        self.parameters = [slot.parameter for slot in whole]
        parts = [Part.of(slot, scratch=self.scratch) for slot in whole if not slot.is_vector]
        batches = batches_of(parts, device)
        *totals, self.totals = totals_of(batches, device)
        sizes = [
            (sum(part.p.numel() for part in batch), ns_dtype if batch[0].slot.orthogonalize else torch.float32)
            for _, _, batch in batches
        ]
        directions = self.scratch.take_all("directions", sizes, most or {})
        self.batches = [
            MatrixBatch(batch, blocks, aligned, direction, total, self.scratch, f"batch {index}")
            for index, ((blocks, aligned, batch), direction, total) in enumerate(
                zip(batches, directions, totals, strict=True)
            )
        ]
        self.vectors = [VectorBatch(batch) for batch in vector_batches(whole)]

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.groups = groups
        self.control = zeros(1 + groups, layout.CONTROL.value)
        # on the device, and as last sent there
        self.rates, self.limits = zeros(groups, layout.RATES.value), zeros(groups)
        self._rates: NDArray[np.float32] | None = None
        self._limits: NDArray[np.float32] | None = None
        self._captured: list[Tensor] = []
        self.grad_norm = zeros()
        self.skip = zeros()
        self.skipped = zeros(1, dtype=torch.int64) if skipped is None else skipped
        self.one, self.zero = torch.ones(1, dtype=torch.float32, device=device), zeros(1)
        self.shards: list[MatrixBatch] = []
        self.shard_vectors: list[VectorBatch] = []
        self.transposed: list[tuple[Tensor, Tensor]] = []
        self.messages = Messages(*[self.zero[:0]] * 5)
        if plan is not None:
            self._plan_shards(plan, ns_dtype)

    def _plan_shards(self, plan: Plan, ns_dtype: torch.dtype) -> None:
        """Lay out the messages, and batches of this rank's slices with their addresses."""
        # one memory, so that one launch clears all messages
        starts = np.cumsum([0, *(-(-length // 64) * 64 for length in plan.lengths)]).tolist()
        self.all_messages = self.scratch.take("messages", starts[-1]).zero_()
        first, second, third = (
            self.all_messages[start : start + length] for start, length in zip(starts, plan.lengths, strict=False)
        )
        active = {index: entry for index, entry in enumerate(plan.entries) if entry.slot.parameter.grad is not None}
        self.flags = upload(np.array([index in active for index in range(len(plan.entries))], np.float32), self.device)
        self.parameters += [entry.slot.parameter for entry in active.values()]
        nothing = self.zero[:0]
        messages = Messages(first, second, third, nothing, nothing)

        # phase 3 writes into the message, and what is of transposed storage, or goes to several ranks, behind it
        sent_size = size = sum(plan.part_counts)
        transposed, divided = list[tuple[Transfer, Slice, int]](), list[tuple[Transfer, Slice, int]]()
        parts = []
        for index, entry in active.items():
            found = parts_of_entry(plan, entry, messages, self.scratch) if entry.layout is not None else ()
            for number, part in found:
                if entry.slot.orthogonalize and number is not None:
                    piece = entry.slices[number]
                    of_matrix = [list[Transfer]() for _ in range(piece.count)]
                    for transfer in plan.parts_of[index, number]:
                        of_matrix[transfer.matrix - piece.matrix].append(transfer)
                    offsets = [transfers[0].offset for transfers in of_matrix]
                    is_transposed = part.swapped and min(part.p.shape[1:]) > 1
                    for b, transfers in enumerate(of_matrix):
                        if is_transposed or len(transfers) > 1:
                            (transposed if is_transposed else divided).extend((t, piece, size) for t in transfers)
                            offsets[b], size = size, size + padded(piece.rows * piece.columns)
                    part = replace(part, directions=np.array(offsets, dtype=np.int64))
                parts.append(part)
        # every rank sends all parts; those without gradients come back to nobody
        sent = self.scratch.take("sent", size, dtype=plan.comm_dtype).zero_()
        received = self.scratch.take("received", sum(plan.receive_counts), dtype=plan.comm_dtype).zero_()
        shared = third if plan.shares_directions else third[:0]
        self.messages = Messages(first, second, shared, sent[:sent_size], received)
        for transfer, piece, offset in transposed:
            rows, columns = transfer.piece.rows, transfer.piece.columns
            there = sent[transfer.offset : transfer.offset + rows * columns].view(rows, columns)
            behind = sent[offset : offset + piece.rows * piece.columns].view(piece.columns, piece.rows).mT
            row, column = transfer.piece.row - piece.row, transfer.piece.column - piece.column
            self.transposed.append((there, behind[row : row + rows, column : column + columns]))
        self.divided = Moves([Move(transfer, offset, piece) for transfer, piece, offset in divided], self.zero)
        self.sent = sent

        batches = batches_of(parts, self.device)
        *totals, self.shard_totals = totals_of(batches, self.device)
        self.counted = self.shard_totals
        if not all(entry.counts for entry in active.values()):
            # 1 for matrices that count on this rank, 0 for those of which another is the first replica
            counting = {entry.slot.position for entry in active.values() if entry.counts}
            *weights, self.weights = totals_of(batches, self.device)
            for (_, _, some), weight in zip(batches, weights, strict=True):
                ones = [np.full(part.p.shape[0], part.slot.position in counting, np.float32) for part in some]
                weight.copy_(upload(np.concatenate(ones), self.device))
            self.counted = torch.empty_like(self.shard_totals)
        # those for Newton-Schulz go into the message
        sizes = [
            (0 if batch[0].slot.orthogonalize else sum(part.p.numel() for part in batch), torch.float32)
            for _, _, batch in batches
        ]
        directions = self.scratch.take_all("shards' directions", sizes, {})
        for index, ((blocks, aligned, some), own, total) in enumerate(zip(batches, directions, totals, strict=True)):
            orthogonal = some[0].slot.orthogonalize
            batch = MatrixBatch(
                some, blocks, aligned, sent if orthogonal else own, total, self.scratch, f"shards {index}"
            )
            if orthogonal:
                # what comes back from the owners has an RMS of 1
                elements = [np.full(part.p.shape[0], part.whole[0] * part.whole[1], np.float32) for part in some]
                batch.matrix_squares.copy_(upload(np.concatenate(elements), self.device))
            self.shards.append(batch)
        self.shard_vectors = list(self._shard_vectors(plan, messages, [e for e in active.values() if not e.layout]))
        self.owner = Owner(plan, ns_dtype, self.scratch)

    def _shard_vectors(self, plan: Plan, messages: Messages, entries: Sequence[Entry]) -> Iterator[VectorBatch]:
        by_position = {entry.slot.position: entry for entry in entries}
        for batch in vector_batches([entry.slot for entry in entries]):
            moments, squares = (
                message.data_ptr() + 4 * np.array([getattr(by_position[slot.position], name) for slot in batch])
                for message, name in ((messages.features, "feature_sumsq"), (messages.directions, "direction_sumsq"))
            )
            nought = np.zeros(1, dtype=np.int64)
            homes = [by_position[slot.position].home for slot in batch]
            pairs = zip(batch, homes, strict=True)
            seeds = np.concatenate([seeds_of_shard(slot.position, first, nought) for slot, first in pairs])
            yield VectorBatch(batch, seeds, moments, squares)

    # the step

    def begin(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._set_rates(inputs.groups)
        scale, found = inputs.grad_scale, inputs.found_inf
        # what gradients are multiplied by, and whether the step must be skipped: float32 [1], on the device
        self.unscale = self.one if scale is None else _number(scale, self.device).reciprocal()
        self.found = self.zero if found is None else _number(found, self.device)
        if self.plan is not None:
            self.all_messages.zero_()

    def _set_rates(self, groups: Sequence[dict[str, Any]]) -> None:
        """Bring learning rates, decays and limits to the device where they have changed."""
        rates = np.zeros((self.groups, layout.RATES.value), np.float32)
        for index, group in enumerate(groups):
            lr = group["lr"]
            # a rate on the device is copied there, below
            rates[index] = (math.nan if _on_device(lr) else float(lr)), group["weight_decay"]
        limits = np.array(
            [math.inf if group["max_grad_norm"] is None else group["max_grad_norm"] for group in groups], np.float32
        )
        if self._rates is None or not np.array_equal(rates, self._rates, equal_nan=True):
            self._rates = rates if send(self.rates, rates, self._captured) else None
        if self._limits is None or not np.array_equal(limits, self._limits):
            self._limits = limits if send(self.limits, limits, self._captured) else None
        for index, group in enumerate(groups):
            if _on_device(group["lr"]):
                self.rates[index, 0].copy_(group["lr"], non_blocking=True)

    def gradient_moments(self, *, clipped: bool = False) -> None:
        assert not clipped, "the sums of elements beyond the clip are taken with the others"
        self.norms = norms_of(self.inputs.whole, self.zero)
        for whole in self.batches:
            whole.gradient_moments(self.unscale)
        for shards in self.shards:
            shards.gradient_moments(self.unscale)
            shards.share_gradient_sums()
        if self.plan is not None:
            if self.counted is not self.shard_totals:
                torch.mul(self.shard_totals, self.weights, out=self.counted)
            shares = norms_of([gradient for gradient in self.inputs.shards if gradient.numel()], self.zero)
            self._share_norm(self.norms, shares, self.unscale, self.found)

    def _share_norm(self, norms: Tensor, shares: Tensor, unscale: Tensor, found: Tensor) -> None:
        """Write the head of the message of gradients."""
        assert self.plan is not None
        launch(sharing.share_norm_kernel, (1,),
            self.counted, self.counted.numel(), shares, shares.numel(), self.totals, self.totals.numel(),
            norms, norms.numel(), unscale, found, self.flags, len(self.plan.entries), self.messages.gradients,
            BLOCK=CONTROL_BLOCK,
        )  # fmt: skip

    def decide(self, comm: Comm) -> bool:
        if self.plan is None:
            self._decide(self.norms, self.unscale, self.found)
        else:
            comm.note_flags(self.messages.gradients[HEADER : HEADER + len(self.plan.entries)])
            # what a rank has found is in the message
            self._decide(self.norms, self.unscale, self.zero)
        return True

    def _decide(self, norms: Tensor, unscale: Tensor, found: Tensor) -> None:
        """Global norm, clipping and skipping."""
        entries, ranks = (0, 1) if self.plan is None else (len(self.plan.entries), self.plan.ranks)
        launch(control_kernel, (1,),
            self.totals, self.totals.numel(), norms, norms.numel(), unscale, found, self.limits, self.groups,
            self.control, self.grad_norm, self.skip, self.skipped,
            self.zero if self.plan is None else self.messages.gradients, entries, ranks,
            SHARDED=self.plan is not None, BLOCK=CONTROL_BLOCK,
        )  # fmt: skip

    def must_clip(self) -> bool:
        return False

    def feature_moments(self) -> None:
        for shards in self.shards:
            shards.feature_moments(self.control)
        for vectors in self.shard_vectors:
            vectors.update(self.control, self.rates, 0, 1)

    def learned_update(self) -> None:
        for shards in self.shards:
            shards.learned_update(self.control)
            if not shards.orthogonalize:
                shards.sum_directions(self.control)
        for vectors in self.shard_vectors:
            vectors.update(self.control, self.rates, 1, 2)
        for there, behind in self.transposed:
            there.copy_(behind)
        if self.plan is not None:
            self.divided.launch(self.messages.sent, self.sent, into_message=True)

    def step_whole(self) -> None:
        for batch in self.batches:
            batch.update(self.control, self.rates)
        for vectors in self.vectors:
            vectors.update(self.control, self.rates)

    def orthogonalize(self, comm: Comm) -> None:
        self.owner.orthogonalize(self.messages.received, comm)

    def apply(self) -> None:
        for there, behind in self.transposed:
            behind.copy_(there)
        if self.plan is not None:
            self.divided.launch(self.messages.sent, self.sent, into_message=False)
        for shards in self.shards:
            shards.apply(self.control, self.rates)
        for vectors in self.shard_vectors:
            vectors.update(self.control, self.rates, 2, 3)
        # autograd must not take what it saved for unchanged
        torch.autograd.graph.increment_version(self.parameters)
        if self.rest is not None and not float(self.skip):
            self.rest.step_alone(self.inputs, self.control[1:, 0].tolist())
        # gradients must be free when their owner lets go
        self.rest, self.inputs = None, _NOTHING

    # compilation

    def compile(self) -> None:
        """Compile the kernels of a step, several at once; what this leaves out is compiled when it is launched."""
        if can_rehearse(learned_update_kernel):
            with on(self.device), rehearsal():
                self._rehearse()

    def _rehearse(self) -> None:
        """Launch every kernel of a step."""
        for batch in self.batches:
            batch.rehearse(self.control, self.rates, shared=False)
        for shards in self.shards:
            shards.rehearse(self.control, self.rates, shared=True)
        for vectors in self.vectors:
            vectors.update(self.control, self.rates)
        for vectors in self.shard_vectors:
            for first in range(3):
                vectors.update(self.control, self.rates, first, first + 1)
        if self.plan is not None:
            self._share_norm(self.zero, self.zero, self.one, self.zero)
            for into_message in (True, False):
                self.divided.launch(self.messages.sent, self.sent, into_message=into_message)
            self.owner.rehearse(self.messages.received)
        self._decide(self.zero, self.one, self.zero)


_NOTHING = Inputs([], [], [])


def norms_of(gradients: Sequence[Tensor], nothing: Tensor) -> Tensor:
    """Return the norms of some gradients, float32 [gradients]; `nothing` when there are none."""
    return torch.stack(foreach_norm(gradients)).float() if gradients else nothing


def _number(value: Tensor, device: torch.device) -> Tensor:
    return value.to(device, torch.float32).reshape(1)


def round_on_device(job: AdamWJob, wide: Tensor) -> None:
    """Round a value of the AdamW side into its parameter, by its step counter on the device."""
    if job.parameter.dtype != torch.bfloat16:
        job.parameter.copy_(wide)
    elif job.parameter.stride() != wide.stride():
        round_on_host(job, wide)
    else:
        size = wide.numel()
        # the same 32 bits, but always an int32 to the compiler
        seed = int(seeds_of(job.position, 1).astype(np.uint32).view(np.int32)[0])
        with on(wide.device):
            launch(round_kernel, (-(-size // 1024),), job.parameter, wide, job.state["step"], seed, size, BLOCK=1024)
        torch.autograd.graph.increment_version(job.parameter)


def _on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"
