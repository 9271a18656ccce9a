from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from celo2 import Theta, flax_state, load_weights
from celo2 import theta as theta_module
from celo2.theta import NAMES, TRAINED, closed_form

STATES = ("normal_gradients", "tiny_gradients", "huge_gradients_clipped", "zero_gradients_every_third_step")


@pytest.mark.parametrize("name", STATES)
def test_reads_the_authors_file_and_writes_one_of_the_same_size(name, golden, golden_folder, tmp_path):
    theta = Theta.load(golden_folder / f"{name}.theta.state")
    assert theta.num_parameters == 347 and theta.hidden == 8
    for key, array in golden(name).items():
        if key.startswith("theta/"):
            assert np.array_equal(theta.arrays[key.removeprefix("theta/")], array)
    assert theta.orthogonalize and theta.variant == "celo2"
    theta.save(tmp_path / "theta.state")
    assert (tmp_path / "theta.state").stat().st_size == 1833
    assert Theta.load(tmp_path / "theta.state") == theta


def test_flax_writer_is_byte_exact(golden_folder):
    data = (golden_folder / "normal_gradients.theta.state").read_bytes()
    arrays = flax_state.loads(data)
    assert flax_state.dumps(arrays) == data


@pytest.mark.parametrize("hidden", [(8, 8), (4, 6), (1, 1), (16, 16), (33, 2)])
@pytest.mark.parametrize("suffix", ["safetensors", "state"])
def test_round_trip(hidden, suffix, random_theta, tmp_path):
    theta = random_theta(1, *hidden, card={"recipe": "none", "variant": "celo2-base", "orthogonalize": "false"})
    path = tmp_path / f"x.{suffix}"
    theta.save(path)
    loaded = Theta.load(path)
    assert loaded == theta and loaded.sha256 == theta.sha256
    if suffix == "safetensors":
        assert loaded.card["recipe"] == "none" and loaded.variant == "celo2-base" and not loaded.orthogonalize
    assert os.listdir(tmp_path) == [path.name]


def test_hash_counts_values_not_the_card(random_theta):
    theta = random_theta(1)
    assert Theta.from_arrays(theta.arrays, {"name": "other"}) == theta
    changed = {name: array.copy() for name, array in theta.arrays.items()}
    changed["b1"][3] += 1e-3
    assert Theta.from_arrays(changed) != theta


def test_is_a_value(random_theta):
    theta = random_theta(2)
    assert pickle.loads(pickle.dumps(theta)) == theta and copy.deepcopy(theta) == theta
    with pytest.raises(ValueError, match="read-only"):
        theta.arrays["b0"][0] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("w1"), r"missing \['w1'\]"),
        (lambda a: a.update(w9=a["w1"]), r"unknown \['w9'\]"),
        (lambda a: a.update(w1=np.zeros((8, 7))), r"'w1' has shape \(8, 7\), expected \(8, 8\)"),
        (lambda a: a.update(w0__3=np.zeros((1, 8))), r"'w0__3' has shape \(1, 8\), expected \(3, 8\)"),
        (lambda a: a.update(b0=np.full(8, np.nan)), "'b0' holds a value that is not finite"),
        (lambda a: a.update(b0=np.full(8, 1e300)), "'b0' holds a value that is not finite"),
        (lambda a: a.update(b0=np.zeros((8, 1))), "must be vectors"),
        (lambda a: a.update(b2=np.array(["a", "b", "c"])), "must be real numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_refuses_other_shapes_and_values(change, message, random_theta):
    arrays = {name: array.copy() for name, array in random_theta().arrays.items()}
    change(arrays)
    with pytest.raises(ValueError, match=message):
        Theta.from_arrays(arrays)


@pytest.mark.parametrize("suffix", ["safetensors", "state"])
def test_refuses_damaged_files(suffix, random_theta, tmp_path):
    path = tmp_path / f"theta.{suffix}"
    random_theta().save(path)
    data = path.read_bytes()
    deep = b"\x91" * 100_000  # lists in lists
    for damaged in (b"", data[:100], data[:-5], data + b"x", b"\x00" * 400, b"hello", deep):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"theta.{suffix} is not a readable theta"):
            Theta.load(path)


