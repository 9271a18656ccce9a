"""Predicted tokens a second and MFU of GPT-2 124M, GPT-2 XL and GPT-3 XL, beside what was published for such models.

`python -m celo2.pretrain.speeds` prints it. The rate of the passes is one constant, `UTILISATION` of
`machines.py`, which was chosen among the published figures: the table shows what the optimizer and the messages leave
of it, and is no evidence for it.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from celo2.pretrain.machines import MACHINES
from celo2.pretrain.model import model_config
from celo2.pretrain.plan import make_plan
from celo2.pretrain.recipes import recipe_for
from celo2.pretrain.runlog import quantity
from celo2.tables import format_table

# tokens a second on 8 x H100, with AdamW or Muon: llm.c and modded-nanogpt; 1.5B: modded-nanogpt and torchtitan's sizes
PUBLISHED = {("small", 8): "3.4M to 3.7M, 40% MFU", ("gpt2-xl", 8): "286k to 381k, 37% to 50% MFU"}
SIZES = ("small", "gpt2-xl", "xl")
RANKS = (1, 8)


def speed_table(gpu: str = "h100") -> str:
    """A line for each size and number of GPUs, of celo2 and of AdamW with the same batch."""
    header = ("size", "GPUs", "opt", "ms a step", "of it optimizer", "tokens/s", "MFU", "GiB a rank", "published")
    rows: list[tuple[str, ...]] = []
    for size in SIZES:
        own = recipe_for(size, "celo2")
        for ranks in RANKS:
            for opt in ("celo2", "adamw"):
                recipe = dataclasses.replace(recipe_for(size, opt), batch_tokens=own.batch_tokens)
                sequences = own.batch_tokens // model_config(size).context
                plan = make_plan(size=size, recipe=recipe, opt=opt, world_size=ranks, gpu=gpu)
                assert sequences % ranks == 0
                rows.append(
                    (
                        size,
                        str(ranks),
                        opt,
                        f"{1e3 * plan.step_seconds:.1f}",
                        f"{1e3 * plan.optimizer_seconds:.1f}",
                        quantity(plan.tokens_per_second),
                        f"{plan.mfu:.1%}",
                        f"{max(plan.peaks) / 2**30:.1f}" + ("" if plan.fits else "!"),
                        PUBLISHED.get((size, ranks), "") if gpu == "h100" else "",
                    )
                )
    return format_table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Predicted tokens a second and MFU beside published runs.")
    parser.add_argument("--gpu", choices=MACHINES, default="h100")
    arguments = parser.parse_args(argv)
    print(f"{MACHINES[arguments.gpu].chip.name}; predictions\n{speed_table(arguments.gpu)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
