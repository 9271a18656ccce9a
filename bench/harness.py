"""Tokens a second of the trainer's loop beside nanoGPT's, on the same model, batch and data, paired in one process.

    python bench/harness.py
    python bench/harness.py --size 30m --rounds 15 --block 2 --opt adamw celo2

The other loop is written here from what nanoGPT (Karpathy, github.com/karpathy/nanoGPT) does: learned positions,
LayerNorm, one matrix for query, key and value, causal attention of PyTorch, GELU, a tied head, all logits and their
cross-entropy, batches stacked from a mapped file, accumulation, clipping at 1.0, AdamW with decay on matrices alone,
a cosine, and a line every ten steps. AdamW is the fused one, which nanoGPT takes on GPUs and the trainer everywhere.
The trainer runs whole, as from its command line; where it begins a step, at times, the other takes a block of its own.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from celo2.pretrain import train_gpt
from celo2.pretrain.model import GPTConfig, model_config
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.recipes import Schedule
from celo2.pretrain.shards import HEADER_BYTES, find_shards

WARM_UP = 3  # steps of each that do not count
# name of a case, --opt and the backend of celo2
CASES = {
    "adamw": ("adamw", "auto"),
    "celo2": ("celo2", "auto"),
    "celo2-torch": ("celo2", "torch"),
    "muon": ("muon", "auto"),
}


class OtherAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.width, 3 * config.width, bias=False)
        self.c_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (part.view(b, t, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(c, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class OtherBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(config.width, bias=False) for _ in range(2))
        self.attn = OtherAttention(config)
        self.c_fc = nn.Linear(config.width, 4 * config.width, bias=False)
        self.c_proj = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class OtherGPT(nn.Module):
    """The same function as `GPT` of arch gpt2, with the tanh GELU; nanoGPT has had that and the exact one."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(OtherBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.width, bias=False)
        self.lm_head = nn.Linear(config.width, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                depth = math.sqrt(2 * config.n_layer) if "c_proj" in name else 1
                nn.init.normal_(parameter, std=0.02 / depth)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)


def other_loop(config: GPTConfig, path: Path, batch: int, micro_steps: int, peak: float) -> Iterator[None]:
    """nanoGPT's loop in float32, which never ends; each `next` is a step."""

    def get_batch() -> tuple[Tensor, Tensor]:
        # mapped anew for every batch, so that no memory is held
        data = np.memmap(path, dtype=np.uint16, mode="r", offset=HEADER_BYTES)
        starts = torch.randint(len(data) - config.context, (batch,))
        x = torch.stack([torch.from_numpy(data[i : i + config.context].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + config.context].astype(np.int64)) for i in starts])
        return x, y

    model = OtherGPT(config)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    inputs, targets = get_batch()
    step, before = 0, time.time()
    while True:
        rate = peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1, step / 10_000))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(micro_steps):
            loss = model(inputs, targets) / micro_steps
            inputs, targets = get_batch()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now = time.time()
        if step % 10 == 0:
            print(f"iter {step}: loss {loss.item() * micro_steps:.4f}, time {1000 * (now - before):.2f}ms")
        before, step = now, step + 1
        yield


