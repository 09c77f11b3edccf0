"""The build: what the binary may depend on, the PEP 517 backend, a light import, clear failures."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from types import ModuleType

import pytest
from cuda_tools import find_tool

import wgpt
from wgpt import ops

ROOT = Path(__file__).parents[1]
PACKAGE = Path(wgpt.__file__).parent
OPS = ["flash_attention", "mel_embed", "token_concat"]


def module() -> Path:
    """What is tied to this Python."""
    spec = importlib.util.find_spec("wgpt._C")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def library() -> Path:
    """The ops."""
    return module().parent / "libwgpt_ops.so"


def read(tool: str, *arguments: object) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}")
    command = [tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def run_python(code: str, python: str = sys.executable, **env: str) -> subprocess.CompletedProcess:
    """Runs `code` away from the source tree, whose wgpt/ would shadow an installed one."""
    return subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        cwd=tempfile.gettempdir(),
    )


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("scikit_build_core")
    monkeypatch.delenv("WGPT_TORCH_DIR", raising=False)
    monkeypatch.chdir(ROOT)  # where PEP 517 frontends call the hooks
    spec = importlib.util.spec_from_file_location(
        "wgpt_build", ROOT / "build_backend" / "wgpt_build.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_torch(site: Path, version: tuple[int, int]) -> Path:
    header = site / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text(
        f"#define TORCH_VERSION_MAJOR {version[0]}\n#define TORCH_VERSION_MINOR {version[1]}\n"
    )
    return site / "torch"


@pytest.mark.parametrize(("version", "usable"), [((2, 9), False), ((2, 10), True), ((3, 0), True)])
def test_backend_uses_a_torch_that_is_new_enough(
    backend: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: tuple[int, int],
    usable: bool,
) -> None:
    torch_dir = fake_torch(tmp_path, version)
    monkeypatch.setattr(backend, "_site_packages", lambda: [tmp_path])
    assert backend.find_torch_dir() == (torch_dir if usable else None)
    assert ("torch==2.13.0" in backend.get_requires_for_build_wheel()) == (not usable)


def test_backend_asks_for_torch_where_there_is_none(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(backend, "_site_packages", lambda: [tmp_path])
    assert "torch==2.13.0" in backend.get_requires_for_build_wheel()
    assert "torch==2.13.0" in backend.get_requires_for_build_editable()
    named = fake_torch(tmp_path / "elsewhere", (2, 13))
    monkeypatch.setenv("WGPT_TORCH_DIR", str(named))
    assert "torch==2.13.0" not in backend.get_requires_for_build_wheel()


def test_source_distribution_fits_in_12_mb_and_leaves_out_only_the_old_codec(
    backend: ModuleType, tmp_path: Path
) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone")
    path = tmp_path / backend.build_sdist(str(tmp_path))
    assert path.stat().st_size <= 12e6
    with tarfile.open(path) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    tracked = read("git", "-C", ROOT, "ls-files", "-z", "wgpt").split("\0")[:-1]
    assert (
        {n for n in tracked if n not in held}
        == {n for n in tracked if n.startswith("wgpt/assets/mini-v1/")}
        != set()
    )


def test_wheel_fits_in_25_mb_with_the_kernels_of_every_gpu() -> None:
    kernels = 10.4e6  # libwgpt_ops.so with all CUDA architectures, deflated (docs/log.md)
    modules = 5 * 0.08e6
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".so", ".pyc")]
    assert kernels + modules + sum(len(zlib.compress(p.read_bytes())) for p in files) <= 25e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF")
@pytest.mark.parametrize(
    "path, expected, search",
    [(library, "libtorch_cpu.so", set()), (module, "libwgpt_ops.so", {"$ORIGIN"})],
)
def test_binary_links_one_library_of_ours_or_torchs(path, expected: str, search: set) -> None:
    """The ops torch's, which is loaded already; the module the ops, which lie beside it."""
    dynamic = read("readelf", "-d", path())
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic))
    system = r"lib(stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so|ld-linux"
    assert {name for name in needed if not re.match(system, name)} == {expected}
    assert set(re.findall(r"\(R(?:UN)?PATH\).*\[(.*?)\]", dynamic)) == search


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF")
def test_binary_uses_the_stable_abi_only() -> None:
    undefined = read("nm", "-D", "--undefined-only", library()).split()
    symbols = [word for word in undefined if len(word) > 1]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not any(re.match(r"_?Py[A-Z_]", symbol) for symbol in symbols), "knows a Python"
    # Mangled names of namespaces at, c10, caffe2 and torch are what changes from release to
    # release.
    unstable = [s for s in symbols if re.match(r"_ZN?K?(2at|3c10|6caffe2|5torch)", s)]
    assert not unstable


