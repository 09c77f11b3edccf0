"""Which GPUs run our CUDA kernels, and what to install where one does not.

On a GPU without kernels the ops run the same formulas in plain torch (`wgpt.ops.plain`): a build
without nvcc, a GPU older than sm_80, a driver older than the kernels. One warning says why.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from dataclasses import dataclass

import torch

from wgpt import _C
from wgpt.errors import ConfigError
from wgpt.ops.switch import is_plain

log = logging.getLogger(__name__)

# The type of device that is judged here. Tests let the CPU stand for a GPU.
DEVICE_TYPE = "cuda"
# The oldest driver of each major CUDA version (CUDA Toolkit Release Notes, table of minimum
# drivers for minor version compatibility).
_OLDEST_DRIVER = {12: "525", 13: "580"}
_RUNS_INSTEAD = "until then the same formulas run in plain torch, more slowly"


@dataclass(frozen=True)
class Gpu:
    """What decides which kernels a GPU can run."""

    name: str
    capability: tuple[int, int]
    driver_cuda: tuple[int, int] | None  # the newest CUDA its driver knows; None: not known


@dataclass(frozen=True)
class Build:
    """What the binary holds: architectures as nvcc writes them, such as 80 and 90a."""

    machine_code: tuple[str, ...]
    ptx: tuple[str, ...]
    toolkit: str  # such as 13.0.88; empty without CUDA kernels


def build() -> Build:
    """The compiled module's."""
    info = _C.build_info()
    return Build(
        tuple(info["cuda_archs"].split()), tuple(info["cuda_ptx"].split()), info["cuda_toolkit"]
    )


def _driver_cuda() -> tuple[int, int] | None:
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if status else (version.value // 1000, version.value % 1000 // 10)


def gpu(index: int) -> Gpu:
    """The GPU of that index."""
    return Gpu(
        torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), _driver_cuda()
    )


def _runs_machine_code(capability: tuple[int, int], arch: str) -> bool:
    """Code of X.y runs on X.z with z >= y; that of an architecture with a letter a on X.y alone."""
    number = int(arch.rstrip("abcdefghijklmnopqrstuvwxyz"))
    major, minor = divmod(number, 10)
    newer = capability[1] > minor and not arch.endswith("a")
    return capability[0] == major and (capability[1] == minor or newer)


def why_no_kernels(device: Gpu, held: Build) -> str | None:
    """Why our kernels do not run on that GPU, and what to install; None where they do."""
    if torch.version.hip is not None:
        return f"{device.name}: this torch is built for ROCm, and wgpt's kernels are CUDA"
    if not held.machine_code:
        return (
            f"{device.name}: this wgpt was built without CUDA kernels. Put nvcc on PATH, then "
            "WGPT_CUDA=ON pip install ."
        )
    major, minor = device.capability
    architecture = f"{device.name} (sm_{major}{minor})"
    if device.capability < (8, 0):
        return f"{architecture}: wgpt has kernels for sm_80 and later"
    has_code = any(_runs_machine_code(device.capability, arch) for arch in held.machine_code)
    if not has_code and not any(int(arch) <= 10 * major + minor for arch in held.ptx):
        suffix = "a" if device.capability == (9, 0) else ""
        return (
            f"{architecture}: this wgpt was built for sm {', '.join(held.machine_code)}. "
            f"WGPT_CUDA_ARCHS={major}{minor}{suffix} WGPT_CUDA=ON pip install ."
        )
    toolkit_major, toolkit_minor = (int(part) for part in held.toolkit.split(".")[:2])
    # The runtime needs a driver of its major version; compiling PTX one that is no older at all.
    needed = (toolkit_major, 0 if has_code else toolkit_minor)
    if device.driver_cuda is not None and device.driver_cuda < needed:
        oldest = _OLDEST_DRIVER.get(toolkit_major)
        return (
            f"{architecture}: its driver knows CUDA {'.'.join(map(str, device.driver_cuda))}, and "
            f"this wgpt was built with CUDA {toolkit_major}.{toolkit_minor}. Install a driver for "
            f"that{f' ({oldest} or later)' if oldest and has_code else ''}, or an older nvcc and "
            "WGPT_CUDA=ON pip install ."
        )
    return None


@functools.cache
def missing_kernels(index: int) -> str | None:
    """`why_no_kernels` of the GPU of that index and of this build."""
    return why_no_kernels(gpu(index), build())


def is_required() -> bool:
    """Whether WGPT_REQUIRE_CUDA=1 asks for our kernels on a GPU, or an error."""
    return os.environ.get("WGPT_REQUIRE_CUDA") == "1"


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("%s; %s", reason, _RUNS_INSTEAD)


def _runs_plain_torch(index: int) -> bool:
    reason = missing_kernels(index)
    if reason is None:
        return False
    if is_required():
        raise ConfigError(f"WGPT_REQUIRE_CUDA=1 asks for wgpt's CUDA kernels. {reason}")
    _warn_once(reason)
    return True


# What torch.compiler.assume_constant_result does, which would import all of torch's compiler.
_runs_plain_torch._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_gpu(device: torch.device) -> bool:
    """Whether `device` is of the type that is judged here."""
    return device.type == DEVICE_TYPE


def is_cpu(device: torch.device) -> bool:
    """Whether `device` is the CPU, and stands for no GPU."""
    return device.type == "cpu" and not is_gpu(device)


def runs_reference(device: torch.device, *, has_cuda_kernels: bool = True) -> bool:
    """Whether an op runs `wgpt.ops.reference` there: everywhere but on the CPU and, if it has CUDA
    kernels, on a GPU that they serve. Warns and raises as `runs_plain_torch` does."""
    if not has_cuda_kernels or not is_gpu(device):
        return is_plain() or not is_cpu(device)
    return runs_plain_torch(device)


def runs_plain_torch(device: torch.device) -> bool:
    """Whether the ops with CUDA kernels run plain torch there: on a GPU without our kernels, and in
    a `use_plain_torch` block. The first GPU found without them is a logged warning.

    Raises:
        ConfigError: it is one, and WGPT_REQUIRE_CUDA=1.
    """
    return is_plain() or (is_gpu(device) and _runs_plain_torch(device.index or 0))
