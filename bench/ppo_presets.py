"""The numbers of `ppo.py`: PPO's for Atari and for MinAtar, and the optimizers' for each, with their sources.

A source that says "untested" is a starting point, not a result.
"""

import dataclasses
import math
from dataclasses import dataclass

from celo2.pretrain.recipes import Tuning


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What PPO does with a game, whatever the optimizer; raises ValueError for a value out of its range."""

    steps: int
    """Steps of an environment, over all of them."""
    envs: int
    rollout: int
    """Steps of every environment between two updates."""
    minibatches: int
    epochs: int
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.1
    """Of the ratio of probabilities, and of the value's change."""
    entropy: float = 0.01
    value: float = 0.5
    """Coefficient of the value's loss."""
    clip_rewards: bool
    """Learn from the rewards' signs."""
    sticky: float
    source: str

    def __post_init__(self) -> None:
        fractions = {"gamma": (0.0, 1.0), "gae_lambda": (0.0, 1.0), "sticky": (0.0, 1.0), "clip": (0.0, math.inf)}
        for field, (low, high) in {**fractions, "entropy": (0.0, math.inf), "value": (0.0, math.inf)}.items():
            found = getattr(self, field)
            if not (low <= found <= high and math.isfinite(found)):
                limit = f"within {low:g}..{high:g}" if math.isfinite(high) else f"finite and >= {low:g}"
                raise ValueError(f"--{field.replace('_', '-')} {found}: must be {limit}")
        if self.batch < 4 * self.minibatches:
            raise ValueError(f"--minibatches {self.minibatches}: a rollout has {self.batch} steps, 4 at least for each")
        if self.steps < self.batch:
            raise ValueError(f"--steps {self.steps}: a rollout alone has {self.envs} x {self.rollout} = {self.batch}")

    @property
    def batch(self) -> int:
        return self.envs * self.rollout

    @property
    def updates(self) -> int:
        """Whole rollouts in the steps."""
        return self.steps // self.batch


ALGORITHMS = {
    "ALE": Algorithm(
        steps=10_000_000,
        envs=8,
        rollout=128,
        minibatches=4,
        epochs=4,
        clip_rewards=True,
        sticky=0.0,
        source="CleanRL ppo_atari.py; here FIRE after a lost life is the agent's, and a game cut short is bootstrapped",
    ),
    "MinAtar": Algorithm(
        steps=300_000,
        envs=64,
        rollout=32,
        minibatches=4,
        epochs=4,
        clip=0.2,
        clip_rewards=False,
        sticky=0.1,
        source="ours, for a minute on one core; network, sticky actions: Young and Tian 2019",
    ),
}

_PPO = "clip 0.5, linear to 0, no warm-up: CleanRL ppo_atari.py"
_SWEPT = "lr: ours, the best of a few on Breakout, one seed, celo2-base as celo2"
_BASE = Tuning(lr=2.5e-4, warmup_frac=0.0, max_grad_norm=0.5, betas=(0.9, 0.999))
# of the AdamW of these runs, also of the one beside muon; PyTorch's own is 1e-8
ADAM_EPS = 1e-5
TUNINGS: dict[tuple[str, str], tuple[Tuning, str]] = {
    ("ALE", "adamw"): (_BASE, f"lr, betas, eps 1e-5, {_PPO}"),
    ("ALE", "muon"): (dataclasses.replace(_BASE, lr=5e-3, adam_lr=2.5e-4), f"lr: ours, untested; AdamW's, {_PPO}"),
    **{
        ("ALE", opt): (dataclasses.replace(_BASE, lr=1e-4, betas=(0.9, 0.95)), f"lr: ours, untested; {_PPO}")
        for opt in ("celo2", "celo2-base")
    },
    ("ALE", "velo"): (dataclasses.replace(_BASE, lr=1.0, final_lr_frac=1.0), "no schedule: VeLO has its own; untested"),
    ("MinAtar", "velo"): (dataclasses.replace(_BASE, lr=1.0, final_lr_frac=1.0), "as on ALE; untested"),
    ("MinAtar", "adamw"): (dataclasses.replace(_BASE, lr=3e-2), f"{_SWEPT}; eps 1e-5, {_PPO}"),
    ("MinAtar", "muon"): (
        dataclasses.replace(_BASE, lr=3e-2, adam_lr=1e-3),
        f"{_SWEPT}; AdamW's beside it: ours, untested; its eps 1e-5, {_PPO}",
    ),
    **{
        ("MinAtar", opt): (dataclasses.replace(_BASE, lr=1e-3, betas=(0.9, 0.95)), f"{_SWEPT}; {_PPO}")
        for opt in ("celo2", "celo2-base")
    },
}
UNTESTED = (_BASE, f"ours, untested; {_PPO}")
