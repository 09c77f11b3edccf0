"""The cases of bench_attention.py and who meets in them: functions of q, k, v that give attention.

Every contestant takes q, k, v (B, T, H, D) and gives out (B, T, H, D).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wgpt import ops

EAGER_LIMIT_BYTES = 3e9
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    steps: int
    head_dim: int
    window: int = 0
    documents: int = 1  # of equal length, packed end to end

    @property
    def visible_pairs(self) -> int:
        """Pairs of one head that causal attention, with the window, looks at."""
        steps = self.steps // self.documents
        width = self.window if 0 < self.window < steps else steps
        return self.documents * (width * (width + 1) // 2 + (steps - width) * width)

    def first_key(self, device: torch.device) -> Tensor | None:
        if self.documents == 1:
            return None
        cu_seqlens = list(range(0, self.steps + 1, self.steps // self.documents))
        return ops.first_key_of([cu_seqlens] * self.batch, self.steps, device)

    def flops(self, passes: str) -> int:
        products = 14 if passes == "fwd_bwd" else 4
        return products * self.head_dim * self.visible_pairs * self.batch * self.heads


def ours(case: Case, first_key: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.flash_attention(q, k, v, window=case.window, first_key=first_key)


def visible_mask(case: Case, device: torch.device) -> Tensor | None:
    """What SDPA takes for a window and packed documents; None where causal says everything."""
    if case.window == 0 and case.documents == 1:
        return None
    step = torch.arange(case.steps, device=device)
    distance = step[:, None] - step
    visible = (distance >= 0) & (distance < (case.window or case.steps))
    document = step // (case.steps // case.documents)
    return visible & (document[:, None] == document)


def sdpa(
    mask: Tensor | None, backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if backend is None:
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=mask is None)
    else:
        with sdpa_kernel([backend]):
            out = F.scaled_dot_product_attention(
                *heads_first, attn_mask=mask, is_causal=mask is None
            )
    return out.transpose(1, 2)


def eager(case: Case, first_key: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.reference.flash_attention(q, k, v, window=case.window, first_key=first_key)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(block_mask: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return compiled_flex()(*heads_first, block_mask=block_mask).transpose(1, 2)


def flex_block_mask(case: Case) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    width = case.window if case.window > 0 else case.steps
    document_steps = case.steps // case.documents

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < width) & (i // document_steps == j // document_steps)

    return create_block_mask(visible, None, None, case.steps, case.steps, device="cuda")


def runner(attend: Callable[..., Tensor], inputs: "Inputs", passes: str) -> Callable[[], Any]:
    """One call of the pass over the same inputs; gradients go to q, k, v and are dropped."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if passes == "fwd":

        def run() -> Any:
            with torch.no_grad():
                return attend(q, k, v)
    else:

        def run() -> Any:
            return torch.autograd.grad(attend(q, k, v), (q, k, v), inputs.d_out)

    return run


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor

    @classmethod
    def make(cls, case: Case, dtype: torch.dtype, device: str) -> "Inputs":
        shape = (case.batch, case.steps, case.heads, case.head_dim)
        fused = torch.randn(shape[0], shape[1], 3, *shape[2:], device=device).to(dtype)
        q, k, v = (x.requires_grad_() for x in fused.unbind(2))
        return cls(q, k, v, torch.randn(shape, device=device).to(dtype))


def eager_fits(case: Case, passes: str) -> bool:
    copies = 6 if passes == "fwd_bwd" else 3
    return copies * 4.0 * case.batch * case.heads * case.steps**2 < EAGER_LIMIT_BYTES
