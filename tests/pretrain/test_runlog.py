"""What a run leaves to read."""

import importlib.metadata
import io
import json
import math

import pytest

from celo2.pretrain.runlog import (
    METRICS,
    WINDOW,
    RunLog,
    ZScore,
    draw_curve,
    duration,
    format_step,
    quantity,
    read_metrics,
    versions,
    write_report,
)

RECORD = {
    "step": 120,
    "loss": 4.23124,
    "loss_z": 0.123,
    "bits_per_byte": 1.5,
    "grad_norm": 0.41213,
    "grad_norm_z": -0.304,
    "lr": 4.8e-4,
    "step_ms": 141.2,
    "optimizer_ms": 4.12,
    "tokens_per_s": 3.712e6,
    "mfu": 0.4012,
    "skipped": False,
}


def test_step_line() -> None:
    assert format_step(RECORD, 4712, 654.0) == (
        "step 120/4712 | loss 4.2312 (+0.12z) | 1.500 bpb | norm 0.4121 (-0.30z) | lr 4.8e-04 | 141 ms (opt 4.1) | "
        "40.1% MFU | 3.71M tok/s | eta 10.9m"
    )
    line = format_step({**RECORD, "mfu": None, "skipped": True, "loss": math.nan}, 4712, 1.0)
    assert "loss nan" in line and "n/a MFU" in line and line.endswith("SKIPPED: not finite")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (42.4, "42s"), (654, "10.9m"), (11_520, "3.2h"), (129_600, "1.5d")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(812, "812"), (9130, "9.13k"), (3.712e6, "3.71M"), (1.3157e9, "1.32B")])
def test_quantity(value: float, text: str) -> None:
    assert quantity(value) == text


def test_z_score_is_of_the_values_before() -> None:
    score = ZScore([1.0, 3.0] * 4)
    assert score(4.0) == pytest.approx((4 - 2) / 1)
    assert score(math.nan) == 0.0
    fresh = ZScore([])
    assert [fresh(float(i)) for i in range(8)] == [0.0] * 8
    assert fresh(8.0) == pytest.approx((8 - 3.5) / math.sqrt(5.25))
    assert ZScore([2.0] * 10)(5.0) == 0.0
    window = ZScore([1e9] * 50 + [0.0, 2.0] * 64)
    assert window(3.0) == pytest.approx(2.0)


def open_log(folder, resume_step=None, **options) -> RunLog:
    return RunLog(folder, resume_step=resume_step, run_id="r", config={}, **options)


def test_records_are_json_lines_without_nan(tmp_path) -> None:
    log = open_log(tmp_path)
    log.write("train", step=1, loss=math.inf, skipped=True)
    log.write("val", step=1, loss=2.5)
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"kind": "train", "step": 1, "loss": None, "skipped": True},
        {"kind": "val", "step": 1, "loss": 2.5},
    ]
    assert log.last("train", "loss") == []
    assert log.last("val", "loss") == [2.5]
    log.close()


def test_resume_drops_what_will_be_made_again(tmp_path) -> None:
    log = open_log(tmp_path)
    log.write("run", step=0)
    for step in range(1, 6):
        log.write("train", step=step, loss=float(step))
    log.write("final", step=3)
    log.close()
    # a line cut short by a kill
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"kind": "train", "st')
    log = open_log(tmp_path, resume_step=3)
    assert log.last("train", "loss") == [1.0, 2.0, 3.0]
    log.write("train", step=4, loss=9.0)
    log.close()
    assert [(r["kind"], r["step"]) for r in read_metrics(tmp_path / METRICS)] == [
        ("run", 0),
        *(("train", step) for step in (1, 2, 3, 4)),
    ]
    before = (tmp_path / METRICS).read_bytes()
    open_log(tmp_path).close()
    assert read_metrics(tmp_path / METRICS) == [] and (tmp_path / f"{METRICS}.old").read_bytes() == before


def test_a_damaged_line_is_named(tmp_path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"kind": "run", "step": 0}\n{"ki\n{"kind": "val", "step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged .* move the file away"):
        open_log(tmp_path, resume_step=1)
    assert read_metrics(tmp_path / "none") == []


def test_full_disk_names_the_file(tmp_path) -> None:
    log = open_log(tmp_path)
    log._file.close()
    message = r"cannot write .*metrics\.jsonl: No space left on device; free space"
    with open("/dev/full", "wb", buffering=0) as full:
        log._file = io.TextIOWrapper(full)
        with pytest.raises(OSError, match=message):
            log.write("train", step=1)


@pytest.mark.needs("matplotlib")
def test_picture_and_report(tmp_path) -> None:
    records = [{"kind": "train", "step": i, "loss": 5 - i / 10} for i in range(1, 20)]
    records += [{"kind": "val", "step": 0, "loss": 5.5}, {"kind": "train", "step": 20, "loss": None}]
    draw_curve(records, tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    draw_curve([], tmp_path / "empty.png", "nothing yet")
    write_report(tmp_path, {"run": "nano, celo2", "validation loss": "2.1"}, "one\ntwo")
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# nano, celo2\n") and "| validation loss | 2.1 |" in report and "    two\n" in report


def test_versions_name_what_decides_the_numbers() -> None:
    found = versions()
    # a checkout that runs without being installed has no version
    installed = {dist.name for dist in importlib.metadata.distributions()} & {"celo2"}
    assert {"python", "torch", "numpy", "git"} | installed <= set(found)


def test_memory_is_bounded_and_other_ranks_keep_nothing(tmp_path) -> None:
    log = open_log(tmp_path)
    for step in range(1, 1001):
        log.write("train", step=step, loss=math.nan if step > 990 else float(step), note="x" * 100, skipped=step > 990)
    log.write("val", step=1000, loss=1.0)
    assert sum(map(len, log._values.values())) <= 2 * WINDOW + 2 and max(map(len, log._values.values())) == WINDOW
    # the last that were finite, however long ago
    expected = [float(step) for step in range(991 - WINDOW, 991)]
    assert log.last("train", "loss") == expected and log.last("val", "step") == [1000]
    log.close()
    resumed = open_log(tmp_path, resume_step=1000)
    assert resumed.last("train", "loss") == expected
    resumed.close()
    assert len(read_metrics(tmp_path / METRICS)) == 1001
    other = open_log(tmp_path / "other", main=False)
    assert other.write("train", step=1, loss=2.0) == {"kind": "train", "step": 1, "loss": 2.0}
    assert not other._values and other.last("train", "loss") == [] and not (tmp_path / "other").exists()


NAME = "cost$_{v1$ | caf\udce9 \u65e5\n"


@pytest.mark.needs("matplotlib")
def test_names_are_shown_as_they_are(tmp_path, recwarn) -> None:
    draw_curve([{"kind": "val", "step": 1, "loss": 2.0}], tmp_path / "loss.png", NAME)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    write_report(tmp_path, {"run": NAME, "data": NAME}, "text")
    lines = (tmp_path / "report.md").read_text().splitlines()
    shown = "cost$_{v1$ | caf\ufffd \u65e5"
    cell = shown.replace("|", "\\|")
    assert lines[0] == f"# {shown}" and f"| data | {cell} |" in lines
    assert [str(warning.message) for warning in recwarn.list] == []
