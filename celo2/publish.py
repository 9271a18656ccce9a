"""A theta for others: PyLO's files, and the Hugging Face hub with a model card from its metadata."""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.numpy import save as save_safetensors

from celo2 import hub
from celo2.files import write_atomic
from celo2.pylo import NAMES
from celo2.theta import BUNDLED, TRAINED, Theta, load_weights

WEIGHTS, README = "theta.safetensors", "README.md"
# of a model of PyLO
PYLO_WEIGHTS, PYLO_CONFIG = "model.safetensors", "config.json"
# entries of a theta's card that a reader looks for, and what they are called
_FACTS = {
    "variant": "variant",
    "orthogonalize": "Newton-Schulz",
    "recipe": "recipe",
    "seed": "meta-seed",
    "outer_steps": "outer steps",
    "inner_steps": "inner steps",
    "data": "meta-training data",
    "meta_loss": "meta-loss",
    "selection": "selection",
    "seconds": "seconds of meta-training",
    "machine": "machine",
    "ranks": "processes",
    "torch": "PyTorch",
    "git": "revision of the code",
    "recipe_fields": "all of the recipe",
}


def fits_pylo(theta: Theta) -> bool:
    """Whether PyLO's network can have a theta's sizes: it has one width for both hidden layers."""
    return theta.arrays["b0"].size == theta.arrays["b1"].size


def save_pylo(theta: Theta, path: str | os.PathLike[str]) -> None:
    """Write a theta for PyLO: `*.pt` for its `checkpoint_path=`, anything else as a folder for its `from_pretrained`.

    A folder gets `model.safetensors`, with the theta's card as metadata, and `config.json`; each is written atomically.
    Raises ValueError for hidden layers of two widths, which PyLO does not have, and OSError naming the path when the
    disk refuses.
    """
    path = Path(path)
    if not fits_pylo(theta):
        widths = f"{theta.hidden} and {theta.arrays['b1'].size}"
        raise ValueError(f"{theta!r} has hidden layers of {widths}: PyLO's network has one width for both")
    arrays = {there: theta.arrays[here] for here, there in NAMES.items()}
    if path.suffix == ".pt":
        file = io.BytesIO()
        torch.save({name: torch.tensor(array) for name, array in arrays.items()}, file)
        write_atomic(path, [file.getvalue()])
        return
    config = {
        "feature_dims": [arrays[f"w0.{group}"].shape[0] for group in range(14)],
        "hidden_size": theta.hidden,
        "hidden_layers": 2,
        "output_size": arrays["dense_b.1"].size,
        "activation": "relu",
    }
    path.mkdir(parents=True, exist_ok=True)
    card = {**theta.card, "format": "pt", "sha256": theta.sha256}
    write_atomic(path / PYLO_WEIGHTS, [save_safetensors(arrays, metadata=card)])
    write_atomic(path / PYLO_CONFIG, [json.dumps(config, indent=1).encode()])


def theta_card(theta: Theta, repo_id: str, *, licence: str | None = None) -> str:
    """Return the model card of a theta as Markdown: how it was meta-trained, from its metadata, and how it is used.

    `licence` is an identifier of the hub, such as `mit`. None is what the theta's metadata say (`licence`), `mit` for
    the bundled thetas, and else no licence, which the card says.
    """
    licence = licence or theta.card.get("licence") or ("mit" if _is_bundled(theta) else None)
    header = ["library_name: celo2", "tags: [learned-optimizer, optimizer]"]
    if licence is not None:
        header.insert(0, f"license: {licence}")
    # a table's cell is one line, and ends at a bar
    facts = {
        text: " ".join(theta.card[key].split()).replace("|", "\\|") for key, text in _FACTS.items() if key in theta.card
    }
    rows = [
        f"| {name} | {value} |"
        for name, value in {**facts, "floats": str(theta.num_parameters), "SHA-256 of the arrays": theta.sha256}.items()
    ]
    pylo = []
    if fits_pylo(theta):
        orthogonalize = "" if theta.orthogonalize else ", orthogonalize=False"
        pylo = [
            "or with PyLO:",
            "",
            "```python",
            "from pylo.optim import CELO2_naive",
            "",
            f'optimizer = CELO2_naive(model.parameters(), num_steps=1000, hf_key="{repo_id}"{orthogonalize})',
            "```",
            "",
        ]
    lines = [
        "---",
        *header,
        "---",
        f"# {theta.name}",
        "",
        "Weights of [Celo2](https://arxiv.org/abs/2602.19142), a learned optimizer: an MLP that turns the gradient "
        "statistics of every parameter into an update direction.",
        "",
        "```python",
        "from celo2 import FusedCelo2",
        "",
        f'optimizer = FusedCelo2(model, lr=1e-3, weights="{repo_id}")',
        "```",
        "",
        *pylo,
        "| | |",
        "|---|---|",
        *rows,
        "",
        f"Licence: {licence or 'none is given'}.",
        "",
    ]
    return "\n".join(lines)


def push_theta(
    weights: str | os.PathLike[str] | Theta,
    repo_id: str,
    *,
    licence: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> str:
    """Upload a theta to the Hugging Face hub, with a model card from its metadata; returns the address of the commit.

    `weights` is what `load_weights` takes; `repo_id` is `owner/name`, a repository that is made when it is missing
    (`private`: one that others cannot see). It gets `theta.safetensors`, which `FusedCelo2(weights=repo_id)` finds, the
    same in PyLO's layout (`celo2.pylo`), where it has one, and the card (`theta_card`). `token=None` takes the one that
    `hf auth login` stored. With `folder`, a new or empty folder, the files are written there, nothing is uploaded, and
    the folder's path is returned.
    Raises ValueError for another repo_id or a folder that is not empty, ImportError without huggingface_hub, OSError
    when the hub or the disk refuses.
    """
    where = hub.parse_id(repo_id)
    if where is None or where[1] is not None:
        raise ValueError(f"repo_id={repo_id!r}: expected owner/name")
    theta = load_weights(weights)
    if folder is not None:
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"folder={str(folder)!r} is not empty: give a new one")
        _write(theta, folder, repo_id, licence)
        return str(folder)
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(
            "pushing a theta needs huggingface_hub: pip install huggingface_hub, or write the files with folder="
        ) from error
    with tempfile.TemporaryDirectory() as temporary:
        _write(theta, Path(temporary), repo_id, licence)
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            message = message or f"Upload {theta.label}"
            commit = api.upload_folder(repo_id=repo_id, folder_path=temporary, commit_message=message)
        except hub.client_errors() as error:
            reason = (str(error).splitlines() or [""])[0]
            raise OSError(
                f"{theta.label} could not be uploaded to {repo_id!r} ({type(error).__name__}: {reason}); log in with "
                "`hf auth login` or give token=, and check the owner and the network"
            ) from error
    return str(commit.commit_url)


def _write(theta: Theta, folder: Path, repo_id: str, licence: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    theta.save(folder / WEIGHTS)
    if fits_pylo(theta):
        save_pylo(theta, folder)
    write_atomic(folder / README, [theta_card(theta, repo_id, licence=licence).encode()])


def _is_bundled(theta: Theta) -> bool:
    return any(theta == Theta.load(BUNDLED / f"{name}.safetensors") for name in TRAINED)
