"""Every program of the package as a process: help exits 0, a typo exits 2, and neither prints anything else."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "train_gpt.py": [str(ROOT / "pretrain" / "train_gpt.py")],
    "train_gpt": ["-m", "celo2.pretrain.train_gpt"],
    "prepare_data": ["-m", "celo2.pretrain.prepare_data"],
    "prepare_data.py": [str(ROOT / "pretrain" / "prepare_data.py")],
    "export": ["-m", "celo2.pretrain.export"],
    "plan": ["-m", "celo2.pretrain.plan"],
    "speeds": ["-m", "celo2.pretrain.speeds"],
    "pretrain.report": ["-m", "celo2.pretrain.report"],
    "sweep": ["-m", "celo2.pretrain.sweep"],
    "meta.train": ["-m", "celo2.meta.train"],
    "meta.select": ["-m", "celo2.meta.select"],
    "meta.average": ["-m", "celo2.meta.average"],
    "meta.evaluate": ["-m", "celo2.meta.evaluate"],
    "report": ["-m", "celo2.kernels.report"],
    "gpu_check.py": [str(ROOT / "bench" / "gpu_check.py")],
    "gpu_page.py": [str(ROOT / "bench" / "gpu_page.py")],
    "ablation.py": [str(ROOT / "bench" / "ablation.py")],
    "evaluate_small.py": [str(ROOT / "bench" / "evaluate_small.py")],
    "harness.py": [str(ROOT / "bench" / "harness.py")],
    "ppo.py": [str(ROOT / "bench" / "ppo.py")],
    "vision.py": [str(ROOT / "bench" / "vision.py")],
    # installed beside the interpreter
    **{
        name: [str(Path(sys.executable).parent / name)]
        for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    },
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_and_typos(name: str, tmp_path: Path) -> None:
    for option, status in (("--help", 0), ("--no-such-option", 2)):
        command = [sys.executable, *PROGRAMS[name], option]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert result.returncode == status, result.stderr
        shown, silent = (result.stdout, result.stderr) if status == 0 else (result.stderr, result.stdout)
        assert shown.startswith("usage: ") and silent == "" and "Traceback" not in shown
        if status:
            last = shown.strip().splitlines()[-1]
            assert "error:" in last
    assert list(tmp_path.iterdir()) == []
