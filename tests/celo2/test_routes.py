"""Routing by module type, place, shape and name: what names alone sent to the wrong rule, in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from celo2 import FusedCelo2, MatrixView, param_groups
from celo2.routes import route_module, route_name


def kinds(module, **options):
    return {route.name: (route.kind, route.rule) for route in route_module(module, **options)}


class Body(nn.Module):
    """A network of two blocks between an embedding and a head of some name."""

    def __init__(self, head: str, built: nn.Module) -> None:
        super().__init__()
        self.wte = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8), "output": nn.Linear(8, 8)}) for _ in "12")
        self.norm = nn.LayerNorm(8)
        self.add_module(head, built)


@pytest.mark.parametrize(
    ("head", "built", "inside"),
    [
        ("classifier", nn.Sequential(*(nn.Identity() for _ in range(6)), nn.Linear(8, 5)), "classifier.6.weight"),
        ("head", nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5)), "head.1.weight"),
        ("to_logits", nn.Linear(8, 5), "to_logits.weight"),
        ("head_dist", nn.Linear(8, 5), "head_dist.weight"),
        (
            "lm_head",
            nn.utils.parametrizations.weight_norm(nn.Linear(8, 5)),
            "lm_head.parametrizations.weight.original1",
        ),
        ("lm_head", nn.utils.parametrizations.orthogonal(nn.Linear(8, 5)), "lm_head.parametrizations.weight.original"),
        ("score", nn.Linear(8, 5, bias=False), "score.weight"),
        ("fc", nn.Linear(8, 5), "fc.weight"),
        ("output", nn.Linear(8, 5), "output.weight"),
    ],
)
def test_heads_by_their_place(head, built, inside):
    found = kinds(Body(head, built))
    assert found[inside] == ("head", "adamw")
    assert {name for name, (kind, _) in found.items() if kind == "head"} == {inside}
    # a block's own projections are no heads, whatever their names
    assert all(found[f"blocks.{i}.{name}.weight"] == ("matrix", "celo2") for i in range(2) for name in ("fc", "output"))


def test_hidden_modules_that_are_named_as_heads():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 16)
            self.output = nn.Linear(16, 16)
            self.head = nn.Linear(16, 3)

    assert kinds(Net()) == {
        "fc.weight": ("matrix", "celo2"),
        "fc.bias": ("vector", "adamw"),
        "output.weight": ("matrix", "celo2"),
        "output.bias": ("vector", "adamw"),
        "head.weight": ("head", "adamw"),
        "head.bias": ("vector", "adamw"),
    }


def test_embeddings_that_are_reparametrised_or_renamed():
    table = Body("lm_head", nn.Linear(8, 50, bias=False))
    nn.utils.parametrizations.weight_norm(table.wte)
    found = kinds(table)
    assert {rule for name, (_, rule) in found.items() if name.startswith("wte")} == {"adamw"}

    class ScaledWordEmbedding(nn.Embedding):
        pass

    assert kinds(nn.Sequential(ScaledWordEmbedding(9, 4)))["0.weight"] == ("embedding", "adamw")


class Holder(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("down_proj_bias", (4, 16), "vector"),
        ("gamma", (16, 1, 1), "vector"),
        ("temperature", (4, 1, 1), "vector"),
        ("time_mix_k", (1, 1, 16), "vector"),
        ("original0", (16, 1, 1, 1), "vector"),
        ("logit_scale", (4, 16), "vector"),
        ("relative_position_bias_table", (169, 3), "table"),
        ("attention_biases", (4, 196), "table"),
        ("pos_emb", (64, 32), "table"),
        ("latents", (32, 64), "table"),
        ("query_tokens", (1, 32, 64), "table"),
        ("A_log", (64, 16), "state"),
    ],
)
def test_gains_tables_and_states(name, shape, kind):
    assert kinds(Holder(**{name: shape}))[name] == (kind, "adamw")
    # the same where the name is all there is
    assert route_name(f"blocks.3.mixer.{name}", torch.Size(shape))[:2] == (kind, "adamw")


@pytest.mark.parametrize("name", ["gate_up_proj", "w1", "kernel", "in_proj_weight", "experts_weight"])
def test_bare_parameters_that_are_matrices(name):
    assert kinds(Holder(**{name: (4, 16, 24)}))[name] == ("matrix", "celo2")


def test_depthwise_and_other_convolutions():
    net = nn.ModuleDict(
        {
            "conv1d": nn.Conv1d(16, 16, 4, groups=16),
            "dw": nn.Conv2d(16, 16, 3, groups=16),
            "grouped": nn.Conv2d(16, 16, 3, groups=4),
            "point": nn.Conv2d(16, 16, 1),
            "line": nn.Conv1d(16, 16, 3),
        }
    )
    found = {name: kind for name, (kind, _) in kinds(net).items() if name.endswith("weight")}
    assert found == {
        "conv1d.weight": "depthwise",
        "dw.weight": "depthwise",
        "grouped.weight": "matrix",
        "point.weight": "matrix",
        "line.weight": "matrix",
    }
    flatten = {route.name: route.flatten for route in route_module(net)}
    assert flatten["line.weight"] is True and flatten["point.weight"] is None
    # one matrix each
    table = {line.split()[0]: line for line in FusedCelo2(net).table().splitlines()}
    assert "1 x [16, 48]" in table["line.weight"] and "1 x [16, 36]" in table["grouped.weight"]
    # reparametrised: the direction is the kernel, the magnitude a vector
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))
    table = {line.split()[0].split(".")[-1]: line for line in FusedCelo2(normed).table().splitlines() if "." in line}
    assert "1 x [8, 27]" in table["original1"] and "celo2" in table["original1"] and "adamw" in table["original0"]


def test_bodies_under_names_of_embeddings_are_hidden():
    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.ModuleDict(
                {
                    "backbone": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3)),
                    "proj": nn.Conv2d(16, 32, 1),
                }
            )
            self.time_embed = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32))
            self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    found = {name: kind for name, (kind, _) in kinds(Hybrid()).items() if name.endswith("weight")}
    # the first reads the inputs' channels
    assert found.pop("patch_embed.backbone.0.weight") == "embedding"
    assert set(found.values()) == {"matrix"} and len(found) == 7


def test_a_patch_embedding_is_an_input_embedding():
    net = nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": nn.Conv2d(3, 32, 4, 4)}), "body": nn.Linear(32, 32)})
    assert kinds(net)["patch_embed.proj.weight"] == ("embedding", "adamw")
    assert kinds(net)["body.weight"] == ("matrix", "celo2")


def test_a_layer_scale_and_norms_of_other_people():
    class GemmaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 8))

    class LayerScale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(16, 1, 1))

    net = nn.ModuleDict({"norm": GemmaRMSNorm(), "layer_scale": LayerScale(), "fc1": nn.Linear(8, 8)})
    found = kinds(net)
    assert found["norm.weight"] == found["layer_scale.gamma"] == ("vector", "adamw")
    groups = {name: group for group in FusedCelo2(net, weight_decay=0.1).param_groups for name in group["param_names"]}
    # gains of any number of axes have no decay
    assert groups["norm.weight"]["weight_decay"] == groups["layer_scale.gamma"]["weight_decay"] == 0.0


def test_overrides_win_and_wrappers_do_not_matter():
    net = nn.ModuleDict(
        {"mlp": nn.ModuleDict({"router": nn.Linear(8, 4), "up": nn.Linear(8, 8)}), "norm": nn.LayerNorm(8)}
    )
    for wrapped in (net, torch.compile(net, backend="eager"), nn.ModuleDict({"module": net})):
        routes = route_module(wrapped, overrides={"mlp.*": "adamw", "*.up.weight": "celo2", "norm.weight": "celo2"})
        found = {route.name.split("mlp.")[-1]: (route.rule, route.reason) for route in routes}
        assert found["router.weight"] == ("adamw", 'override "mlp.*"')
        assert found["up.weight"] == ("celo2", 'override "*.up.weight"')  # the last that matches
        assert found["up.bias"][0] == "adamw" and [r.rule for r in routes if "norm" in r.name] == ["celo2", "adamw"]
    assert kinds(net)["mlp.router.weight"] == ("matrix", "celo2")
    with pytest.raises(ValueError, match="matches no parameter"):
        route_module(net, overrides={"*.gate.*": "adamw"})
    with pytest.raises(ValueError, match="unknown rule, allowed: celo2, adamw"):
        route_module(net, overrides={"mlp.*": "sgd"})


def test_reasons_and_hints_are_in_the_table():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            self.qkv = nn.Linear(16, 48)
            self.proj = nn.Linear(16, 16)

    net = nn.ModuleDict({"wte": nn.Embedding(9, 16), "attn": Attention()})
    lines = {line.split()[0]: line for line in FusedCelo2(net).table().splitlines()}
    assert lines["wte.weight"].endswith("nn.Embedding")
    assert 'fused q, k, v: views={"attn.qkv.weight": MatrixView(split=3, heads=4)}' in lines["attn.qkv.weight"]
    assert all(len(line.split("  ")) > 3 for name, line in lines.items() if "." in name)
    # not when it is split
    groups = param_groups(net, views={"attn.qkv.weight": MatrixView(split=3, heads=4)})
    assert "fused" not in FusedCelo2(groups).table()


def test_adapters_are_matrices():
    net = nn.ModuleDict(
        {"q": nn.ModuleDict({"lora_A": nn.Linear(32, 2, bias=False), "lora_B": nn.Linear(2, 32, bias=False)})}
    )
    assert set(kinds(net).values()) == {("matrix", "celo2")}
