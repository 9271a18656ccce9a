"""What a run would be, before it is paid for: the real sharded model and optimizer, on meta tensors, as rank 0 of many.

    python -m celo2.pretrain.plan
    python -m celo2.pretrain.train_gpt --size xl --opt celo2 --dry-run --world-size 8 --gpu h100

Bytes, messages, owners and FLOPs are those of the objects that a run makes, here in a fake process group; seconds are
predictions of `machines.py`. The first command prints a table of every large size on 8 to 1024 ranks.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from celo2 import FusedCelo2, Theta
from celo2.pretrain.activations import Activations, count_activations
from celo2.pretrain.device import DTYPES
from celo2.pretrain.loss import automatic_chunks
from celo2.pretrain.machines import ASSUMPTIONS, LAUNCH, MACHINES, RULE_LAUNCHES, USABLE, Links, Machine
from celo2.pretrain.messages import Loads, Messages, model_messages, row_messages, rule_messages
from celo2.pretrain.model import GPT, GPTConfig, model_config
from celo2.pretrain.optimizers import Optimizers, local_bytes
from celo2.pretrain.parallel import PARALLEL, REDUCE, Parallel, shard
from celo2.pretrain.recipes import Recipe, recipe_for, split_batch
from celo2.pretrain.runlog import quantity
from celo2.state import local
from celo2.tables import format_table

GIB = 2**30
TABLE_SIZES = ("small", "medium", "large", "gpt2-xl", "xl")
TABLE_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
LEGEND = (
    "GiB a rank: at most (! does not fit). state: of the optimizer. MB sent: by a rank, in the learned rule's step.",
    "balance: Newton-Schulz FLOPs of the rank with most over the mean. batch: whether the ranks divide the recipe's,",
    "or how many times larger the batch of this line is.",
)


@dataclass(frozen=True)
class Plan:
    """Numbers of a run, of the rank with most of each: bytes of memory, messages of a step, predicted seconds."""

    size: str
    config: GPTConfig
    opt: str
    gpu: str
    ranks: int
    parallel: str
    batch_tokens: int
    micro_batch: int
    micro_steps: int
    settings: str
    parameters: dict[str, int]
    """Of the whole model, by rule."""
    held: dict[str, int]
    """On the rank, by rule."""
    memory: dict[str, int]
    """Bytes; not all at once."""
    activations: Activations
    peaks: tuple[int, int]
    """Bytes at most: in forward and backward passes, and in the optimizer's step."""
    model_messages: tuple[Messages, ...]
    rule_messages: tuple[Messages, ...]
    gathered_instead: float
    """Bytes that would leave a rank of a sharded model if every rank gathered all directions; else 0."""
    matrices: int
    """That Newton-Schulz takes."""
    newton_schulz: tuple[int, int, float]
    """FLOPs of all ranks that share them, of the rank with most, and the ratio of that to their mean."""
    flops_per_token: int
    compute: float
    """Seconds of forward and backward passes."""
    optimizer: dict[str, float] | None
    """Seconds by part; None where there is no model of it (muon)."""

    @property
    def machine(self) -> Machine:
        return MACHINES[self.gpu]

    @property
    def bytes_sent(self) -> float:
        """Bytes that leave a rank for the learned rule in a step."""
        return sum(messages.sent for messages in self.rule_messages)

    @property
    def fits(self) -> bool:
        """Whether the usable part of the memory holds the peak."""
        return max(self.peaks) <= USABLE * self.machine.memory * GIB

    @property
    def hidden(self) -> float:
        """Seconds of the model's messages, behind its computation or the other way around."""
        return sum(messages.seconds for messages in self.model_messages)

    @property
    def optimizer_seconds(self) -> float:
        return math.nan if self.optimizer is None else sum(self.optimizer.values())

    @property
    def step_seconds(self) -> float:
        return max(self.compute, self.hidden) + self.optimizer_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.batch_tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs of all ranks over their peak; what is computed again does not count."""
        return self.flops_per_token * self.tokens_per_second / (self.ranks * self.machine.peak)

    @property
    def share(self) -> float:
        """The optimizer's part of a step."""
        return self.optimizer_seconds / self.step_seconds


