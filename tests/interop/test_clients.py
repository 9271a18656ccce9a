"""FusedCelo2 in other people's trainers: it trains, resumes to the same numbers, and routes as its table says."""

from __future__ import annotations

import pytest

# of losses, float32, between ways that differ in the order of sums
CLOSE = pytest.approx


def assert_sound(run, *, learns: float = 0.5) -> None:
    losses = run["losses"]
    assert len(losses) == 6 and losses[-1] < learns * losses[0]
    assert run["resumed equal"] and run["faults"] == []


@pytest.mark.parametrize("way", ["Hugging Face Trainer", "Hugging Face Trainer with an optimizer of your own"])
def test_trainer(run_client, way) -> None:
    run = run_client("trainer_ranks", 1)[way]
    assert_sound(run)
    assert run["resumed losses"] == run["losses"][3:] and run["resumed faults"] == []
    # what the Trainer logs is the learned rule's rate, which its schedule brings to zero
    assert run["rates"] == CLOSE([1e-2 * (6 - step) / 6 for step in range(6)])


def test_trainer_accumulates_and_both_ways_agree(run_client) -> None:
    found = run_client("trainer_ranks", 1)
    assert found["difference of ways"] == 0
    assert found["accumulated"]["losses"] == CLOSE(found["Hugging Face Trainer"]["losses"], rel=1e-3)
    assert found["accumulated"]["difference"] <= 1e-4


def test_trainer_with_fsdp2(run_client) -> None:
    alone, found = run_client("trainer_ranks", 1), run_client("trainer_ranks", 2)
    run, whole = found["Hugging Face Trainer"], alone["Hugging Face Trainer"]
    assert_sound(run)
    assert run["resumed losses"] == run["losses"][3:]
    assert run["losses"] == CLOSE(whole["losses"], rel=1e-3)
    assert run["unsharded"] == [] and run["bytes"] < 0.6 * whole["bytes"]


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_accelerate(run_client, way) -> None:
    found = run_client("accelerate_ranks", 2)
    run = found[way]
    assert_sound(run)
    assert run["resumed losses"] == run["losses"][3:] and run["resumed faults"] == []
    assert run["type"] == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}[way]
    assert run["losses"] == CLOSE(found["ddp"]["losses"], rel=1e-3) and found["difference"] <= 1e-4


def test_accelerate_shards_all_state(run_client) -> None:
    found = run_client("accelerate_ranks", 2)
    # after `prepare`, and at the end
    assert found["fsdp2"]["unsharded"] == [[], []] and found["ddp"]["unsharded"][1]
    assert found["fsdp2"]["bytes"] < 0.6 * found["ddp"]["bytes"]


@pytest.mark.parametrize("way", ["ddp", "model parallel"])
def test_lightning(run_client, way) -> None:
    found = run_client("lightning_ranks", 2)
    run = found[way]
    assert_sound(run)
    assert run["resumed losses"] == run["losses"][3:] and run["resumed faults"] == []
    assert run["losses"] == CLOSE(found["ddp"]["losses"], rel=1e-3) and found["difference"] <= 1e-4
    assert bool(run["unsharded"]) == (way == "ddp")


def test_torchtitan(run_client) -> None:
    run = run_client("titan_ranks", 2)
    assert_sound({**run, "resumed equal": run["resumed_equal"]})
    assert run["resumed_losses"] == run["losses"][3:] and run["unsharded"] == []


@pytest.mark.parametrize("model", ["vit", "convnext"])
def test_timm(run_client, model) -> None:
    found = run_client("models_ranks", 1)
    runs = [found[f"{model} torch.{layout}"] for layout in ("contiguous_format", "channels_last")]
    for run in runs:
        assert_sound(run, learns=0.99)
        # layer decay is in the rates, and not lost in the routing
        assert run["rates"][-1] == CLOSE(1e-3) and len(run["rates"]) >= 4
    assert runs[0]["losses"] == CLOSE(runs[1]["losses"], rel=1e-4)


def test_peft(run_client) -> None:
    run = run_client("models_ranks", 1)["lora"]
    assert_sound(run, learns=1.0)
    # the base is as it was, and has no state
    assert run["frozen"] > 10 and run["frozen equal"] and run["state"] == [True]