def test_importing_wgpt_is_light() -> None:
    result = run_python("import sys, wgpt; print(wgpt.__version__, 'torch' in sys.modules)")
    assert result.stdout.split() == [wgpt.__version__, "False"], result.stderr


def test_missing_binary_says_how_to_build_it(tmp_path: Path) -> None:
    shutil.copytree(
        PACKAGE, tmp_path / "wgpt", ignore=shutil.ignore_patterns("_C*", "lib*", "assets")
    )
    result = run_python("import wgpt.ops", PYTHONPATH=str(tmp_path))
    assert "ImportError: wgpt._C is not built for this Python." in result.stderr
    assert "make dev" in result.stderr


def test_unknown_cpu_target_in_the_environment_names_the_variable() -> None:
    code = "import torch, wgpt; print(wgpt.ops.info()['cpu_target'])"
    result = run_python(code, WGPT_CPU_TARGET="sse9")
    assert "WGPT_CPU_TARGET must be one of" in result.stderr and "got 'sse9'" in result.stderr
    assert run_python(code, WGPT_CPU_TARGET="generic").stdout.strip() == "generic"


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_file_of_its_name_in_every_layer(op: str) -> None:
    layers = [
        f"csrc/kernels/{op}.h",
        f"csrc/kernels/cuda/{op}.cuh",
        f"csrc/ops/{op}.cpp",
        f"wgpt/ops/{op}.py",
        f"tests/ops/test_{op}.py",
    ]
    assert [layer for layer in layers if not (ROOT / layer).exists()] == []


def configure(build: Path, *options: str, **env: str) -> subprocess.CompletedProcess:
    import pybind11

    return subprocess.run(
        [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *options,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("cmake") is None or importlib.util.find_spec("pybind11") is None,
    reason="needs cmake and pybind11",
)
def test_configure_errors_name_the_switch_to_change(tmp_path: Path) -> None:
    result = configure(tmp_path / "a", "-DWGPT_CUDA=MAYBE")
    assert "WGPT_CUDA must be AUTO, ON or OFF, got 'MAYBE'" in result.stderr
    result = configure(tmp_path / "b", WGPT_CUDA="ON", CUDACXX="/no/such/nvcc")
    assert "WGPT_CUDA=ON, but no CUDA compiler was found" in " ".join(result.stderr.split())
    result = configure(tmp_path / "c", "-DWGPT_CUDA=OFF", f"-DWGPT_TORCH_DIR={tmp_path}")
    assert "set WGPT_TORCH_DIR to a torch package folder" in " ".join(result.stderr.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "archs, said",
    [
        ("", "machine code for 80;86;90a;100;120, PTX of 90;120)"),
        ("80;90a", "machine code for 80;90a, PTX of 90)"),
        ("100;80", "machine code for 100;80, PTX of 100)"),
    ],
)
def test_ptx_is_that_of_portable_architectures(tmp_path: Path, archs: str, said: str) -> None:
    """90a's can be compiled for no other GPU: a build that held it alone left RTX 50xx without."""
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("needs nvcc and cmake")
    result = configure(tmp_path, "-DWGPT_CUDA=ON", f"-DWGPT_CUDA_ARCHS={archs}")
    assert said in result.stdout, result.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF")
def test_build_info_asks_the_library_which_kernels_it_holds() -> None:
    """What a module was compiled with says nothing of the library that lies beside it."""
    assert "cuda_build" in read("nm", "-D", "--undefined-only", module())


def test_build_info_names_the_machine_code_and_ptx_inside() -> None:
    info = ops.info()
    cuobjdump = find_tool("cuobjdump")
    if not info["cuda_archs"] or cuobjdump is None:
        pytest.skip("needs a build with CUDA kernels, and cuobjdump")
    for kind, key in (("elf", "cuda_archs"), ("ptx", "cuda_ptx")):
        listed = subprocess.run(
            [cuobjdump, f"-l{kind}", library()], capture_output=True, text=True, check=True
        )
        assert set(re.findall(r"\bsm_(\w+)\.", listed.stdout)) == set(info[key])


@pytest.mark.slow
@pytest.mark.skipif(
    "WGPT_OTHER_PYTHON" not in os.environ,
    reason="WGPT_OTHER_PYTHON names no Python (same minor version) with another torch",
)
def test_binary_runs_under_another_torch(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "wgpt", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import torch; from wgpt import ops, doctor; info = ops.info();"
        "assert doctor._self_test('cpu') == [], doctor._self_test('cpu');"
        "print(info['torch_built'], info['torch_running'])"
    )
    result = run_python(code, os.environ["WGPT_OTHER_PYTHON"], PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    built, running = result.stdout.split()
    assert running.split("+")[0] != built
