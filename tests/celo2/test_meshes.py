"""Parameters sharded on two axes of a mesh, and replicas: FSDP2 after tensor parallelism, HSDP, on four gloo ranks."""

from __future__ import annotations

import pytest

from scenarios import meshes

pytestmark = pytest.mark.dist

EVERYTHING = list(meshes.LAYOUTS)
CASES = [
    *((variant, [name], {"max_grad_norm": 1.0}) for variant in ("celo2", "celo2-base") for name in EVERYTHING),
    *((variant, EVERYTHING[n:] + EVERYTHING[:n], {}) for variant in ("celo2", "celo2-base") for n in (0, 3)),
    ("celo2", EVERYTHING, {"ns_over_replicas": True}),
    # elements beyond the rule's clip
    ("celo2", EVERYTHING, {"steps": 2, "scale": 2e3}),
]


@pytest.mark.parametrize(("variant", "layouts", "options"), CASES, ids=lambda value: str(value)[:60])
def test_equals_one_process(on_ranks, variant, layouts, options) -> None:
    parameters, factors, norm = on_ranks(4, meshes.differences, variant, layouts, **options)
    print(parameters, factors, norm)
    assert parameters <= 2e-6 and factors <= 1e-5 and norm <= 1e-6


@pytest.mark.parametrize(
    ("variant", "layouts", "options"),
    [
        ("celo2", ["rowwise", "replicas"], {"max_grad_norm": 1.0, "ns_over_replicas": True}),
        ("celo2-base", EVERYTHING, {}),
    ],
)
def test_kernels_equal_one_process(on_ranks, interpreter, variant, layouts, options) -> None:
    options = {"specs": meshes.SMALL, "steps": 2, "backend": "triton", **options}
    parameters, factors, norm = on_ranks(4, meshes.differences, variant, layouts, **options)
    print(parameters, factors, norm)
    assert parameters <= 2e-6 and factors <= 1e-4 and norm <= 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_replicas_round_alike(on_ranks, backend, request) -> None:
    if backend == "triton":
        request.getfixturevalue("interpreter")
    assert on_ranks(4, meshes.replicas_agree, backend)


def test_newton_schulz_of_replicas(on_ranks) -> None:
    # eight matrices of 16 x 16, half of each here. Each replica by itself, or all four ranks for both
    alone, together = (on_ranks(4, meshes.owners, over) for over in (False, True))
    assert alone == {"owned": [4, 4, 0, 0], "own": 8 * 128, "sent": 8 * 128, "returned": 2 * 4 * 128}
    assert together == {"owned": [2, 2, 2, 2], "own": 8 * 128, "sent": 4 * 128, "returned": 2 * 4 * 128}


def test_fsdp2_after_tensor_parallelism_trains_and_resumes(on_ranks, tmp_path) -> None:
    trained = on_ranks(4, meshes.trained, tmp_path / "checkpoint")
    assert trained["difference"] <= 2e-6 and trained["resumed"] and trained["alone"] <= 2e-6


def test_what_is_not_supported_is_refused_by_name(on_ranks) -> None:
    strided, short, velo, apart = on_ranks(4, meshes.refusals)
    assert "strided otherwise than by fully_shard after tensor parallelism" in strided
    assert "a rank has (1, 8) of shape (8, 8)" in short
    assert "sharded on 2 axes of DeviceMesh" in velo
    assert "the one is no part of the other" in apart
