"""HellaSwag (Zellers et al. 2019), scored as llm.c does: which of four endings the model finds likeliest.

Context and ending are GPT-2 tokens, the ending with a space before it. `accuracy_norm`, the number that is quoted for
GPT-2, takes the ending with the smallest mean loss a token, `accuracy` the one with the smallest sum.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from celo2.pretrain.device import precision
from celo2.pretrain.loss import IGNORED
from celo2.pretrain.model import GPT
from celo2.pretrain.parallel import World
from celo2.pretrain.tokenizer import Tokenizer

FILE = "hellaswag_val.jsonl"
DATASET = "Rowan/hellaswag"
OFF = "off"
ENDINGS = 4
BATCH = 8
"""Items of a forward pass."""


@dataclass(frozen=True)
class Item:
    """A context, its four endings, and which of them is right."""

    context: str
    endings: tuple[str, ...]
    label: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Item:
        """Of a row as the data set has it: `ctx`, `endings` and `label` (a number, or one as text)."""
        endings, label = tuple(row["endings"]), int(row["label"])
        if len(endings) != ENDINGS or not all(isinstance(text, str) for text in (row["ctx"], *endings)):
            raise ValueError(f"it needs a context and {ENDINGS} endings, all of them text")
        if not 0 <= label < ENDINGS:
            raise ValueError(f"label {label} is none of {ENDINGS} endings")
        return cls(row["ctx"], endings, label)


@dataclass(frozen=True)
class Score:
    """The part of the items whose right ending has the smallest mean loss a token, and the smallest sum."""

    accuracy_norm: float
    accuracy: float
    items: int


def read_file(path: Path) -> list[Item]:
    """The items of a file of JSON lines; raises ValueError naming the file and the line."""
    items = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                items.append(Item.of(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                what = f"no {error} in it" if isinstance(error, KeyError) else error
                raise ValueError(f"{path}, line {number}, is no item of HellaSwag: {what}") from error
    if not items:
        raise ValueError(f"{path} holds no items of HellaSwag")
    return items


def find_items(source: str | None, data: Path, tokenizer: Tokenizer) -> list[Item]:
    """The items of `--hellaswag`: none for `off`, and for None (not asked for) unless `FILE` is beside the shards.

    A path is a file of JSON lines, anything else an id of `datasets`, whose validation split is taken. Raises
    ValueError, ImportError or OSError for a source that was asked for and cannot be had, and for a tokenizer that is
    not GPT-2's.
    """
    if source == OFF or (source is None and (tokenizer.name != "gpt2" or not (data / FILE).is_file())):
        return []
    if tokenizer.name != "gpt2":
        raise ValueError(f"--hellaswag {source}: it is scored in GPT-2 tokens, and this model has {tokenizer.name}")
    path = data / FILE if source is None else Path(source)
    if path.is_file():
        return read_file(path)
    assert source is not None
    if path.suffix in (".jsonl", ".json"):
        raise FileNotFoundError(f"--hellaswag {source}: no such file")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"--hellaswag {source} needs the package datasets: pip install 'celo2[train]'") from error
    try:
        return [Item.of(row) for row in datasets.load_dataset(source, split="validation")]
    except (ValueError, KeyError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--hellaswag {source}: cannot be loaded ({reason}); give a file of JSON lines, or an id as {DATASET}"
        ) from error


def encode(item: Item, tokenizer: Tokenizer, context: int) -> list[tuple[list[int], int]]:
    """The tokens of the context and each ending, and how many at the end are the ending's.

    What does not fit the model's context, with one token before the ending, is cut off on the left.
    """
    before = tokenizer.encode(item.context).tolist()
    rows = []
    for ending in item.endings:
        after = tokenizer.encode(" " + ending).tolist()
        tokens = (before or [tokenizer.eot]) + after
        tokens = tokens[-(context + 1) :]
        rows.append((tokens, min(len(after), len(tokens) - 1)))
    return rows


def losses_of(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Summed and mean loss in nats, float32 [B], of each row's targets that are not ignored."""
    losses_BT = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none")
    sums_B = losses_BT.view_as(targets_BT).sum(1)
    return sums_B, sums_B / (targets_BT != IGNORED).sum(1)


def _batches(items: Sequence[Item], tokenizer: Tokenizer, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(items), BATCH):
        rows = [row for item in items[first : first + BATCH] for row in encode(item, tokenizer, context)]
        length = max(len(tokens) for tokens, _ in rows) - 1
        inputs_BT = torch.full((len(rows), length), tokenizer.eot)
        targets_BT = torch.full((len(rows), length), IGNORED)
        for index, (tokens, counted) in enumerate(rows):
            end = len(tokens) - 1
            inputs_BT[index, :end] = torch.tensor(tokens[:-1])
            targets_BT[index, end - counted : end] = torch.tensor(tokens[-counted:])
        yield inputs_BT, targets_BT


@torch.no_grad()
def score(model: GPT, items: Sequence[Item], tokenizer: Tokenizer, world: World, dtype: str) -> Score:
    """Score the items, shared out among the ranks, which all run as many forward passes; collective.

    `dtype` is for `precision`.
    """
    model.eval()
    share = -(-len(items) // world.ranks)
    # the last ranks may score some items again, which do not count
    mine = [items[(world.rank * share + index) % len(items)] for index in range(share)]
    count = max(0, min(share, len(items) - world.rank * share))
    sums, means = [], []
    for inputs_BT, targets_BT in _batches(mine, tokenizer, model.config.context):
        with precision(world.device, dtype):
            logits_BTV = model(inputs_BT.to(world.device))
        sums_B, means_B = losses_of(logits_BTV, targets_BT.to(world.device))
        sums.append(sums_B.view(-1, ENDINGS).argmin(1).cpu())
        means.append(means_B.view(-1, ENDINGS).argmin(1).cpu())
    model.train()
    if isinstance(model, FSDPModule):
        # without a backward pass the root's parameters stay gathered
        model.reshard()
    labels = torch.tensor([item.label for item in mine])[:count]
    right, right_norm = (int((torch.cat(chosen)[:count] == labels).sum()) for chosen in (sums, means))
    total, total_norm, number = world.all_reduce_sum(right, right_norm, count)
    return Score(total_norm / number, total / number, int(number))
