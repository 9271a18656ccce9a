"""`bench/ppo.py`: its arithmetic against plain loops, its games, whole runs as processes, signals and mistakes."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
PROGRAM = BENCH / "ppo.py"
sys.path.insert(0, str(BENCH))
ppo, environments, presets = map(importlib.import_module, ("ppo", "environments", "ppo_presets"))

SMALL = (
    "--game",
    "MinAtar/Breakout-v1",
    "--envs",
    "32",
    "--threads",
    "1",
    "--device",
    "cpu",
    "--random-episodes",
    "32",
)


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"} | environment
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
    process = start(*arguments, **environment)
    out, error = process.communicate(timeout=200)
    return process.returncode, out, error


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def numbers(folder: Path) -> list[dict[str, Any]]:
    """What the same seed makes the same: all but times and names."""
    times = ("train_seconds", "steps_per_s")
    found = [record for kind in ("random", "train", "val", "final") for record in records(folder, kind)]
    return [{key: value for key, value in record.items() if key not in times} for record in found]


def plain_advantages(case: dict[str, np.ndarray], last: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Sums of discounted errors, episode by episode, in float64."""
    rewards, values, ended, valid = (case[key] for key in ("rewards", "values", "ended", "valid"))
    steps, envs = rewards.shape
    found = np.zeros((steps, envs))
    for b in range(envs):
        following = [*values[1:, b], last[b]]
        for t in range(steps):
            weight = 1.0
            for k in range(t, steps):
                if not valid[k, b]:
                    break
                bootstrap = 0.0 if ended[k, b] else following[k]
                found[t, b] += weight * (rewards[k, b] + gamma * bootstrap - values[k, b])
                weight *= gamma * lam
                if ended[k, b]:
                    break
    return found


def test_advantages_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    shape = (40, 6)
    over = rng.random(shape) < 0.15
    valid = np.vstack([np.ones((1, 6), dtype=bool), ~over[:-1]])
    over &= valid
    valid = np.vstack([np.ones((1, 6), dtype=bool), ~over[:-1]])
    # of the games that are over some are cut short; a lost life ends without that
    ended = valid & ((over & (rng.random(shape) < 0.6)) | (rng.random(shape) < 0.1))
    case = {"rewards": rng.standard_normal(shape) * valid, "values": rng.standard_normal(shape)}
    case |= {"ended": ended, "valid": valid}
    assert (over & ~ended).any() and (ended & ~over).any() and (~valid).any()
    last = rng.standard_normal(6)
    want = plain_advantages(case, last, 0.97, 0.9)
    tensors = {key: torch.from_numpy(value) for key, value in case.items()}
    found = ppo.advantages(
        tensors["rewards"],
        tensors["values"],
        torch.from_numpy(last),
        tensors["ended"],
        tensors["valid"],
        0.97,
        0.9,
    )
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ended", "want"), [(True, [1.75, 1.5, 1.0]), (False, [2.75, 3.5, 5.0])])
def test_a_game_that_ends_is_worth_its_rewards_and_one_cut_short_goes_on(ended: bool, want: list[float]) -> None:
    """Three rewards of 1, values of 0, then a last observation worth 8, in the step that begins the next game."""
    rewards, values = torch.tensor([[1.0], [1.0], [1.0], [0.0]]), torch.tensor([[0.0], [0.0], [0.0], [8.0]])
    ends, valid = torch.tensor([[False], [False], [ended], [False]]), torch.tensor([[True], [True], [True], [False]])
    found = ppo.advantages(rewards, values, torch.tensor([100.0]), ends, valid, 0.5, 1.0)
    assert found.squeeze(-1).tolist() == [*want, 0.0]


def test_the_loss_of_a_policy_that_has_not_moved_is_known() -> None:
    torch.manual_seed(0)
    model = ppo.ActorCritic("MinAtar", 4, 3)
    seen = torch.rand(12, 10, 10, 4) < 0.3
    with torch.no_grad():
        log_NA, values = model(seen)
    actions = torch.arange(12) % 3
    batch = ppo.Batch(seen, actions, log_NA.gather(-1, actions[:, None]).squeeze(-1), values, torch.randn(12))
    _, facts = ppo.losses(model, batch, torch.arange(12), presets.ALGORITHMS["MinAtar"])
    _, policy, value, entropy, kl, clipped = facts.tolist()
    # normalised advantages have a mean of 0, and the value misses by the advantage itself
    assert (policy, kl, clipped) == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    assert value == pytest.approx(0.5 * float((batch.advantages**2).mean()), rel=1e-5)
    assert entropy == pytest.approx(math.log(3), abs=1e-3)


