"""Recipes and the learning-rate schedule."""

import math
from dataclasses import replace

import pytest

from celo2.pretrain.model import SIZES
from celo2.pretrain.recipes import (
    CELO2_LR_SWEEP,
    OPTS,
    RECIPES,
    Recipe,
    Schedule,
    learning_rate,
    recipe_for,
    split_batch,
    warmup_steps,
)

PLAIN = replace(recipe_for("nano", "adamw"), lr=1.0, warmup_frac=0.1, final_lr_frac=0.0)


def test_every_size_and_optimizer_has_a_recipe_with_a_source() -> None:
    for size in SIZES:
        for opt in OPTS:
            recipe = recipe_for(size, opt)
            assert recipe.source and recipe.val_tokens > 0 and recipe.steps >= 1
            assert recipe.batch_tokens % 256 == 0
            assert RECIPES[recipe.name] is recipe


@pytest.mark.parametrize(
    ("name", "lr", "steps", "batch", "warmup", "final"),
    [
        ("gpt2-124m-llmc", 6e-4, 18_865, 524_288, 700, 0.0),
        ("gpt2-124m-build-nanogpt", 6e-4, 19_073, 524_288, 715, 0.1),
        ("gpt2-350m-llmc", 3e-4, 60_000, 524_288, 700, 0.0),
        ("gpt2-774m-llmc", 2.5e-4, 286_102, 524_288, 700, 0.0),
        ("gpt2-1558m-llmc", 6e-4, 32_000, 1_048_576, 700, 0.1),
        ("xl-adamw-10b", 2e-4, 9_536, 1_048_576, 477, 0.0),
        ("gpt3-xl", 2e-4, 286_102, 1_048_576, 358, 0.1),
    ],
)
def test_published_runs(name: str, lr: float, steps: int, batch: int, warmup: int, final: float) -> None:
    recipe = RECIPES[name]
    assert (recipe.lr, recipe.steps, recipe.batch_tokens, recipe.final_lr_frac) == (lr, steps, batch, final)
    assert warmup_steps(recipe.steps, recipe) == warmup
    assert (recipe.weight_decay, recipe.max_grad_norm, recipe.betas) == (0.1, 1.0, (0.9, 0.95))


@pytest.mark.parametrize("opt", ["celo2", "celo2-base"])
@pytest.mark.parametrize("size", SIZES)
def test_celo2_recipes_follow_the_paper(size: str, opt: str) -> None:
    recipe, adamw = recipe_for(size, opt), recipe_for(size, "adamw")
    assert (recipe.warmup_frac, recipe.final_lr_frac, recipe.max_grad_norm) == (0.05, 0.0, None)
    assert (recipe.weight_decay, recipe.adam_lr_mult) == (0.0, 20.0)
    assert (recipe.tokens, recipe.batch_tokens) == (adamw.tokens, adamw.batch_tokens)
    if size != "nano":
        assert recipe.lr == 2.15e-4 and "untested" in recipe.source


def test_celo2_sweep_is_log_spaced() -> None:
    assert len(CELO2_LR_SWEEP) == 7
    for index, lr in enumerate(CELO2_LR_SWEEP):
        assert lr == pytest.approx(10 ** (-5 + index / 3), rel=0.005)


@pytest.mark.parametrize("size", SIZES)
def test_muon_keeps_adamw_beside_it(size: str) -> None:
    assert recipe_for(size, "muon").adam_lr == recipe_for(size, "adamw").lr
    assert all(recipe_for(size, opt).adam_lr is None for opt in OPTS if opt != "muon")


def test_30m_trains_20_tokens_a_parameter() -> None:
    assert recipe_for("30m", "celo2").tokens == pytest.approx(598e6, rel=1e-3)


