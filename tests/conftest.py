"""Fixtures every test may use: the device, the CPU target, a fixed seed."""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator

# Before torch loads OpenMP: idle threads sleep instead of spinning, or a busy machine makes tests
# of tiny models many times slower. Test processes that are started inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path

import pytest
import torch

# Of a process with WGPT_EMULATED_GPU=1: its ops can launch their CUDA kernels on the emulator.
EMULATED_GPU = None
if os.environ.get("WGPT_EMULATED_GPU") == "1":
    sys.path.insert(0, str(Path(__file__).parent / "simt"))
    import emulated_gpu as emulation

    EMULATED_GPU = emulation.load()


def _missing_cuda() -> str | None:
    """Why CUDA tests cannot run here, or None when they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU (WGPT_REQUIRE_CUDA=1 makes this a failure)"
    from wgpt import ops

    if not ops.info()["cuda_archs"]:
        return "this build of wgpt has no CUDA kernels (WGPT_REQUIRE_CUDA=1 makes this a failure)"
    return None


def require_cuda() -> None:
    """Skip the test without a usable GPU, or fail it where one is required."""
    reason = _missing_cuda()
    if reason is None:
        return
    if os.environ.get("WGPT_REQUIRE_CUDA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test that leaves another number of threads makes later ones round otherwise: it fails."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu":
        yield "cpu"
    elif EMULATED_GPU is not None:
        with EMULATED_GPU.on():
            yield "cpu"
    else:
        require_cuda()
        yield "cuda"


@pytest.fixture
def emulated_gpu():
    """The EmulatedGpu of tests/simt/emulated_gpu.py, not yet on."""
    if EMULATED_GPU is None:
        pytest.skip("runs in a process with WGPT_EMULATED_GPU=1 (tests/simt/test_simt_gpu.py)")
    return EMULATED_GPU


@pytest.fixture
def cuda() -> str:
    require_cuda()
    return "cuda"


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def restore_cpu_target() -> Iterator[None]:
    from wgpt import ops

    target = ops.info()["cpu_target"]
    yield
    ops.set_cpu_target(target)


class SimulatedGpu:
    """The CPU as a GPU that our kernels do not serve, in `wgpt.ops.cuda`."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    @property
    def n_warnings(self) -> int:
        return sum(record.name == "wgpt.ops.cuda" for record in self._caplog.records)

    def forget(self) -> None:
        """What was judged and said before."""
        from wgpt.ops import cuda

        cuda.missing_kernels.cache_clear()
        cuda._warn_once.cache_clear()


@pytest.fixture
def gpu_without_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[SimulatedGpu]:
    """A Tesla T4, on CPU tensors."""
    from wgpt.ops import cuda

    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda, "gpu", lambda index: cuda.Gpu("Tesla T4", (7, 5), (13, 0)))
    monkeypatch.setattr(cuda, "build", lambda: cuda.Build(("80",), ("80",), "13.0"))
    simulated = SimulatedGpu(caplog)
    simulated.forget()
    yield simulated
    simulated.forget()


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """A folder of real audio files: eight clips of rendered music, WAV and FLAC, 24 s in all."""
    from wgpt import audio
    from wgpt.codec.training import synth

    folder = tmp_path_factory.mktemp("recordings")
    for seed in range(8):
        suffix = "flac" if seed % 2 else "wav"
        audio.write(folder / f"{seed}.{suffix}", synth.render_music(3.0, seed=seed))
    return folder


@pytest.fixture(scope="session")
def prepared(recordings, tmp_path_factory):
    """The recordings prepared with the codec of `starter`, with the mel of codebook 0 as well."""
    from wgpt.data.pipeline import prepare

    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(recordings, out, mel_sources=("wave", "decoded-1"),
            valid_fraction=0.3, progress=False)  # fmt: skip
    return out


@pytest.fixture(scope="session")
def tiny_run(prepared, tmp_path_factory):
    """A run of a few steps of hybrid-xs."""
    from wgpt.train import train

    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(prepared, out, "hybrid-xs", max_steps=3, batch_size=2, context_s=0.5, sample_s=0.2,
          eval_audio_s=3.0, warmup_steps=1, device="cpu")  # fmt: skip
    return out


@pytest.fixture
def hosts():
    """Two network namespaces joined by a cable, as two hosts: names and addresses."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    name = f"wgpt{uuid.uuid4().hex[:6]}"
    names, addresses = [f"{name}{i}" for i in "ab"], ["10.77.0.1", "10.77.0.2"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for host in names:
            ip("netns", "add", host)
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for host, address in zip(names, addresses, strict=True):
            ip("link", "set", host, "netns", host)
            ip("-n", host, "addr", "add", f"{address}/24", "dev", host)
            ip("-n", host, "link", "set", host, "up")
            ip("-n", host, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for host in names:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield list(zip(names, addresses, strict=True))
    for host in names:
        for pid in subprocess.run(["ip", "netns", "pids", host], capture_output=True,
                                  text=True).stdout.split():  # fmt: skip
            os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", host], capture_output=True)
