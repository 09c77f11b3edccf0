"""A GPU that is not there: wgpt's ops launch their CUDA kernels on the SIMT emulator.

The extension is built a second time, from the same csrc/ops, with the emulator in the place of
csrc/ops/device.cpp. While an EmulatedGpu is on, CPU tensors are to the ops what CUDA tensors are
elsewhere: the same checks, workspaces, launchers and kernels. All CPU tensors of the process lie in
the emulator's arena, poisoned and between red zones, and kernels may touch nothing else.

One process has one extension, so this must be loaded before wgpt.ops is imported. Under pytest the
variable WGPT_EMULATED_GPU=1 does that (tests/conftest.py), and the fixture `emulated_gpu` gives it.
"""

import importlib.util
import os
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from emulator import (
    CACHE,
    CSRC,
    HERE,
    POLICIES,
    Emulator,
    compile_object,
    emulator_objects,
    launcher_objects,
    link,
)

TORCH = Path(torch.__file__).parent


def build():
    """The extension over the emulator, compiled once per content; its path.

    WGPT_EMULATED_MUTANT names a file mutated_OP.cpp that takes the place of csrc/ops/OP.cpp.
    """
    headers = [f"-I{CSRC}", f"-I{HERE}", f"-isystem{TORCH / 'include'}"]
    headers += [f"-isystem{sysconfig.get_path('include')}"]
    defines = ["-DWGPT_WITH_CUDA", '-DWGPT_COMPILER=""', '-DWGPT_CUDA_ARCHS="emulated"']
    defines += ['-DWGPT_CUDA_PTX=""', '-DWGPT_CUDA_TOOLKIT=""']
    another_torch = f'-DBUILT_AGAINST_TORCH="{torch.__version__}"'  # another torch, another object
    flags = ["-O1", *headers, another_torch]
    stable = [*flags, *defines, "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # as CMakeLists.txt
    dispatch = CSRC / "kernels" / "cpu" / "dispatch"
    sources = [path for path in sorted((CSRC / "ops").glob("*.cpp")) if path.stem != "device"]
    mutant, name = os.environ.get("WGPT_EMULATED_MUTANT"), "emulated_gpu"
    if mutant:
        op, name = Path(mutant).stem.removeprefix("mutated_"), "mutated_gpu"
        sources = [Path(mutant) if path.stem == op else path for path in sources]
    sources += [HERE / "emulated_device.cpp", CSRC / "module.cpp"]
    sources += [dispatch / "dispatch.cpp", dispatch / "target_generic.cpp"]
    objects = [compile_object(source, stable, CACHE) for source in sources]
    objects += [compile_object(HERE / "emulated_memory.cpp", flags, CACHE)]
    objects += [*launcher_objects("fast", CACHE), *emulator_objects("fast", CACHE)]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    return link(objects, name, CACHE, libraries)


class EmulatedGpu:
    """The process's extension, and the switch of its device."""

    def __init__(self, library):
        self.emulator = Emulator(library)
        self._switch = self.emulator.lib.emulated_device_switch

    @contextmanager
    def on(self, policy=POLICIES[0]):
        """Inside, ops launch CUDA kernels. Gives a list of the Launches, whole at the end."""
        from wgpt.ops import cuda

        missing_kernels = cuda.missing_kernels
        self.emulator.set_policy(policy)
        self._switch(1)
        cuda.DEVICE_TYPE, cuda.missing_kernels = "cpu", lambda index: None
        try:
            with self.emulator.recorded() as launches:
                yield launches
        finally:
            self._switch(0)
            cuda.DEVICE_TYPE, cuda.missing_kernels = "cuda", missing_kernels


def in_the_arena(function):
    """`function` of torch, whose tensor is the memory of somebody else, with a copy of it."""

    def copied(*args, **kwargs):
        return function(*args, **kwargs).clone()

    return copied


def load():
    """Builds the extension and makes it the process's wgpt._C."""
    assert "wgpt._C" not in sys.modules, "another extension is loaded already"
    os.environ["WGPT_CPU_TARGET"] = "generic"
    library = build()
    spec = importlib.util.spec_from_file_location("wgpt._C", library)
    import wgpt

    module = importlib.util.module_from_spec(spec)
    gpu = EmulatedGpu(library)
    gpu.emulator.lib.emulated_memory_install()
    torch.from_numpy = in_the_arena(torch.from_numpy)
    torch.frombuffer = in_the_arena(torch.frombuffer)
    spec.loader.exec_module(module)
    sys.modules["wgpt._C"] = wgpt._C = module
    return gpu
