"""The report on several runs: its numbers by hand, as a process, and what it says to input that is no run."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from celo2.pretrain.comparison import BITS, LOSS, Comparison, Log, names_of, read_log
from celo2.pretrain.curves import first_reaching, smoothed, value_at
from celo2.pretrain.intervals import mean
from celo2.pretrain.page import Page
from celo2.pretrain.report import main
from celo2.pretrain.runlog import METRICS

pytestmark = pytest.mark.needs("matplotlib", "scipy")

BATCH = 1000


def write_run(
    folder: Path,
    *,
    opt: str = "celo2",
    seed: int = 1,
    steps: int = 100,
    done: int | None = None,
    drop: float = 0.01,
    lr: float = 1e-3,
    norms: bool = False,
    shards: dict[str, str] | None = None,
    vocab: int = 256,
    final: bool = True,
    **arguments: Any,
) -> Path:
    """A run whose validation loss is 4 - drop * step, validated every tenth, 0.5 s a step."""
    done = steps if done is None else done
    folder.mkdir(parents=True)
    recipe = {"batch_tokens": BATCH, "tokens": BATCH * steps, "lr": lr, "betas": [0.9, 0.95], "val_tokens": 512}
    identity = {
        "model": {"vocab_size": vocab},
        "optimizer": opt,
        "recipe": recipe,
        "seed": seed,
        "shards": shards or {"x_train_000001.bin": "9-a", "x_val_000000.bin": "9-b"},
        "ranks": 1,
        "extensions": [],
    }
    given = {"opt": opt, "seed": seed, "lr": None, "steps": None, "out_dir": str(folder), **arguments}
    records: list[dict[str, Any]] = [
        {"kind": "run", "step": 0, "run_id": folder.name, "arguments": given, "identity": identity, "device": "a CPU",
         "theta": None, "versions": {"git": "0123abc", "torch": "2.13.0"}}
    ]  # fmt: skip
    for step in range(done + 1):
        if step:
            records.append(
                {"kind": "train", "step": step, "loss": None if step == 5 else 4 - drop * step, "bits_per_byte": 5.0,
                 "lr": lr, "grad_norm": 1.0, "step_ms": 500.0, "optimizer_ms": 50.0, "optimizer_share": 0.1,
                 "tokens_per_s": 2000.0, "mfu": None, "memory_gib": 1.5, "skipped": step == 5}
            )  # fmt: skip
            if norms and step % 5 == 0:
                records.append({"kind": "norms", "step": step, "update_ratio/matrix": 0.01, "weight_rms/matrix": 0.02})
        if step % 10 == 0:
            records.append({"kind": "val", "step": step, "loss": 4 - drop * step, "bits_per_byte": 6 - drop * step})
    if final and done == steps:
        records.append({"kind": "final", "step": steps, "loss": 4 - drop * steps, "skipped": 1})
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def report(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "celo2.pretrain.report", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=180, check=False)


def logs(*folders: Path) -> list[Log]:
    return [read_log(folder, folder.name) for folder in folders]


def cells(page: str, first: str, table: int = 0) -> list[str]:
    """The cells of a row of the n-th table that has a row with this name."""
    rows = [line for line in page.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in rows[table].strip("|").split("|")]


# curves


def test_where_a_curve_reaches_a_value() -> None:
    xs, ys = [0.0, 10.0, 20.0, 30.0], [4.0, 3.0, 3.5, 1.5]
    assert first_reaching(xs, ys, 3.5) == 5.0 and first_reaching(xs, ys, 2.0) == 27.5
    assert first_reaching(xs, ys, 4.0) == 0.0 and first_reaching(xs, ys, 1.0) is None
    # no line from a value that was not finite, and none reaches NaN
    assert first_reaching([0, 10], [math.nan, 3.0], 3.5) == 10 and first_reaching(xs, ys, math.nan) is None
    assert first_reaching(xs, [0.1, 0.3, 0.2, 0.7], 0.2, maximize=True) == pytest.approx(5.0)
    assert value_at(xs, ys, 15.0) == 3.25 and value_at(xs, ys, 30.0) == 1.5
    assert math.isnan(value_at(xs, ys, 31.0)) and math.isnan(value_at(xs, ys, -1.0)) and math.isnan(value_at([], [], 0))


def test_smoothing() -> None:
    assert smoothed([3.0, 1.0, 2.0], 1) == [3.0, 1.0, 2.0]
    assert smoothed([2.0] * 5, 10) == pytest.approx([2.0] * 5)
    # weights of 1/2 and 1 over their sum; NaN is left out
    assert smoothed([math.nan, 3.0, math.nan, 0.0], 2)[1:] == pytest.approx([3.0, 3.0, 1.0])


# numbers


def test_a_comparison_by_hand(tmp_path: Path) -> None:
    fast = write_run(tmp_path / "fast", drop=0.02)
    slow = write_run(tmp_path / "slow", opt="adamw", lr=3e-3, drop=0.01)
    short = write_run(tmp_path / "short", drop=0.015, done=64, keep=5)
    comparison = Comparison(logs(fast, slow, short))
    assert comparison.differing == ["opt", "lr"] and comparison.metric == LOSS and comparison.warnings() == []
    # the worst that has ended: 4 - 0.01 * 100
    assert comparison.target == pytest.approx(3.0)
    *found, missing = (comparison.tokens_to_target(log) for log in comparison.logs)
    assert found == pytest.approx([50 * BATCH, 100 * BATCH]) and missing is None
    assert comparison.common_tokens == 60 * BATCH
    assert [comparison.at_common_tokens(log) for log in comparison.logs] == pytest.approx([2.8, 3.4, 3.1])
    assert comparison.logs[2].step == 64 and not comparison.logs[2].finished and comparison.logs[2].steps == 100
    assert comparison.logs[0].seconds_at([0, 10, 100]) == [0.0, 5.0, 50.0]
    assert Comparison(logs(fast, slow), target=3.5).tokens_to_target(comparison.logs[1]) == 50 * BATCH


def test_runs_of_other_data(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", shards={"y_train_000001.bin": "9-a", "y_val_000000.bin": "7-c"})
    tokens = write_run(tmp_path / "tokens", vocab=50_257)
    train = write_run(tmp_path / "train", shards={"x_train_000001.bin": "8-d", "x_val_000000.bin": "9-b"})
    for folder in (other, tokens):
        comparison = Comparison(logs(one, folder))
        assert comparison.metric == BITS and comparison.target == pytest.approx(5.0)
        assert "losses a token do not compare" in comparison.warnings()[0]
    comparison = Comparison(logs(one, train))
    assert comparison.metric == LOSS and comparison.warnings() == ["the runs are trained on different data"]


def test_seeds_are_one_row(tmp_path: Path) -> None:
    drops = {"celo2": (0.021, 0.020, 0.022), "adamw": (0.010, 0.012, 0.011)}
    folders = [
        write_run(tmp_path / f"{opt}{seed}", opt=opt, seed=seed, drop=drop, lr=1e-3 if opt == "celo2" else 3e-3)
        for opt, found in drops.items()
        for seed, drop in enumerate(found)
    ]
    comparison = Comparison(logs(*folders))
    assert [len(group) for group in comparison.groups().values()] == [3, 3]
    findings = comparison.findings()
    # named by the first option that tells them apart
    assert findings is not None
    reference, method = findings.methods
    assert (reference.name, method.name) == ("celo2", "adamw")
    assert sorted(method.values.values()) == pytest.approx([2.8, 2.9, 3.0])
    difference = findings.difference(method)
    assert difference.value == pytest.approx(1.0) and difference.count == 3
    assert difference.half_width == pytest.approx(mean([1.1, 0.8, 1.1]).half_width)
    assert Comparison(logs(*folders[:1], *folders[3:4])).findings() is None


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run" / METRICS, tmp_path / "c"]
    assert names_of(paths) == ["a/run", "b/run", "c"]
    with pytest.raises(ValueError, match=r"run/metrics\.jsonl is given twice"):
        names_of([paths[0], tmp_path / "b" / ".." / "a" / "run" / METRICS])


# the program


def test_the_page(tmp_path: Path, capsys) -> None:
    fast = write_run(tmp_path / "runs" / "fast", drop=0.02, norms=True)
    slow = write_run(tmp_path / "runs" / "slow", opt="adamw", lr=3e-3)
    live = write_run(tmp_path / "runs" / "live $_{x", done=37)
    with open(live / METRICS, "a") as file:
        # a line that is being written
        file.write('{"kind": "train", "st')
    done = report(*sorted((tmp_path / "runs").iterdir(), key=lambda path: path.name != "fast"), cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "live $_{x | step 37 of 100: not ended | loss 3.7000" in done.stdout
    out = tmp_path / "runs" / "comparison"
    page = (out / "report.md").read_text()
    header = cells(page, "run")
    row = dict(zip(header, cells(page, "fast"), strict=True))
    assert row == {
        "run": "fast", "opt": "celo2", "lr": "0.001", "steps": "100", "tokens": "100k", "last loss": "2.0000",
        "lowest loss": "2.0000", "bits per byte": "4.0000", "time": "50s", "tokens/s": "2k", "optimizer": "10.0%",
        "memory": "1.50 GiB", "skipped": "1",
    }  # fmt: skip
    assert dict(zip(header, cells(page, "live $_{x"), strict=True))["steps"] == "37 of 100"
    assert cells(page, "slow", 1) == ["slow", "3.7000", "+0.3000", "100k", "100", "0.50x"]
    assert cells(page, "run", 1)[1:4] == ["after 30k tokens", "minus the first", "tokens to 3.0000"]
    pictures = re.findall(r"\]\((\w+\.png)\)", page)
    assert pictures == ["validation.png", "training.png", "rates.png", "norms.png"]
    html = (out / "report.html").read_text()
    inside = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert [base64.b64decode(data) for data in inside] == [(out / name).read_bytes() for name in pictures]
    assert "http" not in html.replace("http-equiv", "") and "<td>live $_{x</td>" in html
    # the report is no run, and is made again
    capsys.readouterr()
    assert main([str(path) for path in sorted((tmp_path / "runs").iterdir())]) == 0
    assert "comparison: a report, left out" in capsys.readouterr().out
    assert main([str(fast), str(slow), "--out", str(tmp_path / "new"), "--target", "3.5"]) == 0
    assert "tokens to 3.5000" in (tmp_path / "new" / "report.md").read_text()


def test_one_run_that_has_just_begun(tmp_path: Path) -> None:
    assert main([str(write_run(tmp_path / "run", done=0)), "--out", str(tmp_path / "out")]) == 0
    assert cells((tmp_path / "out" / "report.md").read_text(), "run", 1)[1] == "0 of 100"


@pytest.mark.parametrize("case", ["none", "folder", "empty", "other", "text", "damaged", "twice", "file", "own"])
def test_what_is_no_run(case: str, tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path / "run")
    bad, options = tmp_path / "bad", []
    if case not in ("none", "twice", "file", "own"):
        bad.mkdir()
    if case == "empty":
        (bad / METRICS).touch()
    elif case == "other":
        (bad / METRICS).write_text('{"kind": "run", "step": 0, "arguments": {}}\n')
    elif case == "text":
        (bad / METRICS).write_text("[1, 2]\n")
    elif case == "damaged":
        (bad / METRICS).write_text('{"kind": "run"}\n{"ki\n{"kind": "val"}\n')
    elif case == "twice":
        bad = run / METRICS
    elif case == "file":
        bad, options = write_run(tmp_path / "two"), ["--out", str(run / METRICS)]
    elif case == "own":
        bad, options = write_run(tmp_path / "two"), ["--out", str(run)]
    message = {
        "none": "no such folder or file",
        "folder": "is no folder of a run: it has no metrics.jsonl",
        "empty": "has no record of a run yet",
        "other": "is of another program",
        "text": "is no log of a run",
        "damaged": "line 2 is damaged",
        "twice": "is given twice",
        "file": "is a file: give a folder",
        "own": "is the folder of a run, whose own report.md would be lost",
    }[case]
    assert main([str(run), str(bad), *options]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and message in shown.err and shown.err.count("\n") == 1
    assert sorted(path.name for path in run.iterdir()) == [METRICS]


def test_a_page_shows_text_as_it_is(tmp_path: Path) -> None:
    page = Page("a <b> & caf\udce9")
    page.table(["name"], [["x | <i>\ny"]])
    page.bullets([])
    assert page.markdown().startswith("# a <b> & caf\ufffd\n") and "| x \\| <i> y |" in page.markdown()
    assert "<h1>a &lt;b&gt; &amp; caf\ufffd</h1>" in page.html() and "<td>x | &lt;i&gt; y</td>" in page.html()
