"""What outer steps draw, also when other processes make it ahead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from celo2.meta.draws import Ahead, Draws, Stream, batches_of
from celo2.meta.outer_trainer import OuterTrainer


@pytest.fixture
def draws() -> Draws:
    streams = [(Stream(size=200, batch=64, index=index, seed=3), 200 * index) for index in range(2)]
    batches = batches_of(streams, range(4), each=2)
    return Draws(seed=3, particles=(0, 1, 2, 3), dimension=347, std=0.01, window=5, families=(batches,))


def assert_equal(one, two):
    np.testing.assert_array_equal(one.perturbations, two.perturbations)
    for mine, other in zip(one.batches, two.batches, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_draws_are_functions_of_the_step(draws):
    first, second = draws(7), draws(8)
    assert first.perturbations.shape == (4, 347) and first.perturbations.std() == pytest.approx(0.01, rel=0.1)
    (batches,) = first.batches
    assert batches.shape == (5, 4, 64) and batches[:, :2].max() < 200 <= batches[:, 2:].min()
    # two particles take ten batches of a stream in a window; an epoch is three, without a repeated example
    stream = np.concatenate([first.batches[0][:, :2].reshape(10, 64), second.batches[0][:, :2].reshape(10, 64)])
    # batches 70 to 89: an epoch begins at 72
    assert len(np.unique(stream[2:5])) == len(np.unique(stream[5:8])) == 192
    assert_equal(first, draws(7))
    assert not np.array_equal(first.perturbations, second.perturbations)


def test_processes_make_the_same_from_any_step_on(draws):
    ahead = Ahead(draws, 2)
    try:
        # in turn, then as a run that was resumed elsewhere
        for step in (4, 5, 6, 7, 2, 3):
            assert_equal(ahead(step), draws(step))
        workers = [process for process, _ in ahead._workers]
        assert len(workers) == 2
    finally:
        ahead.close()
    assert not any(process.is_alive() for process in workers)


def test_a_process_that_has_ended_is_told(draws):
    ahead = Ahead(draws, 1)
    ahead(0)
    ahead._workers[0][0].kill()
    with pytest.raises(RuntimeError, match="a process that makes batches has ended"):
        for step in (1, 2):
            ahead(step)
    # and the same steps go on with another
    assert_equal(ahead(1), draws(1))
    ahead.close()


def test_a_run_is_the_same_with_draws_made_ahead(image_sets, small_recipe):
    alone = OuterTrainer(small_recipe(), image_sets, compiled=False)
    ahead = OuterTrainer(small_recipe(), image_sets, compiled=False, ahead=2)
    try:
        for _ in range(4):
            assert alone.step() == ahead.step()
    finally:
        ahead.close()
    assert alone.theta == ahead.theta


def test_killing_the_run_ends_its_processes(tmp_path: Path):
    program = """
import time
from celo2.meta.draws import Ahead, Draws
if __name__ == "__main__":
    ahead = Ahead(Draws(0, (0,), 347, 0.01, 5, ()), 2)
    ahead(0)
    print(*(process.pid for process, _ in ahead._workers), flush=True)
    time.sleep(600)
"""
    (tmp_path / "run.py").write_text(program)
    run = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 30
    while (left := [pid for pid in workers if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # a zombie that nobody has waited for yet has ended
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


PROGRAM = """
import os, signal, sys
from celo2.meta.draws import Ahead, Draws
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: None)
    draws = Draws(0, (0,), 347, 0.01, 5, ())
    ahead = Ahead(draws, 2)
    ahead._start(0)
    ahead._next = 0
    # as Ctrl-C does, while the processes are importing
    os.killpg(0, signal.SIGINT)
    os.killpg(0, signal.SIGTERM)
    for step in range(4):
        assert (ahead(step).perturbations == draws.perturbations(step)).all()
    print("drawn", flush=True)
    # and it ends without a word to them
"""


def test_signals_are_for_the_run_and_its_end_is_theirs(tmp_path: Path):
    (tmp_path / "run.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "run.py")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "drawn\n", "")


def test_other_particles_draw_the_same(draws):
    part = replace(draws, particles=(1, 2), families=(batches_of([(Stream(200, 64, 0, 3), 0)], (1,), each=2),))
    np.testing.assert_array_equal(part(7).perturbations, draws(7).perturbations[1:3])
    np.testing.assert_array_equal(part(7).batches[0][:, 0], draws(7).batches[0][:, 1])
