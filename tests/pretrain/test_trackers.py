"""Trackers: the same scalars in each, once and in order after a kill and a resume, and none of them ends a run."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from celo2.pretrain import trackers, train_gpt
from celo2.pretrain.options import parse_arguments
from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.runlog import METRICS, RunLog, read_metrics
from celo2.pretrain.trackers import TRACKED, Start, Trackers, check_packages, tracker_names

Curves = dict[str, list[tuple[int, float]]]


def open_log(folder: Path, *names: str, resume_step: int | None = None) -> RunLog:
    config = {"arguments": {"lr": None}, "versions": {"git": "0123abc"}}
    options: dict[str, Any] = {"run_id": "abc", "name": "nano-celo2", "config": config, "trackers": names}
    return RunLog(folder, resume_step=resume_step, **options)


# one tracker


def test_wandb_gets_numbers_under_the_run_id(tmp_path, monkeypatch) -> None:
    calls: list[Any] = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: calls.append((numbers, step)), finish=lambda: calls.append("end"), resumed=False
    )
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = open_log(tmp_path, "wandb-offline")
    log.write("train", step=3, loss=2.0, note="text", mfu=None, skipped=True)
    log.write("run", step=3)
    log.close()
    assert calls[0]["id"] == "abc" and calls[0]["name"] == "nano-celo2-abc" and calls[0]["mode"] == "offline"
    assert calls[0]["config"]["versions"] == {"git": "0123abc"}
    assert calls[1:] == [({"train/step": 3, "train/loss": 2.0, "train/skipped": 1}, 3), "end"]

    # a server that has the steps before 3: the other ones of what the run goes on from
    log = open_log(tmp_path, resume_step=9)
    log.write("train", step=4, loss=3.0)
    log.close()
    calls.clear()
    run.resumed, run.starting_step = True, 3
    open_log(tmp_path, "wandb-online", resume_step=9).close()
    assert calls[1:-1] == [
        ({"train/step": 3, "train/loss": 2.0, "train/skipped": 1}, 3),
        ({"train/step": 4, "train/loss": 3.0}, 4),
    ]

    class Error(Exception):
        pass

    def refuse(**options: object) -> None:
        raise Error("No API key configured\nmore")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse, Error=Error))
    with pytest.raises(ValueError, match="--wandb online cannot start: No API key configured; run `wandb login`"):
        open_log(tmp_path / "new", "wandb-online")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--wandb", "online"], "--wandb online needs the package wandb: pip install 'celo2[train]', or drop --wandb"),
        (["--tensorboard"], "--tensorboard needs the package tensorboard: pip install 'celo2[train]', or drop"),
        (["--trackio"], "--trackio needs the package trackio: pip install 'celo2[trackio]', or drop --trackio"),
    ],
)
def test_a_package_that_is_missing(flags: list[str], message: str, tmp_path, monkeypatch, capsys) -> None:
    names = tracker_names(parse_arguments(flags))
    monkeypatch.setitem(sys.modules, names[0].split("-")[0], None)
    with pytest.raises(ImportError) as raised:
        check_packages(names)
    assert message in str(raised.value)
    with pytest.raises(ImportError) as raised:
        open_log(tmp_path, *names)
    assert message in str(raised.value) and list(tmp_path.iterdir()) == []
    if find_spec("matplotlib") and find_spec("tqdm"):
        # before anything is trained or written
        monkeypatch.chdir(tmp_path)
        assert train_gpt.main(["--steps", "1", "--out-dir", "out", *flags]) == 1
        assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_flags() -> None:
    assert tracker_names(parse_arguments([])) == []
    flags = ["--trackio", "--wandb", "offline", "--tensorboard"]
    assert tracker_names(parse_arguments(flags)) == ["wandb-offline", "tensorboard", "trackio"]


# several, and their failures


class Recorder:
    """A tracker that keeps what it gets, up to `kept` of earlier starts, and fails at a step."""

    def __init__(self, kept: float = math.inf, fails_at: int | None = None) -> None:
        self.kept, self.fails_at = kept, fails_at
        self.got: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log(self, numbers: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise OSError(28, "No space left on device")
        self.got.append((step, dict(numbers)))

    def flush(self) -> None:
        if self.fails_at == -1:
            raise ConnectionError("no network\nand a page of it")

    def close(self) -> None:
        self.closed += 1


def test_one_that_fails_is_one_warning(tmp_path, monkeypatch, capsys) -> None:
    found = {"tensorboard": Recorder(fails_at=3), "trackio": Recorder(), "wandb-online": Recorder(fails_at=-1)}
    monkeypatch.setattr(trackers, "_open", lambda name, start: found[name])
    log = open_log(tmp_path, *found)
    for step in range(1, 6):
        log.write("train", step=step, loss=1.0)
        log.sync()
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == [
        " wandb-online failed and gets nothing more of this run",
        " tensorboard failed and gets nothing more of this run",
    ]
    assert "ConnectionError: no network; all of it is in metrics.jsonl" in lines[0]
    assert "No space left on device" in lines[1]
    assert [step for step, _ in found["trackio"].got] == [1, 2, 3, 4, 5]
    assert [step for step, _ in found["tensorboard"].got] == [1, 2]
    assert [step for step, _ in found["wandb-online"].got] == [1]
    assert [tracker.closed for tracker in found.values()] == [0, 1, 0]
    assert len(read_metrics(tmp_path / METRICS)) == 5


def test_one_that_does_not_open_closes_the_others(tmp_path, monkeypatch) -> None:
    first = Recorder()

    def open_tracker(name: str, start: Start) -> Recorder:
        if name == "trackio":
            raise ValueError("--trackio cannot start")
        return first

    monkeypatch.setattr(trackers, "_open", open_tracker)
    with pytest.raises(ValueError, match="--trackio cannot start"):
        open_log(tmp_path, "tensorboard", "trackio")
    assert first.closed == 1 and list(tmp_path.iterdir()) == []


def test_what_is_made_again_is_sent_once(tmp_path, monkeypatch) -> None:
    """A killed run got to step 7 and a second start to 6: both resume at 4, once more at 6, and go on."""
    append, rewind = Recorder(), Recorder()
    monkeypatch.setattr(trackers, "_open", lambda name, start: append if name == "trackio" else rewind)

    def start(resume_step: int | None, last: int, ended: bool = False) -> None:
        # as TensorBoard: what is later than the resume is gone
        rewind.kept = -1 if resume_step is None else resume_step
        rewind.got = [(step, numbers) for step, numbers in rewind.got if step <= rewind.kept]
        log = open_log(tmp_path, "trackio", "tensorboard", resume_step=resume_step)
        log.write("run", step=resume_step or 0)
        for step in range((resume_step or 0) + 1, last + 1):
            log.write("train", step=step, loss=1.0 / step)
            if step % 2 == 0 and step < last:
                log.write("val", step=step, loss=2.0 / step)
        if ended:
            log.write("val", step=last, loss=2.0 / last)
            log.write("final", step=last, loss=2.0 / last)

    # killed without the validation of step 6
    start(None, 7)
    start(4, 6)
    start(4, 9)
    start(8, 10, ended=True)
    # a finished run is shown again
    start(10, 10, ended=False)
    log = open_log(tmp_path, "trackio", "tensorboard", resume_step=10)
    rewind.kept = 10
    log.write("final", step=10, loss=0.2)
    for tracker in (append, rewind):
        steps = {kind: [step for step, numbers in tracker.got if f"{kind}/loss" in numbers] for kind in TRACKED}
        assert steps == {"train": [*range(1, 11)], "val": [2, 4, 6, 8, 10], "norms": [], "final": [10]}


def test_one_that_is_added_at_a_resume_gets_what_was_before(tmp_path, monkeypatch) -> None:
    new, old = Recorder(kept=-1), Recorder()
    monkeypatch.setattr(trackers, "_open", lambda name, start: new if name == "tensorboard" else old)
    log = open_log(tmp_path, "trackio")
    for step in range(1, 6):
        log.write("train", step=step, loss=1.0)
    log = open_log(tmp_path, "trackio", "tensorboard", resume_step=3)
    for step in range(4, 7):
        log.write("train", step=step, loss=1.0)
    log.close()
    for tracker in (new, old):
        assert [step for step, _ in tracker.got] == [1, 2, 3, 4, 5, 6]


def test_a_run_from_the_start_forgets_what_was_sent(tmp_path, monkeypatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(trackers, "_open", lambda name, start: recorder)
    for _ in range(2):
        log = open_log(tmp_path, "trackio")
        log.write("train", step=1, loss=1.0)
        log.close()
    assert [step for step, _ in recorder.got] == [1, 1]


# the thread that writes ends with its error
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.needs("tensorboard")
def test_a_full_disk_of_tensorboard(tmp_path, capsys) -> None:
    log = open_log(tmp_path, "tensorboard")
    log.write("train", step=1, loss=1.0)
    events = log._trackers._open["tensorboard"]._writer.file_writer.event_writer._general_file_writer
    with open("/dev/full", "wb", buffering=0) as full:
        events.write = full.write
        for step in range(2, 60):
            log.write("train", step=step, loss=1.0)
            log.sync()
    log.close()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "tensorboard failed" in warnings[0] and "No space left on device" in warnings[0]
    assert len(read_metrics(tmp_path / METRICS)) == 59


@pytest.mark.needs("trackio")
def test_trackio_that_cannot_write(tmp_path) -> None:
    """It warns by itself, and what is logged is in `metrics.jsonl`."""
    program = (
        "import sys; from pathlib import Path; from celo2.pretrain.runlog import RunLog\n"
        "log = RunLog(Path(sys.argv[1]), resume_step=None, run_id='abc', config={}, trackers=['trackio'])\n"
        "for step in range(1, 4): log.write('train', step=step, loss=1.0)\n"
        "log.close()"
    )
    environment = {**os.environ, "TRACKIO_DIR": "/dev/null/trackio"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr and "could not be persisted" in done.stderr
    assert len(read_metrics(tmp_path / METRICS)) == 3


# a whole run, killed and resumed, in all of them that are installed


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run of 12 steps that a kill ended in step 9 or soon after; its checkpoint is of step 6."""
    folder = tmp_path_factory.mktemp("killed")
    data = prepare_embedded("bytes", folder / "wikipedia-bytes")
    out = folder / "run"
    command = [sys.executable, "-m", "celo2.pretrain.train_gpt", "--size", "nano", "--batch-tokens", "256"]
    command += ["--val-tokens", "512", "--steps", "12", "--save-every", "6", "--eval-every", "3", "--norms-every", "3"]
    command += ["--sample-tokens", "0", "--data", str(data), "--out-dir", str(out), "--resume", "auto"]
    flags = {"wandb": ["--wandb", "offline"], "tensorboard": ["--tensorboard"], "trackio": ["--trackio"]}
    command += [flag for package, words in flags.items() if find_spec(package) for flag in words]
    environment = {**os.environ, "TRACKIO_DIR": str(folder / "trackio"), "WANDB_SILENT": "true"}
    # the process ends itself: no race
    killer = (
        "import os, signal, sys\nfrom celo2.pretrain import train_gpt\nfrom celo2.pretrain.runlog import RunLog\n"
        "write = RunLog.write\n"
        "def kill(self, kind, **values):\n"
        "    record = write(self, kind, **values)\n"
        "    if (kind, values['step']) == ('train', 9):\n"
        "        import time; time.sleep(1.5); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return record\n"
        "RunLog.write = kill\n"
        "sys.exit(train_gpt.main(sys.argv[1:]))"
    )
    first = [sys.executable, "-c", killer, *command[3:]]
    done = subprocess.run(first, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "resumed at step 6 of 12" in done.stdout, done.stderr
    return out


def expected(out: Path) -> Curves:
    found: Curves = {}
    for record in read_metrics(out / METRICS):
        for key, value in record.items() if record["kind"] in TRACKED else ():
            if isinstance(value, (int, float)):
                found.setdefault(f"{record['kind']}/{key}", []).append((record["step"], float(value)))
    return found


def assert_same(found: Curves, out: Path) -> None:
    wanted = expected(out)
    assert [step for step, _ in wanted["train/loss"]] == [*range(1, 13)]
    assert [step for step, _ in wanted["norms/update_ratio/matrix"]] == [3, 6, 9, 12]
    assert set(found) == set(wanted)
    # times of steps that were made twice are those of either
    exact = ("step", "loss", "lr", "grad_norm", "bits_per_byte", "update_ratio/matrix", "skipped")
    for name, curve in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in curve], name
        if name.partition("/")[2] in exact:
            assert [value for _, value in found[name]] == pytest.approx([value for _, value in curve], rel=1e-6), name


