"""Parts of the pages that stand alone: pictures and sounds are inside them."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from importlib import resources


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page in the style of report_template.html."""
    template = (resources.files("wgpt.experiments") / "report_template.html").read_text()
    body = "\n".join(part for part in parts if part)
    return template.replace("<!-- title -->", html.escape(title)).replace("<!-- body -->", body)


def table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table, the first column of names."""
    head = "".join(f"<th>{html.escape(cell)}" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return f"<div class=table><table><tr>{head}\n{body}</table></div>"


def text(words: str) -> str:
    """Escaped, `x` as code."""
    parts = html.escape(words).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def inline(content: bytes, kind: str) -> str:
    """A data URL. kind: the MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
