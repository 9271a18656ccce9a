"""The language model that judges a theta: one short training run of a small GPT.

The model is the harness's `modern` GPT on bytes, its optimizers are the harness's own, so what is measured here is what
`pretrain/train_gpt.py` runs. Everything is a function of (method, theta, options, seed, settings, data).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
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
Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]


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
    """An optimizer that trains the model: the harness's `--opt`, and its theta."""

    name: str
    opt: str
    weights: str | Theta | None = None


def selection_shards(data_dir: Path, out_dir: Path) -> Path:
    """Write shards for choosing: the training shards of `data_dir`, their last tenth for validation.

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
    """Training and validation batches of a folder of byte shards, and those of a split that is reported."""

    def __init__(self, folder: Path, settings: Settings, reported: Path | None = None) -> None:
        self._train, val = find_shards(folder)
        last = find_shards(reported)[1] if reported is not None else []
        self._vocab_id = get_tokenizer(TOKENIZER).vocab_id
        self._context = settings.context
        self.fingerprint = [shard_fingerprint(path) for path in (*self._train, *val, *last)]

        def batches(shards: Sequence[Path]) -> Batches:
            return list(validation_batches(shards, settings.context, settings.val_tokens, 64, self._vocab_id))

        self.validation = batches(val)
        self.reported = batches(last) if last else []

    def loader(self, seed: int) -> Loader:
        return Loader(self._train, self._context, seed, self._vocab_id)


@cache
def _compiled_forward(config: GPTConfig) -> tuple[GPT, Callable[..., torch.Tensor]]:
    """One model a shape: its weights are drawn anew for every run, its compiled forward pass is kept."""
    model = GPT(config)
    return model, torch.compile(model, dynamic=False)


def train_once(
    method: Method,
    tuned: Mapping[str, float],
    seed: int,
    settings: Settings,
    text: Text,
    *,
    compiled: bool = True,
    build: Callable[[Recipe, GPT], Optimizers] | None = None,
) -> dict[str, Any]:
    """Train one model; return its validation losses in nats a byte, `curve` [[step, loss], ...] and `final`.

    `tuned` has options of the optimizer, as fields of a `Recipe` (`lr`, `momentum`, ...) or `beta2`. Where the text has
    a split that is reported, `reported` is the final loss there. `build` makes the optimizers of the recipe and the
    model, where they are not those of the method's name.

    A step with a gradient that is not finite is skipped and counted (`skipped`); a run whose loss ends not finite has
    `final` infinity.
    """
    recipe = Recipe(
        name=method.name,
        opt=method.opt,
        batch_tokens=settings.sequences * settings.context,
        warmup_frac=settings.warmup_frac,
        final_lr_frac=0.0,
        max_grad_norm=1.0,
        tokens=settings.steps * settings.sequences * settings.context,
        val_tokens=settings.val_tokens,
        source="language-model comparison",
        **_fields(tuned),
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
            curve.append([step + 1, validation_loss(model, text.validation)])
    reported = {"reported": _or_infinite(validation_loss(model, text.reported))} if text.reported else {}
    return {
        "method": method.name,
        "tuned": dict(tuned),
        "seed": seed,
        "final": _or_infinite(curve[-1][1]),
        **reported,
        "curve": curve,
        "skipped": skipped,
        "theta": optimizers.theta.sha256 if optimizers.theta else None,
        "parameters": model.num_params(),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _fields(tuned: Mapping[str, float]) -> dict[str, Any]:
    """Options as fields of a recipe."""
    fields: dict[str, Any] = {key: value for key, value in tuned.items() if key != "beta2"}
    if "beta2" in tuned:
        fields["betas"] = (0.9, tuned["beta2"])
    return fields


def _or_infinite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


@torch.no_grad()
def validation_loss(model: GPT, batches: Batches) -> float:
    """Return the loss in nats a byte over validation batches."""
    nats = tokens = 0.0
    for inputs_BT, targets_BT in batches:
        nats += float(model(inputs_BT, targets_BT, reduction="sum"))
        tokens += targets_BT.numel()
    return nats / tokens
