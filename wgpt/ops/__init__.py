"""The fused ops, and what runs where: the device of the arguments decides.

                                             CPU       CUDA              any other device
    flash_attention, mel_embed, token_concat kernels   kernels           error
    add_rms_norm, rotary_qkv                 kernels   kernels           `reference`
    feed_forward, linear_cross_entropy       kernels   kernels, cuBLAS   `reference`
    linear                                   kernels   `reference`       `reference`
    token_concat_norm                        its parts kernels           its parts
    PackedMatrix (float32)                   kernels   torch's GEMM      torch's GEMM

`reference` holds the formula of every op in plain torch. float64 is for the CPU.

On a GPU that our CUDA kernels do not serve (a build without nvcc, a GPU older than sm_80, a driver
older than the kernels) all of it is plain torch: `wgpt.ops.plain` for the first row, `reference`
for the others. One logged warning says why and what to install; with `WGPT_REQUIRE_CUDA=1` it is a
ConfigError. Arguments that do not fit raise the same OpError everywhere.

On CPUs the best instruction set that is compiled in and supported runs, unless `WGPT_CPU_TARGET` or
`set_cpu_target` names another; on x86 it flushes results too small for a normal float to zero.
Importing this package imports torch, and nothing else outside the standard library.
"""

import sys
import sysconfig
from pathlib import Path
from typing import TypedDict

import torch  # first: wgpt._C resolves its symbols in the libtorch this loads

# A copy of this package as a kernel of the Hub has another name.
if f"{__name__.removesuffix('.ops')}._C" not in sys.modules and hasattr(
    torch.ops.wgpt, "flash_attention"
):
    raise ImportError(
        "wgpt's ops are in this process already, from another place (the installed wgpt, or a "
        "kernel of the Hub): use those; torch takes them once"
    )
try:
    from wgpt import _C
except ImportError as error:
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
    if (Path(__file__).parents[1] / f"_C{suffix}").exists():
        raise  # it is there but does not load: the loader's own words say why
    raise ImportError(
        "wgpt._C is not built for this Python. Install the package (pip install .), or in a source "
        "tree run: make dev"
    ) from error

from wgpt.errors import ConfigError
from wgpt.ops import cuda, flops, reference  # noqa: F401  flops registers formulas
from wgpt.ops.add_rms_norm import add_rms_norm
from wgpt.ops.feed_forward import feed_forward
from wgpt.ops.flash_attention import first_key_of, flash_attention
from wgpt.ops.linear import linear
from wgpt.ops.linear_cross_entropy import linear_cross_entropy
from wgpt.ops.mel_embed import mel_embed
from wgpt.ops.packed_addmm import PackedMatrix
from wgpt.ops.rotary_qkv import rotary_qkv
from wgpt.ops.sdpa import SdpaCalls, SdpaHandle, sdpa_calls, use_for_sdpa
from wgpt.ops.switch import use_plain_torch
from wgpt.ops.token_concat import token_concat
from wgpt.ops.token_concat_norm import token_concat_norm

__all__ = [
    "Info",
    "PackedMatrix",
    "SdpaHandle",
    "add_rms_norm",
    "feed_forward",
    "first_key_of",
    "flash_attention",
    "info",
    "linear",
    "linear_cross_entropy",
    "mel_embed",
    "reference",
    "rotary_qkv",
    "set_cpu_target",
    "token_concat",
    "token_concat_norm",
    "use_for_sdpa",
    "use_plain_torch",
]


class Info(TypedDict):
    """What runs the ops; see `info`."""

    cpu_target: str
    cpu_targets: list[str]  # that this machine can run, best first
    cpu_threads: int
    cuda_archs: list[str]  # with machine code; empty: a build without CUDA kernels
    cuda_ptx: list[str]  # which later GPUs compile when they load it
    cuda_toolkit: str | None
    cuda_available: bool
    cuda_in_plain_torch: dict[str, str]  # GPUs that our kernels do not serve: why
    torch_running: str
    torch_built: str
    torch_oldest: str
    compiler: str
    sdpa: SdpaCalls  # of use_for_sdpa


def info() -> Info:
    """What runs the ops: CPU target and alternatives, CUDA architectures, torch versions.

    Raises:
        ConfigError: `WGPT_CPU_TARGET` names a target that this machine cannot run.
    """
    build = _C.build_info()
    try:
        cpu_target = _C.cpu_target()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return {
        "cpu_target": cpu_target,
        "cpu_targets": _C.cpu_targets(),
        "cpu_threads": torch.get_num_threads(),
        "cuda_archs": build["cuda_archs"].split(),
        "cuda_ptx": build["cuda_ptx"].split(),
        "cuda_toolkit": build["cuda_toolkit"] or None,
        "cuda_available": torch.cuda.is_available(),
        "cuda_in_plain_torch": _in_plain_torch(),
        "torch_running": torch.__version__,
        "torch_built": build["torch"],
        "torch_oldest": build["torch_target"],
        "compiler": build["compiler"],
        "sdpa": sdpa_calls(),
    }


def _in_plain_torch() -> dict[str, str]:
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reasons = {f"cuda:{index}": cuda.missing_kernels(index) for index in range(n_gpus)}
    return {device: reason for device, reason in reasons.items() if reason is not None}


def set_cpu_target(name: str | None) -> None:
    """Forces a CPU target from now on.

    Args:
        name: one of `info()["cpu_targets"]`; None goes back to the best.

    Raises:
        ConfigError: a target that is not compiled in or that this machine cannot run.
    """
    try:
        _C.set_cpu_target(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
