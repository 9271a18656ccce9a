"""The inner loop: all trajectories of one network on this rank, advanced one window of slots at a time.

When a trajectory ends is known beforehand (its counter and length do not depend on a loss), so a window is planned on
the host: at which slot each particle starts anew, and from which state. A slot is one inner step of every trajectory;
a particle that ended in the previous slot spends its slot on the restart and takes no step. What `TruncatedStep.plan`
decides, `TruncatedStep.advance` carries out on the device, without a look back at the host.

Arrays that belong to a particle have the axes [slots, signs, particles] or [signs, particles]; problems are the two
axes flattened, the + signs first.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celo2.meta.inner_optimizer import InnerOptimizer, Rehearsal, State
from celo2.meta.learned_rule import ThetaBatch
from celo2.meta.network import MLP
from celo2.meta.randomness import Purpose, generator
from celo2.meta.recipes import Recipe
from celo2.meta.tasks import TaskFamily, normalised_loss

Arrays = dict[str, NDArray[np.generic]]
BACKENDS = ("auto", "triton", "torch")
# decay of the average loss whose rise marks a trajectory as worth resuming
DRAWUP_DECAY = 0.9


def backend_of(name: str, device: torch.device) -> str:
    """Return what advances the MLP's windows: `triton`, one kernel a window, or `torch`; `auto` is Triton on a GPU.

    Raises ValueError for `triton` where it cannot run.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: allowed: {', '.join(BACKENDS)}")
    found = importlib.util.find_spec("triton") is not None
    if name == "auto":
        return "triton" if found and device.type == "cuda" else "torch"
    if name == "triton" and not found:
        raise ValueError("backend 'triton' needs Triton: pip install 'celo2[triton]', or give --backend torch")
    if name == "triton" and device.type == "cpu":
        from celo2.backends.parts import interpreted

        if not interpreted():
            raise ValueError("backend 'triton' needs a GPU, or TRITON_INTERPRET=1 on a CPU: give --backend torch")
    return name


@dataclass(frozen=True)
class Plan:
    """What happens in a window: masks [K, n], and where and from what each particle restarts."""

    mask: NDArray[np.bool_]
    """False on the slots that are spent on a restart."""
    done: NDArray[np.bool_]
    """True on the last training slot of a trajectory."""
    restarts: dict[int, list[int]]
    """Slot to the particles (of this rank) that restart in it."""
    resumed: NDArray[np.bool_]
    """[n], whether a restart continues the particle's snapshot."""
    lr: NDArray[np.float32]
    """[K, n], the inner learning rate of each slot."""
    batch: NDArray[np.int64]
    """[K, n], how many examples of each slot's batch count."""
    weight: NDArray[np.float64]
    """[K, n], the weight of each slot's loss in the meta-loss."""

    @classmethod
    def joined(cls, plans: Sequence[Plan]) -> Plan:
        """Return the plans of several families as one, their particles one family after another."""
        restarts: dict[int, list[int]] = {}
        first = 0
        for plan in plans:
            for slot, particles in plan.restarts.items():
                restarts.setdefault(slot, []).extend(first + i for i in particles)
            first += len(plan.resumed)
        arrays = ("mask", "done", "resumed", "lr", "batch", "weight")
        return cls(restarts=restarts, **{name: np.concatenate([vars(x)[name] for x in plans], -1) for name in arrays})


@dataclass(frozen=True)
class Window:
    """A window as `TruncatedStep.advance` takes it, on the device: K slots of N particles, P = 2 N problems."""

    index_KNB: Tensor
    """Rows of the bank of each slot's batches."""
    lr_KP: Tensor
    share_KNB: Tensor | None
    """What the examples of a batch weigh; None where all batches are full."""
    restarts: dict[int, list[int]]
    """Slot to the particles that restart in it, after its step; one restart a particle at most."""


@dataclass(frozen=True)
class Unroll:
    """What a window gave: normalised losses [K, 2, n], imitation losses or None, the plan, non-finite losses seen."""

    losses: NDArray[np.float64]
    imitation: NDArray[np.float64] | None
    plan: Plan
    non_finite: int


