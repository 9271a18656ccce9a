"""What a single process can see of the parallel layouts; the rest is in test_distributed.py, with real processes."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from celo2.pretrain import parallel as parallel_module
from celo2.pretrain.model import ARCHS, GPT, GPTConfig, model_config
from celo2.pretrain.parallel import Parallel, World, micro_step, shard


@pytest.fixture
def eight_ranks(request):
    dist.init_process_group("fake", rank=getattr(request, "param", 0), world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_one_process_agrees_with_itself() -> None:
    world = World.start("cpu")
    assert (world.rank, world.ranks, world.main, world.control) == (0, 1, True, None)
    assert world.all_reduce_max(3) == 3 and world.all_reduce_sum(1.5, 2) == [1.5, 2]
    assert (
        world.broadcast_object("x") == "x"
        and world.gather("x") == ["x"]
        and float(world.mean(torch.tensor(2.0))) == 2.0
    )
    parallel = Parallel.choose("auto", 1, 1, "cpu")
    assert not parallel.sharded and str(parallel) == "one process"


@pytest.mark.parametrize(
    ("device", "taken"), [("auto", "cuda:3"), ("cuda", "cuda:3"), ("cpu", "cpu"), ("cuda:0", None)]
)
@pytest.mark.parametrize("program", ["celo2.pretrain.train_gpt", "celo2.meta.train"])
def test_each_process_takes_its_own_gpu(program, device, taken, tmp_path, monkeypatch, capsys) -> None:
    """As rank 7 of 8 on two machines of four GPUs; the choice ends the program here."""
    for name, value in {"RANK": 7, "WORLD_SIZE": 8, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))

    def choose(name: str) -> torch.device:
        raise ValueError(f"took {name}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(parallel_module, "select_device", choose)
    assert importlib.import_module(program).main(["--device", device, "--out-dir", str(tmp_path / "out")]) > 0
    error = capsys.readouterr().err
    refused = "--device cuda:0: each of 4 processes would take it; give cuda, which gives each its own"
    assert (refused if taken is None else f"took {taken}\n") in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("local_rank", [0, 3])
@pytest.mark.parametrize("program", ["celo2.pretrain.train_gpt", "celo2.meta.train"])
def test_more_processes_than_gpus(program, local_rank, tmp_path, monkeypatch, capsys) -> None:
    """Those that have one say it too, instead of waiting for the others."""
    places = {"RANK": local_rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 4}
    for name, value in places.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert importlib.import_module(program).main(["--out-dir", str(tmp_path / "out")]) > 0
    assert "4 processes on this machine, and each sees 2 GPU(s): start one for each GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mode", "shards", "expected"),
    [
        ("auto", None, "fsdp, 8 ranks"),
        ("fsdp", None, "fsdp, 8 ranks"),
        ("ddp", None, "ddp, 8 ranks"),
        ("hsdp", None, "hsdp, 2 x 4"),
        ("hsdp", 2, "hsdp, 4 x 2"),
    ],
)
def test_modes_and_their_meshes(eight_ranks, mode: str, shards: int | None, expected: str) -> None:
    parallel = Parallel.choose(mode, 8, 4, "cpu", shards)
    assert str(parallel) == expected
    assert parallel.shards * parallel.replicas == 8 == parallel.mesh.size()
    assert parallel.sharded == (mode != "ddp")


def test_shards_that_do_not_fit(eight_ranks) -> None:
    with pytest.raises(ValueError, match="--shards 3 must divide the 8 ranks"):
        Parallel.choose("hsdp", 8, 8, "cpu", 3)
    with pytest.raises(ValueError, match="--shards 2 belongs to --parallel hsdp"):
        Parallel.choose("fsdp", 8, 8, "cpu", 2)


def test_a_model_is_cut_before_it_has_memory(eight_ranks) -> None:
    with torch.device("meta"):
        model = GPT(model_config("nano"))
    shard(model, Parallel.choose("fsdp", 8, 8, "cpu"), "float32")
    assert all(parameter.is_meta for parameter in model.parameters())
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    # the first rank has the longer chunk of what does not divide by 8: the 257 embeddings
    assert held == model.num_params() / 8 + (33 - 257 / 8) * 128
    model.to_empty(device="cpu")
    model.init_weights(3)
    whole = GPT(model_config("nano"))
    whole.init_weights(3)
    for name, parameter in model.named_parameters():
        part = parameter.to_local()
        assert torch.equal(part, whole.get_parameter(name)[: len(part)]), name
    assert model.lm_head.weight is model.token_embedding.weight


@pytest.mark.parametrize("eight_ranks", [7], indirect=True)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_last_rank_has_the_padding(eight_ranks, arch: str) -> None:
    config = GPTConfig(arch, n_layer=1, n_head=2, head_dim=8, context=16, vocab_size=383)
    with torch.device("meta"):
        model = GPT(config)
    shard(model, Parallel.choose("fsdp", 8, 8, "cpu"), "float32")
    model.to_empty(device="cpu")
    model.init_weights(3)
    whole = GPT(config)
    whole.init_weights(3)
    for name in ("token_embedding.weight", "lm_head.weight"):
        part = model.get_parameter(name).to_local()
        assert torch.equal(part, whole.get_parameter(name)[-48:]) and not part[-1].any(), name
        # the head of speedrun begins with zeros
        assert part[-2].any() == ((arch, name) != ("speedrun", "lm_head.weight")), name
    assert model.num_params() == whole.num_params() and sum(model.padding().values()) == sum(whole.padding().values())


def test_gradients_wait_for_the_last_micro_batch(eight_ranks) -> None:
    model = GPT(model_config("nano"))
    shard(model, Parallel.choose("fsdp", 8, 8, "cpu"), "float32")
    states = [module._get_fsdp_state() for module in (model, *model.blocks)]
    for last, reduce, expected in [(False, "last", False), (True, "last", True), (False, "every", True)]:
        with micro_step(model, last, reduce):
            groups = [state._fsdp_param_group for state in states]
            assert [group.reduce_grads for group in groups] == [expected] * len(groups)
            assert states[0]._state_ctx.is_last_backward == last


def test_rope_stays_float32_in_a_sharded_bfloat16_model(eight_ranks) -> None:
    model = GPT(model_config("nano", "modern"))
    model.init_weights(0)
    shard(model, Parallel.choose("fsdp", 8, 8, "cpu"), "bfloat16")
    seen = []
    model.blocks[1].attention.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0].dtype, inputs[1][0].dtype))
    )
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    model(tokens, tokens)
    assert seen == [(torch.bfloat16, torch.float32)]
