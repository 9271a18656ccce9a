"""Parameters sharded on two axes of a mesh, and replicas: FSDP2 after tensor parallelism, HSDP, on four gloo ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.dist

PROGRAM = Path(__file__).with_name("mesh_ranks.py")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]) -> Any:
    return run_ranks(PROGRAM, 4, tmp_path_factory.mktemp("meshes"), TRITON_INTERPRET="0")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]) -> Any:
    return run_ranks(PROGRAM, 4, tmp_path_factory.mktemp("kernels"), TRITON_INTERPRET="1")


def test_equals_one_process(report) -> None:
    print(json.dumps(report["cases"]))
    assert len(report["cases"]) == 18
    for case, (parameters, factors, norm) in report["cases"].items():
        assert parameters <= 2e-6 and factors <= 1e-5 and norm <= 1e-6, case


def test_kernels_equal_one_process(kernels) -> None:
    print(json.dumps(kernels["cases"]))
    assert len(kernels["cases"]) == 2
    for case, (parameters, factors, norm) in kernels["cases"].items():
        assert parameters <= 2e-6 and factors <= 1e-4 and norm <= 1e-6, case


def test_replicas_round_alike(report, kernels) -> None:
    assert report["replicas agree"] and kernels["replicas agree"]


def test_newton_schulz_of_replicas(report) -> None:
    # eight matrices of 16 x 16, half of each here. Each replica by itself, or all four ranks for both
    alone, together = report["owners"]
    assert alone == {"owned": [4, 4, 0, 0], "own": 8 * 128, "sent": 8 * 128, "returned": 2 * 4 * 128}
    assert together == {"owned": [2, 2, 2, 2], "own": 8 * 128, "sent": 4 * 128, "returned": 2 * 4 * 128}


def test_fsdp2_after_tensor_parallelism_trains_and_resumes(report) -> None:
    trained = report["trained"]
    assert trained["difference"] <= 2e-6 and trained["resumed"] and trained["alone"] <= 2e-6


def test_what_is_not_supported_is_refused_by_name(report) -> None:
    strided, short, velo, apart = report["refused"]
    assert "strided otherwise than by fully_shard after tensor parallelism" in strided
    assert "a rank has (1, 8) of shape (8, 8)" in short
    assert "sharded on 2 axes of DeviceMesh" in velo
    assert "the one is no part of the other" in apart
