"""Compilation ahead of the first outer step: a rehearsal runs what a step runs, and processes share its regions."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from celo2.meta import compilation
from celo2.meta.compilation import Claims, claiming, processes_for
from celo2.meta.outer_trainer import OuterTrainer
from scenarios import regions


@pytest.mark.parametrize("name", ["celo2-short", "celo2-base-short", "celo2", "celo2-elo", "celo2-base-elo"])
@pytest.mark.parametrize("ablation", [{}, {"hidden": 4}])
def test_a_rehearsal_compiles_what_a_step_compiles(image_sets, small_recipe, name, ablation):
    trainer = OuterTrainer(small_recipe(name, **ablation), image_sets)
    state = {key: x.clone() for key, x in trainer.truncated_step.state.items()}
    with claiming(Claims()) as rehearsed:
        trainer._rehearse()
    assert trainer.count_regions() == len(rehearsed.seen) > 10
    for key, x in trainer.truncated_step.state.items():
        assert torch.equal(x, state[key]), key
    with claiming(Claims()) as taken:
        trainer.step()
        trainer.step()
    assert taken.seen.keys() == rehearsed.seen.keys()


SHARED = """
import os, sys
from functools import partial
from pathlib import Path
from torch._dynamo.utils import counters
from celo2.meta.compilation import compile_ahead
from scenarios import regions
folder = Path(sys.argv[1])
elsewhere = regions.fail if sys.argv[2] == "fail" else regions.rehearse
# the second region waits here until the helper has been through all
compile_ahead(partial(regions.rehearse, folder, elsewhere is regions.rehearse), partial(elsewhere, folder, False), 2)
print(os.getpid(), counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.parametrize(
    ("elsewhere", "misses", "hits"), [("rehearse", 1, 1), pytest.param("fail", 2, 0, marks=pytest.mark.slow)]
)
def test_two_processes_share_the_regions(tmp_path, elsewhere, misses, hits):
    """What fails in the other one is compiled in this one, and neither leaves anything."""
    places = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", SHARED, str(tmp_path), elsewhere]
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    process, *figures = map(int, done.stdout.split())
    assert figures == [misses, hits]
    assert ((tmp_path / "helped").read_text() == str(process)) == (elsewhere == "fail")
    assert regions.processes_with(str(tmp_path)) == []
    assert {name for name in os.listdir(tmp_path) if not name.startswith("torchinductor_")} <= {"cache", "helped"}


def test_a_helper_ends_with_its_run(tmp_path):
    """It reads from a pipe: at its end the run is gone, however."""
    program = "from celo2.meta.compilation import help_out; help_out()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, start_new_session=True, stderr=subprocess.PIPE
    )
    process.stdin.write(pickle.dumps((partial(regions.sleep, tmp_path), Path(tmp_path), 1)))
    process.stdin.flush()
    regions.wait_for(tmp_path / "asleep")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -15, errors


def test_helpers_only_where_processors_are_idle(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(compilation.os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    for load, expected in ((0.2, 6), (3.1, 3), (9.0, 1)):
        monkeypatch.setattr(compilation.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert processes_for(cpu) == expected
    assert processes_for(torch.device("cuda")) == 1


@pytest.mark.parametrize("name", ["celo2-short", "celo2-base-short", "celo2-elo", "celo2-base-elo", "celo2-text"])
def test_a_window_on_another_device(image_sets, small_recipe, name, monkeypatch):
    """On the meta device, which refuses what lies on the host as a GPU does; what comes back from it are zeros."""
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else real(x))
    select = torch.Tensor.index_select

    def strict(x, dim, index):
        assert index.device == x.device
        return select(x, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", strict)
    trainer = OuterTrainer(small_recipe(name), image_sets, device=torch.device("meta"), compiled=False)
    trainer._rehearse()
    for _ in range(3):
        trainer.step()
    arrays = trainer.truncated_step.state_dict()
    trainer.truncated_step.load_state_dict(arrays)
    assert all(x.is_meta for x in trainer.truncated_step.state.values())
