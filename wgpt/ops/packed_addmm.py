"""packed_addmm: a prepacked, batch-invariant GEMM for few rows, as in decoding."""

import torch
from torch import Tensor

from wgpt.errors import OpError
from wgpt.ops.cuda import is_cpu
from wgpt.ops.gradient import register_fake

_COLUMNS = 64  # of a panel: kPanelColumns of csrc/kernels/gemm.h


class PackedMatrix:
    """A matrix (K, N), packed once for many GEMMs with few rows each. Holds a copy; no gradients.

    float32 on the CPU is batch-invariant: a row of a result has the same bits whatever the other
    rows are, however many there are, on any number of threads. No BLAS promises that. Other dtypes
    and devices run torch's GEMM, without that promise.

    Args:
        matrix: (K, N).

    Raises:
        OpError: for what is not a matrix.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() != 2:
            raise OpError(f"packed_addmm: matrix must have shape (K, N), got {tuple(matrix.shape)}")
        matrix = matrix.detach()
        self.shape = matrix.shape
        self._plain: Tensor | None = None
        if not is_cpu(matrix.device) or matrix.dtype != torch.float32:
            self._plain = matrix.clone(memory_format=torch.contiguous_format)
            return
        depth, n_columns = matrix.shape
        n_panels = -(-n_columns // _COLUMNS)
        padded = torch.nn.functional.pad(matrix, (0, n_panels * _COLUMNS - n_columns))
        panels = padded.view(depth, n_panels, _COLUMNS).transpose(0, 1)
        self._panels = panels.clone(memory_format=torch.contiguous_format)

    def mm(self, x: Tensor) -> Tensor:
        """x (M, K) times the matrix: (M, N). Raises OpError for other shapes or dtypes."""
        if self._plain is not None:
            return x.mm(self._plain)
        return _packed_addmm(x, self._panels, None, self.shape[1])

    def addmm(self, addend: Tensor, x: Tensor) -> Tensor:
        """addend (M, N) or (N,) plus x (M, K) times the matrix: (M, N). Raises as mm."""
        if self._plain is not None:
            return torch.addmm(addend, x, self._plain)
        return _packed_addmm(x, self._panels, addend, self.shape[1])


@register_fake("packed_addmm")
def _fake(x: Tensor, panels: Tensor, addend: Tensor | None, columns: int) -> Tensor:
    return x.new_empty((x.shape[0], columns))


def _packed_addmm(x: Tensor, panels: Tensor, addend: Tensor | None, columns: int) -> Tensor:
    try:
        y: Tensor = torch.ops.wgpt_kernels.packed_addmm.default(x, panels, addend, columns)
    except ValueError as error:  # a check of csrc/checks.h
        raise OpError(str(error)) from None
    return y
