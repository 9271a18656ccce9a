"""First weights from GPT-2's public layout: `config.json` and `model.safetensors`, in a folder or on the hub.

Names come with or without `transformer.`; the matrices of Conv1D are transposed; the masks `attn.bias` and the head,
which is the embedding, are left out.
"""

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from celo2 import hub
from celo2.pretrain.hf_layout import gpt2_names
from celo2.pretrain.model import GPT, NORM_EPS, SIZES, GPTConfig
from celo2.pretrain.parallel import World

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def load_gpt2(model: GPT, source: str, world: World) -> str:
    """Fill a model, sharded or not, with GPT-2's weights from a folder or a hub id; collective.

    Every rank reads the files, one parameter at a time, and keeps its part. Returns what identifies them, as
    `openai-community/gpt2, SHA-256 0123456789ab`. Raises ValueError on every rank when they cannot be had, or are of
    another model, naming each mismatch.
    """
    problem, digest = None, None
    # one process a machine fetches, the others find what it fetched
    for turn in (True, False):
        if (world.local_rank == 0) == turn:
            try:
                folder = _find(source, fetched=not turn)
            except (ValueError, OSError, ImportError) as error:
                problem = str(error)
        _agree(world, source, problem)
    try:
        with ExitStack() as opened:
            weights = _Weights(folder, opened)
            if wrong := _mismatches(model.config, weights):
                raise ValueError(f"it is of another model: {'; '.join(wrong)}")
            _fill(model, weights)
        if world.main:
            digest = weights.digest()
    except (ValueError, OSError, SafetensorError) as error:
        problem = str(error)
    _agree(world, source, problem)
    return f"{source}, SHA-256 {world.broadcast_object(digest)}"


def _agree(world: World, source: str, problem: str | None) -> None:
    problem = next((text for text in world.gather(problem) if text is not None), None)
    if problem is not None:
        raise ValueError(f"--init-hf {source}: {problem}")


def _find(source: str, *, fetched: bool) -> Path:
    """The folder; a path that exists wins over a hub id of the same spelling."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"is a file: give the folder that holds config.json and {WEIGHTS}")
    if (where := hub.parse_id(source)) is None:
        raise ValueError("no such folder; an id of the hub is owner/name, such as openai-community/gpt2")
    return hub.fetch_model(*where, cached=fetched)


class _Weights:
    """The configuration and the tensors of a folder, read when they are asked for; raises ValueError and OSError."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        config = self._json(folder / "config.json")
        self.config: dict[str, Any] = config
        if (folder / INDEX).is_file():
            entries = self._json(folder / INDEX).get("weight_map", {})
            self.files = [folder / name for name in sorted({Path(name).name for name in entries.values()})]
        elif (folder / WEIGHTS).is_file():
            self.files = [folder / WEIGHTS]
        else:
            raise ValueError(f"{folder} holds no {WEIGHTS}, in which this program reads weights")
        self._found: dict[str, tuple[Any, str]] = {}
        for path in self.files:
            file = opened.enter_context(safe_open(path, framework="pt"))
            self._found |= {name.removeprefix("transformer."): (file, name) for name in file.keys()}  # noqa: SIM118

    @staticmethod
    def _json(path: Path) -> dict[str, Any]:
        if not path.is_file():
            raise ValueError(f"{path.parent} holds no {path.name}")
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is damaged: it is no JSON object")
        return content

    def names(self) -> set[str]:
        """Names without `transformer.`, masks and the head left out."""
        masks = (".attn.bias", ".attn.masked_bias")
        return {name for name in self._found if not name.endswith(masks) and name != "lm_head.weight"}

    def shape(self, name: str) -> tuple[int, ...]:
        file, full = self._found[name]
        return tuple(file.get_slice(full).get_shape())

    def read(self, name: str) -> Tensor:
        file, full = self._found[name]
        tensor: Tensor = file.get_tensor(full)
        return tensor

    def digest(self) -> str:
        """The first 12 digits of the SHA-256 of the files with weights."""
        digest = hashlib.sha256()
        for path in self.files:
            with open(path, "rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
        return digest.hexdigest()[:12]


def _mismatches(config: GPTConfig, weights: _Weights) -> list[str]:
    """What keeps these weights out of this model: of the configuration, then of the tensors."""
    if config.arch != "gpt2":
        return [f"arch is 'gpt2' there and {config.arch!r} here"]
    # by GPT-2's names, with what transformers takes for one that is missing
    rows: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("model_type", None, ("gpt2",)),
        ("n_layer", 12, (config.n_layer,)),
        ("n_head", 12, (config.n_head,)),
        ("n_embd", 768, (config.width,)),
        ("n_positions", 1024, (config.context,)),
        ("vocab_size", 50257, (config.vocab_size,)),
        ("n_inner", None, (None, 4 * config.width)),
        ("activation_function", "gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
        ("layer_norm_epsilon", 1e-5, (NORM_EPS["gpt2"],)),
        ("scale_attn_weights", True, (True,)),
        ("scale_attn_by_inverse_layer_idx", False, (False,)),
        ("add_cross_attention", False, (False,)),
        ("tie_word_embeddings", True, (True,)),
    )
    wrong = [
        f"{name} is {there!r} there and {here[-1]!r} here"
        for name, default, here in rows
        if (there := weights.config.get(name, default)) not in here
    ]
    if wrong:
        return [*wrong[:-1], wrong[-1] + _size_of(config, weights.config)]
    wanted = dict(gpt2_names(config).values())
    missing, unknown = sorted(set(wanted) - weights.names()), sorted(weights.names() - set(wanted))
    if missing or unknown:
        return [f"tensors are missing, {missing[:3]}, or unknown, {unknown[:3]}"]
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in GPT(config).named_parameters()}
    for name, (there, transposed) in gpt2_names(config).items():
        if name in shapes:
            shape = shapes[name][::-1] if transposed else shapes[name]
            if name == "token_embedding.weight":
                shape = (config.vocab_size, config.width)
            if weights.shape(there) != shape:
                wrong.append(f"{there} has shape {weights.shape(there)} there and {shape} here")
        elif not wrong and weights.read(there).any():
            return ["it has biases, and this model none: give --bias"]
    return wrong


def _size_of(config: GPTConfig, there: dict[str, Any]) -> str:
    """Which other `--size` has the layers of a GPT-2's configuration, as the end of a message."""
    layers = tuple(there.get(key, default) for key, default in (("n_layer", 12), ("n_head", 12), ("n_embd", 768)))
    shapes = {name: (size.n_layer, size.n_head, size.n_head * size.head_dim) for name, size in SIZES.items()}
    found = next((name for name, shape in shapes.items() if shape == layers), None)
    same = layers == (config.n_layer, config.n_head, config.width)
    return "" if found is None or same else f" (its layers are those of --size {found})"


@torch.no_grad()
def _fill(model: GPT, weights: _Weights) -> None:
    names = gpt2_names(model.config)
    for name, parameter in model.named_parameters():
        there, transposed = names[name]
        tensor = weights.read(there)
        tensor = tensor.T.contiguous() if transposed else tensor
        if tensor.shape[0] < parameter.shape[0]:
            # rows of the vocabulary that are padding
            tensor = F.pad(tensor, (0, 0, 0, parameter.shape[0] - tensor.shape[0]))
        if isinstance(parameter, DTensor):
            # from this rank's own reading: no message
            tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(tensor)
