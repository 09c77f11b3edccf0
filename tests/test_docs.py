"""README and docs: links lead somewhere, commands parse, and the words are the field's."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import wgpt
from wgpt import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "wgpt/assets/*/README.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Words that a reader who knows the field would not search for -> what she would.
REPLACED = {
    r"\bproducts?\b": "GEMM, matmul",
    r"on its way": "in flight, prefetched",
    r"said aloud": "set explicitly",
    r"\bgo(es)? on\b": "continues, resumes",
    r"in any company": "batch-invariant",
    r"what lost|tried and lost": "negative results",
    r"\b1/\d\.\d": "N times faster",
    r"\bspeaks?\b": "generate, sample",
    r"Speaker\.|\bDesk\b|likeness\.py|loopback\.py": "the names of the tree today",
}
OURS = [page for page in PAGES if "assets" not in page.parts]  # cards have authors of their own


def anchor(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, fragment = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}, which is not there"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name}: {target} is no heading"


def commands_of(page):
    """Every `wgpt VERB ...` in a shell block of a page, with its lines joined."""
    for block in SHELL.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split(" | ")[0]
            for start in ("wgpt ", "torchrun "):
                if line.startswith(start):
                    yield line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page):
    for line in commands_of(page):
        words = shlex.split(line, comments=True)
        if words[0] == "torchrun":
            words = ["wgpt", *words[words.index("wgpt.train") :]]
            words[1] = "train"
        if len(words) == 1 or words[1] in ("--help", "--version", "VERB", "COMMAND"):
            continue
        words = [word for word in words if word not in ("...",)]
        assert words[1] in cli.COMMANDS, f"{page.name}: {line}"
        try:
            cli.parser_for(words[1]).parse_args(words[2:])
        except SystemExit:
            pytest.fail(f"{page.name} shows a command that is refused: {line}")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", OURS, ids=lambda page: str(page.relative_to(ROOT)))
def test_words_are_those_of_the_field(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for pattern, instead in REPLACED.items():
        for found in re.finditer(pattern, text, re.IGNORECASE):
            around = text[max(0, found.start() - 30) : found.end() + 30].replace("\n", " ")
            pytest.fail(f"{page.name}: {around!r}: say {instead}")


def test_every_page_is_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name}" in readme, f"README does not link docs/{page.name}"


def test_site_has_every_page_and_package(tmp_path, monkeypatch):
    """`make docs` in so far as it needs no Sphinx: the folder that Sphinx reads."""
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "build_site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    monkeypatch.setattr(site, "SOURCE", tmp_path / "source")
    site.lay_out()
    pages = [path for path in (tmp_path / "source").rglob("*") if path.suffix in (".md", ".rst")]
    made = {str(path.relative_to(tmp_path / "source").with_suffix("")) for path in pages}
    assert made - {"index"} == {name for names in site.CONTENTS.values() for name in names}
    packages = {name for name in wgpt.__all__ if (ROOT / "wgpt" / name).is_dir()}
    assert packages <= set(site.CONTENTS["Reference"])
    for page in pages:
        for target in LINK.findall(page.read_text()):
            name = target.partition("#")[0]
            if name and ":" not in name:
                assert (page.parent / name).exists(), f"{page.name}: {target}"
