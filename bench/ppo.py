"""Train PPO on an Atari or a MinAtar game with Celo2, AdamW or Muon: one script, from the command line to the picture.

    python bench/ppo.py --game ALE/SpaceInvaders-v5 --opt celo2
    python bench/ppo.py --game MinAtar/Breakout-v1 --opt adamw

PPO (Schulman et al. 2017) with the details of CleanRL's `ppo_atari` (Huang et al. 2022): the Celo2 paper's evaluation
on reinforcement learning, and on MinAtar one for a CPU. Everything that is resolved is printed before the first step. A
run leaves checkpoints, `metrics.jsonl` and `return.png` in `--out-dir`; a step is one of one environment. Returns are
of whole games, with their own rewards, beside those of the random policy.
"""

import argparse
import dataclasses
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environments import VECTORS, WINDOW, Game, Games, Returns, mean_and_error, random_returns
from ppo_presets import ADAM_EPS, ALGORITHMS, TUNINGS, UNTESTED, Algorithm
from torch import Tensor, nn

from celo2.pretrain import interruption, options, require
from celo2.pretrain.checkpoint import Checkpoints, RunState
from celo2.pretrain.device import device_name, select_device
from celo2.pretrain.failures import explain
from celo2.pretrain.folder_lock import locked
from celo2.pretrain.interruption import Interruption, signals_restored
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.parallel import World
from celo2.pretrain.recipes import OPTS, Tuning
from celo2.pretrain.runlog import METRICS, RunLog, duration, has_records, iterate_metrics, quantity, versions, write_png
from celo2.pretrain.terminal import attempt, unfailing_streams
from celo2.pretrain.trackers import tracker_names

MAX_SKIPS = 20
# of a step in the name of a checkpoint
LARGEST = 99_999_999


