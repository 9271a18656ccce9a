"""What the programs share: the snippets of docs/interop.md, tiny models and data, and what an optimizer holds."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from celo2 import FusedCelo2

VOCABULARY = 61
PAGE = Path(__file__).parents[2] / "docs" / "interop.md"

# torchvision (which timm needs, and transformers imports where it is) registers the shapes of two operators when it is
# imported, and its builds for GPUs cannot load the library that has them next to a PyTorch for CPUs. They are declared
# here, and never called
_torchvision = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def run_snippet(heading: str, **names: Any) -> dict[str, Any]:
    """Run the Python below a heading of docs/interop.md with some names defined; all names after it."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = (text for text in sections if text.splitlines()[0] == heading)
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    namespace = dict(names)
    exec(compile(block, f"{PAGE.name}: {heading}", "exec"), namespace)
    return namespace


def let_accelerate_shard_on_cpus() -> None:
    """Let accelerate take FSDP2 for processes on CPUs.

    `AcceleratorState` asks for FSDP only where the processes are of a list of accelerators' types, written out in its
    `__init__`; CPUs are not among them, though everything after it works on them. They are called GPUs while it
    decides.
    """
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def __init__(self: AcceleratorState, *arguments: Any, **options: Any) -> None:
        if not PartialState._shared_state:
            PartialState(cpu=True)
        shared = PartialState._shared_state
        if options.get("fsdp_plugin") is not None and shared["distributed_type"] == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *arguments, **options)

    AcceleratorState.__init__ = __init__


def llama() -> nn.Module:
    """A Llama of two layers, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


class Byte(nn.Module):
    """Embedding, two residual blocks and a head; an axis of 33 leaves ranks with uneven shards."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, 33)
        self.blocks = nn.ModuleList(nn.Linear(33, 33) for _ in range(2))
        self.norm = nn.LayerNorm(33)
        self.lm_head = nn.Linear(33, VOCABULARY, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of tokens."""
        x_BTD = self.embed_tokens(tokens_BT)
        for block in self.blocks:
            x_BTD = x_BTD + block(x_BTD).relu()
        return self.lm_head(self.norm(x_BTD))


def byte_model() -> Byte:
    """The same on every rank."""
    torch.manual_seed(0)
    return Byte()


def batch(step: int, rows: int = 8) -> Tensor:
    """Tokens [rows, 9] of a step, each one above the last, so that there is something to learn."""
    start = torch.randint(VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(step))
    return (start + torch.arange(9)) % VOCABULARY


def own_rows(tokens_BT: Tensor) -> Tensor:
    """This rank's rows of a batch."""
    return tokens_BT.chunk(dist.get_world_size())[dist.get_rank()]


def next_token_loss(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Mean cross entropy of the next token."""
    logits_BTV = model(tokens_BT[:, :-1])
    return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())


def mean_over_ranks(loss: Tensor) -> float:
    """A loss, averaged over the ranks."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def parameters(model: nn.Module) -> list[Tensor]:
    """All of a model's parameters, on every rank."""
    return [whole(parameter) for parameter in model.parameters()]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    """Whether lists of tensors are the same to the bit."""
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def distance(one: list[Tensor], two: list[Tensor]) -> float:
    """Largest difference between two lists of tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


def routes(optimizer: FusedCelo2) -> dict[str, str]:
    """Name to rule, read from `optimizer.table()`."""
    header, _, *lines = optimizer.table().splitlines()
    column = re.split(r"\s{2,}", header).index("rule")
    return {cells[0]: cells[column] for cells in (re.split(r"\s{2,}", line) for line in lines) if len(cells) > column}


def routing_faults(optimizer: FusedCelo2, expected: dict[str, str]) -> list[str]:
    """Where the table is not the expected one, or the state or the rate of a parameter not those of the table."""
    table, faults = routes(optimizer), []
    if table != expected:
        faults.append(f"table {table}, expected {expected}")
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            kinds = {"celo2": "momentum_fast", "adamw": "exp_avg"}
            found = [rule for rule, key in kinds.items() if key in optimizer.state.get(parameter, {})]
            if parameter.requires_grad and found != [table[name]]:
                faults.append(f"{name}: the table says {table[name]}, its state is of {found}")
    return faults


def local_bytes(optimizer: FusedCelo2) -> int:
    """Bytes of state that this rank holds."""
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors)


def unsharded(optimizer: FusedCelo2) -> list[tuple[int, ...]]:
    """Shapes of state, but for counters, that this rank holds whole."""
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return [tuple(t.shape) for t in tensors if t.ndim and not isinstance(t, DTensor)]


def report(**found: Any) -> None:
    """Print what was found on rank 0, as JSON, and end the process."""
    together = dist.is_initialized()
    if together:
        dist.barrier()
    if not together or dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    if together:
        dist.barrier()
    # gloo's threads may abort a process that tears its groups down while another still talks to it
    os._exit(0)
