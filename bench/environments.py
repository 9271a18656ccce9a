"""Atari and MinAtar games for `ppo.py`: many at once, stepped together, whole games with their own rewards.

All of them reset as gymnasium's vectors do by default: the step after a game's last one ignores its action, earns
nothing and brings the first observation of the next game. A lost life ends what an agent learns from, not the game.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import re
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

VECTORS = ("auto", "envpool", "ale")
MINATAR = ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
# half an hour of a console, as everybody's since Mnih et al. 2015
MAX_FRAMES, FRAME_SKIP, NOOPS = 108_000, 4, 30
# episodes that a mean return is over
WINDOW = 100


class Step(NamedTuple):
    """What a step of all games brings, along their axis."""

    observations: NDArray[Any]
    """uint8 `[games, 4, 84, 84]` of Atari, bool `[games, 10, 10, channels]` of MinAtar; may be written over later."""
    rewards: NDArray[np.float32]
    """As the game gives them, not clipped."""
    ended: NDArray[np.bool_]
    """Whether nothing of value follows: a game that is lost or won, or a life lost; not a game cut short."""
    over: NDArray[np.bool_]
    """Whether the game is over, also cut short: the next step begins another."""


class Games(Protocol):
    """Some games of one kind."""

    count: int
    actions: int
    name: str
    """What steps them."""

    def reset(self) -> NDArray[Any]:
        """Begin all games; returns their first observations."""
        ...

    def step(self, actions: NDArray[np.int64]) -> Step: ...

    def close(self) -> None: ...


def imported(*names: str) -> list[Any]:
    """Modules by name; raises ImportError that says what to install for one that is missing or broken."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        needed = " and ".join(name.split(".")[0].replace("_", "-") for name in names)
        raise ImportError(f"this game needs {needed}: pip install 'celo2[rl]' ({error})") from error


