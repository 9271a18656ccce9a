"""PyLO's layout of a theta: what its network computes with our files, and what we read of its."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from celo2 import Theta, load_weights, save_pylo
from celo2.reference import mlp
from celo2.theta import GROUP_COLUMNS


def network() -> Any:
    """The class of a network with the names, the shapes and the result of PyLO's `CELO2MLP`, and its way to the hub."""
    hub = pytest.importorskip("huggingface_hub")

    class Network(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(
            self,
            feature_dims: tuple[int, ...] = GROUP_COLUMNS,
            hidden_size: int = 8,
            hidden_layers: int = 2,
            output_size: int = 3,
            activation: str = "relu",
        ) -> None:
            super().__init__()
            assert hidden_layers == 2 and activation == "relu"
            self.w0 = nn.ParameterList(torch.randn(columns, hidden_size) for columns in feature_dims)
            self.b0 = nn.Parameter(torch.randn(hidden_size))
            widths = ((hidden_size, hidden_size), (hidden_size, output_size))
            self.dense_w = nn.ParameterList(torch.randn(shape) for shape in widths)
            self.dense_b = nn.ParameterList(torch.randn(width) for _, width in widths)

        def forward(self, groups: list[Tensor]) -> Tensor:
            x = sum(group @ matrix for group, matrix in zip(groups, self.w0, strict=True)) + self.b0
            x = x.relu() @ self.dense_w[0] + self.dense_b[0]
            return x.relu() @ self.dense_w[1] + self.dense_b[1]

    return Network


def assert_same_outputs(theta: Theta, model: nn.Module) -> None:
    columns = torch.randn(1000, 30)
    with torch.no_grad():
        there = model(list(columns.split(GROUP_COLUMNS, dim=-1)))[:, 0]
    here = mlp(theta.tensors(torch.float32, columns.device), columns)
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5 * float(here.abs().max()))


@pytest.mark.parametrize("name", ["celo2-lm", "random of 8", "random of 5"])
def test_its_network_computes_the_same_with_our_files(name: str, random_theta: Any, tmp_path: Path) -> None:
    hidden = int(name.split()[-1]) if "random" in name else 8
    theta = random_theta(hidden=hidden, hidden2=hidden) if "random" in name else load_weights(name)
    save_pylo(theta, tmp_path / "new" / "folder")
    # the class fetches the sizes and the weights from a folder as from the hub
    assert_same_outputs(theta, network().from_pretrained(tmp_path / "new" / "folder"))
    save_pylo(theta, tmp_path / "theta.pt")
    model = network()(hidden_size=hidden)
    model.load_state_dict(torch.load(tmp_path / "theta.pt"))
    assert_same_outputs(theta, model)
    # and back, with the card where the file has one
    assert load_weights(tmp_path / "new" / "folder") == load_weights(tmp_path / "theta.pt") == theta
    assert dict(load_weights(tmp_path / "new" / "folder").card) == {"name": "model", **theta.card}


def test_its_own_files_are_read(tmp_path: Path) -> None:
    model = network()(hidden_size=8)
    model.save_pretrained(tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "theta.pt")
    theta = load_weights(tmp_path / "folder")
    assert_same_outputs(theta, model)
    assert load_weights(tmp_path / "theta.pt") == theta and theta.name == "model"


def test_what_is_refused(random_theta: Any, tmp_path: Path) -> None:
    theta = random_theta()
    with pytest.raises(ValueError, match=r"hidden layers of 8 and 4: PyLO's network has one width"):
        save_pylo(random_theta(hidden=8, hidden2=4), tmp_path / "theta.pt")
    save_pylo(theta, tmp_path / "theta.pt")
    state = torch.load(tmp_path / "theta.pt")
    del state["w0.3"]
    torch.save(state, tmp_path / "missing.pt")
    with pytest.raises(ValueError, match=r"missing.pt is not a readable theta .*missing \['w0__3'\]"):
        load_weights(tmp_path / "missing.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "theta.pt").read_bytes()[:900])
    for name in ("list.pt", "cut.pt"):
        with pytest.raises(ValueError, match=rf"{name} is not a readable theta \(no state dict of tensors"):
            load_weights(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights("me/theta.pt")


@pytest.mark.parametrize("whole", [True, False])
def test_files_with_linear_layers_are_read(whole: bool, tmp_path: Path) -> None:
    first, hidden, output = nn.Linear(30, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    state = {
        f"{name}.{key}": value
        for name, layer in (("hidden", hidden), ("output", output))
        for key, value in layer.state_dict().items()
    }
    if whole:
        state |= {"first_layer.weight": first.weight, "first_layer.bias": first.bias}
    else:
        parts = first.weight.split(GROUP_COLUMNS, dim=1)
        state |= {f"first_layer_weights.{group}": part for group, part in enumerate(parts)}
        state["first_layer_bias"] = first.bias
    torch.save({name: tensor.detach().clone() for name, tensor in state.items()}, tmp_path / "theta.pt")
    theta = load_weights(tmp_path / "theta.pt")
    columns = torch.randn(100, 30)
    with torch.no_grad():
        there = output(hidden(first(columns).relu()).relu())[:, 0]
    torch.testing.assert_close(mlp(theta.tensors(torch.float32, columns.device), columns), there)


def test_linear_layers_with_a_part_missing_are_refused(tmp_path: Path) -> None:
    torch.save({"first_layer.weight": torch.zeros(8, 30), "hidden.weight": torch.zeros(8, 8)}, tmp_path / "theta.pt")
    with pytest.raises(ValueError, match="theta.pt is not a readable theta"):
        load_weights(tmp_path / "theta.pt")
