"""A theta on the hub: its card, the files of a dry run, and the real client against a hub on this machine."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, fake_hub

from celo2 import Theta, load_weights, push_theta
from celo2.publish import theta_card

FILES = ["README.md", "config.json", "model.safetensors", "theta.safetensors"]


def python(code: str, *arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python that knows no other hub; its own cache, and no token that is stored."""
    variables = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        variables.pop(name, None)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=variables | environment
    )


@pytest.mark.parametrize("name", ["celo2-lm", "celo2-base"])
def test_the_card_says_how_it_was_trained(name: str) -> None:
    theta = load_weights(name)
    text = theta_card(theta, "me/mine")
    head, body = text.removeprefix("---\n").split("\n---\n")
    assert head.splitlines()[0] == "license: mit" and f"# {name}\n" in body
    rows = dict(
        line.strip("| ").split(" | ", 1) for line in body.splitlines() if line.startswith("| ") and line != "| | |"
    )
    assert rows["recipe"] == theta.card["recipe"] and rows["meta-seed"] == "0" and rows["selection"]
    assert rows["outer steps"] == theta.card["outer_steps"] and rows["SHA-256 of the arrays"] == theta.sha256
    assert json.loads(rows["all of the recipe"])["name"] == theta.card["recipe"]
    assert 'weights="me/mine"' in body and 'hf_key="me/mine"' in body
    assert ("orthogonalize=False" in body) == (name == "celo2-base")


def test_licences(random_theta: Any) -> None:
    theta = random_theta()
    assert "license:" not in theta_card(theta, "me/mine") and "Licence: none is given." in theta_card(theta, "me/mine")
    assert theta_card(theta, "me/mine", licence="cc0-1.0").startswith("---\nlicense: cc0-1.0\n")
    assert "license: gpl" in theta_card(random_theta(card={"licence": "gpl"}), "me/mine")
    # a bar or a line break in an entry does not end its cell
    card = theta_card(random_theta(card={"recipe": "a|b\nc"}), "me/mine")
    assert "| recipe | a\\|b c |\n" in card


def test_a_dry_run_writes_the_folder(random_theta: Any, tmp_path: Path) -> None:
    theta, folder = random_theta(), tmp_path / "new" / "folder"
    assert push_theta(theta, "me/mine", folder=folder) == str(folder)
    assert sorted(os.listdir(folder)) == FILES
    assert load_weights(folder) == theta == load_weights(folder / "model.safetensors")
    assert (folder / "README.md").read_text() == theta_card(theta, "me/mine")
    with pytest.raises(ValueError, match=r"folder=.* is not empty: give a new one"):
        push_theta(theta, "me/mine", folder=folder)
    for repo_id in ("mine", "me/mine@v1", "me/mine/more", "./mine", ""):
        with pytest.raises(ValueError, match="expected owner/name"):
            push_theta(theta, repo_id, folder=tmp_path / "other")
    # PyLO has one width
    push_theta(random_theta(hidden=8, hidden2=4), "me/mine", folder=tmp_path / "other")
    assert sorted(os.listdir(tmp_path / "other")) == ["README.md", "theta.safetensors"]
    assert "pylo" not in (tmp_path / "other" / "README.md").read_text()


def test_a_push_and_what_it_brings_back(random_theta: Any, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    theta, file = random_theta(card={"name": "mine", "recipe": "a recipe"}), tmp_path / "mine.safetensors"
    theta.save(file)
    push = "import sys, celo2; print(celo2.push_theta(sys.argv[1], 'me/mine', token='secret', private=True))"
    push += "; t = celo2.load_weights('me/mine'); print(t.sha256, t.card['recipe'])"
    push += "; celo2.push_theta(t, 'me/mine', token='wrong')"
    with fake_hub() as hub:
        done = python(push, str(file), home=tmp_path, HF_ENDPOINT=hub.url)
    assert done.stdout.splitlines() == [f"{hub.url}/me/mine/commit/{COMMIT}", f"{theta.sha256} a recipe"], done.stderr
    assert sorted(hub.files["me/mine"]) == FILES and hub.private == {"me/mine": True}
    assert hub.messages == [f"Upload {theta.label}"] and hub.tokens == {"Bearer secret", "Bearer wrong"}
    assert hub.files["me/mine"]["README.md"].decode() == theta_card(theta, "me/mine")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError: mine@") and "could not be uploaded to 'me/mine' (" in last
    assert "log in with `hf auth login`" in last
    # the hub is gone: what was fetched before serves, and nothing else
    load = "import celo2; print(celo2.load_weights('me/mine').sha256); celo2.load_weights('me/other')"
    gone = python(load, home=tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert gone.stdout == f"{theta.sha256}\n"
    assert gone.stderr.strip().splitlines()[-1].startswith("OSError: weights='me/other' could not be fetched")


def test_a_client_that_is_no_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx, the hub's client since its version 1, has errors of its own."""
    hub = pytest.importorskip("huggingface_hub")
    error = importlib.import_module("huggingface_hub.errors").HfHubHTTPError.__bases__[0]

    def no_route(*_: object, **__: object) -> None:
        raise error("no route")

    monkeypatch.setattr(hub, "list_repo_files", no_route)
    monkeypatch.setattr(hub.HfApi, "create_repo", no_route)
    with pytest.raises(OSError, match=r"weights='me/mine' could not be fetched.*no route"):
        load_weights("me/mine")
    with pytest.raises(OSError, match=r"could not be uploaded to 'me/mine' \(.*no route"):
        push_theta("celo2", "me/mine", token="secret")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install huggingface_hub, or write the files with folder="):
        push_theta(Theta.from_arrays(load_weights("momentum").arrays), "me/mine")
