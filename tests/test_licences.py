"""Every file in the package that is no source text has a licence and a provenance."""

import fnmatch
import json
import re
from pathlib import Path

import pytest

import wgpt

PACKAGE = Path(wgpt.__file__).parent
ASSETS = PACKAGE / "assets"
SOURCE_TEXT = {".py", ".pyi", ".typed", ".html", ".css", ".js", ".svg", ".so"}  # .so: compiled here
LICENCES = {"MIT", "MIT-Festival", "CC0-1.0"}


def rows():
    """(patterns, licence, provenance) of the table in LICENCES.md."""
    for line in (ASSETS / "LICENCES.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and "`" in cells[0]:
            yield re.findall("`(.*?)`", cells[0]), cells[1], cells[2]


def test_every_asset_has_one_licence_and_a_provenance():
    patterns = {pattern: licence for names, licence, where in rows() for pattern in names if where}
    matched = {pattern: 0 for pattern in patterns}
    for path in ASSETS.rglob("*"):
        if path.is_file():
            name = path.relative_to(ASSETS).as_posix()
            found = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
            assert len({patterns[pattern] for pattern in found}) == 1, f"{name}: {found}"
            matched[found[0]] += 1
    assert all(matched.values()), matched
    assert {re.split(r"[ ,]", licence)[0] for licence in patterns.values()} == LICENCES


def test_all_else_in_the_package_is_source_text():
    for path in PACKAGE.rglob("*"):
        if path.is_file() and ASSETS not in path.parents and "__pycache__" not in path.parts:
            assert path.suffix in SOURCE_TEXT, path


def test_sources_of_models_and_sounds_name_licences_and_each_file():
    for name in ("mini", "starter"):
        sources = json.loads((ASSETS / name / "sources.json").read_text())["recordings"]
        card = (ASSETS / name / "README.md").read_text()
        for source in sources:
            assert source["licence"] and source["version"]
            assert f"| {source['package']} {source['version']} |" in card
    speech = json.loads((ASSETS / "speech" / "sources.json").read_text())["recordings"]
    sounds = {path.name for path in (ASSETS / "speech").glob("*.ogg")}
    assert {one["file"] for one in speech if len(one["sha256"]) == 64} == sounds


def test_metadata_names_the_licences():
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    if not pyproject.is_file():
        pytest.skip("needs the source tree")
    text = pyproject.read_text()
    expression = re.search(r'^license = "(.*)"', text, re.M)[1]
    assert set(expression.split(" AND ")) == LICENCES
    assert "wgpt/assets/LICENCES.md" in text and "wgpt/assets/speech/LICENCE.txt" in text