class TruncatedStep:
    """Trajectories of a family's particles in `particles` (numbers of the whole run), two signs each.

    `unroll` advances them by one window under one theta a problem; they persist from window to window. Everything
    random is a function of (seed, particle, outer step).
    """

    def __init__(
        self,
        recipe: Recipe,
        family: TaskFamily,
        particles: Sequence[int],
        *,
        device: torch.device,
        compiled: bool = True,
        backend: str = "torch",
    ) -> None:
        self.recipe, self.family, self.particles, self.device = recipe, family, particles, device
        self.batches = (family.batches(particles),)
        self.network = family.network
        self.optimizer = InnerOptimizer(recipe, self.network, compiled=compiled)
        if device.type == "cpu":
            # the C library then keeps freed temporaries instead of returning and faulting in every page again
            torch.empty(1 << 22)
        self.inputs, self.targets = family.bank(device)
        n = len(particles)
        self.state = self.optimizer.zeros(2 * n, device)
        # where a particle that restarts begins; rows of the others are not read
        self.fresh = self.optimizer.zeros(n, device)
        self._fused = None
        if backend == "triton" and isinstance(self.network, MLP):
            from celo2.meta.fused import FusedLoop

            self._fused = FusedLoop(recipe, self.state, self.fresh, self.inputs, self.targets)
        self.iteration = np.array(
            [
                generator(family.seed, Purpose.INITIAL_ITERATION, p).integers(recipe.initial_iterations)
                for p in particles
            ]
        )
        self.length = np.array([self._draw_length(Purpose.INITIAL_LENGTH, p, 0) for p in particles])
        self.done = np.zeros(n, bool)
        self.rate = np.array([self._draw_rate(p, 0) for p in particles])
        self.batch = np.array([self._draw_batch(p, 0) for p in particles])
        for i, particle in enumerate(particles):
            # occasion 0 is the start of the run, u + 1 a restart in outer step u
            fresh = self._start(particle, 0)
            for name, start in fresh.items():
                self.state[name][self._rows(i)] = start
        # one snapshot a particle to resume from, and the running draw-up of the current trajectory
        self.snapshot = {name: x[:n].clone() for name, x in self.state.items()} if recipe.resume_probability else {}
        self.snapshot_iteration = np.full(n, -1)
        self.average = np.full((2, n), np.nan)
        self.lowest = np.full((2, n), np.inf)
        self.drawup = np.zeros(n)

    @property
    def prefix(self) -> str:
        """What the names of its arrays in a checkpoint begin with: the network's, of the MLP nothing."""
        return f"{self.network.name}/" if self.network.name else ""

    @property
    def rehearsals(self) -> list[Rehearsal]:
        """What `torch.compile` compiles for its windows: nothing where they are the kernel's."""
        return [] if self._fused is not None else [Rehearsal(self.network, 2 * len(self.particles))]

    def rehearse(self) -> None:
        """Take a step on zeros, which compiles what windows need; the trajectories stay."""
        for _, problems in self.rehearsals:
            self.optimizer.rehearse(problems, self.device)

    @property
    def parts(self) -> dict[str, slice]:
        """Where the particles are among those of this rank, by the prefix of their arrays: all of them."""
        return {self.prefix: slice(0, len(self.particles))}

    def _draw_length(self, purpose: Purpose, particle: int, outer_step: int) -> int:
        rng = generator(self.family.seed, purpose, particle, outer_step)
        low, high = self.recipe.length_range
        if self.recipe.length_distribution == "uniform":
            return int(rng.uniform(low, high))
        return int(math.exp(rng.uniform(math.log(low), math.log(high))))

    def _draw_rate(self, particle: int, outer_step: int) -> float:
        """What the rate of the trajectory that begins at an outer step is multiplied by."""
        low, high = np.log(self.recipe.inner_lr_range)
        if low == high:
            return self.recipe.inner_lr_range[0]
        return float(np.exp(generator(self.family.seed, Purpose.RATE, particle, outer_step).uniform(low, high)))

    def _draw_batch(self, particle: int, outer_step: int) -> int:
        """How many examples of a batch count in the trajectory that begins at an outer step."""
        low, high = np.log(self.recipe.batch_range)
        if low == high:
            return max(1, round(self.network.batch * self.recipe.batch_range[0]))
        part = np.exp(generator(self.family.seed, Purpose.BATCH, particle, outer_step).uniform(low, high))
        return max(1, round(self.network.batch * float(part)))

    def _rows(self, i: int) -> list[int]:
        return [i, len(self.particles) + i]

    def _start(self, particle: int, occasion: int) -> State:
        """Return what is not zero in a fresh trajectory of a particle: weights and scale, without the problem axis."""
        scale, weights = self.family.sample(particle, occasion)
        start = {name: torch.from_numpy(w).to(self.device) for name, w in weights.items()}
        return start | {"scale": torch.full_like(self.state["scale"][0], scale)}

    def plan(self, outer_step: int) -> Plan:
        """Advance counters, lengths and ends over the window of `outer_step`, and say what happens in it."""
        slots, n = self.recipe.window, len(self.particles)
        slot_K1 = np.arange(slots)[:, None]
        # the slot that ends a trajectory, and the one after it, which its restart takes; beyond the window: none
        last = np.where(self.done, -1, np.maximum(self.length - self.iteration - 1, 0))
        restart = last + 1
        done = slot_K1 == last
        lengths, rates, batches = self.length.copy(), self.rate.copy(), self.batch.copy()
        first, resumed = np.zeros(n, np.int64), np.zeros(n, bool)
        restarts: dict[int, list[int]] = {}
        for i in np.flatnonzero(restart <= slots).tolist():
            particle = self.particles[i]
            if not self.done[i]:
                lengths[i] = self._draw_length(Purpose.LENGTH, particle, outer_step)
            if restart[i] == slots:
                continue
            restarts.setdefault(int(restart[i]), []).append(i)
            if self.snapshot_iteration[i] >= 0:
                rng = generator(self.family.seed, Purpose.RESUME, particle, outer_step)
                resumed[i] = rng.uniform() < self.recipe.resume_probability
            first[i] = self.snapshot_iteration[i] if resumed[i] else 0
            lengths[i] += first[i]
            rates[i] = self._draw_rate(particle, outer_step + 1)
            batches[i] = self._draw_batch(particle, outer_step + 1)
        mask = slot_K1 != restart
        begun = slot_K1 > restart
        # a trajectory's counter before each slot's step
        counter = np.where(begun, first + slot_K1 - restart - 1, self.iteration + slot_K1)
        progress = np.minimum(1.0, counter / np.where(begun, lengths, self.length))
        lr = np.float32(self.recipe.inner_lr) * (np.where(begun, rates, self.rate) * self._schedule(progress))
        weight = (progress >= 1 - self.recipe.loss_tail) / self.recipe.loss_tail
        batch = np.where(begun, batches, self.batch)
        ended, begins = restart <= slots, restart < slots
        self.iteration = np.where(
            begins, first + slots - restart - 1, np.where(ended, self.iteration + restart, self.iteration + slots)
        )
        self.done = restart == slots
        self.length, self.rate, self.batch = lengths, rates, batches
        return Plan(mask, done, dict(sorted(restarts.items())), resumed, lr.astype(np.float32), batch, weight)

    def _schedule(self, progress: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the rate is multiplied by where trajectories are, from 0 at their start to 1 at their end."""
        warmup = self.recipe.inner_warmup
        # the first step has a rate too
        rising = np.minimum(1.0, (progress + 1e-3) / (warmup + 1e-3)) if warmup else np.ones_like(progress)
        if self.recipe.inner_schedule == "constant":
            return rising
        falling = np.maximum(0.0, progress - warmup) / (1 - warmup)
        return np.asarray(rising * 0.5 * (1 + np.cos(np.pi * falling)))

    def unroll(self, theta: Tensor, outer_step: int, batches: Sequence[NDArray[np.int32]] | None = None) -> Unroll:
        """Advance every trajectory by one window under `theta` [2 n, 347], the + perturbations first.

        `batches` has those of the window, [K, n, B], where they have been made.
        """
        recipe, n = self.recipe, len(self.particles)
        before = {name: x.clone() for name, x in self.state.items()} if self.snapshot else {}
        before_average = self.average.copy()
        weights = ThetaBatch.from_vectors(theta.to(self.device), self.recipe.hidden)
        plan = self.plan(outer_step)
        window = self._window(plan, outer_step, None if batches is None else batches[0])
        losses, imitations = self.advance(window, weights, recipe.expert_weight(outer_step))
        raw = losses.view(recipe.window, 2, n).double().cpu().numpy()
        mask = plan.mask[:, None]
        normalised = np.where(mask, normalised_loss(raw, self.network.loss_clip), 0.0)
        result = Unroll(
            losses=normalised,
            imitation=None if imitations is None else self._imitation(imitations, mask),
            plan=plan,
            non_finite=int((~np.isfinite(raw) & mask).sum()),
        )
        if self.snapshot:
            self._store(before, before_average, result)
        return result

    def _window(self, plan: Plan, outer_step: int, indices: NDArray[np.int32] | None = None) -> Window:
        """Bring a plan to the device: its batches, rates, shares and the states of its restarts."""
        if indices is None:
            indices = self.batches[0].of(outer_step * self.recipe.window, self.recipe.window)
        share = None
        if (plan.batch < self.network.batch).any():
            counts = np.arange(self.network.batch) < plan.batch[..., None]
            share = torch.from_numpy((counts / plan.batch[..., None]).astype(np.float32)).to(self.device)
        for i in (i for particles in plan.restarts.values() for i in particles):
            # a snapshot is of the + trajectory and both signs continue it: they start equal, as PES's accumulator at a
            # restart supposes
            if plan.resumed[i]:
                start = {name: x[i] for name, x in self.snapshot.items()}
            else:
                start = self._start(self.particles[i], outer_step + 1)
                # without snapshots all else stays as it was made
                for name in self.snapshot.keys() - start.keys():
                    self.fresh[name][i] = 0
            for name, x in start.items():
                self.fresh[name][i] = x
        return Window(
            index_KNB=torch.from_numpy(indices).to(self.device),
            lr_KP=torch.from_numpy(np.tile(plan.lr, 2)).to(self.device),
            share_KNB=share,
            restarts=plan.restarts,
        )

    def advance(self, window: Window, theta: ThetaBatch, expert_weight: float) -> tuple[Tensor, Tensor | None]:
        """Take the window's slots in place; return losses [K, P] and, with an expert, imitation losses [K, P].

        Losses are raw, also those of slots that the plan's mask leaves out. A particle that restarts begins with its
        row of `fresh`.
        """
        if self._fused is not None:
            return self._fused(theta, window.index_KNB, window.lr_KP, window.restarts, window.share_KNB, expert_weight)
        slots, n, _ = window.index_KNB.shape
        losses, imitations = [], []
        for t in range(slots):
            picked = window.index_KNB[t].flatten()
            inputs, targets = (
                bank.index_select(0, picked).view(n, -1, *bank.shape[1:]) for bank in (self.inputs, self.targets)
            )
            share = None if window.share_KNB is None else window.share_KNB[t]
            loss, imitation = self.optimizer.step(
                self.state, inputs, targets, theta, lr=window.lr_KP[t], share=share, expert_weight=expert_weight
            )
            losses.append(loss)
            if imitation is not None:
                imitations.append(imitation)
            for i in window.restarts.get(t, []):
                for name, x in self.state.items():
                    x[[i, n + i]] = self.fresh[name][i]
        return torch.stack(losses), torch.stack(imitations) if imitations else None

    def _imitation(self, imitations: Tensor, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        values = imitations.view(self.recipe.window, 2, -1).double().cpu().numpy()
        return np.where(mask, np.nan_to_num(values, nan=2.0, posinf=2.0, neginf=0.0), 0.0)

    def _store(
        self,
        before: dict[str, Tensor],
        before_average: NDArray[np.float64],
        unroll: Unroll,
    ) -> None:
        """Keep the start of the window as a particle's snapshot when the loss rose to a new record in it, or it ended.

        The record is the largest draw-up of the averaged loss over its own running minimum. Never kept: a state whose
        loss was not finite or at the clip, or one older than the cap.
        """
        slots, _, n = unroll.losses.shape
        record = self.drawup.copy()
        restarted = np.full(n, slots)
        for t in range(slots):
            for i in unroll.plan.restarts.get(t, []):
                restarted[i] = t
                self.average[:, i], self.lowest[:, i], record[i] = np.nan, np.inf, 0.0
                self.drawup[i] = 0.0
            valid = unroll.plan.mask[t]
            loss = unroll.losses[t]
            average = np.where(np.isnan(self.average), loss, DRAWUP_DECAY * self.average + (1 - DRAWUP_DECAY) * loss)
            self.average = np.where(valid, average, self.average)
            self.lowest = np.where(valid, np.minimum(self.lowest, self.average), self.lowest)
            record = np.where(valid, np.maximum(record, (self.average - self.lowest).mean(0)), record)
        rose = (record > self.drawup) & (restarted == slots)
        healthy = np.nan_to_num(before_average, nan=0.0).max(0) < 0.9 * self.network.loss_clip
        # steps taken, not the counter: the first trajectories' counters start anywhere
        before_iteration = before["iteration"][:n].cpu().numpy().astype(np.int64)
        finite = torch.stack([torch.isfinite(x).view(2 * n, -1).all(1) for x in before.values()]).all(0)
        healthy &= finite.view(2, n).all(0).cpu().numpy() & (before_iteration < self.recipe.max_iterations)
        # in the window of a restart the start belongs to the trajectory that has ended
        keep = np.flatnonzero((rose | unroll.plan.done.any(0)) & healthy)
        for name, x in self.snapshot.items():
            x[keep] = before[name][keep]
        self.snapshot_iteration[keep] = before_iteration[keep]
        self.drawup = record

    def state_dict(self) -> Arrays:
        """Return everything that a window depends on, as arrays with the particle axis second, [1 or 2, n, ...]."""
        n = len(self.particles)
        arrays: Arrays = {f"state/{k}": x.view(2, n, *x.shape[1:]).cpu().numpy() for k, x in self.state.items()}
        for name, x in self.snapshot.items():
            arrays[f"snapshot/{name}"] = x[None].cpu().numpy()
        for name in ("iteration", "length", "snapshot_iteration"):
            arrays[f"host/{name}"] = getattr(self, name)[None]
        arrays |= {"host/done": self.done[None], "host/drawup": self.drawup[None]}
        if self.recipe.inner_lr_range != (1.0, 1.0):
            arrays["host/rate"] = self.rate[None]
        if self.recipe.batch_range != (1.0, 1.0):
            arrays["host/batch"] = self.batch[None]
        arrays |= {"host/average": self.average, "host/lowest": self.lowest}
        return {self.prefix + name: array for name, array in arrays.items()}

    def share(self, arrays: Arrays) -> Arrays:
        """Return this rank's particles of the arrays of a checkpoint, its family's alone."""
        first = self.particles[0] - self.family.numbers[0]
        kinds = tuple(f"{self.prefix}{kind}/" for kind in ("state", "snapshot", "host", "pes"))
        mine = slice(first, first + len(self.particles))
        return {name: array[:, mine] for name, array in arrays.items() if name.startswith(kinds)}

    def load_state_dict(self, arrays: Arrays) -> None:
        """Continue from the arrays of `state_dict`; raises ValueError for a missing name or another shape."""
        for name, mine in self.state_dict().items():
            if name not in arrays or arrays[name].shape != mine.shape:
                found = arrays[name].shape if name in arrays else "nothing"
                raise ValueError(f"inner state {name!r}: expected shape {mine.shape}, found {found}")
        arrays = {name.removeprefix(self.prefix): x for name, x in arrays.items() if name.startswith(self.prefix)}
        for kind, tensors in (("state", self.state), ("snapshot", self.snapshot)):
            for name, x in tensors.items():
                x.copy_(torch.from_numpy(np.ascontiguousarray(arrays[f"{kind}/{name}"])).view(x.shape))
        for name in ("iteration", "length", "snapshot_iteration", "done", "drawup"):
            setattr(self, name, np.array(arrays[f"host/{name}"][0]))
        if "host/rate" in arrays:
            self.rate = np.array(arrays["host/rate"][0])
        if "host/batch" in arrays:
            self.batch = np.array(arrays["host/batch"][0])
        self.average, self.lowest = np.array(arrays["host/average"]), np.array(arrays["host/lowest"])