@pytest.mark.needs("matplotlib", "tqdm", "tensorboard")
def test_tensorboard_shows_every_step_once(killed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = killed / "tensorboard"
    assert len(list(folder.iterdir())) == 2
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert_same(found, killed)
    text = events.Tensors("run/text_summary")[-1].tensor_proto.string_val[0].decode()
    about = json.loads("\n".join(line.removeprefix("    ") for line in text.splitlines()))
    assert about["arguments"]["steps"] == 12 and {"git", "torch"} <= set(about["versions"])
    assert about["name"].startswith("nano-celo2-")


@pytest.mark.needs("matplotlib", "tqdm", "trackio")
def test_trackio_has_every_step_once(killed: Path) -> None:
    program = (
        "import json, trackio\nfrom trackio.sqlite_storage import SQLiteStorage\n"
        "(run,) = trackio.Api().runs('celo2')\n"
        "print(json.dumps([run.config, SQLiteStorage.get_logs('celo2', run.name, run_id=run.id)]))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(killed.parent / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    config, rows = json.loads(done.stdout.splitlines()[-1])
    found: Curves = {}
    for row in rows:
        for name, value in row.items():
            if "/" in name:
                found.setdefault(name, []).append((row["step"], value))
    assert_same(found, killed)
    assert config["arguments"]["steps"] == 12 and {"git", "torch"} <= set(config["versions"])


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format (7 bytes of W&B's before it): blocks of 32 KiB, records in parts."""
    position, parts = 7, b""
    while position < len(content):
        left = 32_768 - position % 32_768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        # whole, or the last part
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.needs("matplotlib", "tqdm", "wandb")
def test_wandb_has_every_step_once(killed: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    """The newest folder has the whole run: the killed one's is cut where its last block began."""
    folders = sorted((killed / "wandb").glob("offline-run-*"))
    run_id = read_metrics(killed / METRICS)[0]["run_id"]
    assert len(folders) == 2 and all(folder.name.endswith(f"-{run_id}") for folder in folders)
    found: Curves = {}
    configs = []
    for data in leveldb_log(next(folders[-1].glob("run-*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        configs += [record.run.config] if record.HasField("run") else []
        items = {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for name, value in items.items():
            if "/" in name:
                found.setdefault(name, []).append((items["_step"], value))
    assert_same(found, killed)
    about = {update.key: json.loads(update.value_json) for update in configs[-1].update}
    assert about["arguments"]["steps"] == 12 and {"git", "torch"} <= set(about["versions"])


def test_no_tracker_is_no_work() -> None:
    empty = Trackers([], Start(Path(), "abc", "run", None, {}), {})
    empty.log("train", {"step": 1, "loss": 1.0})
    empty.flush()
    empty.close()
