"""The tree of docs/architecture.md, held against the code: who may import whom, what verbs are."""

import ast
from pathlib import Path

import pytest

import wgpt
from wgpt.cli import COMMANDS

ROOT = Path(__file__).parents[1] / "wgpt"
FOUNDATIONS = ("errors", "files", "hub", "commits", "config")
# Down the data flow: a folder imports those before it, and itself.
FLOW = (
    "ops",
    "audio",
    "codec",
    "data",
    "model",
    "runs",
    "generation",
    "evaluation",
    "training",
    "experiments",
    "serving",
)
SOURCES = sorted(path for path in ROOT.rglob("*.py"))


def rooms_imported(path: Path) -> set[str]:
    """Names directly below wgpt that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "wgpt":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wgpt."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("wgpt.")}
    return found - {"__version__", "_C"}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down_the_data_flow(path):
    room, imported = room_of(path), rooms_imported(path)
    if room in FOUNDATIONS:
        allowed = set(FOUNDATIONS[: FOUNDATIONS.index(room)])
    elif room in FLOW:
        allowed = {*FOUNDATIONS, *FLOW[: FLOW.index(room) + 1]}
    else:  # a verb, or the package itself
        allowed = {*FOUNDATIONS, *FLOW, "cli"}
    assert imported <= allowed, f"{path}: {room} may not import {sorted(imported - allowed)}"


def test_the_top_holds_verbs_nouns_and_foundations():
    files = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__", "cli"}
    verbs = {module.removeprefix("wgpt.") for module, _ in COMMANDS.values()}
    assert files == verbs | set(FOUNDATIONS)
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(FLOW)


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.parent != ROOT],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_libraries_neither_parse_arguments_nor_print(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
            assert "argparse" not in names, f"{path}:{node.lineno}: libraries parse no arguments"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "sys.exit", "sys.stdout.write"), (
                f"{path}:{node.lineno}: libraries return and raise; {called} is for verbs"
            )


def test_every_error_is_a_wgpt_error():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Error", "Interrupted")):
                assert path.name == "errors.py", f"{path}: {node.name} belongs into errors.py"
    assert issubclass(wgpt.WgptError, Exception)
