"""The language model that judges a theta: one short training run of a small GPT, and the runs that make a comparison.

The model is the harness's `modern` GPT on bytes, its optimizers are the harness's own, so what is measured here is what
`pretrain/train_gpt.py` runs. Everything is a function of (method, theta, learning rate, seed, settings, data).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from celo2.pretrain.model import GPT, VOCAB_SIZES, GPTConfig
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.recipes import Recipe, learning_rate
from celo2.pretrain.shards import Loader, find_shards, open_shard, shard_fingerprint, validation_batches, write_shard
from celo2.pretrain.tokenizer import get_tokenizer
from celo2.theta import Theta

TOKENIZER = "bytes"


@dataclass(frozen=True)
class Settings:
    """Shape of the model and length of a run; the defaults are the test's: 1.0M parameters, 800 steps."""

    n_layer: int = 3
    n_head: int = 5
    head_dim: int = 32
    context: int = 128
    sequences: int = 6
    """Sequences a step."""
    steps: int = 800
    warmup_frac: float = 0.05
    val_tokens: int = 32_768
    eval_every: int = 50

    def model(self) -> GPTConfig:
        return GPTConfig("modern", self.n_layer, self.n_head, self.head_dim, self.context, VOCAB_SIZES[TOKENIZER])


# for choosing a theta: another model, shorter, on another split of the text
SELECTION = Settings(n_layer=2, n_head=4, sequences=8, steps=300, eval_every=100)


@dataclass(frozen=True)
class Method:
    """An optimizer of the comparison: the harness's `--opt`, its theta, and the learning rates of its sweep."""

    name: str
    opt: str
    learning_rates: tuple[float, ...]
    weights: str | Theta | None = None


def log_spaced(low: float, high: float, count: int = 7) -> tuple[float, ...]:
    """Return `count` learning rates from `low` to `high`, three significant digits."""
    return tuple(float(f"{rate:.3g}") for rate in np.geomspace(low, high, count))


def selection_shards(data_dir: Path, out_dir: Path) -> Path:
    """Write shards for choosing a theta: the training shards of `data_dir`, their last tenth for validation.

    The validation documents of `data_dir` are not read, so that the test stays unseen.
    """
    vocab_id = get_tokenizer(TOKENIZER).vocab_id
    tokens = np.concatenate([open_shard(path, vocab_id) for path in find_shards(data_dir)[0]])
    cut = len(tokens) * 9 // 10
    out_dir.mkdir(parents=True, exist_ok=True)
    write_shard(out_dir / "selection_val_000000.bin", tokens[cut:], vocab_id)
    write_shard(out_dir / "selection_train_000001.bin", tokens[:cut], vocab_id)
    return out_dir


class Text:
    """Training and validation batches of a folder of byte shards."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._train, val = find_shards(folder)
        self._vocab_id = get_tokenizer(TOKENIZER).vocab_id
        self._context = settings.context
        self.fingerprint = [shard_fingerprint(path) for path in (*self._train, *val)]
        self.validation = list(validation_batches(val, settings.context, settings.val_tokens, 64, self._vocab_id))

    def loader(self, seed: int) -> Loader:
        return Loader(self._train, self._context, seed, self._vocab_id)


@cache
def _compiled_forward(config: GPTConfig) -> tuple[GPT, Callable[..., torch.Tensor]]:
    """One model a shape: its weights are drawn anew for every run, its compiled forward pass is kept."""
    model = GPT(config)
    return model, torch.compile(model, dynamic=False)


def train_once(
    method: Method,
    lr: float,
    seed: int,
    settings: Settings,
    text: Text,
    *,
    compiled: bool = True,
    build: Callable[[Recipe, GPT], Optimizers] | None = None,
) -> dict[str, Any]:
    """Train one model; return its validation losses in nats a byte, `curve` [[step, loss], ...] and `final`.

    `build` makes the optimizers of the recipe and the model, where they are not those of the method's name.

    A step with a gradient that is not finite is skipped and counted (`skipped`); a run whose loss ends not finite has
    `final` infinity.
    """
    recipe = Recipe(
        name=method.name,
        opt=method.opt,
        lr=lr,
        weight_decay=0.0,
        batch_tokens=settings.sequences * settings.context,
        warmup_frac=settings.warmup_frac,
        final_lr_frac=0.0,
        max_grad_norm=1.0,
        tokens=settings.steps * settings.sequences * settings.context,
        val_tokens=settings.val_tokens,
        source="language-model comparison",
    )
    if compiled:
        model, forward = _compiled_forward(settings.model())
    else:
        model = forward = GPT(settings.model())
    model.init_weights(seed)
    optimizers = Optimizers(method.opt, recipe, model, method.weights) if build is None else build(recipe, model)
    loader = text.loader(seed)
    curve, skipped, started = [], 0, time.perf_counter()
    for step in range(settings.steps):
        optimizers.set_lr(learning_rate(step, settings.steps, recipe) / recipe.lr)
        inputs_BT, targets_BT = loader.batch(step * settings.sequences, settings.sequences)
        optimizers.zero_grad()
        forward(inputs_BT, targets_BT).backward()  # type: ignore[no-untyped-call]
        skipped += not math.isfinite(optimizers.step())
        if (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps:
            curve.append([step + 1, validation_loss(model, text)])
    final = curve[-1][1]
    return {
        "method": method.name,
        "lr": lr,
        "seed": seed,
        "final": final if math.isfinite(final) else math.inf,
        "curve": curve,
        "skipped": skipped,
        "theta": optimizers.theta.sha256 if optimizers.theta else None,
        "parameters": model.num_params(),
        "seconds": round(time.perf_counter() - started, 1),
    }


@torch.no_grad()
def validation_loss(model: GPT, text: Text) -> float:
    """Return the loss in nats a byte over the validation batches."""
    nats = tokens = 0.0
    for inputs_BT, targets_BT in text.validation:
        nats += float(model(inputs_BT, targets_BT, reduction="sum"))
        tokens += targets_BT.numel()
    return nats / tokens
