"""The lock files name all that the extras ask for, by hash, for the Pythons that we support."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "requirements").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
from packaging.markers import Marker  # noqa: E402
from packaging.utils import canonicalize_name  # noqa: E402

EXTRAS = {
    "locked": ("test",),
    "ci": ("test", "serve", "browser-test", "tools-test", "dev"),
    "sources": ("sources-test",),
}
NOT_LOCKED = {"torch"}  # by itself, in torch.txt


def locked(name):
    """(package, version, marker, hashes) of each pin of requirements/NAME.txt."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "requirements" / f"{name}.txt").read_text())
    for block in re.split(r"\n(?=\S)", text.replace("\\\n", " ")):
        package, version, rest = re.match(r"\s*([\w.-]+)==(\S+)(.*)", block, re.S).groups()
        marker = re.search(r";(.*?)(--hash|$)", rest, re.S)
        yield (
            package,
            version,
            marker and marker[1].strip(),
            re.findall(r"--hash=sha256:[0-9a-f]{64}", rest),
        )


def asked_for(extras):
    """Names of packages that pyproject.toml asks for."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = [re.search(r"(?ms)^dependencies = \[(.*?)^\]", text)[1]]
    lists += [re.search(rf"(?ms)^{extra} = \[(.*?)\](?=\s*(#|$))", text)[1] for extra in extras]
    lines = "\n".join(re.sub(r"(?m)#.*$", "", part) for part in lists)
    return {canonicalize_name(name) for name in re.findall(r'"([\w.-]+)', lines)}


@pytest.mark.parametrize("name", ["torch", "locked", "ci", "sources", "encodec", "metrics"])
def test_every_pin_has_hashes(name):
    found = list(locked(name))
    assert found and all(hashes for *_, hashes in found)


@pytest.mark.parametrize("name", EXTRAS)
def test_lock_has_all_that_the_extras_ask_for(name):
    """Add what is new with `make lock`."""
    missing = asked_for(EXTRAS[name]) - {package for package, *_ in locked(name)} - NOT_LOCKED
    assert not missing, "make lock"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_files_agree_on_versions_for_a_python(python):
    """Installed one after the other, none replaces a package of another."""
    where = {"python_version": python, "python_full_version": f"{python}.0",
             "sys_platform": "linux", "platform_machine": "x86_64"}  # fmt: skip
    versions: dict[str, set[str]] = {}
    for name in ("torch", "locked", "ci", "sources"):
        for package, version, marker, _ in locked(name):
            if not marker or Marker(marker).evaluate(where):
                versions.setdefault(package, set()).add(version)
    assert {p: v for p, v in versions.items() if len(v) > 1} == {}
    assert "numpy" in versions and "torch" in versions
