"""Meta-training recipes: the two of the paper, and the short ones that trained the bundled weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from celo2.theta import VARIANTS


@dataclass(frozen=True)
class Recipe:
    """Every constant of a run; the defaults are the paper's Celo2. Runs with equal fields, data and seed agree."""

    name: str
    variant: str
    """`celo2`: Newton-Schulz on the matrices, Adam on the biases; `celo2-base`: the rule alone, on everything."""
    outer_steps: int = 100_001
    outer_lr: float = 5e-5
    """Peak rate of the outer AdamW (betas 0.9 and 0.999, eps 1e-8)."""
    outer_final_lr: float | None = None
    """Where a cosine ends, at the last step; None keeps the rate constant."""
    outer_warmup: int = 0
    """Steps of linear warm-up of the outer rate."""
    outer_weight_decay: float = 1e-4
    outer_clip_norm: float | None = None
    """Global norm that the outer gradient is clipped to."""
    particles: int = 8
    """Antithetic pairs a task."""
    window: int = 50
    """Inner steps of each trajectory in one outer step (the truncation)."""
    std: float = 0.01
    """Standard deviation of the perturbation of theta."""
    scale_range: tuple[float, float] = (1e-3, 1e3)
    """Range of the log-uniform reparametrisation scale."""
    length_range: tuple[int, int] = (100, 2000)
    length_distribution: str = "log-uniform"
    """How a trajectory's length is drawn from [low, high): `log-uniform` or `uniform`."""
    initial_iterations: int = 2000
    """The counters of the first trajectories start in [0, this), so that their ends are staggered."""
    inner_lr: float = 1e-3
    inner_schedule: str = "constant"
    """`constant`, or `cosine`: each trajectory's rate falls from `inner_lr` to 0 at its end, as where theta is used."""
    inner_warmup: float = 0.0
    """Part of a trajectory in which its rate rises from 0; `cosine` falls after it."""
    inner_lr_range: tuple[float, float] = (1.0, 1.0)
    """Range of the log-uniform factor on a trajectory's rate."""
    batch_range: tuple[float, float] = (1.0, 1.0)
    """Range of the log-uniform part of a batch that a trajectory learns from, its noise: of 64 images, of 8 windows."""
    loss_tail: float = 1.0
    """Last part of a trajectory that the meta-loss is of: 1 for all of it."""
    tasks: tuple[str, ...] = ("images",)
    """Kinds of inner tasks: `images`, `text` (the next byte), `memory` (Zipf's frequencies) and `transformer`."""
    adam_lr_mult: float = 20.0
    bias_correction: bool = False
    """Whether Adam on the biases corrects its averages."""
    inner_clip_norm: float | None = None
    """Norm over all tensors that the inner gradient is clipped to; a non-finite gradient then counts as zero."""
    resume_probability: float = 0.0
    """Chance that a new trajectory continues a stored snapshot of its particle instead of starting afresh."""
    max_iterations: int = 40_000
    """A snapshot older than this is not stored: the cap of a chain of resumed trajectories."""
    start: str = "random"
    """Where theta starts: `random` as in the paper, or at an expert's direction, `muon` or `adam`."""
    expert: str | None = None
    """`muon` or `adam`: an expert whose direction theta imitates, and whose steps lead the trajectories at first."""
    direction_weight: float = 0.0
    """Weight of the imitation of the expert's direction in the meta-loss while the expert leads."""
    direction_floor: float = 0.0
    """Part of `direction_weight` that stays after the expert has left."""
    expert_until: tuple[float, float] = (0.05, 0.5)
    """Parts of the run at which the expert begins to give way and at which it is gone."""
    hidden: int = 8
    """Width of the MLP's two hidden layers; 4 and 16 are the paper's ablations."""
    normalize_update: bool = True
    """Whether a step has an RMS of `inner_lr`; False takes the direction as it is: the paper's ablation."""

    def __post_init__(self) -> None:
        def require(condition: bool, what: str) -> None:
            if not condition:
                raise ValueError(f"recipe {self.name!r}: {what}")

        require(self.variant in VARIANTS, f"variant={self.variant!r}, allowed: {', '.join(VARIANTS)}")
        require(
            self.length_distribution in ("log-uniform", "uniform"),
            f"length_distribution={self.length_distribution!r}, allowed: log-uniform, uniform",
        )
        require(
            self.inner_schedule in ("constant", "cosine"),
            f"inner_schedule={self.inner_schedule!r}, allowed: constant, cosine",
        )
        require(0 <= self.inner_warmup < 1, f"inner_warmup={self.inner_warmup}: expected [0, 1)")
        require(0 < self.loss_tail <= 1, f"loss_tail={self.loss_tail}: expected (0, 1]")
        require(
            0 < self.inner_lr_range[0] <= self.inner_lr_range[1],
            f"inner_lr_range={self.inner_lr_range}: expected 0 < low <= high",
        )
        require(
            0 < self.batch_range[0] <= self.batch_range[1] <= 1,
            f"batch_range={self.batch_range}: expected 0 < low <= high <= 1",
        )
        require(bool(self.tasks) and set(self.tasks) <= set(TASKS), f"tasks={self.tasks}, allowed: {', '.join(TASKS)}")
        require(self.start in ("random", "muon", "adam"), f"start={self.start!r}, allowed: random, muon, adam")
        require(self.expert in (None, "muon", "adam"), f"expert={self.expert!r}, allowed: None, muon, adam")
        require(self.outer_steps > 0, f"outer_steps={self.outer_steps}: expected at least 1")
        low, high = self.length_range
        require(0 < self.window < low < high, f"length_range={self.length_range}: expected 0 < window < low < high")
        require(0 <= self.resume_probability < 1, f"resume_probability={self.resume_probability}: expected [0, 1)")
        require(self.hidden > 0, f"hidden={self.hidden}: expected at least 1")
        require(
            self.normalize_update or (self.expert is None and self.variant == "celo2-base"),
            "normalize_update=False is an ablation of celo2-base, without an expert",
        )
        require(self.particles > 0 and self.std > 0, f"particles={self.particles} and std={self.std} must be positive")

    def lr(self, step: int) -> float:
        """Return the outer learning rate of step `step` (from 0)."""
        warm = min(1.0, (step + 1) / self.outer_warmup) if self.outer_warmup else 1.0
        if self.outer_final_lr is None:
            return self.outer_lr * warm
        span = max(1, self.outer_steps - 1 - self.outer_warmup)
        progress = min(1.0, max(0, step - self.outer_warmup) / span)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return (self.outer_final_lr + (self.outer_lr - self.outer_final_lr) * cosine) * warm

    def expert_weight(self, step: int) -> float:
        """Return how much of the inner step the expert takes at outer step `step`: 1 at first, 0 later."""
        if self.expert is None:
            return 0.0
        start, end = (part * self.outer_steps for part in self.expert_until)
        return min(1.0, max(0.0, (end - step) / max(1.0, end - start)))

    def imitation_weight(self, step: int) -> float:
        """Return the weight of the imitation loss at outer step `step`; the task loss has the rest."""
        if self.expert is None:
            return 0.0
        return self.direction_weight * max(self.expert_weight(step), self.direction_floor)

    @property
    def identity(self) -> dict[str, object]:
        """What must agree for a checkpoint to continue; the number of steps counts only where the schedule uses it."""
        fields: dict[str, object] = asdict(self)
        if self.outer_final_lr is None and self.expert is None:
            del fields["outer_steps"]
        # checkpoints from before these fields have none of them
        for name in ADDED:
            if fields[name] == Recipe.__dataclass_fields__[name].default:
                del fields[name]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}

    def ablated(self, names: Sequence[str]) -> Recipe:
        """Return the recipe with some of `ABLATIONS`; raises ValueError that lists them for another name."""
        recipe = self
        for name in names:
            if name not in ABLATIONS:
                raise ValueError(f"ablation {name!r}: allowed: {', '.join(ABLATIONS)}")
            recipe = replace(recipe, name=f"{recipe.name}-{name}", **ABLATIONS[name])  # type: ignore[arg-type]
        return recipe

    def with_outer_steps(self, outer_steps: int) -> Recipe:
        """Return the recipe for another number of outer steps: its schedule stretches with it."""
        return replace(self, outer_steps=outer_steps, outer_warmup=min(self.outer_warmup, outer_steps // 10))


TASKS = ("images", "text", "memory", "transformer")
# fields that earlier checkpoints lack: they count where they are not the default
ADDED = ("hidden", "normalize_update", "inner_warmup", "inner_lr_range", "batch_range", "loss_tail", "tasks")
# the paper's, of one piece of the method each
ABLATIONS: dict[str, dict[str, object]] = {
    "hidden-4": {"hidden": 4},
    "hidden-16": {"hidden": 16},
    "no-output-rms": {"normalize_update": False},
    "no-augmentation": {"scale_range": (1.0, 1.0)},
}
CELO2 = Recipe(name="celo2", variant="celo2")
CELO2_BASE = Recipe(name="celo2-base", variant="celo2-base", outer_lr=1e-4)
SHORT = {
    "outer_steps": 5000,
    "outer_lr": 3e-3,
    "outer_final_lr": 1e-5,
    "outer_warmup": 100,
    "outer_clip_norm": 1.0,
    "inner_clip_norm": 1.0,
}
# what ELO (arXiv 2607.06772) adds: trajectories that resume from where they failed, and an expert to imitate
ELO = SHORT | {
    "outer_steps": 2500,
    "length_distribution": "uniform",
    "resume_probability": 0.5,
    "direction_weight": 0.7,
    "direction_floor": 0.3,
}
# theta starts at an expert's direction: a small outer rate refines it before it forgets
WARM = SHORT | {"outer_steps": 2000, "outer_lr": 3e-4, "outer_warmup": 50}
# tasks of unequal classes, and the schedule, the rates and the loss of where theta is used
TEXT = WARM | {
    "tasks": ("images", "text", "memory"),
    "inner_schedule": "cosine",
    "inner_warmup": 0.05,
    "inner_lr_range": (0.3, 3.0),
    "loss_tail": 0.2,
    "length_range": (200, 4000),
}
# the same with the transformer, and with nothing else; an eighth of its batch is one window of 32 bytes. From Muon's
# direction, 1,000 steps (one window, one seed) end at 2.78 nats at a scale of 0.03, 2.53 at 0.1, 2.09 at 3, 2.15 at 10,
# and at 2.37 at 100, after a loss of 17: the paper's range is mostly steps too small or too large for it
TRANSFORMER = TEXT | {
    "tasks": ("images", "text", "memory", "transformer"),
    "batch_range": (0.125, 1.0),
    "scale_range": (0.1, 10.0),
}
LANGUAGE = TRANSFORMER | {"tasks": ("transformer",), "particles": 16}
RECIPES = {
    recipe.name: recipe
    for recipe in (
        CELO2,
        CELO2_BASE,
        replace(CELO2, name="celo2-short", **SHORT),  # type: ignore[arg-type]
        replace(CELO2_BASE, name="celo2-base-short", **SHORT),  # type: ignore[arg-type]
        replace(CELO2, name="celo2-warm", start="muon", **WARM),  # type: ignore[arg-type]
        replace(CELO2_BASE, name="celo2-base-warm", start="adam", **WARM),  # type: ignore[arg-type]
        replace(CELO2, name="celo2-text", start="muon", **TEXT),  # type: ignore[arg-type]
        replace(CELO2_BASE, name="celo2-base-text", start="adam", **TEXT),  # type: ignore[arg-type]
        replace(CELO2, name="celo2-transformer", start="muon", **TRANSFORMER),  # type: ignore[arg-type]
        replace(CELO2_BASE, name="celo2-base-transformer", start="adam", **TRANSFORMER),  # type: ignore[arg-type]
        replace(CELO2, name="celo2-lm", start="muon", **LANGUAGE),  # type: ignore[arg-type]
        replace(CELO2_BASE, name="celo2-base-lm", start="adam", **LANGUAGE),  # type: ignore[arg-type]
        replace(CELO2, name="celo2-elo", expert="muon", **ELO),  # type: ignore[arg-type]
        replace(CELO2_BASE, name="celo2-base-elo", expert="adam", **ELO),  # type: ignore[arg-type]
    )
}


def get_recipe(name: str) -> Recipe:
    """Return the recipe of that name; raises ValueError that lists the known ones."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r}: allowed: {', '.join(RECIPES)}")
    return RECIPES[name]
