import pytest
import torch

from celo2.pretrain.device import OptimizerTimer, device_name, memory_gib, peak_flops, precision, select_device


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI300X", 1307e12),
        ("AMD EPYC, 2 threads", None),
        ("Tesla T4", None),
    ],
)
def test_peak_flops_come_from_the_table_or_not_at_all(name: str, flops: float | None) -> None:
    assert peak_flops(name) == flops


def test_select_device() -> None:
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("abacus", "cuda:77", "meta"):
        with pytest.raises(ValueError, match=f"--device {name}: not usable here .*; use auto"):
            select_device(name)
    assert "threads" in device_name(torch.device("cpu"))


def test_a_gpu_by_its_kind_alone(monkeypatch) -> None:
    """One process with `--device cuda` takes the current GPU, and with a number that one."""
    taken = []
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)
    assert select_device("cuda") == torch.device("cuda") and taken == []
    assert select_device("cuda:1") == torch.device("cuda:1") and taken == [1]


def test_precision() -> None:
    x = torch.ones(2, 2)
    with precision(torch.device("cpu"), "bfloat16"):
        assert (x @ x).dtype == torch.bfloat16
    with precision(torch.device("cpu"), "float32"):
        assert (x @ x).dtype == torch.float32


def test_timer_measures_what_is_between() -> None:
    timer = OptimizerTimer(torch.device("cpu"))
    timer.start()
    timer.stop()
    assert 0 <= timer.elapsed_ms() < 1000


def test_memory_of_the_process() -> None:
    before = memory_gib(torch.device("cpu"))
    assert 0.05 < before < 64
    held = torch.ones(2**26)
    # a quarter of a GiB, and what the allocator likes
    assert memory_gib(torch.device("cpu")) - before == pytest.approx(held.nbytes / 2**30, rel=0.2)
