"""A learned optimizer of your own: meta-train theta, choose its best checkpoint, and train a language model with it.

    python own_learned_optimizer.py --steps 60 --outer-steps 4

leaves the thetas in `own-theta` and the text's shards in `data`. It runs the commands that it prints, at a size of a
minute or two: theta begins at Adam's direction, so that it trains from the first outer step on, and four outer steps
do not change it much.

For the real size run the two commands themselves, without `--no-compile` and the sizes: `--recipe celo2-lm`, 700
outer steps and more (docs/meta-training.md), on a GPU or with torchrun; a recipe of your own is a `Recipe` of
celo2/meta/recipes.py.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from celo2 import FusedCelo2
from celo2.meta import select, train
from celo2.pretrain.model import GPT, GPTConfig
from celo2.pretrain.shards import Loader, find_shards
from celo2.pretrain.tokenizer import get_tokenizer

OUT = Path("own-theta")


def run(program, command: str) -> None:
    """Run a program of the package with a command line, and print it; ends when the program fails."""
    print(f"$ python -m {program.__name__} {command}", flush=True)
    status = program.main(shlex.split(command))
    if status:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description="Meta-train, choose and use a learned optimizer.")
    parser.add_argument("--steps", type=int, default=60, help="of each language model (default: 60)")
    parser.add_argument("--outer-steps", type=int, default=4, help="of the meta-training, at least 2 (default: 4)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: must be at least 1")
    if arguments.outer_steps < 2:
        parser.error(f"--outer-steps {arguments.outer_steps}: must be at least 2")

    # a checkpoint at half of the outer steps and one at the end: two thetas to choose from
    size = f"--outer-steps {arguments.outer_steps} --save-every {arguments.outer_steps // 2} --log-every 1"
    run(train, f"--recipe celo2-base-warm {size} --no-compile --resume auto --out-dir {OUT}")
    # lowest validation loss of a small language model, at the best of three rates
    run(select, f"{OUT} --train-steps {arguments.steps} --no-compile")

    model = GPT(GPTConfig("modern", n_layer=2, n_head=4, head_dim=32, context=128, vocab_size=257))
    model.init_weights(seed=0)
    optimizer = FusedCelo2(model, lr=1e-3, weights=OUT / "selected.safetensors")
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=arguments.steps)
    text = Loader(find_shards(Path("data/wikipedia-bytes"))[0], 128, 0, get_tokenizer("bytes").vocab_id)
    for step in range(arguments.steps):
        inputs, targets = text.batch(step * 8, 8)
        loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0 or step == arguments.steps - 1:
            print(f"step {step} | loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
