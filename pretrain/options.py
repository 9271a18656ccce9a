"""The command line of the trainer, and what all programs ask of a value: refused with one line that names the flag."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from celo2.optimizer import COMM_DTYPES
from celo2.pretrain import interruption
from celo2.pretrain.device import DTYPES
from celo2.pretrain.model import ARCHS, SIZES
from celo2.pretrain.parallel import PARALLEL, REDUCE
from celo2.pretrain.recipes import NEWTON_SCHULZ, OPTS, RECIPES, Recipe, Tuning, recipe_for

AnyTuning = TypeVar("AnyTuning", bound=Tuning)

# more than cores are slower, and thousands end the process in the library that makes them
MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))


def whole_number(lowest: int, highest: int | None = None, cure: str = "") -> Callable[[str], int]:
    """The type of a flag: a whole number from `lowest` to `highest`; `cure` ends the message about any other."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number") from None
        if value < lowest or (highest is not None and value > highest):
            limit = f"at least {lowest}" if highest is None else f"{lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"{text}: must be {limit}{cure}")
        return value

    return convert


seed = whole_number(-(2**63), 2**64 - 1, ", which 64 bits hold")
threads = whole_number(1, MAX_THREADS, f" on these {os.cpu_count()} cores, and more than the cores are slower")


def given(text: str) -> str:
    """The type of a flag whose value may not be empty, as of a variable of the shell that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: is empty; give a value, or leave the flag out for its default")
    return text


def path(text: str) -> Path:
    """The type of a flag for a file or a folder."""
    return Path(given(text))


def add_tuning(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The flags of what is tuned of an optimizer; one that is left out is None, and the recipe's value holds."""
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, help="decoupled weight decay")
    parser.add_argument("--max-grad-norm", type=float, help="global gradient-norm clip, 0 for none")
    parser.add_argument("--warmup-frac", type=float, help="part of the steps in the linear warm-up")
    parser.add_argument("--final-lr-frac", type=float, help="last learning rate, as a part of the peak")
    parser.add_argument(
        "--cooldown-frac", type=float, help="constant, then linear over this last part of the steps, not a cosine"
    )
    parser.add_argument("--beta1", type=float, help="of AdamW, also on the side of celo2 and muon")
    parser.add_argument("--beta2", type=float, help="of AdamW, also on the side of celo2 and muon")
    parser.add_argument("--momentum", type=float, help="of muon")
    parser.add_argument("--adam-lr", type=float, help="of muon: AdamW's learning rate beside it")
    parser.add_argument("--adam-lr-mult", type=float, help="of celo2: AdamW's learning rate, as a multiple of --lr")
    parser.add_argument("--newton-schulz", choices=NEWTON_SCHULZ, help="of celo2 (auto: not of celo2-base)")


