"""What a run says about itself: everything that was resolved, before its first step, and its results after the last."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

from celo2.plan import resolved_comm_dtype
from celo2.pretrain.device import peak_flops
from celo2.pretrain.hellaswag import Score
from celo2.pretrain.model import GPT
from celo2.pretrain.optimizers import Optimizers, local_bytes
from celo2.pretrain.parallel import Parallel, World
from celo2.pretrain.recipes import Recipe, Schedule
from celo2.pretrain.runlog import (
    CURVE,
    RunLog,
    draw_curve,
    duration,
    iterate_metrics,
    quantity,
    versions,
    write_report,
)
from celo2.pretrain.terminal import attempt
from celo2.pretrain.tokenizer import Tokenizer
from celo2.theta import VARIANTS


def describe(
    arguments: argparse.Namespace,
    schedule: Schedule,
    model: GPT,
    optimizers: Optimizers,
    micro: tuple[int, int],
    parallel: Parallel,
    where: str,
) -> str:
    """Everything that is resolved, as text; `micro` is sequences a micro-batch and micro-batches a step, on a rank."""
    config, recipe, steps = model.config, schedule.recipe, schedule.steps
    parameters, rules = model.num_params(), optimizers.parameters_by_rule()
    flops, peak = model.flops_per_token(), peak_flops(where)
    gib = 2**30
    held = sum(local_bytes(parameter) for parameter in model.parameters()) / gib
    theta = optimizers.theta
    weights = f", theta {theta.label} ({theta.card.get('recipe', 'no recipe in its card')})" if theta else ""
    ranks = parallel.shards * parallel.replicas
    lines = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "device": where + ("" if peak else ": not in the table of peak FLOPs, so no MFU"),
        "model": f"{arguments.size}, {config.arch}: {config.n_layer} layers, {config.n_head} x {config.head_dim} "
        f"heads, width {config.width}, context {config.context}, vocabulary {config.vocab_size}"
        + (", attention within documents" if arguments.mask_documents else ""),
        "parameters": f"{parameters:,} ({', '.join(f'{count:,} by {rule}' for rule, count in rules.items())})",
        "optimizer": arguments.opt + weights,
        "recipe": f"{recipe.name}; source: {recipe.source}",
        "schedule": f"{schedule}; weight decay {recipe.weight_decay:g}, clip {recipe.max_grad_norm or 'none'}",
        "batch": f"{recipe.batch_tokens:,} tokens: "
        + (f"{ranks} ranks, each " if ranks > 1 else "")
        + f"{micro[0]} sequences of {config.context}, {micro[1]} micro-batches",
        "parallel": str(parallel),
        "FLOPs": f"{quantity(flops)} a token, {quantity(flops * recipe.batch_tokens)} a step, "
        f"{quantity(flops * recipe.batch_tokens * steps)} in all",
        "memory": f"{held:.3f} GiB parameters, {held:.3f} GiB gradients, "
        f"{optimizers.state_bytes() / gib:.3f} GiB optimizer state, and the activations"
        + (" (on this rank)" if ranks > 1 else ""),
    }
    return "\n".join(f"{name + ':':<12}{text}" for name, text in lines.items()) + "\n\n" + optimizers.table() + "\n"


def setting_of(arguments: argparse.Namespace, parallel: Parallel, device: torch.device, where: str) -> dict[str, Any]:
    """What changes a run's numbers by rounding alone, besides the batch's split: None where it does not matter."""
    several = parallel.mode != "none"
    comm_dtype = resolved_comm_dtype(arguments.comm_dtype, device)
    return {
        "device": where,
        "torch": str(torch.__version__),
        "compile": arguments.compile,
        "loss_chunks": arguments.loss_chunks,
        "activation_checkpointing": arguments.activation_checkpointing,
        "comm_dtype": comm_dtype if several and arguments.opt in VARIANTS else None,
        "zero1": arguments.zero1 if several else None,
        "reduce": arguments.reduce if several else None,
        "layout": str(parallel) if parallel.mode == "hsdp" else None,
    }


def plan_of(arguments: argparse.Namespace, recipe: Recipe) -> str:
    """What the run would be on `--world-size` GPUs of the kind `--gpu`."""
    from celo2.pretrain import plan

    if arguments.fp8:
        raise ValueError("--fp8 cannot be planned: there is no model of its speed; leave it or --world-size out")
    return plan.describe(
        plan.make_plan(
            size=arguments.size,
            arch=arguments.arch or recipe.arch,
            bias=arguments.bias,
            opt=arguments.opt,
            weights=arguments.weights,
            recipe=recipe,
            world_size=arguments.world_size,
            parallel=arguments.parallel,
            shards=arguments.shards,
            gpu=arguments.gpu,
            dtype=arguments.dtype or "bfloat16",
            micro_batch=arguments.micro_batch,
            reduce=arguments.reduce,
            recompute=arguments.activation_checkpointing,
            loss_chunks=arguments.loss_chunks,
            comm_dtype=arguments.comm_dtype,
            zero1=arguments.zero1,
        )
    )


def finish(
    arguments: argparse.Namespace,
    schedule: Schedule,
    model: GPT,
    optimizers: Optimizers,
    tokenizer: Tokenizer,
    log: RunLog,
    out_dir: Path,
    skipped: int,
    world: World,
    hellaswag: Score | None,
) -> None:
    """Print and write what a finished run has to show: validation loss, sample, picture, report. Collective.

    All is trained and saved: a picture or a report that cannot be made is a line on standard error.
    """
    recipe = schedule.recipe
    prompt = torch.tensor([[tokenizer.eot, *tokenizer.encode(arguments.prompt).tolist()]], device=world.device)
    generator = torch.Generator(world.device).manual_seed(arguments.seed)
    try:
        # every rank of a sharded model takes part in its forward passes
        tokens_BT = model.generate(prompt, max(arguments.sample_tokens, 0), generator=generator)
    except RuntimeError as error:
        # as of probabilities that are not finite, which all ranks have
        print(f"warning: no sample: {str(error).splitlines()[0]}", file=sys.stderr)
        tokens_BT = prompt
    if not world.main:
        return
    text = tokenizer.decode(tokens_BT[0].tolist())
    # a byte model may well write control characters
    sample = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    title = f"{arguments.size}, {arguments.opt}" + (f" ({optimizers.theta.label})" if optimizers.theta else "")
    seconds, loss, bpb = 0.0, math.nan, math.nan
    for record in iterate_metrics(log.path):
        if record["kind"] == "train":
            seconds += record["step_ms"] / 1000
        elif record["kind"] == "val":
            # one that was not finite is null in the log
            loss, bpb = (math.nan if record[key] is None else record[key] for key in ("loss", "bits_per_byte"))
    log.write(
        "final",
        step=schedule.steps,
        loss=loss,
        bits_per_byte=bpb,
        skipped=skipped,
        train_seconds=seconds,
        sample=sample,
        **({} if hellaswag is None else {f"hellaswag_{key}": value for key, value in vars(hellaswag).items()}),
    )
    answered = "not scored: no data (--hellaswag)"
    if hellaswag is not None:
        answered = f"{hellaswag.accuracy_norm:.4f} of {hellaswag.items:,} (by sums {hellaswag.accuracy:.4f})"
    facts: dict[str, Any] = {
        "run": title,
        "validation loss": f"{loss:.4f} nats a token, {bpb:.4f} bits per byte",
        **({} if hellaswag is None else {"HellaSwag": answered}),
        "steps": f"{schedule.steps:,} of {recipe.batch_tokens:,} tokens, {skipped} skipped",
        "peak lr, decay": f"{recipe.lr:g}, {recipe.weight_decay:g}",
        "training time": duration(seconds),
        "data": arguments.data,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    attempt("picture", lambda: draw_curve(iterate_metrics(log.path), out_dir / CURVE, title))
    attempt("report", lambda: write_report(out_dir, facts, sample))
    if arguments.sample_tokens > 0:
        print(f"\nsample:\n{sample}\n")
    print(f"theta:           {optimizers.theta.label}" if optimizers.theta else f"optimizer:       {arguments.opt}")
    print(f"validation loss: {facts['validation loss']}")
    if tokenizer.name == "gpt2":
        print(f"HellaSwag:       {answered}")
    print(f"training time:   {facts['training time']}")
    print(f"picture:         {out_dir / CURVE}")
