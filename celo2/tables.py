"""Tables of text: columns aligned for a terminal, and Markdown for a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def format_table(header: tuple[str, ...], rows: list[tuple[str, ...]], *, collapse: bool = False) -> str:
    """Align rows of text in columns.

    With `collapse`, rows that differ only in a number within the name, the first cell, become one: `blocks.*.qkv x12`.
    Other cells that repeat the name are written so as well.
    """
    if collapse:
        counts: dict[tuple[str, ...], int] = {}
        for name, *cells in rows:
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            key = (pattern, *(cell.replace(name, pattern) for cell in cells))
            counts[key] = counts.get(key, 0) + 1
        rows = [(f"{name} x{count}" if "*" in name else name, *cells) for (name, *cells), count in counts.items()]
    rows = [header, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table as lines, and an empty one after it."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return [*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows), ""]