def test_the_learning_rate_is_linear_to_nothing() -> None:
    tuning = presets.TUNINGS["ALE", "adamw"][0]
    assert [ppo.learning_rate(update, 4, tuning) for update in range(4)] == [1.0, 0.75, 0.5, 0.25]


class Clocks:
    """Game i lasts `lengths[i]` steps, and every step earns 1."""

    name, actions = "clocks", 2

    def __init__(self, lengths: list[int]) -> None:
        self.count, self._lengths = len(lengths), np.array(lengths)

    def reset(self) -> np.ndarray:
        self._played, self._over = np.zeros(self.count, dtype=int), np.zeros(self.count, dtype=bool)
        return self._played

    def step(self, actions: np.ndarray) -> Any:
        rewards = (~self._over).astype(np.float32)
        self._played = np.where(self._over, 0, self._played + 1)
        self._over = self._played == self._lengths
        return environments.Step(self._played, rewards, self._over, self._over)


def test_long_games_count_as_much_as_short_ones_in_the_random_policys_return() -> None:
    assert sorted(environments.random_returns(Clocks([1, 10]), 6, 0)) == [1.0] * 3 + [10.0] * 3


def test_mean_and_error() -> None:
    assert environments.mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert all(map(math.isnan, environments.mean_and_error([])))


@pytest.mark.needs("minatar")
def test_after_a_game_of_minatar_comes_a_step_that_begins_the_next() -> None:
    games = environments.Game.find("MinAtar/Breakout").start(4, 0, sticky=0.1, ramping=True)
    first = games.reset().copy()
    assert first.shape == (4, 10, 10, 4) and first.dtype == bool
    begun, over = 0, np.zeros(4, dtype=bool)
    for _ in range(60):
        step = games.step(np.zeros(4, dtype=np.int64))
        assert not step.rewards[over].any() and not step.over[over].any()
        # three whole rows of bricks
        assert step.observations[over][:, 1:4, :, 3].all()
        begun, over = begun + over.sum(), step.over
    assert begun >= 8


