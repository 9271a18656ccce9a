"""HellaSwag: scores against losses computed one ending at a time, shares of ranks, and bad files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from celo2.pretrain.hellaswag import FILE, Item, encode, find_items, read_file, score
from celo2.pretrain.model import GPT, GPTConfig
from celo2.pretrain.tokenizer import get_tokenizer

pytestmark = pytest.mark.needs("tiktoken", "regex")
CONFIG = GPTConfig("modern", n_layer=1, n_head=1, head_dim=8, context=24, vocab_size=50257)
ITEMS = [
    Item("A man opens the door of the train and", ("waves.", "sings to the rails", "door door", "is a bird"), 0),
    Item("She pours the milk.", ("Then she drinks it slowly", "Milk", "The milk pours her", "It rains"), 2),
    Item("The dog", ("barks at the cat that sits on the wall", "flies", "reads", "is"), 3),
]


def model(seed: int = 0) -> GPT:
    found = GPT(CONFIG)
    found.init_weights(seed)
    return found.double()


def loss_of(gpt: GPT, tokens: list[int], counted: int) -> list[float]:
    """The loss of each of the last `counted` tokens, one forward pass a token."""
    losses = []
    for end in range(len(tokens) - counted, len(tokens)):
        logits = gpt(torch.tensor([tokens[:end]]))[0, -1].detach()
        losses.append(float(logits.logsumexp(0) - logits[tokens[end]]))
    return losses


class OneOf:
    """A rank of several, whose sums are added up by the test."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.device, self.parts = rank, ranks, torch.device("cpu"), None

    def all_reduce_sum(self, *values: float) -> list[float]:
        self.parts = values
        return [*values[:2], max(1, values[2])]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_are_those_of_one_ending_at_a_time(seed: int) -> None:
    gpt, tokenizer = model(seed), get_tokenizer("gpt2")
    right = right_norm = 0
    for item in ITEMS:
        losses = []
        for ending in item.endings:
            context, after = tokenizer.encode(item.context).tolist(), tokenizer.encode(" " + ending).tolist()
            losses.append(loss_of(gpt, context + after, len(after)))
        sums, means = [sum(found) for found in losses], [sum(found) / len(found) for found in losses]
        right += sums.index(min(sums)) == item.label
        right_norm += means.index(min(means)) == item.label
    found = score(gpt, ITEMS, tokenizer, OneOf(0, 1), "float32")
    assert (found.accuracy, found.accuracy_norm, found.items) == (right / 3, right_norm / 3, 3)


def test_every_answer_counts() -> None:
    gpt, tokenizer = model(), get_tokenizer("gpt2")
    # the same items with every label: each is right once
    every = [Item(item.context, item.endings, label) for item in ITEMS for label in range(4)]
    found = score(gpt, every, tokenizer, OneOf(0, 1), "float32")
    assert found.accuracy == found.accuracy_norm == 0.25


@pytest.mark.parametrize("ranks", [2, 3, 5, 7])
def test_ranks_share_the_items(ranks: int) -> None:
    gpt, tokenizer = model(), get_tokenizer("gpt2")
    items = [Item(item.context, item.endings, label) for item in ITEMS for label in (0, 2)][:5]
    alone = OneOf(0, 1)
    score(gpt, items, tokenizer, alone, "float32")
    passes = []
    gpt.register_forward_hook(lambda *_: passes.append(1))
    worlds = [OneOf(rank, ranks) for rank in range(ranks)]
    counts = set()
    for world in worlds:
        passes.clear()
        score(gpt, items, tokenizer, world, "float32")
        counts.add(len(passes))
    assert [sum(parts) for parts in zip(*(world.parts for world in worlds), strict=True)] == list(alone.parts)
    assert len(counts) == 1


def test_a_long_context_is_cut_on_the_left() -> None:
    tokenizer = get_tokenizer("gpt2")
    item = Item("word " * 40, ("the end", "of it", "x", "another way to end this sentence"), 0)
    full = tokenizer.encode(item.context).tolist() + tokenizer.encode(" the end").tolist()
    assert encode(item, tokenizer, 24)[0] == (full[-25:], 2)
    tokens, counted = encode(Item("", ("a b c", *item.endings[1:]), 0), tokenizer, 2)[0]
    assert (len(tokens), counted) == (3, 2)


def rows(*changes: dict[str, Any]) -> str:
    row = {"ctx": "A cat", "endings": ["a", "b", "c", "d"], "label": 1, "ind": 4}
    return "".join(json.dumps(row | change) + "\n" for change in changes)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text(rows({}, {"label": "3"}))
    assert read_file(path) == [Item("A cat", ("a", "b", "c", "d"), 1), Item("A cat", ("a", "b", "c", "d"), 3)]
    gpt2, byte = get_tokenizer("gpt2"), get_tokenizer("bytes")
    assert len(find_items(None, tmp_path, gpt2)) == 2
    assert (
        find_items(None, tmp_path, byte)
        == find_items("off", tmp_path, gpt2)
        == find_items(None, tmp_path / "x", gpt2)
        == []
    )
    with pytest.raises(ValueError, match="scored in GPT-2 tokens, and this model has bytes"):
        find_items(str(path), tmp_path, byte)
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such file"):
        find_items("none.jsonl", tmp_path, gpt2)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no items"),
        ("{", "line 1, is no item"),
        (rows({}, {"label": 4}), "line 2.*label 4"),
        (rows({"endings": ["a"]}), "4 endings"),
        (rows({"ctx": None}), "all of them text"),
        ('{"endings": ["a", "b", "c", "d"], "label": 1}\n', "no 'ctx' in it"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_file(path)


def test_an_id_goes_through_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load_dataset(path: str, split: str) -> list[dict[str, Any]]:
        asked.append((path, split))
        if path == "nobody/nothing":
            raise FileNotFoundError("there is no network\nand more lines")
        return [{"ctx": "A cat", "endings": ["a", "b", "c", "d"], "label": "2"}]

    error = type("DatasetsError", (Exception,), {})
    fake = SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=error))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert find_items("Rowan/hellaswag", tmp_path, get_tokenizer("gpt2"))[0].label == 2
    with pytest.raises(ValueError, match=r"--hellaswag nobody/nothing: cannot be loaded \(there is no network\)"):
        find_items("nobody/nothing", tmp_path, get_tokenizer("gpt2"))
    assert asked == [("Rowan/hellaswag", "validation"), ("nobody/nothing", "validation")]


def test_the_trainer_scores_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(rows({}, {"label": 3}, {"ctx": "The dog"}))
    command = [sys.executable, "-m", "celo2.pretrain.train_gpt", "--out-dir", "run", "--hellaswag", str(path)]
    refused = subprocess.run([*command, "--size", "nano"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "this model has bytes" in refused.stderr
    small = [
        "--size",
        "30m",
        "--steps",
        "1",
        "--batch-tokens",
        "512",
        "--val-tokens",
        "512",
        "--sample-tokens",
        "0",
        "--opt",
        "adamw",
    ]
    result = subprocess.run([*command, *small], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    final = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["hellaswag_items"] == 3 and final["hellaswag_accuracy_norm"] in (0, 1 / 3, 2 / 3, 1)
    assert "HellaSwag:" in result.stdout and "| HellaSwag |" in (tmp_path / "run" / "report.md").read_text()
