"""The Python examples of the README and of the pages run, one after the other, and what they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md")]


def run_examples(page: Path, count: int) -> dict[str, object]:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == count
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    return namespace


def test_the_trainer_of_the_readme(capsys) -> None:
    run_examples(ROOT / "README.md", 1)
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "celo2  0.001" in table["hidden.weight"]
    assert "adamw  0.02" in table["embedding.weight"] and "adamw  0.02" in table["lm_head.weight"]


def test_the_views_of_the_page_on_routing() -> None:
    table = run_examples(ROOT / "docs" / "routing.md", 1)["optimizer"].table()
    assert "12 x [16, 64]" in table and "4 x [64, 16]" in table


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_it_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:celo2|pretrain|docs|tests|bench|kernels|meta|examples)/[\w./-]+)`", text)
    assert len(paths) > 8 or page.name != "README.md"
    assert [path for path in paths if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\(([\w./-]+\.(?:md|png))\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_named_by_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text] == []
