"""Hyper-parameters of the runs, each with its source, and the learning-rate schedule.

A recipe whose source says "untested" was not run by us: it is a starting point, not a result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from celo2.pretrain.model import ARCHS, SIZES

OPTS = ("celo2", "celo2-base", "adamw", "muon", "velo")
CELO2_LR_SWEEP = (1e-5, 2.15e-5, 4.64e-5, 1e-4, 2.15e-4, 4.64e-4, 1e-3)
CELO2_DECAY_SWEEP = (0.0, 0.1, 10.0)
NEWTON_SCHULZ = ("auto", "on", "off")
# tokens of a micro-batch when none is asked for
MICRO_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is tuned of an optimizer, and its schedule; raises ValueError for a value out of its range."""

    lr: float
    """Peak learning rate; of the matrices when the optimizer has two."""
    weight_decay: float = 0.0
    warmup_frac: float = 0.05
    """Part of the steps spent in the linear warm-up."""
    final_lr_frac: float = 0.0
    """Learning rate of the last step, as a part of the peak."""
    cooldown_frac: float | None = None
    """None: a cosine from the warm-up on. Else constant, and linear over this last part of the steps."""
    max_grad_norm: float | None = None
    """Global gradient-norm clip; None for no clip."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW, and of the AdamW side of celo2 and muon."""
    momentum: float = 0.95
    """muon only."""
    adam_lr: float | None = None
    """muon only: peak learning rate of AdamW on what is not a hidden matrix."""
    adam_lr_mult: float = 20.0
    """celo2 only: AdamW's learning rate on embeddings, head and vectors, as a multiple of lr."""
    newton_schulz: str = "auto"
    """celo2 only, one of `NEWTON_SCHULZ`: whether matrices are orthogonalised; auto: for celo2, not for celo2-base."""

    def _ranges(self) -> dict[str, tuple[bool, str]]:
        """Of every field, whether its value is allowed, and what is."""
        return {
            "lr": (0.0 < self.lr < math.inf, "finite and > 0"),
            "weight_decay": (0.0 <= self.weight_decay < math.inf, "finite and >= 0"),
            "warmup_frac": (0.0 <= self.warmup_frac <= 1.0, "within 0..1"),
            "final_lr_frac": (0.0 <= self.final_lr_frac <= 1.0, "within 0..1"),
            "cooldown_frac": (
                self.cooldown_frac is None or 0.0 < self.cooldown_frac <= 1.0 - self.warmup_frac,
                "within (0, 1 - warmup_frac], or None for a cosine",
            ),
            "max_grad_norm": (
                self.max_grad_norm is None or 0.0 < self.max_grad_norm < math.inf,
                "finite and > 0, or None for no clip (--max-grad-norm 0)",
            ),
            "betas": (all(0.0 <= beta < 1.0 for beta in self.betas), "within [0, 1)"),
            "momentum": (0.0 <= self.momentum < 1.0, "within [0, 1)"),
            "adam_lr": (self.adam_lr is None or 0.0 < self.adam_lr < math.inf, "finite and > 0, or None"),
            "adam_lr_mult": (0.0 <= self.adam_lr_mult < math.inf, "finite and >= 0"),
            "newton_schulz": (self.newton_schulz in NEWTON_SCHULZ, f"one of {', '.join(NEWTON_SCHULZ)}"),
        }

    def __post_init__(self) -> None:
        for field, (valid, rule) in self._ranges().items():
            if not valid:
                raise ValueError(f"{self}: {field}={getattr(self, field)!r} must be {rule}")

    def __str__(self) -> str:
        return "the optimizer"


@dataclass(frozen=True, kw_only=True)
class Recipe(Tuning):
    """Everything a run needs besides the model; raises ValueError for a value out of its range."""

    name: str
    batch_tokens: int
    """Tokens an optimizer step, over all ranks and micro-batches."""
    tokens: int
    """Training tokens."""
    val_tokens: int
    """Target tokens of the fixed validation set."""
    source: str
    """Where the numbers come from."""
    opt: str = "adamw"
    """The optimizer that the numbers are for, one of `OPTS`."""
    arch: str | None = None
    """The architecture that the numbers are for, one of `ARCHS`; None: the size's own."""

    def _ranges(self) -> dict[str, tuple[bool, str]]:
        return super()._ranges() | {
            "batch_tokens": (self.batch_tokens >= 1, ">= 1"),
            "opt": (self.opt in OPTS, f"one of {', '.join(OPTS)}"),
            "arch": (self.arch is None or self.arch in ARCHS, f"one of {', '.join(ARCHS)}, or None"),
            "tokens": (
                self.tokens >= self.batch_tokens,
                f">= batch_tokens ({self.batch_tokens}), a step at least: lower the batch, or give --steps",
            ),
            "val_tokens": (self.val_tokens >= 1, ">= 1"),
        }

    def __str__(self) -> str:
        return f"recipe {self.name!r}"

    @property
    def steps(self) -> int:
        """Optimizer steps: whole batches in the training tokens."""
        return self.tokens // self.batch_tokens


