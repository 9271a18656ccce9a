"""The files of examples/ that need this package alone run as they are, and the pages name and show all of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FILES = sorted(
    path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb") or (path / "__init__.py").is_file()
)
# headings of docs/interop.md, and where the whole of what they show is
SHOWN = {
    "accelerate": "accelerate_fsdp2.py",
    "Hugging Face Trainer": "hf_trainer.py",
    "Hugging Face Trainer with an optimizer of your own": "hf_trainer.py",
    "Lightning": "lightning_module.py",
    "timm": "timm_vit.py",
    "torchtitan": "torchtitan_celo2/__init__.py",
}


def run(name: str, *arguments: str, folder: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run an example as a process in another folder."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == status, result.stderr
    return result


def losses(text: str) -> list[float]:
    """What the lines of steps print."""
    return [float(value) for value in re.findall(r"^step \d+ \| loss ([\d.]+)", text, re.MULTILINE)]


def test_nanogpt(tmp_path: Path) -> None:
    text = run("nanogpt.py", "--steps", "11", folder=tmp_path).stdout
    assert "h.*.c_attn.weight x4" in text and "wte.weight" in text
    first, last = losses(text)
    assert first > 5 and last < 3.8
    validation = float(re.findall(r"^validation loss ([\d.]+)$", text, re.MULTILINE)[0])
    # 3.54 when the loop leaves out the groups' multiples
    assert validation < 3.4


@pytest.mark.needs("skimage", "matplotlib", "tqdm")
def test_own_learned_optimizer(tmp_path: Path) -> None:
    text = run("own_learned_optimizer.py", "--steps", "11", "--outer-steps", "2", folder=tmp_path).stdout
    assert text.count("$ python -m celo2.meta.") == 2 and text.count("| validation ") == 6
    assert sorted(path.name for path in (tmp_path / "own-theta").glob("*.safetensors") if "theta" in path.name) == [
        "theta-0000001.safetensors",
        "theta-0000002.safetensors",
        "theta.safetensors",
    ]
    first, last = losses(text)
    assert first > 5 and last < 4


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [
        ("nanogpt.py", "--steps", "0"),
        ("own_learned_optimizer.py", "--steps", "0"),
        ("own_learned_optimizer.py", "--outer-steps", "1"),
    ],
)
def test_a_bad_value(name: str, flag: str, value: str, tmp_path: Path) -> None:
    refused = run(name, flag, value, folder=tmp_path, status=2)
    assert f"error: {flag} {value}: must be at least" in refused.stderr and refused.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("page", ["examples/README.md", "docs/examples.md"])
def test_the_pages_name_every_file(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(FILES) == 8 and [name for name in FILES if f"`{name}" not in text and f"/{name}" not in text] == []


@pytest.mark.parametrize("heading", SHOWN)
def test_what_the_page_shows_is_the_example(heading: str) -> None:
    """Every line but imports is in the example, in this order."""
    page = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
    (section,) = (text for text in re.split(r"^## ", page, flags=re.MULTILINE) if text.splitlines()[0] == heading)
    assert f"`examples/{SHOWN[heading].removesuffix('__init__.py')}`" in section
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    example = iter([line.strip() for line in (EXAMPLES / SHOWN[heading]).read_text(encoding="utf-8").splitlines()])
    shown = [line.strip() for line in block.splitlines() if line.strip() and not line.startswith(("from ", "import "))]
    assert len(shown) >= 2 and [line for line in shown if line not in example] == []
