"""Sphinx's settings for the site that docs/build_site.py lays out.

Our docstrings are plain text: code is indented, and parameters outside of `Args:` are lines such as
`top_k: keep the k most likely`.
"""

import inspect
import re
from typing import Any

project, author, html_title = "wgpt", "wgpt", "wgpt"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "code"
myst_heading_anchors = 3
html_theme = "furo"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

_SECTION = re.compile(r"(Args|Returns|Yields|Raises|Attributes):")
_FIELD = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): (.+)")


def as_restructured_text(lines: list[str]) -> list[str]:
    """Marks blocks of code and of parameters, outside of sections that napoleon reads."""
    out: list[str] = []
    in_section = False
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        rows = block.split("\n")
        is_indented = [row.startswith(" ") for row in rows]
        fields = [_FIELD.fullmatch(row) for row in rows]
        in_section = bool(_SECTION.match(rows[0])) or (in_section and is_indented[0])
        if in_section:
            pass
        elif all(is_indented):
            rows = ["::", "", *rows]
        elif all(a or b for a, b in zip(is_indented, fields, strict=True)) and fields[0]:
            rows = [f":{f[1]}: {f[2]}" if f else row for f, row in zip(fields, rows, strict=True)]
        elif not rows[0].startswith(("-", "*", "=", "|", "+")):
            rows = [row.strip() for row in rows]  # a hanging indent is one paragraph
        out += [*rows, ""]
    return out


def setup(app: Any) -> None:
    """Comes before napoleon; after it for properties, whose first colon it takes for a type's."""

    def before(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
        lines[:] = as_restructured_text(lines)

    def after(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
        if what == "property":
            lines[:] = as_restructured_text(inspect.cleandoc(item.__doc__).splitlines())

    app.connect("autodoc-process-docstring", before, priority=400)
    app.connect("autodoc-process-docstring", after, priority=600)
