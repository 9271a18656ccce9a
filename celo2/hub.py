"""Weights on a hub: ids `owner/name[@revision]`, the file that a repository or a folder holds, and the local cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".safetensors", ".state")
# of what is a path and no hub id
FILES = (*SUFFIXES, ".pt")
# of a model of transformers, besides its tokenizer
MODEL_FILES = ("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def parse_id(name: str) -> tuple[str, str | None] | None:
    """Return the repository and the revision of a hub id; None for what is a file's path or something else."""
    found = _HUB_ID.fullmatch(name)
    if found is None or name.endswith(FILES) or name[0] in "./":
        return None
    return found["repo"], found["revision"]


def choose(names: Sequence[str]) -> list[str]:
    """Return the names of files with weights, the best first: theta.safetensors, other safetensors, theta.state."""
    found = [name for name in names if name.endswith(SUFFIXES)]
    return sorted(found, key=lambda name: (not name.endswith(".safetensors"), Path(name).stem != "theta", name))


def files_in(folder: Path) -> list[Path]:
    """Return a folder's files with weights, the best first."""
    return [folder / name for name in choose([path.name for path in folder.iterdir()])]


def client_errors() -> tuple[type[Exception], ...]:
    """Return what a call of huggingface_hub raises when the hub does not answer, or answers with an error.

    Its HTTP client is requests, httpx or httpx2, by its version, and only the errors of requests are OSErrors.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, RuntimeError, *HfHubHTTPError.__bases__


def fetch(repo: str, revision: str | None) -> Path:
    """Return the path of the best file of a hub repository, without a network that of what was fetched before.

    Raises ImportError without huggingface_hub, OSError when nothing can be fetched, ValueError for a repository without
    weights, each naming the id.
    """
    try:
        from huggingface_hub import hf_hub_download, list_repo_files
    except ImportError as error:
        raise ImportError(
            f"weights={repo!r} is a hub id: pip install huggingface_hub, or pass a file's path"
        ) from error
    errors = client_errors()
    try:
        try:
            files = list_repo_files(repo, revision=revision)
        except errors as error:
            # no network, or told to use none: what was fetched before serves
            if (cached := _cached(repo, revision)) is not None:
                return cached
            raise OSError(str(error)) from error
        for name in choose(files):
            return Path(hf_hub_download(repo, name, revision=revision))
    except errors as error:
        raise OSError(
            f"weights={repo!r} could not be fetched from the hub ({type(error).__name__}: {error}); check the id and "
            "the network, or download the file and pass its path"
        ) from error
    raise ValueError(f"hub repository {repo!r} holds no .safetensors or .state file, only {files}")


def fetch_model(repo: str, revision: str | None, *, cached: bool = False) -> Path:
    """Return the folder of a model of transformers on the hub, without a network that of what was fetched before.

    With `cached` it takes what was fetched before in any case. Raises ImportError without huggingface_hub, OSError when
    nothing can be fetched, naming the id.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(f"{repo!r} is a hub id: pip install huggingface_hub, or give a folder") from error
    try:
        patterns = list(MODEL_FILES)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=cached))
    except client_errors() as error:
        raise OSError(
            f"{repo!r} could not be fetched from the hub ({type(error).__name__}: {str(error).splitlines()[0]}); check "
            "the id and the network, or download it and give the folder"
        ) from error


def _cached(repo: str, revision: str | None) -> Path | None:
    """Return a file that was fetched from the hub before, None when there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return next(iter(files_in(Path(folder))), None)