def warmup_steps(total_steps: int, recipe: Tuning) -> int:
    """Number of warm-up steps of a run of `total_steps`."""
    return round(recipe.warmup_frac * total_steps)


def learning_rate(step: int, total_steps: int, recipe: Tuning) -> float:
    """Learning rate of a 0-based step: linear warm-up, then half a cosine, or constant and a linear cooldown.

    The peak is at the last warm-up step and the one after it; the cosine would reach `final_lr_frac` of it one step
    after the run, so that the last step still counts. Source: llm.c, nanoGPT. Raises ValueError for a step outside
    0..total_steps - 1.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside the run: it must be within 0..{total_steps - 1}")
    warmup = warmup_steps(total_steps, recipe)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.cooldown_frac is not None:
        left = min(1.0, (total_steps - step) / (recipe.cooldown_frac * total_steps))
        return recipe.lr * (recipe.final_lr_frac + (1.0 - recipe.final_lr_frac) * left)
    progress = (step - warmup) / (total_steps - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return recipe.lr * (recipe.final_lr_frac + (1.0 - recipe.final_lr_frac) * cosine)


@dataclass(frozen=True)
class Schedule:
    """The steps of a run and their learning rates: those of the recipe, then extensions.

    An extension has the recipe's shape at its own length: a warm-up from 0 to the peak, and a cosine. What was trained
    before it does not depend on it.
    """

    recipe: Recipe
    extensions: tuple[int, ...] = ()
    """Optimizer steps of each."""

    @property
    def steps(self) -> int:
        return self.recipe.steps + sum(self.extensions)

    def learning_rate(self, step: int) -> float:
        """Learning rate of a 0-based step; raises ValueError for one outside of the run."""
        first = 0
        for length in (self.recipe.steps, *self.extensions):
            if step < first + length:
                return learning_rate(step - first, length, self.recipe)
            first += length
        raise ValueError(f"step {step} is outside the run: it must be within 0..{self.steps - 1}")

    def check(self, step: int, extensions: Sequence[int]) -> None:
        """Raise ValueError unless a run at `step` that had these extensions goes on by this schedule."""
        begun, first = 0, self.recipe.steps
        for length in extensions:
            begun, first = begun + (first < step), first + length
        if list(self.extensions[:begun]) != list(extensions[:begun]):
            lengths = " ".join(map(str, extensions[:begun]))
            raise ValueError(
                f"step {step} of this run is within --extend {lengths}: give that, and then further numbers"
            )

    def __str__(self) -> str:
        recipe = self.recipe

        fall = "cosine" if recipe.cooldown_frac is None else f"linear over the last {recipe.cooldown_frac:g}"

        def shape(steps: int) -> str:
            return f"{steps:,} steps, warm-up {warmup_steps(steps, recipe)}, peak lr {recipe.lr:g}, {fall} to "

        lines = f"{shape(recipe.steps)}{recipe.final_lr_frac:g} of it"
        return lines + "".join(f"; then {shape(steps)}the same" for steps in self.extensions)


def split_batch(requested: int | None, batch_tokens: int, context: int, ranks: int = 1) -> tuple[int, int]:
    """Sequences a micro-batch on each rank, and micro-batches a step.

    None takes the largest micro-batch of at most MICRO_TOKENS tokens. The batch is the same on any number of ranks.
    Raises ValueError when something does not divide, with what would.
    """
    sequences, rest = divmod(batch_tokens, context)
    if rest or not sequences:
        raise ValueError(
            f"batch_tokens={batch_tokens} is not a multiple of the context, {context}: change --batch-tokens"
        )
    if sequences % ranks:
        raise ValueError(
            f"the batch of {sequences} sequences of {context} does not divide among {ranks} ranks: take a number of "
            f"ranks that divides it, or --batch-tokens {max(1, round(sequences / ranks)) * ranks * context}"
        )
    sequences //= ranks
    if requested is None:
        limit = min(sequences, max(1, MICRO_TOKENS // context))
        requested = next(size for size in range(limit, 0, -1) if sequences % size == 0)
    if sequences % requested:
        share = f"the batch of {sequences} sequences" if ranks == 1 else f"a rank's {sequences} sequences of the batch"
        raise ValueError(f"--micro-batch {requested} does not divide {share}")
    return requested, sequences // requested


VAL_TOKENS = 10_485_760
HALF_M = 524_288
ONE_M = 1_048_576


def _adamw(
    name: str, lr: float, *, batch: int, steps: int, warmup_frac: float, final: float = 0.0, source: str
) -> Recipe:
    """An AdamW run over `steps` batches: decay 0.1, clip 1.0, betas 0.9 and 0.95."""
    return Recipe(
        name=name,
        lr=lr,
        weight_decay=0.1,
        batch_tokens=batch,
        warmup_frac=warmup_frac,
        final_lr_frac=final,
        max_grad_norm=1.0,
        tokens=steps * batch,
        val_tokens=VAL_TOKENS,
        source=source,
    )


_ADAMW = {
    "nano": Recipe(
        name="nano-adamw",
        lr=3e-3,
        weight_decay=0.0,
        batch_tokens=4096,
        warmup_frac=0.05,
        final_lr_frac=0.0,
        max_grad_norm=1.0,
        tokens=600 * 4096,
        val_tokens=65_536,
        source="ours, for a laptop",
    ),
    "30m": _adamw(
        "30m-adamw",
        1e-3,
        batch=131_072,
        steps=4_562,
        warmup_frac=0.05,
        source="tokens: Celo2 paper (598M, 20 a parameter); lr, decay, batch and clip: ours, untested",
    ),
    "small": _adamw(
        "gpt2-124m-llmc",
        6e-4,
        batch=HALF_M,
        steps=18_865,
        warmup_frac=700 / 18_865,
        source="karpathy/llm.c, GPT-2 124M on FineWeb 10B",
    ),
    "medium": _adamw(
        "gpt2-350m-llmc",
        3e-4,
        batch=HALF_M,
        steps=60_000,
        warmup_frac=700 / 60_000,
        source="karpathy/llm.c scripts/run_gpt2_350M.sh, on FineWeb 100B",
    ),
    "large": _adamw(
        "gpt2-774m-llmc",
        2.5e-4,
        batch=HALF_M,
        steps=286_102,
        warmup_frac=700 / 286_102,
        source="karpathy/llm.c scripts/run_gpt2_774M.sh, on FineWeb 100B",
    ),
    "gpt2-xl": _adamw(
        "gpt2-1558m-llmc",
        6e-4,
        batch=ONE_M,
        steps=32_000,
        warmup_frac=700 / 32_000,
        final=0.1,
        source="karpathy/llm.c scripts/run_gpt2_1558M.sh, on FineWeb-Edu 100B",
    ),
    "xl": _adamw(
        "xl-adamw-10b",
        2e-4,
        batch=ONE_M,
        steps=9_536,
        warmup_frac=0.05,
        source="lr, decay, batch: GPT-3 XL (Brown et al. 2020) as in Marek et al., arXiv 2507.07101; "
        "tokens, schedule: Celo2 paper; the learning rate looks under-tuned, sweep it",
    ),
}

# published alternatives to the defaults
_OTHERS = (
    replace(
        _ADAMW["small"],
        name="gpt2-124m-build-nanogpt",
        warmup_frac=715 / 19_073,
        final_lr_frac=0.1,
        tokens=19_073 * HALF_M,
        source="karpathy/build-nanogpt, GPT-2 124M on FineWeb-Edu 10B",
    ),
    replace(
        _ADAMW["xl"],
        name="gpt3-xl",
        warmup_frac=375e6 / 300e9,
        final_lr_frac=0.1,
        tokens=300_000_000_000,
        source="GPT-3 XL (Brown et al. 2020, table 2.1 and appendix B); there the cosine ends at 260B tokens",
    ),
)


def _celo2(size: str, opt: str) -> Recipe:
    """The size's tokens and batch with the Celo2 paper's schedule; no clip, no decay."""
    base = _ADAMW[size]
    lr, source = (
        2.15e-4,
        "schedule, no clip: Celo2 paper; lr: the fifth of its seven sweep values, untested; tokens, batch: ",
    )
    source += base.name
    if size == "nano":
        lr, source = 1e-3, "ours, for a laptop; lr: the top of the Celo2 paper's sweep"
    return replace(
        base,
        name=f"{size}-{opt}",
        opt=opt,
        lr=lr,
        weight_decay=0.0,
        warmup_frac=0.05,
        final_lr_frac=0.0,
        max_grad_norm=None,
        source=source,
    )


def _muon(size: str) -> Recipe:
    """torch.optim.Muon on the hidden matrices, AdamW at the size's AdamW rate on the rest."""
    base = _ADAMW[size]
    source = f"ours, untested; AdamW side, tokens, batch and schedule: {base.name}"
    if size == "nano":
        source = "ours, for a laptop"
    return replace(
        base,
        name=f"{size}-muon",
        opt="muon",
        lr=2e-2,
        weight_decay=0.0,
        adam_lr=base.lr,
        max_grad_norm=None,
        source=source,
    )