@contextmanager
def fake_processes(ranks: int) -> Iterator[None]:
    """Be rank 0 of a process group whose collectives send nothing; none for one rank."""
    if ranks == 1:
        yield
        return
    if dist.is_initialized():
        raise ValueError("a plan makes a process group of its own: run it in one process, without torchrun")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_plan(
    *,
    size: str,
    recipe: Recipe,
    arch: str | None = None,
    opt: str = "celo2",
    world_size: int = 8,
    local_ranks: int = 8,
    parallel: str = "auto",
    shards: int | None = None,
    gpu: str = "h100",
    dtype: str = "bfloat16",
    micro_batch: int | None = None,
    reduce: str = "last",
    recompute: bool = False,
    loss_chunks: int | None = None,
    weights: str | Theta | None = None,
    bias: bool = False,
    comm_dtype: str = "auto",
    zero1: bool = False,
) -> Plan:
    """Plan a run on `world_size` GPUs, `local_ranks` in a node; the options are those of `train_gpt.py`.

    Raises ValueError for an unknown GPU, layout, size or dtype, for fewer than one rank, a batch that does not divide
    among the ranks, and in a process that belongs to a process group already.
    """
    if opt == "velo":
        raise ValueError("--opt velo cannot be planned: its messages are not modelled; leave --world-size out")
    gpu = gpu.lower()
    choices = {"--gpu": (gpu, MACHINES), "--parallel": (parallel, PARALLEL), "--reduce": (reduce, REDUCE)}
    for name, (value, allowed) in {**choices, "--dtype": (dtype, DTYPES)}.items():
        if value not in allowed:
            raise ValueError(f"{name} {value}: cannot be planned; choose one of {', '.join(allowed)}")
    if world_size < 1 or local_ranks < 1:
        raise ValueError(f"--world-size {world_size} in nodes of {local_ranks}: both must be at least 1")
    machine, config = MACHINES[gpu], model_config(size, arch, bias=bias)
    micro_batch, micro_steps = split_batch(micro_batch, recipe.batch_tokens, config.context, world_size)
    if loss_chunks is None:
        loss_chunks = automatic_chunks(micro_batch * config.context, config.padded_vocab_size)
    reductions = micro_steps if reduce == "every" else 1
    local_ranks = min(local_ranks, world_size)
    with fake_processes(world_size):
        # a split step wants its mesh where the parameters are, and fully_shard a device that there is
        layout = Parallel.choose(parallel, world_size, local_ranks, "meta" if parallel == "ddp" else "cpu", shards)
        if zero1 and layout.mode != "ddp":
            raise ValueError(f"--zero1 belongs to --parallel ddp, this run is {layout}")
        with torch.device("meta"):
            model = GPT(config, recompute=recompute, loss_chunks=loss_chunks)
        if layout.sharded:
            shard(model, layout, dtype)
        over = layout.mesh if zero1 else None
        optimizers = Optimizers(
            opt, recipe, model, weights, comm_dtype=comm_dtype, zero1_mesh=over, ranks_per_node=local_ranks
        )
        links = Links(machine, layout.shards, min(layout.shards, local_ranks))
        replicas = Links(machine, layout.replicas, max(1, local_ranks // layout.shards))
        passing, buffers = model_messages(model, layout, links, replicas, dtype, micro_steps, reductions)

        held = dict.fromkeys(optimizers.parameters_by_rule(), 0)
        for member in optimizers.members:
            for parameter, entry in member.state.items():
                rule = member.rule_of(parameter) if isinstance(member, FusedCelo2) else type(member).__name__.lower()
                held[rule] += local(entry.get("momentum_fast", parameter)).numel()
        seconds = {"AdamW": held.get("adamw", 0) * machine.adamw_seconds()}
        stepping: list[Messages] = []
        loads, instead = Loads(1, machine), 0.0
        learned = optimizers.members[0]
        if isinstance(learned, FusedCelo2):
            step = learned.planner.plan_ranks().plan if layout.sharded or zero1 else None
            loads = Loads.of(learned, step, machine)
            if step is not None:
                among = Links(machine, world_size, local_ranks)
                within = among if zero1 else links
                stepping, buffers["messages"], instead = rule_messages(step, loads, among, within)
                if zero1:
                    gather, buckets = row_messages(step, among)
                    stepping, instead = [*stepping, gather], 0.0
                    buffers["messages"] += buckets
            if step is None or not loads.batches:
                # where directions do not wait in a message; Newton-Schulz takes float16 ones
                buffers["directions"] = (2 if loads.batches else 4) * held["celo2"]
            seconds |= {
                "learned rule": held["celo2"] * machine.rule_seconds(bool(loads.batches)),
                "Newton-Schulz": max(loads.seconds),
                "messages": sum(messages.seconds for messages in stepping),
                "launches": LAUNCH * (RULE_LAUNCHES + loads.launches),
            }
        parameters, state = sum(local_bytes(p) for p in model.parameters()), optimizers.state_bytes()
        rules = optimizers.parameters_by_rule()
        activations = count_activations(
            config, micro_batch, dtype, autocast=not layout.sharded, recompute=recompute, loss_chunks=loss_chunks
        )

    # between micro-batches that do not reduce, `fully_shard` keeps whole gradients
    whole = layout.sharded and reductions < micro_steps
    memory = {
        "parameters": parameters,
        "optimizer state": state,
        "gradients": 4 * sum(p.numel() for p in model.parameters()) if whole else parameters,
        "activations": activations.peak,
        **buffers,
        "Newton-Schulz": loads.workspace,
    }
    in_passes = sum(memory.get(key, 0) for key in ("gradients", "activations", "gathered", "reduced"))
    in_step = parameters + sum(memory.get(key, 0) for key in ("messages", "directions", "Newton-Schulz"))
    flops = model.flops_per_token() * recipe.batch_tokens / world_size * (4 / 3 if recompute else 1)
    settings = {
        dtype: True,
        f"gradients travel after {'every' if reduce == 'every' else 'the last'} one": world_size > 1,
        "blocks recomputed": recompute,
        "ZeRO-1": zero1,
        f"the loss in {loss_chunks} parts": loss_chunks > 1,
    }
    return Plan(
        size=size,
        config=config,
        opt=opt,
        gpu=gpu,
        ranks=world_size,
        parallel=str(layout),
        batch_tokens=recipe.batch_tokens,
        micro_batch=micro_batch,
        micro_steps=micro_steps,
        settings=", ".join(text for text, applies in settings.items() if applies),
        parameters=rules,
        held=held,
        memory=memory,
        activations=activations,
        peaks=(parameters + state + in_passes, parameters + state + in_step),
        model_messages=tuple(passing),
        rule_messages=tuple(stepping),
        gathered_instead=instead,
        matrices=sum(loads.batches.values()),
        newton_schulz=(sum(loads.flops), max(loads.flops), loads.balance),
        flops_per_token=model.flops_per_token(),
        compute=flops / machine.model_rate(dtype),
        optimizer=None if opt == "muon" else seconds,
    )


def _memory_notes(plan: Plan) -> dict[str, str]:
    """What each part of the memory is."""
    kept, loss, block = (size / GIB for size in plan.activations)
    whole = plan.memory["gradients"] > plan.memory["parameters"]
    return {
        "parameters": "float32",
        "gradients": "float32" + (", whole until the last micro-batch; --reduce every keeps shards" if whole else ""),
        "activations": f"{kept:.2f} that layers keep, {loss:.2f} for the loss"
        + (f" or {block:.2f} of a recomputed block" if block else ""),
        "gathered": "by fully_shard: embeddings, head and two blocks",
        "reduced": "by fully_shard: the largest group's gradients, and their message",
        "messages": "of the learned rule, sent and received",
        "directions": "of the learned rule",
    }


def _time_notes(plan: Plan) -> dict[str, str]:
    """The model behind each prediction of the optimizer's time."""
    machine = plan.machine
    learned, adamw = (f"{quantity(plan.held.get(rule, 0))} parameters" for rule in ("celo2", "adamw"))
    rates = 1e12 * machine.rule_seconds(plan.matrices > 0), 1e12 * machine.adamw_seconds()
    return {
        "learned rule": f"{learned} x {rates[0]:.1f} ps: the kernels' roofline, of shards too",
        "AdamW": f"{adamw} x {rates[1]:.1f} ps: bytes over bandwidth",
        "Newton-Schulz": "FLOPs, or bytes over bandwidth, of the rank with most",
        "messages": "bytes over links and latencies, of the rank with most",
    }


def describe(plan: Plan) -> str:
    """The plan as text, some forty lines."""
    machine, config, tokens = plan.machine, plan.config, plan.batch_tokens // plan.ranks
    notes, models = _memory_notes(plan), _time_notes(plan)
    total = sum(plan.parameters.values())
    rules = ", ".join(f"{count:,} by {rule}" for rule, count in plan.parameters.items())
    lines = [
        f"plan:       {plan.size} ({config.arch}), {plan.opt}, {plan.ranks} x {machine.chip.name}, {plan.parallel}",
        f"parameters: {total:,} ({rules}; {plan.matrices:,} matrices for Newton-Schulz)",
        f"batch:      {plan.batch_tokens:,} tokens: {plan.ranks} ranks, each {plan.micro_steps} micro-batches of "
        f"{plan.micro_batch} sequences of {config.context}",
        f"settings:   {plan.settings}",
        "",
        "memory a rank, GiB",
    ]
    for name, size in plan.memory.items():
        if size:
            lines.append(f"  {name:<28}{size / GIB:8.2f}  {notes.get(name, '')}".rstrip())
    passes, step = plan.peaks
    verdict = "fits" if plan.fits else "does NOT fit"
    lines += [
        f"  {'at most':<28}{max(plan.peaks) / GIB:8.2f}  in the {'passes' if passes >= step else 'step'} "
        f"({min(plan.peaks) / GIB:.2f} in the {'step' if passes >= step else 'passes'}): {verdict} into "
        f"{USABLE:.0%} of {machine.memory} GiB",
        "",
        "collectives a step                count  MB sent a rank",
    ]
    for owner, kinds in (("model", plan.model_messages), (plan.opt, plan.rule_messages)):
        for kind in kinds:
            lines.append(f"  {owner + ': ' + kind.name:<30}{kind.count:7,}  {kind.sent / 1e6:14,.1f}")
    if not plan.model_messages:
        lines.append("  none")
    if plan.rule_messages:
        instead = f"; gathering the directions would send {plan.gathered_instead / 1e9:.3f}"
        sent = f"  {plan.opt} sends {plan.bytes_sent / 1e9:.3f} GB a rank"
        lines.append(sent + (instead if plan.gathered_instead else ""))
    flops, most, balance = plan.newton_schulz
    if flops:
        lines.append(
            f"  Newton-Schulz: {flops:.3g} FLOPs, {most:.3g} on the rank with most: {balance:.2f} times the mean"
        )
    lines += [
        "",
        "predicted, ms a step",
        f"  {'forward and backward':<28}{1e3 * plan.compute:8.1f}  {tokens:,} tokens a rank x "
        f"{quantity(plan.flops_per_token)} FLOPs, {quantity(tokens * plan.flops_per_token / plan.compute)} a second",
    ]
    if plan.model_messages:
        lines.append(f"  {'messages of the model':<28}{1e3 * plan.hidden:8.1f}  at the same time: the longer counts")
    if plan.optimizer is None:
        lines.append("  optimizer: no model of torch.optim.Muon")
    else:
        for name, value in plan.optimizer.items():
            if value:
                lines.append(f"  {name:<28}{1e3 * value:8.2f}  {models.get(name, '')}".rstrip())
        lines.append(
            f"  {'a step':<28}{1e3 * plan.step_seconds:8.1f}  optimizer {1e3 * plan.optimizer_seconds:.1f}, "
            f"{plan.share:.2%} of it; {quantity(plan.tokens_per_second)} tokens/s, {plan.mfu:.1%} MFU"
        )
    return "\n".join([*lines, *(f"  {line}" for line in ASSUMPTIONS)]) + "\n"


def table(gpu: str = "h100", sizes: Sequence[str] = TABLE_SIZES, world_sizes: Sequence[int] = TABLE_RANKS) -> str:
    """Plans of celo2 with each size's own recipe, a line each.

    Where the ranks do not divide the batch, the line is of the next larger one that they do.
    """
    header = ("size", "ranks", "GiB a rank", "state", "MB sent", "balance", "optimizer ms", "step ms", "share", "batch")
    rows: list[tuple[str, ...]] = []
    for size in sizes:
        own = recipe_for(size, "celo2")
        context = model_config(size).context
        for ranks in world_sizes:
            sequences = own.batch_tokens // context
            more = -(-sequences // ranks) * ranks
            recipe = dataclasses.replace(own, batch_tokens=more * context)
            plan = make_plan(size=size, recipe=recipe, world_size=ranks, gpu=gpu)
            rows.append(
                (
                    size,
                    str(ranks),
                    f"{max(plan.peaks) / GIB:.2f}" + ("" if plan.fits else "!"),
                    f"{plan.memory['optimizer state'] / GIB:.3f}",
                    f"{plan.bytes_sent / 1e6:.1f}",
                    f"{plan.newton_schulz[2]:.2f}",
                    f"{1e3 * plan.optimizer_seconds:.2f}",
                    f"{1e3 * plan.step_seconds:.1f}",
                    f"{plan.share:.2%}",
                    "divides" if more == sequences else f"x {more / sequences:g}",
                )
            )
    return format_table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="What runs of celo2 on 8 to 1024 GPUs would be.")
    parser.add_argument("--gpu", choices=MACHINES, default="h100")
    parser.add_argument("--size", nargs="+", choices=TABLE_SIZES, default=TABLE_SIZES)
    arguments = parser.parse_args(argv)
    print(f"celo2, fully_shard over all ranks, 8 x {MACHINES[arguments.gpu].chip.name} in a node; predictions")
    print("\n".join([table(arguments.gpu, arguments.size), *LEGEND, *ASSUMPTIONS]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
