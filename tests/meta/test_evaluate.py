"""Judging a theta: the small language model, the choice of a checkpoint, the long unroll, the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from celo2.meta import evaluate, horizon, select
from celo2.meta.language_model import Method, Settings, Text, log_spaced, selection_shards, train_once
from celo2.meta.report import Comparison, write
from celo2.pretrain.shards import find_shards, open_shard, write_shard
from celo2.pretrain.tokenizer import get_tokenizer
from celo2.theta import Theta, closed_form, load_weights

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
    method = Method("celo2", "celo2", (1e-2,), closed_form("momentum"))
    one = train_once(method, 1e-2, 0, TINY, text, compiled=False)
    two = train_once(method, 1e-2, 0, TINY, text, compiled=False)
    del one["seconds"], two["seconds"]
    assert one == two and one["theta"] == closed_form("momentum").sha256
    assert [step for step, _ in one["curve"]] == [3, 6] and one["final"] == one["curve"][-1][1]
    assert one["final"] < 5.6 and one["skipped"] == 0
    assert train_once(method, 1e-2, 1, TINY, text, compiled=False)["final"] != one["final"]
    for opt in ("adamw", "muon", "celo2-base"):
        record = train_once(Method(opt, opt, (1e-2,)), 1e-2, 0, TINY, text, compiled=False)
        assert math.isfinite(record["final"]) and (record["theta"] is None) == (opt != "celo2-base")


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

    def score(method, lr, seed, settings, text):
        calls.append((method.name, lr))
        assert method.weights.variant == "celo2" and seed == select.SEED
        best = method.name == "theta-0000010" and lr == select.LEARNING_RATES["celo2"][1]
        return {"final": 1.0 if best else 2.0, "lr": lr, "seconds": 1.0, "parameters": 1000}

    monkeypatch.setattr(select, "train_once", score)
    assert select.main([str(run), "--out", str(tmp_path / "out.safetensors")]) == 0
    chosen = Theta.load(tmp_path / "out.safetensors")
    assert chosen == thetas[10] and chosen.card["outer_steps"] == "10 of 20" and chosen.card["inner_steps"] == "32000"
    assert chosen.card["selection"].startswith("1.0000 nats/byte") and chosen.variant == "celo2"
    assert len(calls) == 6
    assert select.main([str(run)]) == 0 and len(calls) == 6  # scores are kept
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


def _comparison(name, finals, steps=100, lrs=(1e-3, 2e-3)):
    sweep = [{"lr": lr, "final": 2.0 + lr, "seed": 0, "method": name} for lr in lrs]
    runs = [
        {
            "final": final,
            "lr": lrs[0],
            "seed": seed,
            "seconds": 1.0,
            "parameters": 5,
            "curve": [[steps // 2, final + 1.0], [steps, final]],
        }
        for seed, final in enumerate(finals, start=1)
    ]
    return Comparison(Method(name, "adamw", lrs), sweep, runs)


def test_interval_and_steps_to_target():
    c = _comparison("adamw", [1.0, 2.0, 3.0])
    assert c.mean == 2.0 and c.half_width == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert c.steps_to(2.5) == pytest.approx(75) and c.steps_to(1.9) is None and c.steps_to(3.5) == 50


@pytest.mark.needs("matplotlib")
def test_page_states_each_goal_reached_or_not(tmp_path, random_theta):
    thetas = [random_theta(0, card={"name": "celo2"}), random_theta(1, card={"name": "celo2-base"})]
    comparisons = [
        _comparison("celo2", [1.00, 1.01, 1.02]),
        _comparison("celo2-base", [1.50, 1.51, 1.52]),
        _comparison("adamw", [1.40, 1.41, 1.42]),
        _comparison("muon", [0.90, 0.91, 0.92]),
    ]
    page = tmp_path / "results.md"
    write(page, tmp_path / "results", comparisons, [], TINY, thetas, {"machine": "m"})
    text = page.read_text()
    assert "`celo2` below tuned AdamW, intervals apart: 1.0100 +- 0.0248 against 1.4100 +- 0.0248, reached." in text
    muon = "`celo2` at least as good as Muon swept over its rate alone"
    assert f"{muon}: 1.0100 +- 0.0248 against 0.9100 +- 0.0248, **not reached**." in text
    assert "`celo2-base` at least as good as tuned AdamW" in text and "1.4100 +- 0.0248, **not reached**" in text
    assert "No long unroll is recorded yet" in text and (tmp_path / "results" / "curves.png").is_file()
    write(page, tmp_path / "results", [], [], TINY, thetas, {})
    assert "## Language model" in page.read_text()
    unfinished = replace(_comparison("celo2", [1.0, 1.1]), sweep=comparisons[0].sweep[:1])
    write(page, tmp_path / "results", [unfinished, comparisons[2]], [], TINY, thetas, {})
    assert "**Not finished: celo2.**" in page.read_text() and "| celo2 | 2.0010 (0.001) | - |" in page.read_text()


def test_records_are_kept_resumed_and_bound_to_theta_and_settings(shards, tmp_path, monkeypatch):
    methods = (Method("adamw", "adamw", (1e-3, 2e-3)), Method("celo2", "celo2", (1e-3, 2e-3), "momentum"))
    monkeypatch.setattr(evaluate, "METHODS", methods)
    path = tmp_path / "language_model.jsonl"
    models = evaluate.LanguageModels(path, TINY, shards)
    todo = list(models._missing())
    assert [(m.name, lr, seed) for m, lr, seed in todo] == [
        ("adamw", 1e-3, 0),
        ("adamw", 2e-3, 0),
        ("celo2", 1e-3, 0),
        ("celo2", 2e-3, 0),
    ]
    for method, lr, seed in todo:
        theta = load_weights(method.weights).sha256 if method.weights else None
        record = {"method": method.name, "lr": lr, "seed": seed, "final": lr, "theta": theta}
        evaluate.append(path, record | models.context)
    path.write_text(path.read_text() + '{"method": "ad')  # cut off by a crash
    models = evaluate.LanguageModels(path, TINY, shards)
    assert models.best_lr(methods[0]) == 1e-3
    assert {(m.name, lr, seed) for m, lr, seed in models._missing()} == {
        (name, 1e-3, seed) for name in ("adamw", "celo2") for seed in (1, 2, 3)
    }
    assert all(json.loads(line) for line in path.read_text().splitlines())
    # other settings, or another theta, start anew
    assert len(list(evaluate.LanguageModels(path, replace(TINY, steps=7), shards)._missing())) == 4
    monkeypatch.setattr(evaluate, "METHODS", (methods[0], replace(methods[1], weights="adam")))
    missing = {(m.name, seed) for m, _, seed in evaluate.LanguageModels(path, TINY, shards)._missing()}
    assert ("celo2", 0) in missing and ("adamw", 0) not in missing
    path.write_text("no json\n")
    with pytest.raises(ValueError, match="holds a line that is not JSON"):
        evaluate.LanguageModels(path, TINY, shards)


@pytest.mark.needs("matplotlib")
def test_the_command_end_to_end(shards, tmp_path, monkeypatch, image_sets):
    methods = (
        Method("adamw", "adamw", log_spaced(1e-3, 1e-2, 2)),
        Method("celo2", "celo2", log_spaced(1e-3, 1e-2, 2), "celo2"),
    )
    monkeypatch.setattr(evaluate, "METHODS", methods)
    monkeypatch.setattr(evaluate, "Settings", lambda steps=6: replace(TINY, steps=steps))
    monkeypatch.setattr(evaluate, "load_image_sets", lambda source: image_sets)
    unroll = horizon.unroll
    monkeypatch.setattr(horizon, "unroll", lambda theta, sets, steps: unroll(theta, sets, steps=steps, compiled=False))
    trained = evaluate.train_once
    monkeypatch.setattr(
        evaluate, "_train", lambda m, lr, seed, s, folder: trained(m, lr, seed, s, Text(folder, s), compiled=False)
    )

    class Here:
        """Runs in this process: the patches above do not reach a spawned one."""

        def __init__(self, *arguments, **options): ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...
        def submit(self, function, *arguments):
            from concurrent.futures import Future

            future = Future()
            future.set_result(function(*arguments))
            return future

    monkeypatch.setattr(evaluate, "ProcessPoolExecutor", Here)
    out = tmp_path / "docs" / "results.md"
    options = ["--out", str(out), "--data", str(shards), "--steps", "6", "--horizon-steps", "20"]
    assert evaluate.main(options) == 0
    text = out.read_text()
    assert "| adamw | " in text and "| celo2 | " in text and "Losses that were not finite: 0 of 480" in text
    assert load_weights("celo2").sha256[:16] in text
    lines = (out.parent / "results" / "language_model.jsonl").read_text().splitlines()
    assert len(lines) == 2 * (2 + 3)
    assert evaluate.main(options) == 0  # nothing is repeated
    assert (out.parent / "results" / "language_model.jsonl").read_text().splitlines() == lines
    assert torch.get_num_threads() >= 1
