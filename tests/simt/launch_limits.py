"""What a GPU checks of a launch: threads, registers and shared memory, as nvcc left the kernel."""

import ctypes
import re
import subprocess

from emulator import (
    CACHE,
    CSRC,
    HERE,
    ROOT,
    WARNINGS,
    Emulator,
    compile_object,
    emulator_objects,
    kernel_flags,
    launcher_objects,
    link,
)

REGISTERS, SHARED_WITHOUT_OPT_IN, SHARED = 65536, 48 * 1024, 99 * 1024  # SHARED: of sm_86


def demangled(name):
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_char_p
    return demangle(name.encode(), None, None, None).decode()


def most_threads(cubin, cuobjdump, env):
    """{mangled kernel: threads of a block that __launch_bounds__ allows}"""
    command = [cuobjdump, "-elf", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    found = {}
    for part in re.split(r"^\.nv\.info\.", text, flags=re.MULTILINE)[1:]:
        bound = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:((?:\s+0x[0-9a-f]+)+)", part)
        if bound is not None:
            x, y, z = (int(value, 16) for value in bound[1].split())
            found[part.split(None, 1)[0]] = x * y * z
    return found


def misfit(launch, facts):
    """Why a GPU would refuse the launch, or None. facts: threads, registers, shared."""
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    if threads > facts["threads"]:
        return f"{threads} threads, and __launch_bounds__ says {facts['threads']}"
    registers = -(-facts["registers"] // 8) * 8 * (-(-threads // 32) * 32)
    if registers > REGISTERS:
        return f"{registers} registers, and a block may have {REGISTERS}"
    shared = facts["shared"] + launch.shared_bytes
    limit = SHARED if launch.shared_bytes > SHARED_WITHOUT_OPT_IN else SHARED_WITHOUT_OPT_IN
    if shared > limit:
        return f"{shared} bytes of shared memory, and a block may have {limit}"
    return None


def launches_of_the_driver():
    """Every Launch of `gpu_driver --small` on the emulator."""
    driver_flags = [*WARNINGS, "-O2", f"-I{CSRC}", f"-I{ROOT / 'benchmarks'}"]
    objects = [compile_object(ROOT / "benchmarks" / "gpu_driver.cpp", driver_flags, CACHE)]
    objects += [compile_object(HERE / "host.cpp", kernel_flags("fast"), CACHE)]
    objects += [*launcher_objects("fast", CACHE), *emulator_objects("fast", CACHE)]
    emulator = Emulator(link(objects, "gpu_driver_library", CACHE))
    emulator.reset()
    arguments = (ctypes.c_char_p * 2)(b"gpu_driver", b"--small")
    with emulator.recorded() as launches:
        assert emulator.lib.main(2, arguments) == 0
    return launches
