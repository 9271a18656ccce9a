"""No memory and no compiler, with real processes: one line with the flag and the cure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from celo2.pretrain import train_gpt
from celo2.pretrain.failures import explain, require_compiler, resolve_compile
from celo2.pretrain.prepare_data import prepare_embedded

CURES = {"memory": "use less", "compiler": "do without"}
LIMITED = """
import resource, runpy, sys
import torch  # with what the libraries map for themselves
from celo2.pretrain import train_gpt
from celo2.pretrain.device import device_name
import matplotlib.figure
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 29), resource.RLIM_INFINITY))
sys.exit(train_gpt.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_embedded("bytes", tmp_path_factory.mktemp("data"))


def options(data: Path, out: Path, *more: str) -> list[str]:
    small = ["--size", "nano", "--opt", "adamw", "--steps", "2", "--val-tokens", "256"]
    return [*small, "--batch-tokens", "524288", "--data", str(data), "--out-dir", str(out), *more]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.mark.needs("matplotlib", "tqdm")
def test_no_memory_on_the_cpu(data: Path, tmp_path: Path) -> None:
    done = run("-c", LIMITED, *options(data, tmp_path / "run", "--micro-batch", "2048"))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: out of memory on the CPU") and "lower --micro-batch" in last


@pytest.mark.needs("matplotlib", "tqdm")
@pytest.mark.parametrize(
    ("compiler", "message"), [("no-such-compiler", "no C++ compiler is here"), ("false", "failed")]
)
def test_no_compiler(data: Path, tmp_path: Path, compiler: str, message: str) -> None:
    small = ["--batch-tokens", "256", "--compile"]
    done = run(
        train_gpt.__file__,
        *options(data, tmp_path / "run", *small),
        CXX=compiler,
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last and "leave --compile out" in last
    if message.startswith("no C++"):
        assert done.stderr.count("\n") == 1 and "'no-such-compiler'" in last and not (tmp_path / "run").exists()


def test_errors_and_their_cures(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert explain(error.value, **CURES) == "out of memory on the CPU, asked for 4294967296.00 GiB at once; use less"
    assert explain(MemoryError(), **CURES) == "out of memory on the CPU; use less"
    assert explain(RuntimeError("std::bad_alloc"), **CURES) == "out of memory on the CPU; use less"
    assert explain(torch.OutOfMemoryError("CUDA out of memory.\nmore"), **CURES) == "CUDA out of memory.; use less"
    assert explain(RuntimeError("size mismatch"), **CURES) is None and explain(ValueError("x"), **CURES) is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.delenv("CC", raising=False)
    for device, message in (
        ("cpu", "no C++ compiler is here ('clang++')"),
        ("cuda", "no C compiler is here ('gcc' or"),
    ):
        with pytest.raises(ValueError) as refused:
            require_compiler(torch.device(device), "leave it out")
        assert str(refused.value).startswith(message) and str(refused.value).endswith("install one, or leave it out")


def test_a_gpu_compiles_by_default_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celo2.pretrain.failures.find_spec", lambda name: name)
    monkeypatch.setattr("celo2.pretrain.failures.shutil.which", lambda name: name)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for asked, device, expected in (
        (None, cpu, False),
        (None, gpu, True),
        (True, cpu, True),
        (True, gpu, True),
        (False, cpu, False),
        (False, gpu, False),
    ):
        assert resolve_compile(asked, device) == (expected, None)
    for missing, lack in (("find_spec", "no Triton is here"), ("shutil.which", "no C compiler is here")):
        with monkeypatch.context() as patch:
            patch.setattr(f"celo2.pretrain.failures.{missing}", lambda _: None)
            compiles, note = resolve_compile(None, gpu)
            assert not compiles and note is not None and note.startswith(lack) and note.endswith("give --no-compile")
            assert resolve_compile(None, cpu) == resolve_compile(False, gpu) == (False, None)
            with pytest.raises(ValueError, match=f"{lack}.*or leave --compile out"):
                resolve_compile(True, gpu)
