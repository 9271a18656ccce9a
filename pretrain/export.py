"""A checkpoint of a run as a model of transformers: a folder that `AutoModelForCausalLM.from_pretrained` loads.

    python -m celo2.pretrain.export --run runs/small-celo2 --export-hf models/small

`--run` is a run's `--out-dir`, whose newest checkpoint counts, or one of its `step-*` folders; how many processes wrote
it does not matter. The model is float32; which one it is, `hf_layout.py` says. transformers is not needed.
"""

import argparse
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from celo2.files import write_atomic
from celo2.pretrain.checkpoint import Checkpoints, RunState
from celo2.pretrain.hf_layout import ARCHITECTURES, hf_config, hf_tensors
from celo2.pretrain.hf_tokenizer import tokenizer_files
from celo2.pretrain.model import GPT, VOCAB_SIZES, GPTConfig
from celo2.pretrain.options import path
from celo2.pretrain.parallel import World
from celo2.pretrain.terminal import unfailing_streams

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# the entry of config.json that says which run it is of
ORIGIN = "celo2"


def check_export(config: GPTConfig, folder: Path) -> None:
    """Raise ValueError unless this model can be exported into this folder: new, empty, or an export from before."""
    hf_config(config)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"--export-hf {folder} is a file: give a folder")
    names = {entry.name for entry in folder.iterdir()}
    foreign = sorted(names - set(FILES))
    if names and not foreign and not _is_export(folder):
        foreign = ["a model that celo2 did not export"]
    if foreign:
        raise ValueError(f"--export-hf {folder} holds something else ({', '.join(foreign[:3])}): give a new folder")


def _is_export(folder: Path) -> bool:
    try:
        return ORIGIN in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False


def export(run: Path, folder: Path) -> str:
    """Write a run's newest checkpoint, or one of its checkpoints, as a model of transformers; returns a line on it.

    The folder appears whole, and replaces an export from before. Raises ValueError when there is no checkpoint, when it
    is of something else than a GPT that transformers has, or when the folder holds something else; OSError when
    a disk refuses.
    """
    checkpoints = Checkpoints(run)
    source, state = checkpoints.find(run, "--run")
    try:
        config = GPTConfig(**state.identity["model"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"--run {source} is no checkpoint of a language model of celo2-train") from error
    check_export(config, folder)
    model = GPT(config)
    checkpoints.read_weights(model, source, "--run")
    _replace(folder, model, state)
    return (
        f"{folder}, {ARCHITECTURES[config.arch]}, {model.num_params():,} parameters, of run {state.run_id}, "
        f"step {state.step}"
    )


def export_run(out_dir: Path, folder: Path, world: World) -> str:
    """`export` on rank 0; collective. Raises ValueError and OSError on every rank."""
    line, problem = "", None
    if world.main:
        try:
            line = export(out_dir, folder)
        except (ValueError, OSError) as error:
            problem = str(error)
    line, problem = world.broadcast_object((line, problem))
    if problem is not None:
        raise OSError(problem)
    return line


def _replace(folder: Path, model: GPT, state: RunState) -> None:
    """Write the files into a folder beside, and rename it."""
    folder = folder.resolve()
    temporary = _temporary(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):
            # of an export that was killed
            if re.fullmatch(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.tmp", left.name):
                shutil.rmtree(left)
        temporary.mkdir()
        for name, data in _small_files(model.config, state).items():
            write_atomic(temporary / name, [data])
        save_file(hf_tensors(model), temporary / "model.safetensors", metadata={"format": "pt"})
        with open(temporary / "model.safetensors", "rb") as file:
            os.fsync(file.fileno())
            # safetensors lets the owner alone read it
            os.fchmod(file.fileno(), (temporary / "config.json").stat().st_mode)
        old = None
        if folder.exists():
            old = folder.rename(_temporary(folder))
        temporary.rename(folder)
        if old is not None:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot export to {folder}: {error}; free space or give another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")


def _small_files(config: GPTConfig, state: RunState) -> dict[str, bytes]:
    """Everything but the weights, by the name of the file."""
    end = config.vocab_size - 1
    contents = {
        "config.json": hf_config(config) | {ORIGIN: {"run": state.run_id, "step": state.step, "arch": config.arch}},
        "generation_config.json": {"bos_token_id": end, "eos_token_id": end},
    }
    files = {name: json.dumps(content, indent=1).encode() for name, content in contents.items()}
    for tokenizer, size in VOCAB_SIZES.items():
        if size == config.vocab_size:
            files |= tokenizer_files(tokenizer, config.context)
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake is one line on standard error and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m celo2.pretrain.export", description="Write a checkpoint of a run as a model of transformers."
    )
    parser.add_argument("--run", type=path, required=True, metavar="DIR", help="--out-dir of a run, or a step-* folder")
    parser.add_argument("--export-hf", type=path, required=True, metavar="DIR", help="folder of the model")
    arguments = parser.parse_args(argv)
    with unfailing_streams():
        try:
            print(export(arguments.run, arguments.export_hf))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; nothing was exported", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
