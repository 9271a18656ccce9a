"""Ablations: the plain rule against the fused one, and the program as a process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from celo2.pretrain.model import GPT, GPTConfig
from celo2.pretrain.recipes import recipe_for

PROGRAM = Path(__file__).parents[2] / "bench" / "ablation.py"


@pytest.fixture(scope="module")
def ablation() -> Any:
    specification = importlib.util.spec_from_file_location("ablation", PROGRAM)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def train(ablation: Any, row: str, *, plain: bool = False) -> dict[str, torch.Tensor]:
    """Three steps of a small GPT whose attention splits into heads."""
    model = GPT(GPTConfig("gpt2", n_layer=1, n_head=2, head_dim=8, context=16, vocab_size=31, bias=True))
    model.init_weights(0)
    optimizers = ablation.build(row, recipe_for("nano", "celo2-base"), model, plain=plain)
    for seed in range(3):
        tokens_BT = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(seed))
        optimizers.set_lr(1 / (1 + seed))
        optimizers.zero_grad()
        model(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
        optimizers.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_the_plain_rule_is_celo2_base(ablation: Any) -> None:
    fused, plain = train(ablation, "base"), train(ablation, "base", plain=True)
    for name, parameter in fused.items():
        torch.testing.assert_close(plain[name], parameter, rtol=0, atol=1e-6)


def test_rows_are_different_rules(ablation: Any) -> None:
    rows = {row: train(ablation, row)["blocks.0.mlp.up.weight"] for row in ablation.ROWS}
    names = list(rows)
    # Newton-Schulz on the matrices, with and without AdamW for the rest, differ elsewhere
    for index, one in enumerate(names):
        for other in names[:index]:
            same = torch.equal(rows[one], rows[other])
            assert not same, (one, other)
    theta = {
        row: ablation.load_weights(ablation.THETAS / f"{entry[0]}.safetensors") for row, entry in ablation.ROWS.items()
    }
    assert {row: theta[row].hidden for row in ("base", "hidden-4", "hidden-16")} == {
        "base": 8, "hidden-4": 4, "hidden-16": 16,
    }  # fmt: skip
    # meta-trained alike but for what the row says
    made = {row: json.loads(one.card["recipe_fields"]) for row, one in theta.items()}
    base = made["base"]
    changed = {
        row: {k: v for k, v in fields.items() if base.get(k) != v and k != "name"} for row, fields in made.items()
    }
    assert changed["no-output-rms"] == {"normalize_update": False}
    assert changed["no-augmentation"] == {"scale_range": [1.0, 1.0]}
    assert changed["hidden-4"] == {"hidden": 4} and changed["hidden-16"] == {"hidden": 16}
    assert {one.card["outer_steps"] for one in theta.values()} == {"1000"}


@pytest.mark.needs("tiktoken", "regex")
def test_the_program(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--row", "no-output-rms", "--lr", "0.001", "--steps", "3"]
    result = subprocess.run([*command, "--out-dir", "run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["run", "val", "final"]
    assert records[0]["row"] == "no-output-rms" and records[-1]["step"] == 3 and 3 < records[-1]["loss"] < 5
    again = subprocess.run([*command, "--out-dir", "run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and again.stderr.startswith("error: run holds a run")