def test_schedule_by_value() -> None:
    # warm-up of 10 steps, then a cosine over 90 that would end one step after the last
    assert learning_rate(0, 100, PLAIN) == pytest.approx(0.1)
    assert learning_rate(4, 100, PLAIN) == pytest.approx(0.5)
    assert learning_rate(9, 100, PLAIN) == learning_rate(10, 100, PLAIN) == 1.0
    assert learning_rate(40, 100, PLAIN) == pytest.approx(0.75)
    assert learning_rate(55, 100, PLAIN) == pytest.approx(0.5)
    assert learning_rate(70, 100, PLAIN) == pytest.approx(0.25)
    assert learning_rate(99, 100, PLAIN) == pytest.approx(0.5 * (1 - math.cos(math.pi / 90)))
    tenth = replace(PLAIN, lr=2.0, final_lr_frac=0.1)
    assert learning_rate(9, 100, tenth) == 2.0
    assert learning_rate(55, 100, tenth) == pytest.approx(1.1)
    assert 0.2 < learning_rate(99, 100, tenth) < 0.201


@pytest.mark.parametrize("warmup_frac", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 3, 50])
def test_schedule_rises_to_its_peak_and_falls(warmup_frac: float, total: int) -> None:
    recipe = replace(PLAIN, warmup_frac=warmup_frac, final_lr_frac=0.1)
    rates = [learning_rate(step, total, recipe) for step in range(total)]
    peak = rates.index(max(rates))
    assert rates[peak] == 1.0 and min(rates) > 0
    assert rates == sorted(rates[: peak + 1]) + sorted(rates[peak + 1 :], reverse=True)


def test_a_linear_cooldown_by_value() -> None:
    recipe = replace(PLAIN, warmup_frac=0.1, cooldown_frac=0.5, final_lr_frac=0.2)
    rates = [learning_rate(step, 100, recipe) for step in range(100)]
    assert rates[4] == pytest.approx(0.5) and set(rates[9:51]) == {1.0}
    assert rates[75] == pytest.approx(0.2 + 0.8 * 0.5) and rates[99] == pytest.approx(0.2 + 0.8 / 50)
    assert "linear over the last 0.5 to 0.2 of it" in str(Schedule(recipe))
    with pytest.raises(ValueError, match="cooldown_frac=0.95 must be within"):
        replace(recipe, cooldown_frac=0.95)
    # the track's own: 1 until 0.3 of the run, then (1 - progress) / 0.7
    track = RECIPES["speedrun-124m-muon"]
    for step in (0, 900, 974, 975, 2000, 3249):
        progress = step / track.steps
        expected = 1.0 if progress < 0.3 else (1 - progress) / 0.7
        assert learning_rate(step, track.steps, track) == pytest.approx(track.lr * expected)


def test_the_papers_gpt2_and_the_speedrun() -> None:
    for opt in ("adamw", "celo2", "muon", "velo"):
        recipe = RECIPES[f"gpt2-124m-2.5b-{opt}"]
        assert recipe.opt == opt and recipe.tokens == pytest.approx(2.47e9, rel=1e-3) and recipe.steps == 4_712
        assert (recipe.warmup_frac, recipe.final_lr_frac) == ((0.0, 1.0) if opt == "velo" else (0.05, 0.0))
    for opt, steps in (("adamw", 5_625), ("muon", 3_250), ("celo2", 3_250)):
        recipe = RECIPES[f"speedrun-124m-{opt}"]
        # what the rules fix, and the tokens of its validation
        assert (recipe.opt, recipe.steps, recipe.batch_tokens, recipe.val_tokens) == (opt, steps, 524_288, 20 * 524_288)
    assert warmup_steps(5_625, RECIPES["speedrun-124m-adamw"]) == 250
    for name in RECIPES:
        if name.startswith(("gpt2-124m-2.5b-", "speedrun-")):
            assert "untested" in RECIPES[name].source
            assert RECIPES[name].arch == ("modern" if "2.5b" in name else "speedrun")
    with pytest.raises(ValueError, match="arch='rnn' must be one of gpt2, modern, speedrun, or None"):
        replace(RECIPES["speedrun-124m-celo2"], arch="rnn")


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_schedule_refuses_a_step_outside_the_run(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} .*0..9"):
        learning_rate(step, 10, PLAIN)


