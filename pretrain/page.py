"""A page of text, tables and pictures, as Markdown and as one HTML file with the pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from celo2.pretrain.terminal import printable
from celo2.tables import markdown_table

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { border: 1px solid #bbb; padding: 0.25em 0.6em; text-align: left; white-space: nowrap; }
img { max-width: 100%; }"""


class Page:
    """Blocks in the order in which they are added; text is plain, and shown as it is."""

    def __init__(self, title: str) -> None:
        self._markdown = [f"# {_line(title)}", ""]
        self._html = [f"<h1>{_escaped(title)}</h1>"]
        self._title = title

    def heading(self, text: str) -> None:
        self._markdown += [f"## {_line(text)}", ""]
        self._html.append(f"<h2>{_escaped(text)}</h2>")

    def text(self, text: str) -> None:
        self._markdown += [_line(text), ""]
        self._html.append(f"<p>{_escaped(text)}</p>")

    def bullets(self, lines: Sequence[str]) -> None:
        if lines:
            self._markdown += [*(f"- {_line(line)}" for line in lines), ""]
            self._html.append("<ul>" + "".join(f"<li>{_escaped(line)}</li>" for line in lines) + "</ul>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._markdown += markdown_table([_line(cell) for cell in header], [[_line(cell) for cell in r] for r in rows])
        lines = ["".join(f"<th>{_escaped(cell)}</th>" for cell in header)]
        lines += ["".join(f"<td>{_escaped(cell)}</td>" for cell in row) for row in rows]
        self._html.append("<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>")

    def picture(self, what: str, path: Path) -> None:
        """A PNG beside the page."""
        self._markdown += [f"![{_line(what)}]({path.name})", ""]
        data = base64.b64encode(path.read_bytes()).decode()
        self._html.append(f'<p><img alt="{_escaped(what)}" src="data:image/png;base64,{data}"></p>')

    def markdown(self) -> str:
        return "\n".join(self._markdown)

    def html(self) -> str:
        head = f'<meta charset="utf-8"><title>{_escaped(self._title)}</title><style>{_STYLE}</style>'
        body = "\n".join(self._html)
        return f"<!DOCTYPE html>\n<html><head>{head}</head>\n<body>\n{body}\n</body></html>\n"


def _line(text: str) -> str:
    return " ".join(printable(text).split())


def _escaped(text: str) -> str:
    return html.escape(_line(text))
