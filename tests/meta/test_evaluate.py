"""Judging a theta: the small language model, the choice of a checkpoint, the long unroll, the page."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from celo2.meta import evaluate, horizon, protocol, select
from celo2.meta.language_model import Method, Settings, Text, selection_shards, train_once
from celo2.meta.protocol import Contender, Setting
from celo2.meta.report import Row, Table, write
from celo2.meta.search import Axis, Lattice, Search
from celo2.pretrain.shards import find_shards, open_shard, write_shard
from celo2.pretrain.tokenizer import get_tokenizer
from celo2.theta import Theta, closed_form

TINY = Settings(n_layer=1, n_head=2, head_dim=16, context=16, sequences=2, steps=6, val_tokens=128, eval_every=3)


@pytest.fixture
def shards(tmp_path):
    vocab_id = get_tokenizer("bytes").vocab_id
    tokens = np.random.default_rng(0).integers(97, 107, 4000).astype(np.uint16)
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "text_val_000000.bin", tokens[:1000], vocab_id)
    write_shard(folder / "text_train_000001.bin", tokens[1000:], vocab_id)
    return folder


def test_a_run_is_a_function_of_its_arguments(shards):
    text = Text(shards, TINY)
    method, tuned = Method("celo2", "celo2", closed_form("momentum")), {"lr": 1e-2, "adam_lr_mult": 10.0}
    one = train_once(method, tuned, 0, TINY, text, compiled=False)
    two = train_once(method, tuned, 0, TINY, text, compiled=False)
    del one["seconds"], two["seconds"]
    assert one == two and one["theta"] == closed_form("momentum").sha256 and one["tuned"] == tuned
    assert [step for step, _ in one["curve"]] == [3, 6] and one["final"] == one["curve"][-1][1]
    assert one["final"] < 5.6 and one["skipped"] == 0 and "reported" not in one
    assert train_once(method, tuned, 1, TINY, text, compiled=False)["final"] != one["final"]
    for opt in ("adamw", "muon", "celo2-base"):
        record = train_once(Method(opt, opt), {"lr": 1e-2}, 0, TINY, text, compiled=False)
        assert math.isfinite(record["final"]) and (record["theta"] is None) == (opt != "celo2-base")


def test_options_reach_the_optimizer(shards):
    seen = []

    def build(recipe, model):
        seen.append(recipe)
        raise StopIteration

    tuned = {"lr": 1e-2, "beta2": 0.99, "weight_decay": 0.1, "momentum": 0.8, "adam_lr": 3e-3}
    with pytest.raises(StopIteration):
        train_once(Method("muon", "muon"), tuned, 0, TINY, Text(shards, TINY), compiled=False, build=build)
    (recipe,) = seen
    assert (recipe.lr, recipe.betas, recipe.weight_decay, recipe.momentum, recipe.adam_lr) == (
        1e-2, (0.9, 0.99), 0.1, 0.8, 3e-3,
    )  # fmt: skip


def test_what_is_reported_is_not_what_was_chosen_on(shards, tmp_path):
    splits = evaluate.Splits(selection_shards(shards, tmp_path / "selection"), shards)
    text = splits.text(TINY)
    record = train_once(Method("adamw", "adamw"), {"lr": 1e-2}, 0, TINY, text, compiled=False)
    assert record["reported"] != record["final"]
    plain = Text(shards, TINY)
    for ours, theirs in zip(text.reported, plain.validation, strict=True):
        assert torch.equal(ours[0], theirs[0])
    # its validation documents are not in what it trains on
    assert len(text.fingerprint) == 3 and text.fingerprint[2] == plain.fingerprint[-1]


def test_selection_never_reads_the_validation_documents(shards, tmp_path):
    vocab_id = get_tokenizer("bytes").vocab_id
    folder = selection_shards(shards, tmp_path / "selection")
    (train,), (val,) = find_shards(folder)
    whole = open_shard(find_shards(shards)[0][0], vocab_id)
    np.testing.assert_array_equal(np.concatenate([open_shard(train, vocab_id), open_shard(val, vocab_id)]), whole)


def test_select_keeps_the_best_checkpoint_and_says_so(shards, tmp_path, monkeypatch, random_theta):
    run = tmp_path / "run"
    run.mkdir()
    thetas = {step: random_theta(step) for step in (10, 20)}
    for step, theta in thetas.items():
        theta.save(run / f"theta-{step:07d}.safetensors")
    card = {"name": "celo2", "variant": "celo2", "outer_steps": "20", "inner_steps": "64000", "recipe": "celo2-short"}
    Theta.from_arrays(thetas[20].arrays, card).save(run / "theta.safetensors")
    monkeypatch.setattr(select, "prepare_embedded", lambda tokenizer, folder: shards)
    monkeypatch.chdir(tmp_path)
    calls = []

    def score(method, tuned, seed, settings, text, *, compiled):
        lr = tuned["lr"]
        calls.append((method.name, lr))
        assert method.weights.variant == "celo2" and seed == select.SEED
        best = method.name == "theta-0000010" and lr == select.LEARNING_RATES["celo2"][1]
        final = 1.0 if best else 2.0
        theta = method.weights.sha256
        return {"final": final, "tuned": tuned, "theta": theta, "seconds": 1.0, "parameters": 1000}

    monkeypatch.setattr(select, "train_once", score)
    assert select.main([str(run), "--out", str(tmp_path / "out.safetensors")]) == 0
    chosen = Theta.load(tmp_path / "out.safetensors")
    assert chosen == thetas[10] and chosen.card["outer_steps"] == "10 of 20" and chosen.card["inner_steps"] == "32000"
    assert chosen.card["selection"].startswith("1.0000 nats/byte") and chosen.variant == "celo2"
    assert len(calls) == 6
    assert select.main([str(run)]) == 0 and len(calls) == 6  # scores are kept
    # another theta under the same name is scored anew
    random_theta(5).save(run / "theta-0000020.safetensors")
    assert select.main([str(run)]) == 0 and len(calls) == 9
    assert select.main([str(tmp_path / "nowhere")]) == 2


def test_long_unroll_counts_what_diverges(image_sets):
    records = horizon.unroll(closed_form("momentum"), image_sets, steps=60, compiled=False)
    assert len(records) == 2 * 2 * 3 and {r["scale"] for r in records} == {1e-3, 1.0, 1e3}
    assert {r["task"] for r in records} == {"stripes0", "stripes1"} and all(r["steps"] == 60 for r in records)
    ordinary = [r for r in records if r["scale"] == 1.0]
    assert all(r["non_finite"] == 0 and r["final_loss"] < 2.3 and 0 <= r["drawup"] < 1 for r in ordinary)
    # at scale 1e-3 a step is 1e-6: the weights stay where they started
    still = [r for r in records if r["scale"] == 1e-3]
    assert all(abs(r["final_loss"] - 2.35) < 0.4 and r["drawup"] < 0.2 for r in still)
    # a theta that follows +g climbs the loss
    arrays = {name: array.copy() for name, array in closed_form("momentum").arrays.items()}
    arrays["w2"] *= -1
    climbing = horizon.unroll(Theta.from_arrays(arrays), image_sets, steps=60, compiled=False)
    climbing = [r for r in climbing if r["scale"] == 1.0]
    assert min(r["final_loss"] for r in climbing) > max(r["final_loss"] for r in ordinary) + 0.1
    assert min(r["drawup"] for r in climbing) > 0.01


LATTICE = Lattice((Axis("lr", (1e-3, 2e-3, 4e-3), 2e-3), Axis("beta2", (0.9, 0.99), 0.9)))
SETTINGS = {"short": Setting(TINY, 3), "long": Setting(replace(TINY, steps=8), 2, "short")}


def _contender(name, weights=None, lattice=LATTICE):
    return Contender(Method(name, "adamw" if weights is None else "celo2", weights), lattice, f"what {name} is")


def _row(name, losses, lattice=LATTICE):
    """A complete row whose seeds reported these losses."""
    best = (("lr", 2e-3), ("beta2", 0.9))
    search = Search(lattice, lattice.start, 1, {best: 1.0})
    runs = {
        seed: {"reported": loss, "seconds": 1.0, "curve": [[3, loss + 1.0], [6, loss]]}
        for seed, loss in enumerate(losses, start=1)
    }
    return Row(_contender(name, lattice=lattice), search, runs)


@pytest.mark.needs("matplotlib", "scipy")
def test_page_pairs_the_seeds_and_says_what_is_not_finished(tmp_path, random_theta):
    thetas = [random_theta(0, card={"name": "celo2"}), random_theta(1, card={"name": "celo2-base"})]
    spread = [0.0, 0.1, 0.2, 0.3, 0.4]
    rows = [
        # better than its start on every seed by the same, whatever the seeds' spread
        _row("celo2", [1.0 + x for x in spread]),
        _row("start", [1.01 + x for x in spread]),
        _row("muon", [0.99 + x for x in spread]),
        _row("celo2-base", [1.5 + x for x in spread]),
        _row("adam", [1.5 + (-1) ** i * 0.01 + x for i, x in enumerate(spread)]),
        _row("adamw", [2.0, 2.0, 2.0, 2.0]),
    ]
    page = tmp_path / "results.md"
    table = Table("wikipedia", "short", SETTINGS["short"], rows)
    assert table.difference("celo2", "start").value == pytest.approx(-0.01)
    write(page, tmp_path / "results", [table], [], thetas, {"machine": "m"})
    text = page.read_text()
    assert "| celo2 | start | wikipedia | short | -0.0100 +- 0.0000 | better |" in text
    assert "| celo2 | muon | wikipedia | short | +0.0100 +- 0.0000 | **worse** |" in text
    assert "| celo2-base | adam | wikipedia | short | -0.0020 +- 0.0136 | no difference is seen |" in text
    assert "**Not finished: adamw (4 of 5 seeds).**" in text and "| celo2-base | adamw |" not in text
    assert "| celo2 | lr 0.002 beta2 0.9 (edge) | 1.2000 +- 0.1963 | +0.0100 +- 0.0000 | - |" in text
    assert "what muon is" in text and "No long unroll is recorded yet" in text
    assert (tmp_path / "results" / "curves.png").is_file()
    write(page, tmp_path / "results", [Table("wikipedia", "short", SETTINGS["short"], rows[5:])], [], thetas, {})
    assert "Nothing is complete yet." in page.read_text()


def _splits(shards, tmp_path):
    return {"text": evaluate.Splits(selection_shards(shards, tmp_path / "selection"), shards)}


def test_every_method_has_as_many_runs_and_all_that_its_users_tune() -> None:
    rows = protocol.contenders()
    assert [row.name for row in rows] == [
        "celo2",
        "celo2-lm",
        "start",
        "nesterov",
        "muon",
        "celo2-base",
        "adam",
        "adamw",
    ]
    options = {row.name: [axis.option for axis in row.lattice.axes] for row in rows}
    assert options["muon"] == ["lr", "momentum", "adam_lr"] and options["adamw"] == ["lr", "beta2", "weight_decay"]
    assert options["celo2"] == options["start"] == options["nesterov"] == ["lr", "adam_lr_mult"]
    assert options["celo2-base"] == options["adam"] == ["lr", "weight_decay"]
    assert {0.85, 0.9, 0.95} <= set(protocol.MUON.axes[1].values)
    assert [setting.settings.steps for setting in protocol.SETTINGS.values()] == [300, 800, 2400]
    start = next(row.method.weights for row in rows if row.name == "start")
    assert start.variant == "celo2" and start.card["orthogonalize"] == "true"
    assert protocol.also("adam").method.opt == "celo2-base"


def test_the_standard_library_is_a_text(tmp_path) -> None:
    folder = protocol.standard_library(tmp_path / "python")
    train, val = find_shards(folder)
    assert sum(path.stat().st_size for path in train) > 5_000_000 and len(val) == 1


def test_records_are_kept_resumed_and_bound_to_theta_settings_and_data(shards, tmp_path):
    rows = [_contender("adamw"), _contender("celo2", "momentum")]
    path = tmp_path / "language_model.jsonl"
    splits = _splits(shards, tmp_path)

    def models(rows=rows, settings=SETTINGS, wanted=("long",), splits=splits, methods=None):
        return evaluate.LanguageModels(path, splits, rows, settings, wanted, methods)

    def finish(jobs, final=lambda point: dict(point)["lr"]) -> None:
        """Record what a run of each job would."""
        for job in jobs:
            theta = job.contender.method.weights
            identity = models()._identity(job.text, job.setting, job.contender)
            assert (identity["theta"] is None) == (theta is None)
            record = {"tuned": dict(job.point), "seed": job.seed, "final": final(job.point), "reported": 1.0}
            evaluate.append(path, identity | record)

    first = list(models().missing())
    assert [(job.setting, job.contender.name, job.point, job.seed) for job in first] == [
        ("short", "adamw", LATTICE.start, 0),
        ("short", "celo2", LATTICE.start, 0),
    ]
    assert [job.contender.name for job in models(methods=["celo2"]).missing()] == ["celo2"]
    with pytest.raises(ValueError, match="--methods celo3: the rows are adamw, celo2"):
        models(methods=["celo3"])
    finish(first)
    path.write_text(path.read_text() + '{"method": "ad')  # cut off by a crash
    finish(models().missing())
    assert all(json.loads(line) for line in path.read_text().splitlines())
    best = (("lr", 1e-3), ("beta2", 0.9))
    state = models()
    assert state.search("text", "short", rows[0]).best == best and len(state.search("text", "short", rows[0]).done) == 3
    # the seeds, and the next setting's search from there
    keys = {(job.setting, job.contender.name, job.point, job.seed) for job in state.missing()}
    assert keys == {
        (setting, name, best, seed)
        for name in ("adamw", "celo2")
        for setting, seeds in (("short", (1, 2, 3, 4, 5)), ("long", (0,)))
        for seed in seeds
    }
    assert {job.setting for job in models(wanted=("short",)).missing()} == {"short"}
    finish(state.missing())
    assert len(models().finals("text", "short", rows[1])) == 5
    # another theta, settings, or data, begins anew; what is not of them stays
    missing = list(models(rows=[rows[0], _contender("celo2", "nesterov")]).missing())
    assert [(job.contender.name, job.setting) for job in missing if job.setting == "short"] == [("celo2", "short")]
    changed = {**SETTINGS, "short": Setting(replace(TINY, steps=7), 3)}
    assert {job.setting for job in models(settings=changed).missing()} == {"short"}
    vocab_id = get_tokenizer("bytes").vocab_id
    write_shard(shards / "text_val_000000.bin", np.full(900, 99, np.uint16), vocab_id)
    assert len(list(models(splits=_splits(shards, tmp_path)).missing())) == 2
    path.write_text("no json\n")
    with pytest.raises(ValueError, match="holds a line that is not JSON"):
        models()


SMALL = """
import sys
from dataclasses import replace
from pathlib import Path
from celo2.meta import evaluate, horizon, protocol
from celo2.meta.language_model import Method, Settings
from celo2.meta.protocol import Contender, Setting
from celo2.meta.search import Axis, Lattice
from celo2.theta import load_weights