class ActorCritic(nn.Module):
    """Logits of the actions and the value of an observation, from one body.

    Of Atari the convolutions of Mnih et al. 2015, of MinAtar those of Young and Tian 2019; orthogonal weights with the
    gains of CleanRL: sqrt(2), 0.01 for the logits, 1 for the value.
    """

    def __init__(self, family: str, channels: int, actions: int) -> None:
        super().__init__()
        self.pixels = family == "ALE"
        if self.pixels:
            convolutions = [nn.Conv2d(channels, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)]
            hidden = nn.Linear(64 * 7 * 7, 512)
        else:
            convolutions, hidden = [nn.Conv2d(channels, 16, 3)], nn.Linear(16 * 8 * 8, 128)
        layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
        self.body = nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU())
        self.actor, self.critic = nn.Linear(hidden.out_features, actions), nn.Linear(hidden.out_features, 1)
        for layer in (*convolutions, hidden, self.actor, self.critic):
            gain = {self.actor: 0.01, self.critic: 1.0}.get(layer, math.sqrt(2.0))
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[N, actions]` and values `[N]`, float32, of observations as a `Step` has them."""
        x = observations.float() / 255.0 if self.pixels else observations.permute(0, 3, 1, 2).float().contiguous()
        hidden = self.body(x)
        return self.actor(hidden).log_softmax(-1), self.critic(hidden).squeeze(-1)


def advantages(
    rewards_TB: Tensor,
    values_TB: Tensor,
    last_value_B: Tensor,
    ended_TB: Tensor,
    valid_TB: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates, `[T, B]` as the rewards (Schulman et al. 2016, equation 16).

    Nothing of value follows a step that `ended`. A game cut short counts with the value of its last observation, which
    is that of the next step: one that is not `valid`, since it only begins another game, and has an advantage of 0.
    """
    found_TB = torch.zeros_like(rewards_TB)
    advantage_B, next_value_B = torch.zeros_like(last_value_B), last_value_B
    for t in reversed(range(len(rewards_TB))):
        follows_B = (~ended_TB[t]).to(rewards_TB.dtype)
        error_B = rewards_TB[t] + gamma * next_value_B * follows_B - values_TB[t]
        advantage_B = (error_B + gamma * gae_lambda * follows_B * advantage_B) * valid_TB[t]
        found_TB[t], next_value_B = advantage_B, values_TB[t]
    return found_TB


@dataclass
class Batch:
    """The steps of a rollout that an update learns from, along one axis."""

    observations: Tensor
    actions: Tensor
    log_probabilities: Tensor
    values: Tensor
    advantages: Tensor


class Player:
    """The games and where they stand, played by the policy a rollout at a time."""

    def __init__(self, games: Games, returns: Returns, device: torch.device) -> None:
        self.games, self.returns, self.device = games, returns, device
        self._observations = torch.from_numpy(games.reset()).clone()
        self._over = torch.zeros(games.count, dtype=torch.bool)
        # MinAtar's come last, and are a few; Atari's are the frames
        self.channels = min(self._observations.shape[1], self._observations.shape[3])

    @torch.no_grad()
    def play(self, model: nn.Module, algorithm: Algorithm) -> tuple[Batch, list[float]]:
        """A rollout, and the returns of the games that it ended."""
        shape, device = (algorithm.rollout, algorithm.envs), self.device
        seen_TB = torch.empty(*shape, *self._observations.shape[1:], dtype=self._observations.dtype, device=device)
        actions_TB = torch.empty(shape, dtype=torch.int64, device=device)
        log_TB, values_TB = torch.empty(shape, device=device), torch.empty(shape, device=device)
        rewards_TB, ended_TB = torch.empty(shape), torch.empty(shape, dtype=torch.bool)
        valid_TB = torch.empty(shape, dtype=torch.bool)
        finished: list[float] = []
        for t in range(algorithm.rollout):
            valid_TB[t] = ~self._over
            seen_TB[t].copy_(self._observations)
            log_BA, values_TB[t] = model(seen_TB[t])
            # a draw from the distribution; one that is not a distribution gives an action all the same
            actions_TB[t] = (log_BA.exp() / torch.empty_like(log_BA).exponential_()).argmax(-1)
            log_TB[t] = log_BA.gather(-1, actions_TB[t][:, None]).squeeze(-1)
            step = self.games.step(actions_TB[t].cpu().numpy())
            finished += self.returns.add(step)
            self._observations = torch.from_numpy(step.observations)
            self._over = torch.from_numpy(step.over)
            rewards_TB[t], ended_TB[t] = torch.from_numpy(step.rewards), torch.from_numpy(step.ended)
        _, last_value_B = model(self._observations.to(device))
        if algorithm.clip_rewards:
            rewards_TB = rewards_TB.sign()
        rewards_TB, ended_TB, valid_TB = (one.to(device) for one in (rewards_TB, ended_TB, valid_TB))
        found_TB = advantages(
            rewards_TB, values_TB, last_value_B, ended_TB, valid_TB, algorithm.gamma, algorithm.gae_lambda
        )
        return Batch(*(one[valid_TB] for one in (seen_TB, actions_TB, log_TB, values_TB, found_TB))), finished


FACTS = ("loss", "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")


def losses(model: nn.Module, batch: Batch, chosen: Tensor, algorithm: Algorithm) -> tuple[Tensor, Tensor]:
    """PPO's loss on the chosen steps of a batch, and the numbers of `FACTS`."""
    log_NA, values = model(batch.observations[chosen])
    advantage, old_values = batch.advantages[chosen], batch.values[chosen]
    targets = advantage + old_values
    log_ratio = log_NA.gather(-1, batch.actions[chosen][:, None]).squeeze(-1) - batch.log_probabilities[chosen]
    ratio = log_ratio.exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clip = algorithm.clip
    policy_loss = -torch.min(advantage * ratio, advantage * ratio.clamp(1.0 - clip, 1.0 + clip)).mean()
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    value_loss = 0.5 * torch.max((values - targets) ** 2, (clipped - targets) ** 2).mean()
    entropy = -(log_NA.exp() * log_NA).sum(-1).mean()
    loss = policy_loss - algorithm.entropy * entropy + algorithm.value * value_loss
    with torch.no_grad():
        approx_kl = (ratio - 1.0 - log_ratio).mean()
        clip_fraction = ((ratio - 1.0).abs() > clip).float().mean()
    return loss, torch.stack([loss, policy_loss, value_loss, entropy, approx_kl, clip_fraction]).detach()


def learning_rate(update: int, updates: int, tuning: Tuning) -> float:
    """The part of the peak at a 0-based update: a linear warm-up, then linear to what the step after the last has."""
    warmup = round(tuning.warmup_frac * updates)
    if update < warmup:
        return (update + 1) / warmup
    progress = (update - warmup) / (updates - warmup)
    return 1.0 - (1.0 - tuning.final_lr_frac) * progress


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train PPO on an Atari or a MinAtar game with Celo2, AdamW or Muon.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=interruption.HELP,
    )
    whole, positive = options.whole_number, options.whole_number(1)
    run = parser.add_argument_group("the run")
    run.add_argument("--game", type=options.given, required=True, help="as ALE/SpaceInvaders-v5, MinAtar/Breakout-v1")
    run.add_argument("--opt", choices=OPTS, default="celo2", help="optimizer (default: celo2)")
    run.add_argument("--weights", type=options.given, help="theta of celo2: a name, a file or a hub id")
    run.add_argument("--seed", type=options.seed, default=1, help="weights, games and actions (default: 1)")
    run.add_argument("--random", action="store_true", help="measure the random policy, and stop")
    run.add_argument("--random-episodes", type=whole(2), default=WINDOW, metavar="N", help="its games (default: 100)")
    algorithm = parser.add_argument_group("changes to the algorithm, whose numbers are the game's")
    algorithm.add_argument("--steps", type=whole(1, LARGEST), metavar="N", help="steps of an environment, over all")
    algorithm.add_argument("--envs", type=whole(1, 65_536), metavar="N", help="games played at once")
    algorithm.add_argument("--rollout", type=positive, metavar="N", help="steps of each between two updates")
    algorithm.add_argument("--minibatches", type=positive, metavar="N", help="optimizer steps an epoch")
    algorithm.add_argument("--epochs", type=positive, metavar="N", help="passes over a rollout")
    for name in ("gamma", "gae-lambda", "clip", "entropy", "value"):
        algorithm.add_argument(f"--{name}", type=float, help=f"{name.replace('-', ' ')} of PPO")
    algorithm.add_argument("--sticky", type=float, metavar="P", help="probability that a game repeats an action")
    algorithm.add_argument("--ramping", action=argparse.BooleanOptionalAction, default=True, help="MinAtar gets harder")
    options.add_tuning(parser.add_argument_group("changes to the optimizer"))
    output = parser.add_argument_group("output")
    output.add_argument("--out-dir", type=options.path, metavar="DIR", help="of this run (default: runs/ppo-GAME-OPT)")
    output.add_argument("--resume", choices=("auto", "never"), default="never", help="auto: go on with --out-dir")
    output.add_argument("--save-every", type=positive, default=500, metavar="N", help="updates (default: 500)")
    output.add_argument("--log-every", type=positive, default=10, metavar="N", help="updates (default: 10)")
    options.add_trackers(output)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", type=options.given, default="auto", help="auto, cpu, cuda, mps (default: auto)")
    machine.add_argument("--threads", type=options.threads, metavar="N", help="CPU threads (default: PyTorch's choice)")
    machine.add_argument("--vector", choices=VECTORS, default="auto", help="of Atari (default: envpool, if installed)")
    machine.add_argument("--workers", type=options.threads, metavar="N", help="threads of Atari (default: the cores)")
    return parser.parse_args(argv)


def train(arguments: argparse.Namespace, held: ExitStack) -> int:
    """Run the training; returns the exit status. `held` keeps the lock of its folder and the games."""
    game = Game.find(arguments.game)
    algorithm = ALGORITHMS[game.family]
    changes = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(algorithm)}
    algorithm = dataclasses.replace(algorithm, **{key: one for key, one in changes.items() if one is not None})
    tuning, source = TUNINGS.get((game.family, arguments.opt), UNTESTED)
    tuning = options.tuned(tuning, arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = select_device(arguments.device)
    where = device_name(device)
    world = World(0, 1, 0, 1, device)
    workers = arguments.workers or min(algorithm.envs, len(os.sched_getaffinity(0)))

    def start(seed: int) -> Games:
        games = game.start(
            algorithm.envs,
            seed,
            sticky=algorithm.sticky,
            ramping=arguments.ramping,
            vector=arguments.vector,
            workers=workers,
        )
        held.enter_context(closing(games))
        return games

    # one bit off: other games than those of the training
    seed = arguments.seed % 2**64
    if arguments.random:
        mean, error = mean_and_error(random_returns(start(seed ^ 1 << 63), arguments.random_episodes, seed))
        print(f"{game}: the random policy's return {mean:.4g} +- {error:.2g} over {arguments.random_episodes} games")
        return 0
    require("matplotlib", extra="rl")
    torch.manual_seed(arguments.seed)
    games = start(seed)
    returns = Returns(algorithm.envs)
    player = Player(games, returns, device)
    model = ActorCritic(game.family, player.channels, games.actions).to(device)
    num_steps = algorithm.updates * algorithm.epochs * algorithm.minibatches
    optimizers = Optimizers(arguments.opt, tuning, model, arguments.weights, num_steps=num_steps)
    for member in optimizers.members:
        if isinstance(member, torch.optim.AdamW):
            for group in member.param_groups:
                group["eps"] = ADAM_EPS

    print(f"game:       {game}, {algorithm.envs} at once by {games.name}, {games.actions} actions")
    print("algorithm:  " + ", ".join(f"{key} {one}" for key, one in vars(algorithm).items() if key != "source"))
    print(f"            {algorithm.updates:,} updates of {algorithm.batch:,} steps; {algorithm.source}")
    print(f"network:    {sum(p.numel() for p in model.parameters()):,} parameters on {where}")
    print(f"optimizer:  {arguments.opt}, " + ", ".join(f"{key} {one}" for key, one in vars(tuning).items()))
    print(f"            {source}" + (f"; {optimizers.theta.label}" if optimizers.theta else ""))
    print(optimizers.table())

    # where the run stands
    out_dir: Path = arguments.out_dir or Path("runs") / f"ppo-{game}-{arguments.opt}".replace("/", "-")
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"--out-dir {out_dir} is a file: give a folder")
    interrupted = Interruption(world)
    held.enter_context(locked(out_dir, world))
    checkpoints = Checkpoints(out_dir, world=world)
    checkpoints.remove_temporary()
    identity: dict[str, Any] = {
        "game": str(game),
        "ramping": arguments.ramping,
        "optimizer": arguments.opt,
        "theta": optimizers.theta.sha256 if optimizers.theta else None,
        "algorithm": {key: one for key, one in vars(algorithm).items() if key != "source"},
        "tuning": {key: list(one) if isinstance(one, tuple) else one for key, one in vars(tuning).items()},
        "seed": arguments.seed,
    }
    state: RunState | None = None
    if arguments.resume == "auto":
        state, notes = checkpoints.load(model, optimizers, identity)
        for note in notes:
            print(f"resume:     {note}")
    elif has_records(out_dir / METRICS) or checkpoints.latest() is not None:
        raise ValueError(f"{out_dir} holds a run: go on with --resume auto, or give another --out-dir")
    step, skipped = (state.step, state.skipped) if state else (0, 0)
    run_id = state.run_id if state else secrets.token_hex(4)
    given = {key: str(one) if isinstance(one, Path) else one for key, one in vars(arguments).items()}
    log = RunLog(
        out_dir,
        resume_step=step if state else None,
        run_id=run_id,
        config={**identity, "arguments": given, "versions": versions()},
        name=f"{arguments.game}-{arguments.opt}",
        trackers=tracker_names(arguments),
    )
    trained, random = 0.0, None
    for record in iterate_metrics(out_dir / METRICS) if state else ():
        if record["kind"] == "val":
            returns.window.extend(record["returns"])
            returns.episodes, trained = record["episodes"], record["train_seconds"]
        elif record["kind"] == "random":
            random = record
    print(f"output:     {out_dir}, run {run_id}, " + (f"resumed at step {step:,}" if state else "from the start"))
    if state:
        # other games than the first ones, or the same would be played again
        player = Player(start(seed + step), returns, device)
        print("resume:     the games begin anew; weights, optimizer, steps and the last returns go on")
    log.write(
        "run",
        step=step,
        run_id=run_id,
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        arguments=given,
        identity=identity,
        source={"algorithm": algorithm.source, "tuning": source},
        theta=optimizers.theta.label if optimizers.theta else None,
        device=where,
        versions=versions(),
    )
    if random is None:
        mean, error = mean_and_error(random_returns(start(seed ^ 1 << 63), arguments.random_episodes, seed))
        random = log.write("random", step=step, **{"return": mean, "return_se": error})
    print(f"random:     return {random['return']:.4g} +- {random['return_se']:.2g}, the mean and its standard error")

    def save() -> None:
        checkpoints.save(model, optimizers, RunState(step, skipped, run_id, identity), before=log.sync)

    update, in_a_row, saved_at = step // algorithm.batch, 0, step if state else -1
    finished: list[float] = []
    began, began_at = time.perf_counter(), step
    while update < algorithm.updates and not interrupted.signal:
        factor = learning_rate(update, algorithm.updates, tuning)
        optimizers.set_lr(factor)
        batch, ended = player.play(model, algorithm)
        finished += ended
        facts, norms = [], []
        for _ in range(algorithm.epochs):
            order = torch.randperm(len(batch.actions), device=device)
            for chosen in order.tensor_split(algorithm.minibatches):
                loss, fact = losses(model, batch, chosen, algorithm)
                optimizers.zero_grad()
                loss.backward()
                norms.append(optimizers.step(loss.detach()))
                facts.append(fact)
        # the first wait for the device after the rollout
        table = torch.stack(facts)
        good = torch.isfinite(table[:, 0]) & torch.isfinite(torch.stack(norms))
        for one in good.tolist():
            skipped, in_a_row = (skipped, 0) if one else (skipped + 1, in_a_row + 1)
        update, step = update + 1, step + algorithm.batch
        targets = batch.advantages + batch.values
        explained = 1.0 - float(batch.advantages.var() / targets.var())
        interrupted.settle()
        last = update == algorithm.updates
        saves = update % arguments.save_every == 0 or interrupted.hangup or interrupted.signal or last
        log.write(
            "train",
            step=step,
            **dict(zip(FACTS, table[good].mean(0).tolist(), strict=True)),
            explained_variance=explained,
            grad_norm=float(torch.stack(norms).mean()),
            lr=tuning.lr * factor,
            skipped=skipped,
        )
        if update % arguments.log_every == 0 or saves:
            seconds = time.perf_counter() - began
            rate = (step - began_at) / seconds
            mean, _ = mean_and_error(returns.window)
            record = {"return": mean, "episodes": returns.episodes, "returns": finished}
            log.write("val", step=step, **record, train_seconds=trained + seconds, steps_per_s=rate)
            finished = []
            cells = [f"step {step}/{algorithm.updates * algorithm.batch}", f"return {mean:.4g}"]
            names = zip(("loss", "policy", "value", "entropy", "kl", "clipped"), table[good].mean(0), strict=True)
            cells += [f"{name} {float(one):.4f}" for name, one in names]
            cells += [f"explained {explained:.3f}", f"lr {tuning.lr * factor:.1e}", f"{quantity(rate)} steps/s"]
            left = duration((algorithm.updates * algorithm.batch - step) / rate)
            print(" | ".join([*cells, f"eta {left}"]) + (f" | {skipped} skipped" if skipped else ""))
        if in_a_row >= MAX_SKIPS:
            save()
            raise FloatingPointError(
                f"{in_a_row} optimizer steps in a row had a loss or gradient that is not finite; step {step} is saved "
                f"in {out_dir} with the parameters before them: lower the learning rate"
            )
        if saves:
            try:
                save()
                saved_at = step
                if interrupted.hangup and not interrupted.signal:
                    print(f"SIGHUP: step {step} is saved in {out_dir}; the run goes on")
            except OSError as error:
                if last or interrupted.signal:
                    raise
                print(f"warning: {error}", file=sys.stderr)
    if interrupted.signal:
        saved = f"step {step} is saved in {out_dir}" if saved_at == step else "before the first step, nothing to save"
        print(f"{interrupted.name}: {saved}; go on with --resume auto")
        log.close()
        return 130 if interrupted.signal == signal.SIGINT else 0
    return finish(game, arguments.opt, returns, random, log, out_dir, step, trained + time.perf_counter() - began)


def finish(
    game: Game,
    opt: str,
    returns: Returns,
    random: dict[str, Any],
    log: RunLog,
    out_dir: Path,
    step: int,
    seconds: float,
) -> int:
    """The last record, the picture, and what they say; returns the exit status."""
    mean, error = mean_and_error(returns.window)
    log.write(
        "final",
        step=step,
        **{"return": mean, "return_se": error, "episodes": returns.episodes},
        random_return=random["return"],
        random_se=random["return_se"],
        train_seconds=seconds,
    )
    log.close()
    attempt("picture", lambda: draw_returns(out_dir, f"{game}, {opt}", random["return"]))
    print(
        f"final:      return {mean:.4g} +- {error:.2g} over the last {len(returns.window)} of {returns.episodes:,};"
        f" random policy: {random['return']:.4g} +- {random['return_se']:.2g}; {duration(seconds)}, {out_dir}"
    )
    return 0


def draw_returns(out_dir: Path, title: str, random: float) -> None:
    """Draw the mean return of the last games over the steps as `return.png`."""
    from matplotlib.figure import Figure

    found = [record for record in iterate_metrics(out_dir / METRICS) if record["kind"] == "val"]
    points = [(record["step"], record["return"]) for record in found if record["return"] is not None]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if points:
        axes.plot(*zip(*points, strict=True), color="tab:blue", label=f"mean of the last {WINDOW} games")
    axes.axhline(random, color="tab:gray", linestyle="--", label="random policy")
    axes.set(xlabel="environment step", ylabel="return of a game", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    write_png(figure, out_dir / "return.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake in it is one line on standard error and exit status 1 or 2."""
    arguments = parse_arguments(argv)
    try:
        with unfailing_streams(), signals_restored(), ExitStack() as held:
            return train(arguments, held)
    except KeyboardInterrupt:
        print("interrupted; checkpoints are as they were", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        text = explain(error, memory="lower --envs or --rollout", compiler="")
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