@dataclass(frozen=True)
class Game:
    """A game by its full name, `ALE/SpaceInvaders-v5` or `MinAtar/Breakout-v1`."""

    family: str
    """`ALE` or `MinAtar`."""
    title: str

    @classmethod
    def find(cls, text: str) -> Game:
        """The game of a name, whose prefix `ALE/` and version may be left out.

        Raises ValueError with the nearest names for an unknown one.
        """
        family, _, rest = text.rpartition("/")
        minatar = family.lower() == "minatar"
        titles: Iterable[str] = MINATAR
        if not minatar:
            roms = imported("ale_py.roms")[0]
            titles = ("".join(map(str.capitalize, rom.split("_"))) for rom in roms.get_all_rom_ids())
        version = "1" if minatar else "5"
        known = {title.lower(): title for title in titles}
        key = rest.removesuffix(f"-v{version}").replace("_", "").lower()
        if family.lower() not in ("", "ale", "minatar") or key not in known:
            found = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or (sorted(known) if minatar else [])
            near = [str(cls("MinAtar" if minatar else "ALE", known[match])) for match in found]
            raise ValueError(
                f"unknown game {text!r}: "
                + (f"the nearest are {', '.join(near)}" if near else "give one as ALE/SpaceInvaders-v5")
                + ("" if minatar else f"; of MinAtar there are MinAtar/{', '.join(MINATAR)}")
            )
        return cls("MinAtar" if minatar else "ALE", known[key])

    def __str__(self) -> str:
        return f"{self.family}/{self.title}-v{1 if self.family == 'MinAtar' else 5}"

    @property
    def rom(self) -> str:
        """As `space_invaders`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.title).lower()

    def start(
        self, count: int, seed: int, *, sticky: float, ramping: bool, vector: str = "auto", workers: int = 1
    ) -> Games:
        """`count` games, each with a seed of its own drawn from `seed`; `workers` are threads that step Atari's.

        `sticky` is the probability that a game repeats its last action; `ramping` whether MinAtar's get harder. Raises
        ImportError with the cure when a package is missing.
        """
        if self.family == "MinAtar":
            return _MinAtar(self, count, seed, sticky, ramping)
        if vector == "auto":
            vector = "envpool" if importlib.util.find_spec("envpool") is not None else "ale"
        return _Atari(self, count, seed, sticky, vector, workers)


def seeds_of(seed: int, count: int) -> list[int]:
    """Independent seeds of 31 bits, which every environment takes."""
    return (np.random.SeedSequence(seed % 2**64).generate_state(count) >> 1).tolist()


class _Atari:
    """Atari games as in Mnih et al. 2015, by what brings their C++: envpool, or ale-py's own vector.

    Up to 30 no-ops and FIRE at the start of a game, four frames a step of which the last two are maxed, grey 84 x 84,
    four of them stacked. A lost life is seen by the count of lives: ale-py's `episodic_life` would begin a new game
    there, and no return of a whole game were left. Unlike in the wrappers of OpenAI's baselines, FIRE after a lost
    life is the agent's to press.
    """

    def __init__(self, game: Game, count: int, seed: int, sticky: float, vector: str, workers: int) -> None:
        self.count = count
        self._seeds: NDArray[np.int64] | None = None
        if vector == "envpool":
            (envpool,) = imported("envpool")
            self._games = envpool.make(
                f"{game.title}-v5",
                env_type="gymnasium",
                num_envs=count,
                num_threads=workers,
                seed=seeds_of(seed, 1)[0] // 2,
                max_episode_steps=MAX_FRAMES // FRAME_SKIP,
                repeat_action_probability=sticky,
                noop_max=NOOPS,
                frame_skip=FRAME_SKIP,
                episodic_life=False,
                reward_clip=False,
            )
            self.actions = int(self._games.action_space.n)
        else:
            module, _ = imported("ale_py.vector_env", "gymnasium")
            self._games = module.AtariVectorEnv(
                game.rom,
                count,
                num_threads=workers,
                max_num_frames_per_episode=MAX_FRAMES,
                repeat_action_probability=sticky,
                noop_max=NOOPS,
                frameskip=FRAME_SKIP,
                episodic_life=False,
                reward_clipping=False,
            )
            self._seeds = np.array(seeds_of(seed, count))
            self.actions = int(self._games.single_action_space.n)
        self.name = f"{vector}, {workers} threads"

    def reset(self) -> NDArray[Any]:
        options = {} if self._seeds is None else {"seed": self._seeds}
        observations, facts = self._games.reset(**options)
        self._lives = np.array(facts["lives"])
        return observations

    def step(self, actions: NDArray[np.int64]) -> Step:
        observations, rewards, terminated, truncated, facts = self._games.step(actions.astype(np.int32))
        lives = np.array(facts["lives"])
        ended, self._lives = terminated | (lives < self._lives), lives
        return Step(observations, rewards.astype(np.float32), ended, terminated | truncated)

    def close(self) -> None:
        self._games.close()


class _MinAtar:
    """MinAtar's games (Young and Tian 2019), one after the other in this process; all actions that have an effect."""

    def __init__(self, game: Game, count: int, seed: int, sticky: float, ramping: bool) -> None:
        (minatar,) = imported("minatar")
        self.count, self.name = count, "minatar, one after the other"
        self._games = [minatar.Environment(game.rom, sticky, ramping) for _ in range(count)]
        for one, its_seed in zip(self._games, seeds_of(seed, count), strict=True):
            one.seed(its_seed)
        self._set = np.array(self._games[0].minimal_action_set())
        self.actions = len(self._set)
        self._observations = np.zeros((count, *self._games[0].state_shape()), dtype=bool)
        self._over = [True] * count

    def reset(self) -> NDArray[Any]:
        for index, game in enumerate(self._games):
            game.reset()
            self._observations[index] = game.state()
        self._over = [False] * self.count
        return self._observations

    def step(self, actions: NDArray[np.int64]) -> Step:
        rewards, over = [0.0] * self.count, [False] * self.count
        for index, (game, action) in enumerate(zip(self._games, self._set[actions].tolist(), strict=True)):
            if self._over[index]:
                game.reset()
            else:
                rewards[index], over[index] = game.act(action)
            self._observations[index] = game.state()
        self._over, ended = over, np.array(over)
        return Step(self._observations, np.array(rewards, dtype=np.float32), ended, ended)

    def close(self) -> None:
        """Nothing is held."""


class Returns:
    """Returns of whole games: the sum of a game's rewards, known when it is over."""

    def __init__(self, count: int, before: Iterable[float] = (), episodes: int = 0) -> None:
        self.window: deque[float] = deque(before, maxlen=WINDOW)
        """Of the last 100 games that are over."""
        self.episodes = episodes
        """Games that are over."""
        self._running = np.zeros(count)

    def add(self, step: Step) -> list[float]:
        """Take a step of all games; returns the returns of those that it ended."""
        self._running += step.rewards
        finished = self._running[step.over].tolist()
        self._running[step.over] = 0.0
        self.window.extend(finished)
        self.episodes += len(finished)
        return finished


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """The mean and its standard error; NaN where there are too few values."""
    values = list(values)
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def random_returns(games: Games, episodes: int, seed: int) -> list[float]:
    """Returns of at least `episodes` games played by the uniformly random policy.

    Every one of the games plays the same number of times: the first that are over would be the short ones.
    """
    quota = math.ceil(episodes / games.count)
    found: list[list[float]] = [[] for _ in range(games.count)]
    running = np.zeros(games.count)
    rng = np.random.default_rng(seed % 2**64)
    games.reset()
    while any(len(returns) < quota for returns in found):
        step = games.step(rng.integers(games.actions, size=games.count))
        running += step.rewards
        for index in np.flatnonzero(step.over):
            found[index].append(float(running[index]))
            running[index] = 0.0
    return [one for returns in found for one in returns[:quota]]
