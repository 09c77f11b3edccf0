"""use_for_sdpa: torch's scaled_dot_product_attention on the CPU by our flash_attention.

torch decides inside `scaled_dot_product_attention` that a CPU call is one for its fused kernel, and
calls `aten::_scaled_dot_product_flash_attention_for_cpu`. That operator and its backward are
replaced here; a call that ours does not serve, or is not faster at, goes to torch's own kernel.
"""

from __future__ import annotations

import math
import warnings
from types import TracebackType
from typing import Any, TypedDict

import torch
from torch import Tensor

from wgpt.errors import OpError
from wgpt.ops.flash_attention import HEAD_DIMS

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = f"{_FORWARD}_backward"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SdpaCalls(TypedDict):
    """Whether `use_for_sdpa` is in force, and the forward calls each kernel served under it."""

    active: bool
    ours: int
    torch: int


_calls = {"ours": 0, "torch": 0}
_installed: _Kernels | None = None  # while a handle is open
_open: set[SdpaHandle] = set()


class SdpaHandle:
    """What `use_for_sdpa` returns. `close()`, or leaving a `with` block, ends it."""

    def close(self) -> None:
        """torch gets its own kernels back when no handle is open; a second call does nothing."""
        global _installed
        _open.discard(self)
        if not _open and _installed is not None:
            _installed.remove()
            _installed = None

    def __enter__(self) -> SdpaHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Kernels:
    """Our kernels in the place of torch's, which are kept."""

    def __init__(self) -> None:
        self._torch = {
            name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in (_FORWARD, _BACKWARD)
        }
        self._library: Any = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            # torch warns that a kernel is overridden, which is what was asked for.
            warnings.filterwarnings(
                "ignore", ".*other operators may also be overridden", UserWarning
            )
            for name, function in ((_FORWARD, self._forward), (_BACKWARD, self._backward)):
                self._library.impl(name, function, "CPU", with_keyset=True, allow_override=True)

    def remove(self) -> None:
        self._library._destroy()

    def _forward(
        self,
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not _serves(query, key, value, dropout_p, is_causal, attn_mask, scale):
            _calls["torch"] += 1
            own: tuple[Tensor, Tensor] = self._torch[_FORWARD].call_boxed(
                keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
            return own
        _calls["ours"] += 1
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse = torch.ops.wgpt.flash_attention(
            q, k, v, _scale(query, scale), is_causal, 0, None, _bias(query, key, attn_mask)
        )
        # The layouts that torch's own kernel gives, which torch.compile counts on.
        return _like(query, out.transpose(1, 2)), lse.transpose(1, 2).contiguous().transpose(1, 2)

    def _backward(
        self,
        keys: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not _serves(query, key, value, dropout_p, is_causal, attn_mask, scale):
            own: tuple[Tensor, Tensor, Tensor] = self._torch[_BACKWARD].call_boxed(
                keys, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal,
                attn_mask=attn_mask, scale=scale,
            )  # fmt: skip
            return own
        d_out, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        gradients = torch.ops.wgpt.flash_attention_backward(
            d_out, None, q, k, v, o, logsumexp.contiguous(), _scale(query, scale), is_causal, 0,
            None, _bias(query, key, attn_mask),
        )  # fmt: skip
        d_q, d_k, d_v = (gradient.transpose(1, 2) for gradient in gradients)
        return d_q, d_k, d_v


def is_fast(head_dim: int, dtype: torch.dtype, is_causal: bool) -> bool:
    """Whether ours takes so many channels, and is faster where they are padded to a kernel's.

    One thread of a Zen 4, torch's time over ours, padded: float32 0.7 to 1.0, but 1.1 to 1.7 if
    causal below 128; bfloat16 1.2 to 3.0, float16 1.4 to 13 (`benchmarks/bench_sdpa.py
    --head-dims`, the table in docs/performance.md).
    """
    if head_dim in HEAD_DIMS:
        return True
    if head_dim % 8 != 0 or not 8 <= head_dim < HEAD_DIMS[-1]:
        return False
    return dtype != torch.float32 or (is_causal and head_dim < 128)


def least_work(queries: int, head_dim: int, dtype: torch.dtype) -> int:
    """Multiply-adds of q k^T below which the way into Python costs more than our kernel gains.

    That way is 5 us in a loop and 20 where code comes from memory. In 16 bits torch's kernel takes
    several times ours (`benchmarks/bench_sdpa.py`, and with --decode for one query). Keys and
    values of a padded number of channels are copied first.
    """
    if head_dim not in HEAD_DIMS:
        return 1 << 24
    if queries > 1:
        return 1 << 24 if dtype == torch.float32 else 1 << 21
    return 1 << 20 if dtype == torch.float32 else 1 << 17


def _like(pattern: Tensor, value: Tensor) -> Tensor:
    """value, in the memory layout of torch.empty_like(pattern)."""
    wanted = torch.empty_like(pattern)
    return value if value.stride() == wanted.stride() else wanted.copy_(value)


def _bias(query: Tensor, key: Tensor, attn_mask: Tensor | None) -> Tensor | None:
    """attn_mask as a (B, H, Tq, Tk) view."""
    return attn_mask if attn_mask is None else attn_mask.expand(_scores_shape(query, key))


def _scores_shape(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    return query.shape[0], query.shape[1], query.shape[2], key.shape[2]


def _serves_mask(query: Tensor, key: Tensor, is_causal: bool, attn_mask: Tensor) -> bool:
    """Masks come as numbers: torch converts those of bools first."""
    shape = _scores_shape(query, key)
    own = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    return (
        not is_causal
        and query.shape[3] == 64  # measured
        and attn_mask.dtype in (query.dtype, torch.float32)
        and len(own) == 4
        and all(n in (1, m) for n, m in zip(own, shape, strict=True))
    )


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> bool:
    """Whether our kernel computes this call and is expected to be faster; (B, H, T, D) tensors.

    The same answer in forward and backward: it depends on what both are given alone.
    """
    batch, heads, q_steps, head_dim = query.shape
    kv_heads, k_steps = key.shape[1:3]
    return (
        # First, since a call of little work should pay for little else.
        batch * heads * q_steps * k_steps * head_dim >= least_work(q_steps, head_dim, query.dtype)
        and dropout_p == 0.0
        and (attn_mask is None or _serves_mask(query, key, is_causal, attn_mask))
        and query.dtype in _DTYPES
        and is_fast(head_dim, query.dtype, is_causal)
        and key.dtype == value.dtype == query.dtype
        and (scale is None or 0 < scale < math.inf)
        # torch aligns a causal mask to the first key, ours to the last.
        and (q_steps == k_steps or not is_causal)
        # Fewer than query heads: enable_gqa, or torch would not have come here.
        and kv_heads > 0
        and heads % kv_heads == 0
        and key.shape == value.shape == (batch, kv_heads, k_steps, head_dim)
    )


def use_for_sdpa() -> SdpaHandle:
    """Lets `torch.nn.functional.scaled_dot_product_attention` on the CPU run our kernels.

        wgpt.ops.use_for_sdpa()                 # from here on
        with wgpt.ops.use_for_sdpa(): ...       # in here

    Ours runs, forward and backward, for float32, bfloat16 and float16, D in {32, 64, 96, 128, 256},
    no mask, a square causal one or, at D 64, an `attn_mask` (bool or numbers, broadcast over batch
    or heads; one that wants a gradient runs torch's formula), no dropout, and enough work (a
    decoding step in 16 bits of 8 heads over 256 keys is enough, in float32 over 2048), with fewer
    key than query heads too (`enable_gqa`, where torch does not repeat them first); for other
    multiples of 8 up to 256 in 16 bits, and in float32 if causal and D < 128. Any other call runs
    torch's own kernel, to the same bits as without this. `ops.info()["sdpa"]` counts both.

    The override holds for the whole process, threads included, until every handle is closed.

    Raises:
        OpError: this torch has no `torch.library.get_kernel`, by which torch's own kernel is
            kept for the calls that need it.
    """
    global _installed
    if not hasattr(torch.library, "get_kernel"):
        raise OpError(
            "use_for_sdpa: needs torch.library.get_kernel, which torch "
            f"{torch.__version__} lacks; upgrade torch, or call wgpt.ops.flash_attention"
        )
    if _installed is None:
        _installed = _Kernels()
    handle = SdpaHandle()
    _open.add(handle)
    return handle


def sdpa_calls() -> SdpaCalls:
    """The counts so far, of all threads."""
    return {"active": _installed is not None, "ours": _calls["ours"], "torch": _calls["torch"]}