def test_unknown_size_and_optimizer_list_the_allowed() -> None:
    with pytest.raises(ValueError, match="'tiny'.*nano, 30m, small, medium, large, gpt2-xl, xl"):
        recipe_for("tiny", "adamw")
    with pytest.raises(ValueError, match="'sgd'.*celo2, celo2-base, adamw, muon"):
        recipe_for("nano", "sgd")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", -1e-3),
        ("lr", math.nan),
        ("weight_decay", -0.1),
        ("batch_tokens", 0),
        ("warmup_frac", 1.5),
        ("final_lr_frac", -0.1),
        ("max_grad_norm", 0.0),
        ("tokens", 100),
        ("val_tokens", 0),
        ("betas", (0.9, 1.0)),
        ("adam_lr", math.inf),
        ("adam_lr_mult", math.nan),
    ],
)
def test_recipe_refuses(field: str, value: object) -> None:
    recipe: Recipe = recipe_for("nano", "celo2")
    with pytest.raises(ValueError, match=f"nano-celo2.*{field}="):
        replace(recipe, **{field: value})


@pytest.mark.parametrize(
    ("requested", "batch", "context", "expected"),
    [
        (None, 4096, 256, (16, 1)),
        (None, 524_288, 1024, (16, 32)),
        (None, 1_048_576, 2048, (8, 64)),
        (None, 24 * 1024, 1024, (12, 2)),
        (None, 7 * 32_768, 32_768, (1, 7)),
        (4, 524_288, 1024, (4, 128)),
    ],
)
def test_micro_batch(requested: int | None, batch: int, context: int, expected: tuple[int, int]) -> None:
    assert split_batch(requested, batch, context) == expected


@pytest.mark.parametrize(("ranks", "expected"), [(2, (16, 16)), (8, (16, 4)), (64, (8, 1)), (512, (1, 1))])
def test_ranks_share_a_batch_that_stays(ranks: int, expected: tuple[int, int]) -> None:
    assert split_batch(None, 524_288, 1024, ranks) == expected
    assert ranks * math.prod(expected) * 1024 == 524_288


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="16 sequences of 256 does not divide among 3 ranks.*--batch-tokens 3840"):
        split_batch(None, 4096, 256, 3)
    with pytest.raises(ValueError, match="--micro-batch 3 does not divide a rank's 8 sequences"):
        split_batch(3, 4096, 256, 2)
    with pytest.raises(ValueError, match="batch_tokens=300 is not a multiple of the context, 256"):
        split_batch(None, 300, 256)
    with pytest.raises(ValueError, match="--micro-batch 3 does not divide the batch of 2 sequences"):
        split_batch(3, 512, 256)


def test_recipes_name_their_optimizer() -> None:
    for size in SIZES:
        for opt in OPTS:
            assert recipe_for(size, opt).opt == opt
    with pytest.raises(ValueError, match="opt='sgd' must be one of"):
        replace(PLAIN, opt="sgd")


def test_an_extension_is_a_schedule_of_its_own_after_the_recipe() -> None:
    recipe = replace(PLAIN, tokens=100 * PLAIN.batch_tokens)
    schedule = Schedule(recipe, (50, 20))
    assert schedule.steps == 170 and str(schedule) == (
        "100 steps, warm-up 10, peak lr 1, cosine to 0 of it; then 50 steps, warm-up 5, peak lr 1, cosine to the same; "
        "then 20 steps, warm-up 2, peak lr 1, cosine to the same"
    )
    expected = [learning_rate(step, length, recipe) for length in (100, 50, 20) for step in range(length)]
    assert [schedule.learning_rate(step) for step in range(170)] == expected
    assert expected[100] == 1 / 5 and expected[105] == 1.0 and expected[149] < 0.01
    for step in (-1, 170):
        with pytest.raises(ValueError, match=f"step {step} is outside the run"):
            schedule.learning_rate(step)


def test_what_is_begun_of_an_extension_stays() -> None:
    recipe = replace(PLAIN, tokens=100 * PLAIN.batch_tokens)
    for step, there, here in ((100, [50], ()), (100, [50], (7,)), (101, [50], (50,)), (150, [50, 9], (50, 3))):
        Schedule(recipe, here).check(step, there)
    for step, there, here in ((101, [50], ()), (101, [50], (7,)), (151, [50, 9], (50, 3)), (151, [50, 9], (50,))):
        with pytest.raises(ValueError, match="this run is within --extend 50.*: give that, and then further numbers"):
            Schedule(recipe, here).check(step, there)
