"""`bench/gpu_check.py` as a process: no GPU, a dry run, signals, tools that fail, hang or find something; its page."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "bench" / "gpu_check.py"


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    variables = {key: value for key, value in os.environ.items() if key not in ("OUT", "TRITON_INTERPRET")}
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        cwd="/",
        env={**variables, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
    process = start(*arguments, **environment)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def tool(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def test_help_list_and_typos() -> None:
    status, out, _ = run("--help")
    assert status == 0 and "--minutes" in out and "language_model" in out
    status, out, _ = run("--list")
    assert status == 0 and out.splitlines()[0].startswith("environment")
    status, _, error = run("--sections", "speeed")
    assert status == 2 and "--sections speeed: there are environment" in error
    assert run("--minutes", "-1")[0] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line(tmp_path) -> None:
    status, out, error = run("--out", tmp_path / "out")
    assert (status, out) == (2, "") and error.startswith("error: no GPU") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_records_and_a_page(tmp_path) -> None:
    out = tmp_path / "out"
    status, _, error = run("--dry", "--sections", "environment,newton_schulz,graphs", OUT=str(out))
    assert status == 2 and error.count("\n") == 1 and "no figure in it is a measurement" in error
    found = records(out)
    assert [r["what"] for r in found if r["section"] == "run"] == ["begin", "end"]
    assert {r["status"] for r in found if r["what"] == "end" and "status" in r} == {0}
    page = (out / "page.md").read_text()
    assert page.index("# Dry run") < page.index("## Failures") < page.index("None.") < page.index("## Newton-Schulz")
    assert "2 x [64, 128]" in page and "CUDA graphs need a GPU" in page
    assert {path.name for path in out.iterdir()} <= {"records.jsonl", "log.txt", "page.md"}


def test_what_is_done_stays_when_it_is_killed(tmp_path) -> None:
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        out = tmp_path / str(status)
        process = start("--dry", "--sections", "environment,step_times,meta", "--out", out)
        while not (out / "page.md").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == status
        assert any(r["section"] == "environment" and r["what"] == "copy" for r in records(out))
        page = (out / "page.md").read_text()
        assert "| copy |" in page and ("by SIG" in page) == (number != signal.SIGKILL)
        # and nothing stays on the device
        for _ in range(300):
            if subprocess.run(["pgrep", "-f", f"gpu_sections.py.*{out}"], capture_output=True, check=False).returncode:
                break
            time.sleep(0.1)
        else:
            pytest.fail("a section goes on after the run was killed")


def test_tools_that_fail_hang_or_find_something(tmp_path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    tool(tools, "compute-sanitizer", "echo '========= ERROR SUMMARY: 2 errors'; exit 1")
    tool(tools, "ncu", "echo 'waiting'; sleep 600 & sleep 600")
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    out = tmp_path / "out"
    status, text, _ = run("--dry", "--minutes", "1", "--sections", "sanitizer,ncu,graphs", "--out", out, PATH=path)
    assert status == 2 and "failures" in text
    page = (out / "page.md").read_text()
    assert "sanitizer: errors 2 (limit 0)" in page and "ncu: end: stopped after its" in page
    assert "waiting" in (out / "ncu.csv").read_text()
    # a section after them still ran
    assert "CUDA graphs need a GPU" in page
    assert subprocess.run(["pgrep", "-f", "^sleep 600"], capture_output=True, check=False).stdout == b""

    header = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    rows = [
        '"0","gradient_moments_kernel","Duration","us","12.5"',
        '"1","gradient_moments_kernel","Duration","ns","9,000"',
    ]
    rows += ['"0","gradient_moments_kernel","DRAM Throughput","%","81.25"']
    (tools / "table").write_text("\n".join(["==PROF== Connected", header, *rows]))
    tool(tools, "ncu", f"cat {tools / 'table'}")
    run("--dry", "--sections", "ncu", "--out", out, PATH=path)
    (counters,) = [r for r in records(out) if r["what"] == "counters"]
    assert counters["kernel"] == "gradient_moments_kernel" and counters["counters"] == {"us": 12.5, "DRAM %": 81.25}
    tool(tools, "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1")
    run("--dry", "--sections", "ncu", "--out", out, PATH=path)
    assert "only administrators read counters" in (out / "page.md").read_text()


def test_a_sanitizer_that_says_nothing_has_not_passed(tmp_path) -> None:
    tool(tmp_path, "compute-sanitizer", "exit 0")
    out = tmp_path / "out"
    run("--dry", "--sections", "sanitizer", "--out", out, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert "sanitizer: errors it has printed no summary" in (out / "page.md").read_text()


@pytest.mark.parametrize(
    ("prints", "status", "failed", "error"),
    [
        ("tests/a.py::test_x FAILED [ 50%]\ntests/a.py::test_y PASSED [100%]", 1, ["tests/a.py::test_x"], None),
        ("tests/a.py::test_y PASSED [100%]", 0, [], None),
        ("tests/a.py::test_y PASSED [ 10%]\nFatal Python error: Segmentation fault", 139, [], "ended with status 139"),
        ("", 5, [], "no test was run"),
    ],
)
def test_what_pytest_says_and_how_it_ends_is_on_record(prints, status, failed, error, tmp_path) -> None:
    fake = tmp_path / "fake"
    fake.mkdir()
    program = f"if __name__ == '__main__':\n    import sys\n    print({prints!r})\n    sys.exit({status})\n"
    (fake / "pytest.py").write_text("def hookimpl(**options):\n    return lambda hook: hook\n\n" + program)
    command = [sys.executable, str(ROOT / "bench" / "gpu_tests.py"), "--out", str(tmp_path), "--seconds", "20", "--dry"]
    environment = {**os.environ, "PYTHONPATH": str(fake)}
    assert subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False).returncode == 0
    (record,) = records(tmp_path)
    assert record["failed"] == failed and record["passed"] == (status == 0)
    assert error is None or error in record["error"]


def test_a_nan_is_the_largest_of_errors() -> None:
    program = "from gpu_lab import largest; print(largest(0.0, float('nan')), largest(1.0, 2.0, 0.5))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["nan", "2.0"]


def test_sections_are_left_out_when_there_is_no_time(tmp_path) -> None:
    status, _, _ = run("--dry", "--minutes", "0.01", "--out", tmp_path)
    skipped = [r["section"] for r in records(tmp_path) if r["what"] == "skipped" and "s are left" in r["reason"]]
    assert status == 2 and {"meta", "language_model"} <= set(skipped)


@pytest.fixture
def gpu_page():
    spec = importlib.util.spec_from_file_location("gpu_page", ROOT / "bench" / "gpu_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_predictions_beside_measurements(tmp_path, gpu_page) -> None:
    gpu_page.append(tmp_path, {"section": "run", "what": "begin", "device": "NVIDIA H100", "revision": "abc"})
    gpu_page.append(
        tmp_path, {"section": "step_times", "what": "small, celo2", "value": 3.0, "unit": "ms", "predicted": 2.0}
    )
    gpu_page.append(
        tmp_path, {"section": "correct", "what": "oracle", "value": float("nan"), "limit": 1.0, "passed": False}
    )
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"section": "step_times", "what": "cut o')
    page = tmp_path / "page.md"
    command = [sys.executable, str(ROOT / "bench" / "gpu_page.py"), str(tmp_path), "--out", str(page)]
    assert subprocess.run(command, check=False).returncode == 0
    text = page.read_text()
    assert "| small, celo2 | 3 | ms | 2 | 1.5 |" in text and "- correct: oracle nan (limit 1)" in text
    assert "| oracle | nan | 1 | **no** |" in text and "It did not end." in text
    assert subprocess.run([*command[:2], str(tmp_path / "none"), *command[3:]], check=False).returncode == 1


def test_the_commit_is_found_without_git(tmp_path, gpu_page) -> None:
    folder = tmp_path / ".git"
    (folder / "refs" / "heads").mkdir(parents=True)
    (folder / "HEAD").write_text("ref: refs/heads/main\n")
    assert gpu_page.revision(tmp_path) == "unknown"
    (folder / "packed-refs").write_text("# pack-refs\n1234 refs/heads/main\n")
    assert gpu_page.revision(tmp_path) == "1234"
    (folder / "refs" / "heads" / "main").write_text("5678\n")
    assert gpu_page.revision(tmp_path) == "5678"
    (folder / "HEAD").write_text("9abc\n")
    assert gpu_page.revision(tmp_path) == "9abc"
    assert gpu_page.revision(tmp_path / "nowhere") == "unknown"
