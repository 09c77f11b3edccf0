import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import emulator


@pytest.fixture(scope="session", params=["fast", "race"])
def built(request):
    """The kernels on the emulator, one library per variant."""
    if shutil.which(emulator.CXX) is None:
        pytest.skip(f"no C++ compiler ({emulator.CXX})")
    return emulator.Emulator(
        emulator.build(emulator.HERE / "host.cpp", request.param, emulator.CACHE, launchers=True)
    )


@pytest.fixture(params=emulator.POLICIES, ids=lambda p: "-".join(map(str, p[:2])))
def emu(built, request):
    """A clean emulator under each policy of warp order and copy arrival."""
    built.reset(request.param)
    return built


@pytest.fixture(scope="session", params=["fast", "race"])
def built_machine(request):
    """Small kernels and the wrappers' probes, one library per variant."""
    host = emulator.HERE / "machine_kernels.cpp"
    machine = emulator.Emulator(emulator.build(host, request.param, emulator.CACHE))
    machine.variant = request.param
    return machine


@pytest.fixture(params=emulator.POLICIES, ids=lambda p: "-".join(map(str, p[:2])))
def machine(built_machine, request):
    built_machine.reset(request.param)
    return built_machine