@pytest.mark.parametrize(
    "vector", [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("ale_py", "envpool")]
)
@pytest.mark.needs("gymnasium", "ale_py")
def test_the_return_of_an_atari_game_is_of_all_its_lives(vector: str) -> None:
    """Three lives of Space Invaders: three ends, of which the last alone is of the game; the rewards of all three."""
    game = environments.Game.find("SpaceInvaders")
    games = game.start(2, 5, sticky=0.0, ramping=True, vector=vector)
    returns, rng = environments.Returns(2), np.random.default_rng(0)
    assert games.reset().shape == (2, 4, 84, 84)
    ends, earned, finished, after = np.zeros(2, dtype=int), np.zeros(2), [], np.zeros(2, dtype=bool)
    while len(finished) < 2:
        step = games.step(rng.integers(games.actions, size=2))
        assert not step.rewards[after].any() and not step.ended[after].any()
        ends, earned, after = ends + step.ended, earned + step.rewards, step.over
        want = earned[step.over].tolist()
        assert (ends[step.over] == 3).all() and returns.add(step) == want
        finished += want
        ends[step.over], earned[step.over] = 0, 0.0
    games.close()
    # aliens are worth 5 to 30
    assert all(one >= 15 and one % 5 == 0 for one in finished) and list(returns.window) == finished


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of some seconds, in which Breakout is learned."""
    folder = tmp_path_factory.mktemp("ppo") / "run"
    status, out, error = run(*SMALL, "--opt", "adamw", "--lr", 3e-3, "--steps", 40_960, "--out-dir", folder)
    assert status == 0, error
    return folder, out


@pytest.mark.needs("minatar", "matplotlib")
def test_a_run_learns_and_writes_its_records(learned: tuple[Path, str]) -> None:
    folder, out = learned
    assert "algorithm:  steps 40960, envs 32" in out and "40 updates of 1,024 steps" in out and "linear to 0" in out
    assert [record["step"] for record in records(folder, "train")] == [1024 * (k + 1) for k in range(40)]
    vals = records(folder, "val")
    assert [record["step"] for record in vals] == [10_240, 20_480, 30_720, 40_960]
    (final,) = records(folder, "final")
    finished = [one for record in vals for one in record["returns"]]
    mean, error = environments.mean_and_error(finished[-100:])
    assert (final["return"], final["return_se"]) == (pytest.approx(mean), pytest.approx(error))
    assert final["episodes"] == len(finished) == vals[-1]["episodes"] and final["step"] == 40_960
    assert final["return"] > final["random_return"] + 5 * (final["return_se"] + final["random_se"])
    assert final["train_seconds"] > 0 and "final:      return" in out
    assert (folder / "return.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.needs("minatar", "matplotlib")
def test_a_finished_run_is_refused_or_finished_again(learned: tuple[Path, str], capfd) -> None:
    folder, before = learned[0], numbers(learned[0])
    options = (*SMALL, "--opt", "adamw", "--steps", "40960", "--out-dir", str(folder))
    assert ppo.main([*options, "--lr", "3e-3"]) == 1
    assert "holds a run: go on with --resume auto" in capfd.readouterr().err
    assert ppo.main([*options, "--lr", "1e-3", "--resume", "auto"]) == 1
    assert "tuning.lr is 0.003 there and 0.001 here" in capfd.readouterr().err
    # the returns of the last games come back from the records
    assert ppo.main([*options, "--lr", "3e-3", "--resume", "auto"]) == 0
    assert numbers(folder) == before


@pytest.mark.needs("minatar", "matplotlib")
def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        status, _, error = run(*SMALL, "--steps", 4096, "--log-every", 1, "--seed", seed, "--out-dir", tmp_path / name)
        assert status == 0, error
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two") != numbers(tmp_path / "other")


@pytest.mark.needs("minatar", "matplotlib")
def test_signals_save_and_a_run_goes_on(tmp_path: Path) -> None:
    options = (*SMALL, "--opt", "muon", "--steps", 9_000_448, "--log-every", 1, "--out-dir", tmp_path)

    def read_until(process: subprocess.Popen[str], text: str) -> str:
        seen = ""
        while text not in seen:
            line = process.stdout.readline()
            assert line, seen + process.stderr.read()
            seen += line
        return seen

    process = start(*options)
    read_until(process, "step 1024/")
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "SIGTERM: step" in out and "go on with --resume auto" in out, error
    stopped = records(tmp_path, "train")[-1]["step"]
    assert (tmp_path / f"step-{stopped:08d}" / "DONE").is_file()

    process = start(*options, "--resume", "auto")
    out = read_until(process, f"step {stopped + 1024}/")
    assert f"resumed at step {stopped:,}" in out and "the games begin anew; weights, optimizer" in out
    process.send_signal(signal.SIGHUP)
    out = read_until(process, "SIGHUP: step")
    assert "the run goes on" in out
    read_until(process, "step ")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "SIGINT: step" in out
    steps = [record["step"] for record in records(tmp_path, "train")]
    assert steps == [1024 * (k + 1) for k in range(len(steps))] and steps[-1] > stopped
    assert len(records(tmp_path, "run")) == 2 and len(records(tmp_path, "random")) == 1
    episodes = [record["episodes"] for record in records(tmp_path, "val")]
    assert episodes == sorted(episodes)


@pytest.mark.needs("minatar", "matplotlib")
def test_a_loss_that_stays_infinite_ends_the_run_in_a_line(tmp_path: Path, capfd) -> None:
    options = (*SMALL, "--opt", "adamw", "--lr", "1e30", "--steps", "8192", "--out-dir", str(tmp_path))
    assert ppo.main(options) == 1
    error = capfd.readouterr().err
    assert (
        len(error.splitlines()) == 1 and "optimizer steps in a row had a loss or gradient that is not finite" in error
    )
    last = records(tmp_path, "train")[-1]
    assert last["skipped"] >= 20 and (tmp_path / f"step-{last['step']:08d}" / "DONE").is_file()


@pytest.mark.needs("minatar", "matplotlib")
def test_a_folder_has_one_run(tmp_path: Path, capfd) -> None:
    from celo2.pretrain.folder_lock import locked
    from celo2.pretrain.parallel import World

    with locked(tmp_path, World(0, 1, 0, 1, torch.device("cpu"))):
        assert ppo.main([*SMALL, "--steps", "2048", "--out-dir", str(tmp_path)]) == 1
    assert "is in use by process" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--game", "MinAtar/Brakout"), "unknown game 'MinAtar/Brakout': the nearest are MinAtar/Breakout-v1"),
        (("--gamma", "1.5"), "--gamma 1.5: must be within 0..1"),
        (("--clip", "nan"), "--clip nan: must be finite"),
        (("--steps", "100"), "--steps 100: a rollout alone has 64 x 32 = 2048"),
        (("--minibatches", "2000"), "--minibatches 2000: a rollout has 2048 steps"),
        (("--lr", "-1"), "lr=-1.0 must be finite and > 0"),
        (("--device", "nowhere"), "--device nowhere: not usable here"),
        (("--out-dir", str(PROGRAM)), "is a file: give a folder"),
        (("--opt", "adamw", "--weights", "celo2"), "--weights celo2 belongs to --opt celo2"),
    ],
)
@pytest.mark.needs("minatar", "matplotlib")
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str, capfd) -> None:
    assert ppo.main(["--game", "MinAtar/Breakout-v1", *arguments]) == 1
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")


@pytest.mark.parametrize("arguments", [("--envs", "0"), ("--steps", "100000000"), ("--seed", "x"), ("--opt", "sgd")])
def test_a_flag_out_of_range_is_refused(arguments: tuple[str, str], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        ppo.main(["--game", "MinAtar/Breakout-v1", *arguments])
    assert ended.value.code == 2 and f"argument {arguments[0]}: " in capsys.readouterr().err


@pytest.mark.needs("ale_py")
def test_names_of_atari_games() -> None:
    for text in ("SpaceInvaders", "ALE/SpaceInvaders-v5", "space_invaders", "spaceinvaders"):
        game = environments.Game.find(text)
        assert str(game) == "ALE/SpaceInvaders-v5" and game.rom == "space_invaders"
    with pytest.raises(ValueError, match="the nearest are ALE/SpaceInvaders-v5"):
        environments.Game.find("SpaceInvader")
    assert str(environments.Game.find("minatar/space_invaders")) == "MinAtar/SpaceInvaders-v1"


@pytest.mark.parametrize(("package", "game"), [("minatar", "MinAtar/Breakout"), ("ale_py", "SpaceInvaders")])
def test_a_missing_package_is_named_with_its_cure(package: str, game: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError('not here')\n")
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    status, _, error = run("--game", game, PYTHONPATH=path)
    assert status == 1 and error.count("\n") == 1 and package.replace("_", "-") in error
    assert "pip install 'celo2[rl]'" in error


@pytest.mark.needs("gymnasium", "ale_py", "matplotlib")
def test_a_short_run_of_atari(tmp_path: Path) -> None:
    options = ("--opt", "adamw", "--envs", 2, "--rollout", 64, "--steps", 640, "--random-episodes", 2)
    more = (
        "--device",
        "cpu",
        "--log-every",
        1,
        "--vector",
        "ale",
        "--workers",
        1,
        "--threads",
        1,
        "--out-dir",
        tmp_path,
    )
    status, out, error = run("--game", "SpaceInvaders", *options, *more)
    assert status == 0, error
    assert "game:       ALE/SpaceInvaders-v5, 2 at once by ale, 1 threads, 6 actions" in out
    (final,) = records(tmp_path, "final")
    assert final["step"] == 640 and final["random_return"] > 0
    assert all(math.isfinite(record["loss"]) for record in records(tmp_path, "train"))
    # games that ended by then, of a few hundred steps each
    assert final["episodes"] == sum(len(record["returns"]) for record in records(tmp_path, "val"))


@pytest.mark.needs("minatar")
def test_the_random_policy_alone(capfd) -> None:
    assert ppo.main([*SMALL, "--random", "--random-episodes", "64"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("MinAtar/Breakout-v1: the random policy's return 0.") and "over 64 games" in out
