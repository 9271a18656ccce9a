"""The files of examples/ that need other people's trainers, each as a process in another folder: the loss falls."""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from celo2.pretrain.prepare_data import EMBEDDED_TEXT

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
OFFLINE = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}


def run(
    program: Path, *arguments: object, folder: Path, ranks: int = 0, status: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in another folder, on some processes that meet through torchrun when `ranks` is given."""
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(program), *map(str, arguments)]
    variables = {**os.environ, **OFFLINE, **environment}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=variables)
    assert result.returncode == status, result.stderr[-4000:]
    return result


def example(name: str, *arguments: object, folder: Path, ranks: int = 0, shard: bool = False) -> str:
    options = ["--shard-on-cpus"] if shard else []
    return run(HERE / "run_example.py", *options, EXAMPLES / name, *arguments, folder=folder, ranks=ranks).stdout


def losses(text: str) -> list[float]:
    """What the lines of steps print."""
    return [float(value) for value in re.findall(r"^step +\d+ \| loss ([\d.]+)", text, re.MULTILINE)]


def validation(text: str) -> float:
    return float(re.findall(r"^validation loss ([\d.]+)", text, re.MULTILINE)[-1])


@pytest.mark.parametrize("name", ["hf_trainer.py", "accelerate_fsdp2.py", "lightning_module.py", "timm_vit.py"])
def test_help_and_a_bad_value(name: str, tmp_path: Path) -> None:
    launcher = HERE / "run_example.py"
    assert "--steps" in run(launcher, EXAMPLES / name, "--help", folder=tmp_path).stdout
    refused = run(launcher, EXAMPLES / name, "--steps", 0, folder=tmp_path, status=2)
    assert refused.stderr.endswith("error: --steps 0: must be at least 1\n")
    assert list(tmp_path.iterdir()) == []


def test_trainer_resumes(tmp_path: Path) -> None:
    command = ("hf_trainer.py", "--steps", 8, "--out-dir", "run")
    whole = validation(example(*command, folder=tmp_path))
    # bytes have 5.5 nats at first
    assert whole < 4.2
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    saved = (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").stat().st_mtime_ns
    assert validation(example(*command, "--resume", folder=tmp_path)) == whole
    # it went on, and did not begin again
    assert (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").stat().st_mtime_ns == saved
    assert (tmp_path / "run" / "checkpoint-8").is_dir()


def test_trainer_takes_a_ready_made_optimizer(tmp_path: Path) -> None:
    assert validation(example("hf_trainer.py", "--steps", 8, "--ready-made", folder=tmp_path)) < 4.2


@pytest.mark.parametrize("shard", [True, False])
def test_accelerate(shard: bool, tmp_path: Path) -> None:
    text = example("accelerate_fsdp2.py", "--steps", 9, folder=tmp_path, ranks=2, shard=shard)
    assert text.splitlines()[0] == f"{'FSDP' if shard else 'MULTI_CPU'} on 2 processes"
    first, last = losses(text)
    assert first > 5 and last < 3.5


def test_lightning(tmp_path: Path) -> None:
    text = example("lightning_module.py", "--steps", 10, folder=tmp_path)
    first, last = losses(text)
    assert first > 5 and last < 3.5
    assert list(tmp_path.iterdir()) == []


def test_timm(tmp_path: Path) -> None:
    text = example("timm_vit.py", "--steps", 60, folder=tmp_path)
    # ten classes have 2.3 nats at first
    assert losses(text)[0] > 2.2 and validation(text) < 1.8


def test_torchtitan(tmp_path: Path) -> None:
    """torchtitan's program takes the folder as a module, and its flags change the configuration."""
    write_titan_data(tmp_path)
    options = ["--module", "torchtitan_celo2", "--config", "llama3_debugmodel_celo2", "--hf_assets_path", "tokenizer"]
    options += ["--dataloader.dataset_path", "text", "--validator.freq", "1000", "--dump_folder", "dump"]
    options += ["--training.steps", "8", "--training.seq_len", "64", "--training.local_batch_size", "4"]
    path = f"{EXAMPLES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    log = run(HERE / "titan_on_cpu.py", *options, folder=tmp_path, ranks=1, PYTHONPATH=path).stdout
    assert "Optimizer FusedCelo2" in log
    found = [float(value) for value in re.findall(r"step: +\d+ .*?loss: +([\d.]+)", log)]
    # a vocabulary of 2,048, of which the text has 257
    assert len(found) == 8 and found[0] > 7 and found[-1] < 5.5


def write_titan_data(folder: Path) -> None:
    """A tokenizer of bytes, and documents, as torchtitan reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    (folder / "tokenizer").mkdir()
    (folder / "text").mkdir()
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    special = {"bos_token": "<end>", "eos_token": "<end>", "add_bos_token": True, "add_eos_token": True}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(special))
    with lzma.open(EMBEDDED_TEXT, "rt", encoding="utf-8") as file:
        text = file.read(200_000)
    lines = [json.dumps({"text": text[start : start + 2000]}) + "\n" for start in range(0, len(text), 2000)]
    (folder / "text" / "documents.json").write_text("".join(lines))


def test_notebook(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "meta_training.ipynb", as_version=4)
    printed = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    # what is stored is of a run of its own size
    assert "outer step 60 |" in "".join(printed)
    check_table(printed, learned=True)
    for size, small in (("outer_steps = 60", "outer_steps = 2"), ("steps=200", "steps=20")):
        (cell,) = (cell for cell in notebook.cells if size in cell.source)
        cell.source = cell.source.replace(size, small)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    assert "outer step 2 |" in "".join(printed) and (tmp_path / "mine.safetensors").is_file()
    check_table(printed, learned=False)


def check_table(printed: list[str], learned: bool) -> None:
    """One line a method with its loss; the theta is better than its start when it has learned."""
    (table,) = (text for text in printed if text.startswith("optimizer "))
    found = {line[:26].strip(): float(line[26:45]) for line in table.splitlines()[1:]}
    assert list(found) == ["random theta, the start", "this theta", "bundled celo2-base", "AdamW"]
    if learned:
        assert found["this theta"] < found["random theta, the start"] - 1
    assert found["bundled celo2-base"] < 2.3