if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    steps = int(sys.argv.pop(1))
    shape = {"n_layer": 1, "n_head": 2, "head_dim": 16, "context": 16, "sequences": 2}
    tiny = Settings(**shape, steps=steps, val_tokens=128, eval_every=3)
    lattice = Lattice((Axis("lr", (1e-3, 2e-3, 4e-3), 2e-3),))
    protocol.SETTINGS = {"short": Setting(tiny, 2)}
    protocol.TEXTS = {"words": lambda: folder}
    methods = Method("adamw", "adamw"), Method("celo2", "celo2", load_weights("celo2"))
    rows = [Contender(method, lattice, "") for method in methods]
    protocol.contenders = lambda: rows
    sys.exit(evaluate.main(sys.argv[1:]))
"""


@pytest.mark.needs("matplotlib", "scipy")
def test_the_command_end_to_end(shards, tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    out = tmp_path / "docs" / "results.md"
    parts = ["--only", "language-model", "--only", "report", "--workers", "2", "--out", str(out)]
    records = out.parent / "results" / "language_model.jsonl"
    # compiling takes longer than these runs
    options = {"cwd": tmp_path, "text": True, "env": {**os.environ, "TORCHDYNAMO_DISABLE": "1"}}

    def command(steps: int, *more: str) -> list[str]:
        return [sys.executable, str(tmp_path / "small.py"), str(shards), str(steps), *parts, *more]

    # interrupted: what ended is kept, nothing is left running
    process = subprocess.Popen(command(100_000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    deadline = time.monotonic() + 100
    children = []
    try:
        while len(children := workers_of(process.pid)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    except BaseException:
        for pid in (process.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    assert process.returncode == 130 and errors.splitlines()[-1].startswith("interrupted: the runs that ended"), errors
    assert not any(alive(child) for child in children)
    done = subprocess.run(command(6), capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    lines = records.read_text().splitlines()
    assert len(lines) == 2 * (2 + 5) and "adamw" in out.read_text()
    again = subprocess.run(command(6), capture_output=True, check=True, **options)
    assert records.read_text().splitlines() == lines and "validation" not in again.stdout
    typo = subprocess.run(command(6, "--settings", "shrt"), capture_output=True, check=False, **options)
    assert typo.returncode == 2 and "invalid choice: 'shrt'" in typo.stderr


def workers_of(pid: int) -> list[int]:
    """The processes that a process has started and that train."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and b"spawn_main" in (path.parent / "cmdline").read_bytes():
            found.append(int(path.parent.name))
    return found


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