def add_trackers(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The flags of the trackers beside `metrics.jsonl`: `trackers.tracker_names` reads them."""
    parser.add_argument("--wandb", choices=("off", "online", "offline"), default="off", help="log to Weights & Biases")
    parser.add_argument("--tensorboard", action="store_true", help="log to TensorBoard, in tensorboard/ of the output")
    parser.add_argument("--trackio", action="store_true", help="log to trackio: pip install 'celo2[trackio]'")


def tuned(tuning: AnyTuning, arguments: argparse.Namespace) -> AnyTuning:
    """`tuning` with what the flags of `add_tuning` say; raises ValueError for a value out of range."""
    fields = (
        "lr",
        "weight_decay",
        "max_grad_norm",
        "warmup_frac",
        "final_lr_frac",
        "cooldown_frac",
        "momentum",
        "adam_lr",
    )
    changes: dict[str, Any] = {
        key: value
        for key in (*fields, "adam_lr_mult", "newton_schulz")
        if (value := getattr(arguments, key)) is not None
    }
    if changes.get("max_grad_norm") == 0:
        changes["max_grad_norm"] = None
    betas = zip((arguments.beta1, arguments.beta2), tuning.betas, strict=True)
    changes["betas"] = tuple(default if beta is None else beta for beta, default in betas)
    return dataclasses.replace(tuning, **changes)


class _Renamed(argparse.Action):
    """An option under a name that it had before: it works, and says what it is called."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, True if self.const else values)
        print(f"warning: {option_string} is --{self.dest.replace('_', '-')} now", file=sys.stderr)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a GPT-2 or GPT-3-sized language model with Celo2, AdamW or Muon.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"recipes: {', '.join(RECIPES)}\n\n{interruption.HELP}",
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--size", type=given, default="nano", metavar="SIZE", help=f"{' | '.join(SIZES)} (default: nano)")
    run.add_argument("--opt", type=given, default="celo2", metavar="OPT", help=f"{' | '.join(OPTS)} (default: celo2)")
    run.add_argument("--arch", choices=ARCHS, help="architecture (default: the recipe's or the size's)")
    run.add_argument("--bias", action="store_true", help="biases, as in the published GPT-2 weights (arch gpt2)")
    run.add_argument("--recipe", type=given, metavar="NAME", help="a named recipe instead of the default one")
    run.add_argument(
        "--weights",
        type=given,
        help="theta of celo2 (default: the bundled one of --opt) or weights of velo: a name, a file or a hub id",
    )
    run.add_argument(
        "--mask-documents", action="store_true", help="attention does not cross end-of-text tokens, in validation too"
    )
    run.add_argument("--seed", type=seed, default=1337, help="initial weights and data order (default: 1337)")
    recipe = parser.add_argument_group("changes to the recipe")
    recipe.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    recipe.add_argument("--batch-tokens", type=int, metavar="N", help="tokens an optimizer step")
    add_tuning(recipe)
    recipe.add_argument("--val-tokens", type=int, metavar="N", help="tokens of the fixed validation set")
    data = parser.add_argument_group("data and output")
    data.add_argument("--data", type=path, metavar="DIR", help="folder of .bin shards (default: the embedded text)")
    data.add_argument("--out-dir", type=path, metavar="DIR", help="folder of this run (default: runs/SIZE-OPT)")
    data.add_argument("--resume", choices=("auto", "never"), default="never", help="auto: go on where --out-dir stands")
    first = data.add_mutually_exclusive_group()
    first.add_argument(
        "--init-from",
        type=path,
        metavar="DIR",
        help="first weights: the newest checkpoint of another run, or one of them",
    )
    first.add_argument(
        "--init-hf",
        type=given,
        metavar="DIR_OR_ID",
        help="first weights: a GPT-2 of transformers, a folder or a hub id (openai-community/gpt2, with --bias)",
    )
    data.add_argument(
        "--export-hf",
        type=path,
        metavar="DIR",
        help="write the finished model as one of transformers, into this folder",
    )
    data.add_argument(
        "--extend",
        type=whole_number(1),
        nargs="+",
        default=[],
        metavar="N",
        help="steps after those of the recipe, with a schedule of their own; more numbers, further extensions",
    )
    data.add_argument(
        "--save-every", type=int, default=200, metavar="N", help="steps between checkpoints (default: 200)"
    )
    data.add_argument("--keep", type=int, default=2, metavar="K", help="newest checkpoints that stay (default: 2)")
    data.add_argument("--keep-every", type=int, metavar="N", help="checkpoints of every N-th step stay as well")
    data.add_argument(
        "--eval-every", type=int, default=100, metavar="N", help="steps between validations (default: 100)"
    )
    data.add_argument("--log-every", type=int, default=1, metavar="N", help="steps between printed lines (default: 1)")
    data.add_argument(
        "--hellaswag",
        type=given,
        metavar="SOURCE",
        help="score HellaSwag at the end: a .jsonl file, an id of datasets (Rowan/hellaswag), or off (default: "
        "hellaswag_val.jsonl in --data, when it is there)",
    )
    data.add_argument("--prompt", default="The ", help="start of the text sample")
    data.add_argument("--sample-tokens", type=int, default=200, metavar="N", help="length of the sample, 0 for none")
    add_trackers(data)
    data.add_argument(
        "--norms-every",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="log weight and update norms of each kind of parameter every N steps (default: 0, never)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", type=given, default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    machine.add_argument(
        "--dtype", choices=DTYPES, help="of the forward pass (default: bfloat16 on a GPU, else float32)"
    )
    machine.add_argument(
        "--micro-batch", type=int, metavar="N", help="sequences a forward pass (default: 16,384 tokens)"
    )
    machine.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile every block (default: on a GPU, where a compiler is)",
    )
    machine.add_argument("--fp8", action="store_true", help="blocks multiply in FP8 (torchao; H100, RTX 4090 or newer)")
    machine.add_argument(
        "--activation-checkpointing", action="store_true", help="compute a block's activations again for its backward"
    )
    machine.add_argument(
        "--loss-chunks",
        type=int,
        metavar="N",
        help="parts of the loss, each with its logits (default: of up to 512 MiB on a GPU, else 1)",
    )
    machine.add_argument(
        "--max-skips", type=int, default=20, metavar="N", help="skipped steps in a row that end the run"
    )
    several = parser.add_argument_group("several processes (torchrun)")
    several.add_argument("--parallel", choices=PARALLEL, default="auto", help="auto: fsdp (FSDP2) on several processes")
    several.add_argument(
        "--shards", type=int, metavar="N", help="hsdp: ranks that share a model (default: a machine's)"
    )
    several.add_argument(
        "--reduce", choices=REDUCE, default="last", help="gradients travel after the last micro-batch, or every one"
    )
    several.add_argument(
        "--comm-dtype", choices=COMM_DTYPES, default="auto", help="of celo2's directions between ranks"
    )
    several.add_argument("--zero1", action="store_true", help="ddp: ranks share celo2's work and state")
    # their names before
    several.add_argument(
        "--wire-dtype", choices=COMM_DTYPES, dest="comm_dtype", action=_Renamed, help=argparse.SUPPRESS
    )
    several.add_argument("--split-step", dest="zero1", nargs=0, const=True, action=_Renamed, help=argparse.SUPPRESS)
    several.add_argument("--async-save", action="store_true", help="write checkpoints in the background")
    plan = parser.add_argument_group("before paying")
    plan.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    plan.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: plan for N GPUs")
    plan.add_argument("--gpu", type=given, default="h100", help="with --world-size: which (default: h100)")
    arguments = parser.parse_args(argv)
    if arguments.world_size is not None and not arguments.dry_run:
        parser.error("--world-size plans a run: give --dry-run with it, or start N processes with torchrun")
    for name in ("save_every", "eval_every", "log_every", "micro_batch", "max_skips", "loss_chunks", "world_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    return arguments


def resolve_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe with the command line's changes; raises ValueError for an unknown name or a value out of range."""
    recipe = recipe_for(arguments.size, arguments.opt)
    if arguments.recipe is not None:
        if arguments.recipe not in RECIPES:
            raise ValueError(f"unknown recipe {arguments.recipe!r}: choose one of {', '.join(RECIPES)}")
        recipe = RECIPES[arguments.recipe]
        if recipe.opt != arguments.opt:
            raise ValueError(
                f"recipe {recipe.name!r} is for --opt {recipe.opt}, not {arguments.opt}: its learning rate would not "
                "fit; take its other numbers with --steps, --batch-tokens and so on"
            )
    changes = {
        key: getattr(arguments, key) for key in ("batch_tokens", "val_tokens") if getattr(arguments, key) is not None
    }
    if arguments.steps is not None:
        if arguments.steps < 1:
            raise ValueError(f"--steps {arguments.steps}: must be at least 1")
        changes["tokens"] = arguments.steps * changes.get("batch_tokens", recipe.batch_tokens)
    return tuned(dataclasses.replace(recipe, **changes), arguments)
