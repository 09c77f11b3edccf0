"""The fused ops, and what runs them.

flash_attention, mel_embed and token_concat have CPU and CUDA kernels, and the device of the
arguments decides. add_rms_norm, rotary_qkv, linear, feed_forward and linear_cross_entropy run on
the CPU only, where a profile of the training step asked for them. There is no fallback, but for
PackedMatrix, which is torch's product where packed_addmm is not. On CPUs the best instruction set
that is compiled in and supported runs, unless `WGPT_CPU_TARGET` or `set_cpu_target` names another;
on x86 it flushes results too small for a normal float to zero. `reference` specifies each op in
plain torch and runs only when asked.
"""

import sysconfig
from pathlib import Path
from typing import Any

import torch  # first: wgpt._C resolves its symbols in the libtorch this loads

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

from wgpt.ops import reference
from wgpt.ops.add_rms_norm import add_rms_norm
from wgpt.ops.feed_forward import feed_forward
from wgpt.ops.flash_attention import first_key_of, flash_attention
from wgpt.ops.linear import linear
from wgpt.ops.linear_cross_entropy import linear_cross_entropy
from wgpt.ops.mel_embed import mel_embed
from wgpt.ops.packed_addmm import PackedMatrix
from wgpt.ops.rotary_qkv import rotary_qkv
from wgpt.ops.token_concat import token_concat

__all__ = [
    "PackedMatrix",
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
]


def info() -> dict[str, Any]:
    """What runs the ops: CPU target and alternatives, CUDA architectures, torch versions."""
    build = _C.build_info()
    return {
        "cpu_target": _C.cpu_target(),
        "cpu_targets": _C.cpu_targets(),
        "cpu_threads": torch.get_num_threads(),
        "cuda_archs": build["cuda_archs"].split(),
        "cuda_toolkit": build["cuda_toolkit"] or None,
        "cuda_available": torch.cuda.is_available(),
        "torch_running": torch.__version__,
        "torch_built": build["torch"],
        "torch_oldest": build["torch_target"],
        "compiler": build["compiler"],
    }


def set_cpu_target(name: str | None) -> None:
    """Force the CPU target `name` (one of `info()["cpu_targets"]`); None goes back to the best.

    Raises ValueError for a target that is not compiled in or that this machine cannot run.
    """
    _C.set_cpu_target(name)
