"""The README's Python examples run, one after the other."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_examples_run(capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "celo2  0.001" in table["hidden.weight"]
    assert "adamw  0.02" in table["embedding.weight"] and "adamw  0.02" in table["lm_head.weight"]
    optimizer = namespace["optimizer"]
    assert "12 x [16, 64]" in optimizer.table() and "4 x [64, 16]" in optimizer.table()


def test_the_files_it_names_exist() -> None:
    text = README.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:celo2|pretrain|docs|tests|bench)/[\w./-]+)`", text)
    assert len(paths) > 8
    assert [path for path in paths if not (README.parent / path).exists()] == []
