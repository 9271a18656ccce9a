"""FP8 in the blocks: the optimizer sees the same parameters, the numbers are near, and what cannot run says why."""

from __future__ import annotations

import pytest
import torch

from celo2.pretrain import fp8
from celo2.pretrain.model import GPT, model_config
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.recipes import recipe_for
from celo2.pretrain.train_gpt import main


@pytest.mark.needs("torchao")
@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_the_optimizer_sees_the_same_parameters(arch: str) -> None:
    plain, model = GPT(model_config("nano", arch)), GPT(model_config("nano", arch))
    for each in (plain, model):
        each.init_weights(0)
    before = dict(model.named_parameters())
    fp8.convert(model, emulate=True)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "weight")}
    converted = {name for name, kind in kinds.items() if kind == "Float8Linear"}
    leaves = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    assert converted == {f"blocks.{layer}.{leaf}" for layer in range(4) for leaf in leaves}
    optimizers = [Optimizers("celo2", recipe_for("nano", "celo2"), each) for each in (plain, model)]
    rules = [
        {name: own.members[0].rule_of(parameter) for name, parameter in each.named_parameters()}  # type: ignore[attr-defined]
        for each, own in zip((plain, model), optimizers, strict=True)
    ]
    assert rules[0] == rules[1] and set(rules[1].values()) == {"celo2", "adamw"}
    assert "12 x [32, 128]" in optimizers[1].table() and "matrix of Float8Linear" in optimizers[1].table()

    tokens_BT = torch.randint(257, (2, 65), generator=torch.Generator().manual_seed(0))
    losses = []
    for each, own in zip((plain, model), optimizers, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = each(tokens_BT[:, :-1], tokens_BT[:, 1:])
        loss.backward()
        losses.append(loss.item())
        for name, parameter in each.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert own.step(loss.detach()).isfinite()
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.01)
    one, other = (each.blocks[2].mlp.up.weight for each in (plain, model))
    moved = (one - before["blocks.2.mlp.up.weight"]).abs().max()
    assert one.dtype == other.dtype == torch.float32 and (one - other).abs().max() < 2 * moved + 1e-2


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    assert main(["--fp8", "--device", "cpu", "--out-dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error == "error: --fp8 needs a GPU that multiplies in FP8 (H100, RTX 4090 or newer), and this is cpu\n"
    assert not (tmp_path / "out").exists()
    gpu = torch.device("cuda", 1)
    for capability, dtype, message in (
        ((8, 0), "bfloat16", "--fp8 needs compute capability 8.9 or more, and cuda:1 has 8.0"),
        ((9, 0), "float32", "--fp8 goes with --dtype bfloat16, not float32"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        with pytest.raises(ValueError, match=message):
            fp8.require_fp8(gpu, dtype)
    monkeypatch.setattr("celo2.pretrain.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"needs torchao: pip install 'celo2\[fp8\]'"):
        fp8.require_fp8(gpu, "bfloat16")


def test_it_is_not_planned(capsys) -> None:
    assert main(["--fp8", "--dry-run", "--world-size", "8", "--size", "small"]) == 1
    assert "error: --fp8 cannot be planned" in capsys.readouterr().err
