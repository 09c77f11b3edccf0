"""`wgpt doctor`: what is installed, and what will run.

Each finding is "ok", a "note" (something optional is missing, or present and ignored) or a
"problem" (wgpt will not work as it is). The ops are not only imported: each runs once against its
reference.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from wgpt import __version__
from wgpt.files import parse_json

REQUIRED: tuple[str, ...] = (
    "torch",
    "numpy",
    "soundfile",
    "soxr",
    "safetensors",
    "tqdm",
)
OPTIONAL = {
    "matplotlib": "the pictures of wgpt train, study and demo (pip install 'wgpt[plots]')",
    "starlette": "the page of wgpt serve (pip install 'wgpt[serve]')",
    "uvicorn": "the page of wgpt serve (pip install 'wgpt[serve]')",
    "transformers": "another implementation of the codec (pip install 'wgpt[transformers]')",
    "encodec": "another implementation of the codec (pip install 'wgpt[encodec]')",
    "pystoi": "STOI in the report of wgpt prepare (pip install 'wgpt[metrics]')",
    "pesq": "PESQ in the report of wgpt prepare (pip install 'wgpt[metrics]')",
    "pocketsphinx": "the recogniser of wgpt eval --metrics (pip install 'wgpt[metrics]')",
    "resemblyzer": "the speakers of wgpt eval --metrics (pip install --no-deps resemblyzer)",
}
# A check of agreement, not of accuracy (that is the tests'): float32 on inputs of order one.
SELF_TEST_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    status: str  # "ok", "note" or "problem"
    detail: str


def _ok(subject: str, detail: str) -> Finding:
    return Finding(subject, "ok", detail)


def _note(subject: str, detail: str) -> Finding:
    return Finding(subject, "note", detail)


def _problem(subject: str, detail: str) -> Finding:
    return Finding(subject, "problem", detail)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages() -> Iterator[Finding]:
    """wgpt, Python, and the packages it needs or can use."""
    yield _ok("wgpt", f"{__version__} on Python {platform.python_version()}, {platform.platform()}")
    for package in REQUIRED:
        version = _version(package)
        if version is None:
            yield _problem(package, f"not installed (pip install {package})")
            continue
        try:
            importlib.import_module(package)
        except Exception as error:  # a broken shared library raises OSError, among others
            yield _problem(package, f"{version} does not import: {_first_line(error)}")
        else:
            yield _ok(package, version)
    for package, use in OPTIONAL.items():
        version = _version(package)
        yield _ok(package, version) if version else _note(package, f"not installed; only for {use}")


def check_torchaudio() -> Iterator[Finding]:
    """Its wheels often cannot load beside the installed torch. Nothing of ours uses it."""
    version = _version("torchaudio")
    if version is None:
        return
    try:
        importlib.import_module("torchaudio")
    except Exception as error:
        detail = f"{version} does not import ({_first_line(error)}); ignored, wgpt does not use it"
        yield _note("torchaudio", detail)
    else:
        yield _note("torchaudio", f"{version}; ignored, wgpt does not use it")


def _self_test(device: str) -> list[str]:
    """Runs every op and its reference on `device`; returns what disagrees."""
    import torch

    from wgpt import ops

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    tokens = torch.arange(10).view(2, 5).to(device)
    calls: dict[str, tuple[tuple[torch.Tensor, ...], dict[str, Any]]] = {
        "flash_attention": ((random(1, 9, 2, 32), random(1, 9, 2, 32), random(1, 9, 2, 32)), {}),
        "mel_embed": (
            (random(2, 10, 8), random(8), random(8), random(6, 24), random(6)),
            {"frames_per_step": 2, "context_frames": 1},
        ),
        "token_concat": ((tokens, random(10, 4), random(2, 5, 3)), {}),
    }
    failures = []
    for name, (arguments, options) in calls.items():
        ours = getattr(ops, name)(*arguments, **options)
        reference = getattr(ops.reference, name)(*arguments, **options)
        error = (ours - reference).abs().max().item()
        if not error <= SELF_TEST_TOLERANCE * max(1.0, reference.abs().max().item()):
            failures.append(f"{name} is off by {error:.2g}")
    return failures


def check_ops() -> Iterator[Finding]:
    """The compiled module: its build, which CPU target runs, and whether its answers are right."""
    try:
        from wgpt import ops

        info = ops.info()
    except Exception as error:
        yield _problem("ops", _first_line(error))
        return
    built = f"built against torch {info['torch_built']} with {info['compiler']}"
    yield _ok("ops", f"{built}, runs with torch >= {info['torch_oldest']}")
    others = [target for target in info["cpu_targets"] if target != info["cpu_target"]]
    failures = _self_test("cpu")
    target = f"{info['cpu_target']} (also here: {', '.join(others) or 'none'})"
    if failures:
        yield _problem("cpu", f"{target}: {'; '.join(failures)}")
    else:
        yield _ok(
            "cpu", f"{target}, {info['cpu_threads']} threads; every op agrees with its reference"
        )
    yield from _check_cuda(info)


def _check_cuda(info: Mapping[str, Any]) -> Iterator[Finding]:
    import torch

    kernels = "no kernels compiled"
    if info["cuda_archs"]:
        kernels = f"kernels for sm {', '.join(info['cuda_archs'])}"
        kernels += f", PTX of {', '.join(info['cuda_ptx'])}"
    if not info["cuda_available"]:
        yield _note("cuda", f"no GPU that torch {torch.__version__} can use; {kernels}")
        return
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        subject = f"cuda:{index}"
        missing = info["cuda_in_plain_torch"].get(subject)
        try:
            failures = _self_test(subject)
        except Exception as error:
            failures = [_first_line(error)]
        if failures:
            yield _problem(subject, f"{missing or name}: {'; '.join(failures)} ({kernels})")
        elif missing is not None:
            yield _note(subject, f"{missing}; until then plain torch runs, and agrees")
        else:
            yield _ok(subject, f"{name}; every op agrees with its reference ({kernels})")


def _trained_on(name: str) -> str:
    """What a packaged codec or model learnt from, and under which licences, if it says so."""
    path = resources.files("wgpt") / "assets" / name / "sources.json"
    if not path.is_file():
        return ""
    sources = parse_json(path.read_text(encoding="utf-8"))["recordings"]
    n_files = sum(source["files"] for source in sources)
    listed = "; ".join(f"{source['package']}: {source['licence']}" for source in sources)
    return f", trained on {n_files} recordings ({listed})"


def check_assets() -> Iterator[Finding]:
    """What the package carries, where it comes from, and the released codec if it is here."""
    try:
        from wgpt import codec
        from wgpt.codec.weights import ASSETS
        from wgpt.runs.pretrained import model_folder
    except Exception as error:
        yield _problem("codec", _first_line(error))
        return
    for name in codec.PACKAGED:
        try:
            loaded = codec.load(name)
        except Exception as error:
            left_out = name == "mini-v1" and not (ASSETS / name).exists()
            yield (_note if left_out else _problem)(f"codec {name}", _first_line(error))
        else:
            yield _ok(
                f"codec {name}",
                f"{loaded.n_codebooks} codebooks of {loaded.codebook_size}, "
                f"{loaded.sample_rate_hz} Hz{_trained_on(name)}",
            )
    try:
        codec.load("encodec_24khz")
    except Exception as error:
        yield _note("codec encodec_24khz", str(error))
    else:
        yield _ok("codec encodec_24khz", "found")
    try:
        model_folder("starter")
    except Exception as error:
        yield _problem("model starter", _first_line(error))
    else:
        yield _ok("model starter", f"in the package, whole{_trained_on('starter')}")
    yield _speech()


def _speech() -> Finding:
    """The recordings in the package, each with its source."""
    folder = resources.files("wgpt") / "assets" / "speech"
    try:
        sources = parse_json((folder / "sources.json").read_text(encoding="utf-8"))
        names = [recording["file"] for recording in sources["recordings"]]
        missing = [name for name in names if not (folder / name).is_file()]
        detail = f"{len(names)} recordings of {sources['package']} ({sources['licence']})"
    except (OSError, ValueError, KeyError) as error:
        return _problem("speech", _first_line(error))
    if missing:
        return _problem("speech", f"must hold {missing[0]}, which is gone; install wgpt again")
    return _ok("speech", detail)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_packages,
    check_torchaudio,
    check_ops,
    check_assets,
)


def examine() -> list[Finding]:
    """All findings, in the order of `CHECKS`."""
    return [finding for check in CHECKS for finding in check()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the findings; 0 without problems, else 1."""
    findings = examine()
    healthy = all(finding.status != "problem" for finding in findings)
    if args.json:
        report = {"healthy": healthy, "findings": [asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        for finding in findings:
            sys.stdout.write(f"{finding.status:8} {finding.subject:20} {finding.detail}\n")
    return 0 if healthy else 1


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["doctor", *sys.argv[1:]]))