def _velo(size: str) -> Recipe:
    """The size's tokens and batch; VeLO has no learning rate and no schedule, and knows the number of steps."""
    base = _ADAMW[size]
    return replace(
        base,
        name=f"{size}-velo",
        opt="velo",
        lr=1.0,
        weight_decay=0.0,
        warmup_frac=0.0,
        final_lr_frac=1.0,
        max_grad_norm=None,
        source=f"no rate, no schedule: VeLO (arXiv 2211.09760), untested; tokens, batch: {base.name}",
    )


# Marek et al. 2025 (arXiv 2507.07101) train on as many tokens at this batch; the Celo2 paper gives none
_TOKENS_2B5 = 4_712 * HALF_M
_2B5 = "tokens: Celo2 paper (2.5B, 20 a parameter); batch: Marek et al., arXiv 2507.07101; "


def _gpt2_2b5() -> tuple[Recipe, ...]:
    """GPT-2 124M on the Celo2 paper's tokens."""

    def of(base: Recipe, source: str, **changes: Any) -> Recipe:
        name = f"gpt2-124m-2.5b-{base.opt}"
        return replace(base, name=name, arch="modern", tokens=_TOKENS_2B5, source=f"{_2B5}{source}", **changes)

    return (
        of(_ADAMW["small"], "lr 0.0048, decay 0.1: Marek et al.; untested here", lr=4.8e-3, warmup_frac=0.05),
        of(_celo2("small", "celo2"), "lr: untested, sweep it"),
        of(_muon("small"), "lr: untested", warmup_frac=0.05, adam_lr=4.8e-3),
        of(_velo("small"), "no rate, no schedule: VeLO; untested"),
    )