@pytest.mark.parametrize("suffix", ["safetensors", "state"])
def test_any_damaged_byte_is_a_value_error_or_another_theta(suffix, random_theta, tmp_path):
    path = tmp_path / f"theta.{suffix}"
    random_theta().save(path)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = data.copy()
        damaged[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            theta = Theta.load(path)
        except ValueError as error:
            assert "theta" in str(error)
        else:
            # a safetensors file carries its hash, so only the card can have changed
            assert suffix == "state" or theta == random_theta()


def test_saved_file_has_the_usual_permissions(random_theta, tmp_path):
    random_theta().save(tmp_path / "theta.safetensors")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "theta.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_refuses_a_flipped_bit(random_theta, tmp_path):
    path = tmp_path / "theta.safetensors"
    random_theta().save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        Theta.load(path)


def test_failed_save_keeps_the_old_file(tmp_path, random_theta):
    path = tmp_path / "theta.safetensors"
    random_theta(1).save(path)
    random_theta(2).save(tmp_path / "other.safetensors")
    code = (
        "import resource, signal, sys; from celo2 import Theta; theta = Theta.load(sys.argv[1]);"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512));"
        "theta.save(sys.argv[2])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "other.safetensors"), str(path)], capture_output=True, text=True
    )
    assert result.returncode != 0 and "File too large" in result.stderr
    assert Theta.load(path) == random_theta(1)
    assert sorted(os.listdir(tmp_path)) == ["other.safetensors", "theta.safetensors"]


def test_load_weights_names(random_theta, tmp_path):
    theta = random_theta()
    assert load_weights(theta) is theta
    assert load_weights("momentum").orthogonalize and not load_weights("adam").orthogonalize
    theta.save(tmp_path / "mine.safetensors")
    assert load_weights(tmp_path / "mine.safetensors") == theta
    assert load_weights(str(tmp_path / "mine.safetensors")).name == "mine"
    with pytest.raises(ValueError, match="weights='celo3': not a known name"):
        load_weights("celo3")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights("nowhere/theta.state")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights(tmp_path / "no" / "theta.safetensors")
    with pytest.raises(TypeError, match="expected a name"):
        load_weights(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown closed form"):
        closed_form("sgd")


@pytest.mark.parametrize("name", TRAINED)
def test_bundled_weights_are_trained_and_say_how(name):
    theta = load_weights(name)
    assert theta.name == name and theta.num_parameters == 347
    assert theta.variant == ("celo2-base" if name == "celo2-base" else "celo2")
    assert theta.orthogonalize == (theta.variant == "celo2")
    for key in (
        "recipe",
        "data_sha256",
        "seed",
        "outer_steps",
        "inner_steps",
        "seconds",
        "machine",
        "git",
        "selection",
    ):
        assert theta.card[key], key
    assert theta not in (closed_form("momentum"), closed_form("adam"))


def test_hub_ids(monkeypatch, golden_folder):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def list_repo_files(repo, revision=None):
        asked.append((repo, revision))
        return ["README.md", "config.json"] if repo == "a/empty" else ["README.md", "theta.state"]

    monkeypatch.setattr(hub, "list_repo_files", list_repo_files)
    monkeypatch.setattr(
        hub, "hf_hub_download", lambda repo, name, revision=None: str(golden_folder / f"normal_gradients.{name}")
    )
    assert load_weights("owner/celo2@v1.0") == Theta.load(golden_folder / "normal_gradients.theta.state")
    assert asked == [("owner/celo2", "v1.0")]
    with pytest.raises(ValueError, match="holds no .safetensors or .state file"):
        load_weights("a/empty")

    def offline(repo, revision=None):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "list_repo_files", offline)
    with pytest.raises(OSError, match="owner/celo2' could not be fetched"):
        load_weights("owner/celo2")


def test_names_are_the_19_of_the_format():
    assert len(NAMES) == 19 and sum(theta_module.GROUP_COLUMNS) == 30
