"""Builds the site, docs/ and the docstrings, into build/site: `make docs`. Any warning is an error.

Sphinx reads one folder. This lays it out: the pages of docs/ and some of the repository's other
pages, links turned to where they lie then, and a page for each public package.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE, SITE = ROOT / "build" / "site-source", ROOT / "build" / "site"
PAGES = {  # file of the repository: page; docs/X.md is X.md
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
    "wgpt/assets/mini/README.md": "mini.md",
    "wgpt/assets/starter/README.md": "starter.md",
}
CONTENTS = {  # heading: pages under it
    "Tutorials": "tutorials/my-voice tutorials/kernels tutorials/paper".split(),
    "Use": "guide scale examples results streaming closed-loop mini starter".split(),
    "Reference": "wgpt ops audio codec data model training generation evaluation".split(),
    "Inside": "architecture kernels performance reliability log contributing security "
    "changelog".split(),
}
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")


def turned(text: str, folder: str, page: str) -> tuple[str, set[str]]:
    """Markdown of a file in `folder` with its links turned for `page`, and what else it shows."""
    shown = set()

    def turn(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[2]))
        target = PAGES.get(path, path.removeprefix("docs/"))
        if not path.endswith(".md"):
            shown.add(path)
            target = path
        return found[1] + posixpath.relpath(target, posixpath.dirname(page) or ".") + found[3]

    return _LINK.sub(turn, text), shown


def lay_out() -> None:
    """Writes the folder that Sphinx reads."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    shutil.copyfile(ROOT / "docs" / "conf.py", SOURCE / "conf.py")
    own = (path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md"))
    for name, page in (PAGES | {f"docs/{page}": page for page in own}).items():
        text, shown = turned((ROOT / name).read_text(), posixpath.dirname(name), page)
        if page == "index.md":
            for heading, names in CONTENTS.items():
                toctree = "\n".join(names)
                text += f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{toctree}\n```\n"
        (SOURCE / page).parent.mkdir(exist_ok=True)
        (SOURCE / page).write_text(text)
        for path in shown:
            (SOURCE / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, SOURCE / path)
    for name in CONTENTS["Reference"]:
        package = name if name == "wgpt" else f"wgpt.{name}"
        text = f"{package}\n{'=' * len(package)}\n\n.. automodule:: {package}\n"
        (SOURCE / f"{name}.rst").write_text(text)


if __name__ == "__main__":
    lay_out()
    sphinx = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--fresh-env"]
    command = [*sphinx, "--quiet", "-b", "html", str(SOURCE), str(SITE)]
    sys.exit(subprocess.run(command, env=os.environ | {"PYTHONSAFEPATH": "1"}).returncode)