def _speedrun() -> tuple[Recipe, ...]:
    """The optimization track of modded-nanogpt: data, batch and architecture are fixed, the steps to 3.28 count."""
    track = "modded-nanogpt, track 3 (FineWeb); "
    base = replace(
        _ADAMW["small"], arch="speedrun", max_grad_norm=None, warmup_frac=0.0, weight_decay=0.0, cooldown_frac=0.7
    )
    return (
        replace(
            base,
            name="speedrun-124m-adamw",
            lr=1.5e-3,
            weight_decay=0.125,
            warmup_frac=250 / 5_625,
            tokens=5_625 * HALF_M,
            source=f"{track}lr, decay, warm-up: its notes; cooldown: its script; untested here",
        ),
        replace(
            base,
            name="speedrun-124m-muon",
            opt="muon",
            lr=0.025,
            weight_decay=0.025,
            adam_lr=3e-3,
            tokens=3_250 * HALF_M,
            source=f"{track}lr, decay, cooldown: its script; untested here, and not its Muon: query, key and value are "
            "one matrix, Newton-Schulz takes five steps instead of twelve, and AdamW has one rate instead of three, "
            "and the decay",
        ),
        replace(
            base,
            name="speedrun-124m-celo2",
            opt="celo2",
            lr=1e-3,
            tokens=3_250 * HALF_M,
            source=f"{track}lr: the top of the Celo2 paper's sweep, untested",
        ),
    )


_DEFAULTS: dict[tuple[str, str], Recipe] = {
    **{(size, "adamw"): recipe for size, recipe in _ADAMW.items()},
    **{(size, opt): _celo2(size, opt) for size in _ADAMW for opt in ("celo2", "celo2-base")},
    **{(size, "muon"): _muon(size) for size in _ADAMW},
    **{(size, "velo"): _velo(size) for size in _ADAMW},
}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (*_DEFAULTS.values(), *_OTHERS, *_gpt2_2b5(), *_speedrun())
}
"""Every recipe by name: the default of each size and optimizer, and the published alternatives."""


def recipe_for(size: str, opt: str) -> Recipe:
    """The default recipe of a size and an optimizer; raises ValueError that lists the allowed names."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
    if opt not in OPTS:
        raise ValueError(f"unknown optimizer {opt!r}: choose one of {', '.join(OPTS)}")
    return _DEFAULTS[size, opt]
