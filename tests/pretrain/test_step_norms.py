"""Norms of updates: against float64 arithmetic on the parameters themselves, for every optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from celo2.pretrain.model import GPT, GPTConfig
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.parallel import World
from celo2.pretrain.recipes import Tuning, recipe_for
from celo2.pretrain.step_norms import StepNorms

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
KINDS = {"token_embedding": "embedding", "position_embedding": "embedding", "lm_head": "head", "blocks": "matrix"}


def config(arch: str) -> GPTConfig:
    return GPTConfig(arch=arch, n_layer=2, n_head=2, head_dim=8, context=16, vocab_size=12_750)


def kind_of(name: str, parameter: nn.Parameter) -> str:
    return "vector" if parameter.ndim < 2 else KINDS[name.split(".")[0]]


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
@pytest.mark.parametrize("opt", ["celo2", "celo2-base", "adamw", "muon"])
def test_by_value(opt: str, arch: str) -> None:
    model = GPT(config(arch))
    model.init_weights(0)
    assert model.config.padded_vocab_size > model.config.vocab_size
    tuning: Tuning = recipe_for("nano", opt)
    optimizers = Optimizers(opt, tuning, model)
    norms = StepNorms(model, ALONE, 1)
    tokens = torch.randint(model.config.vocab_size, (2, 17))
    for _ in range(2):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        before = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
        norms.before()
        optimizers.step()
        found = norms.after()
        optimizers.zero_grad()
    wanted: dict[str, Any] = {}
    rows = model.config.vocab_size
    for name, parameter in model.named_parameters():
        old, new = before[name], parameter.detach().double()
        if parameter.shape[0] == model.config.padded_vocab_size:
            if opt != "celo2-base":
                assert not new[rows:].any()
                old, new = old[:rows], new[:rows]
            count = rows * parameter.shape[1]
        else:
            count = parameter.numel()
        sums = wanted.setdefault(kind_of(name, parameter), [0.0, 0.0, 0])
        for index, value in enumerate((float(old.square().sum()), float((new - old).square().sum()), count)):
            sums[index] += value
    assert {key.split("/")[1] for key in found} == set(wanted)
    for kind, (weight, update, count) in wanted.items():
        assert found[f"weight_rms/{kind}"] == pytest.approx(math.sqrt(weight / count), rel=1e-5)
        assert found[f"update_rms/{kind}"] == pytest.approx(math.sqrt(update / count), rel=1e-4)
        assert found[f"update_ratio/{kind}"] == pytest.approx(math.sqrt(update / weight), rel=1e-4)
    if opt == "celo2":
        # what the rule promises: an update of RMS lr, and AdamW's side at its multiple
        assert found["update_rms/matrix"] == pytest.approx(tuning.lr, rel=0.05)


def test_decay_is_part_of_the_update_and_a_skipped_step_is_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    norms = StepNorms(model, ALONE, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    (weight,) = model.parameters()
    weight.grad = torch.zeros_like(weight)
    norms.before()
    optimizer.step()
    found = norms.after()
    assert found["update_ratio/matrix"] == pytest.approx(0.1 * 0.5, rel=1e-5)
    norms.before()
    assert norms.after()["update_rms/matrix"] == 0.0
    # nothing is held in between
    assert norms._copies == [] and norms._weights == []


def test_low_precision_and_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)).bfloat16()
    model[1].requires_grad_(False)
    norms = StepNorms(model, ALONE, 1)
    norms.before()
    old = model[0].weight.detach().double().clone()
    with torch.no_grad():
        model[0].weight.mul_(1.0078125)
    found = norms.after()
    assert set(found) == {f"{name}/matrix" for name in ("weight_rms", "update_rms", "update_ratio")}
    difference = model[0].weight.detach().double() - old
    assert found["update_rms/matrix"] == pytest.approx(float(difference.square().mean().sqrt()), rel=1e-6)


def test_zero_weights_have_no_ratio() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    nn.init.zeros_(model[0].weight)
    norms = StepNorms(model, ALONE, 1)
    norms.before()
    assert math.isnan(norms.after()["update_ratio/matrix"])
