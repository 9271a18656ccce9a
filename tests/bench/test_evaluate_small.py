"""The page of evaluations: its commands are sweeps that parse, and what it says of VeLO is measured."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "bench" / "evaluate_small.py"


def load() -> Any:
    import importlib.util

    specification = importlib.util.spec_from_file_location("evaluate_small", PROGRAM)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # dataclasses look their module up
    sys.modules["evaluate_small"] = module
    specification.loader.exec_module(module)
    return module


@pytest.mark.needs("scipy")
def test_every_command_is_a_sweep_with_as_many_runs_for_each_method() -> None:
    from celo2.pretrain.sweep import Sweep, parse_arguments

    result = subprocess.run([sys.executable, str(PROGRAM), "--list"], capture_output=True, text=True, check=True)
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    assert [Path(command[4]).name for command in commands] == [
        "language",
        "vision",
        "reinforcement-learning",
        "ablations",
    ]
    for command in commands:
        sweep = Sweep(parse_arguments(command[3:]))
        counts = {sweep.by[0]: {}}
        for point in sweep.points:
            method = point.method(sweep.by)
            counts[sweep.by[0]][method] = counts[sweep.by[0]].get(method, 0) + 1
        assert len(set(counts[sweep.by[0]].values())) == 1, counts
        rates = {
            point.get("lr") for point in sweep.points if point.method(sweep.by) == sweep.points[0].method(sweep.by)
        }
        assert len(rates) == {"language": 7, "vision": 7, "reinforcement-learning": 5, "ablations": 4}[sweep.out.name]


@pytest.mark.needs("scipy", "matplotlib")
def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = load()
    monkeypatch.chdir(tmp_path)
    difference = page.velo_difference("velo_small")
    assert 0 < difference < page.VELO_TOLERANCE
    # one run that ended, one that failed
    from celo2.pretrain.sweep import Sweep, parse_arguments
    from celo2.pretrain.sweep_runner import RECORD, folder_of

    sweep = Sweep(parse_arguments(page.EVALUATIONS[2].command))
    numbers = {"step": 100, "return": 9.0, "return_se": 0.3, "random_return": 1.0, "random_se": 0.4}
    curve = {"step": [0, 100], "return": [1.0, 9.0]}
    for point, status in zip(sweep.points, ("done", "failed"), strict=False):
        record = {"id": point.id, "settings": dict(point.settings), "status": status, "seconds": 60.0, "curve": curve}
        record |= {"metrics": numbers} if status == "done" else {"metrics": {}, "reason": "error: no memory"}
        folder_of(sweep.out, point).mkdir(parents=True)
        (folder_of(sweep.out, point) / RECORD).write_text(json.dumps(record))
    (tmp_path / "docs").mkdir()
    page.write_page({"velo_small": difference})
    text = (tmp_path / "docs" / "evaluations.md").read_text()
    # 8 above, with an error of 0.5
    assert "| celo2 | 0 | 9.00 +- 0.30 | 1.00 +- 0.40 | 16 |" in text
    assert "error: no memory" in text and f"{difference:.1e}" in text
    kept = (tmp_path / "docs" / "evaluations" / "reinforcement-learning" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["status"] for line in kept] == ["done", "failed"]
    for paper in ("Fig. 2", "Fig. 3", "Fig. 4", "Fig. 5", "Fig. 6", "Fig. 7", "Tab. 1", "GPT-3 XL", "LM-30M"):
        assert paper in text