class Clock(NamedTuple):
    """Seconds on the wall, and of this process on its cores, which other programs of the machine do not lengthen."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Clock:
        return cls(time.perf_counter(), time.process_time())

    def since(self, before: Clock) -> Clock:
        return Clock(self.wall - before.wall, self.cpu - before.cpu)


class Turns:
    """Stands where the trainer asks for a step's learning rate: every `block` steps the other loop has as many.

    What the trainer does from one step's beginning to the next's is its time, with its log and its progress bar.
    """

    def __init__(self, other: Iterator[None], block: int) -> None:
        self.other, self.block = other, block
        self.ours: list[Clock] = []
        self.theirs: list[Clock] = []
        self._learning_rate = Schedule.learning_rate
        self._since = Clock.now()

    def learning_rate(self, schedule: Schedule, step: int) -> float:
        if step >= WARM_UP and (step - WARM_UP) % self.block == 0:
            begun = Clock.now()
            if step > WARM_UP:
                self.ours.append(begun.since(self._since))
            for _ in range(self.block if step > WARM_UP else WARM_UP):
                next(self.other)
            self._since = Clock.now()
            if step > WARM_UP:
                self.theirs.append(self._since.since(begun))
        return self._learning_rate(schedule, step)


def spread(values: Sequence[float], digits: int) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}, {high:,.{digits}f})"


def compare(case: str, arguments: argparse.Namespace, data: Path, out: Path) -> str:
    """Run the trainer and the other loop in turns; returns a row of the table."""
    opt, backend = CASES[case]
    config = model_config(arguments.size, "gpt2")
    tokens = arguments.micro_batch * arguments.micro_steps * config.context
    train_paths, _ = find_shards(data)
    torch.manual_seed(0)
    other = other_loop(config, train_paths[0], arguments.micro_batch, arguments.micro_steps, 6e-4)
    turns = Turns(other, arguments.block)
    steps = WARM_UP + arguments.block * arguments.rounds + 1
    options = ["--size", arguments.size, "--arch", "gpt2", "--opt", opt, "--steps", str(steps)]
    options += ["--micro-batch", str(arguments.micro_batch), "--batch-tokens", str(tokens), "--max-grad-norm", "1"]
    options += ["--data", str(data), "--out-dir", str(out), "--val-tokens", str(config.context), "--device", "cpu"]
    options += ["--eval-every", "1000000", "--save-every", "1000000", "--sample-tokens", "0", "--log-every", "10"]
    train_gpt.Optimizers = functools.partial(Optimizers, backend=backend)  # type: ignore[assignment, misc]
    Schedule.learning_rate = lambda self, step: turns.learning_rate(self, step)  # type: ignore[method-assign]
    try:
        status = train_gpt.main([*options, *arguments.trainer])
    finally:
        train_gpt.Optimizers, Schedule.learning_rate = Optimizers, turns._learning_rate  # type: ignore[misc, method-assign]
    if status:
        raise SystemExit(status)
    if len(turns.theirs) < arguments.rounds:
        raise SystemExit(f"interrupted in block {len(turns.theirs) + 1} of {arguments.rounds}")
    rates = [[arguments.block * tokens / clock.wall for clock in side] for side in (turns.ours, turns.theirs)]
    pairs = list(zip(turns.ours, turns.theirs, strict=True))
    cells = [spread(side, 0) for side in rates]
    cells += [spread([theirs[clock] / ours[clock] for ours, theirs in pairs], 3) for clock in range(2)]
    named = f"{case}{' ' if arguments.trainer else ''}{' '.join(arguments.trainer)}"
    return f"| {arguments.size} | {named} | {tokens:,} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="The trainer's loop beside nanoGPT's, paired, on the CPU.")
    parser.add_argument("--size", choices=("nano", "30m", "small"), default="nano")
    parser.add_argument("--opt", choices=CASES, nargs="+", default=["adamw", "celo2", "celo2-torch"])
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences (default: 4)")
    parser.add_argument("--micro-steps", type=int, default=1, help="micro-batches a step (default: 1)")
    parser.add_argument("--block", type=int, default=5, help="steps of one before the other's turn (default: 5)")
    parser.add_argument("--rounds", type=int, default=30, help="blocks of each (default: 30)")
    parser.add_argument("trainer", nargs="*", help="more options of the trainer, after --")
    arguments = parser.parse_args(argv)
    if min(arguments.micro_batch, arguments.micro_steps, arguments.block) < 1 or arguments.rounds < 2:
        parser.error("--micro-batch, --micro-steps and --block must be at least 1, --rounds at least 2")
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_embedded("bytes" if arguments.size == "nano" else "gpt2", Path(folder) / "data")
        rows = [compare(case, arguments, data, Path(folder) / case) for case in arguments.opt]
    print(f"\n{torch.get_num_threads()} threads, PyTorch {torch.__version__}; tokens a second, median (quartiles)\n")
    print("| size | optimizer | tokens a step | the trainer | nanoGPT's loop, AdamW | ratio | by CPU time |")
    print("|---" * 7 + "|")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
