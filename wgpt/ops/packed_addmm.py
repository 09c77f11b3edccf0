"""packed_addmm: a prepacked, batch-invariant GEMM for few rows, as in decoding."""

import torch
from torch import Tensor

from wgpt.errors import OpError
from wgpt.ops.cuda import is_cpu
from wgpt.ops.gradient import register_fake

_COLUMNS = 64  # of a panel: kPanelColumns of csrc/kernels/gemm.h
_INT8_MAX = 127


class PackedMatrix:
    """A matrix (K, N), packed once for many GEMMs with few rows each. Holds a copy; no gradients.

    float32 on the CPU is batch-invariant: a row of a result has the same bits whatever the other
    rows are, however many there are, on any number of threads. No BLAS promises that. Other dtypes
    and devices run torch's GEMM, without that promise.

    Decoding reads every weight once a step, so bytes are time: a float32 matrix on the CPU can be
    held as bfloat16 (half of the bytes) or int8 (a quarter; weight-only, symmetric, one scale for
    each column). Rows and results stay float32, accumulation is by float32 FMAs, and the
    promise is the same. What differs is the matrix: it is rounded once, as `rounded` does.

    Args:
        matrix: (K, N).
        dtype: in which it is held: that of matrix (None), or torch.bfloat16 or torch.int8 where
            that is float32 on the CPU.

    Raises:
        OpError: for what is not a matrix, another dtype, and elements that are not finite, which
            int8 cannot hold.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype | None = None) -> None:
        if matrix.dim() != 2:
            raise OpError(f"packed_addmm: matrix must have shape (K, N), got {tuple(matrix.shape)}")
        matrix = matrix.detach()
        self.shape = matrix.shape
        self.dtype = matrix.dtype if dtype is None else dtype
        self._plain: Tensor | None = None
        self._scale: Tensor | None = None  # (N,), of int8
        is_packed = is_cpu(matrix.device) and matrix.dtype == torch.float32
        if self.dtype != matrix.dtype and not is_packed:
            raise OpError(
                f"packed_addmm: matrix must be float32 on the CPU to be held as "
                f"{_name(self.dtype)}, got {_name(matrix.dtype)} on {matrix.device.type}"
            )
        if not is_packed:
            self._plain = matrix.clone(memory_format=torch.contiguous_format)
            return
        if self.dtype == torch.int8:
            matrix, self._scale = _quantized(matrix)
        elif self.dtype not in (torch.float32, torch.bfloat16):
            raise OpError(
                f"packed_addmm: dtype must be float32, bfloat16 or int8, got {_name(self.dtype)}"
            )
        depth, n_columns = matrix.shape
        n_panels = -(-n_columns // _COLUMNS)
        padded = torch.nn.functional.pad(matrix, (0, n_panels * _COLUMNS - n_columns))
        panels = padded.view(depth, n_panels, _COLUMNS).transpose(0, 1)
        packed = torch.empty(panels.shape, dtype=self.dtype, device=matrix.device)
        self._panels = packed.copy_(panels)

    def mm(self, x: Tensor) -> Tensor:
        """x (M, K) times the matrix: (M, N). Raises OpError for other shapes or dtypes."""
        if self._plain is not None:
            return x.mm(self._plain)
        return _packed_addmm(x, self._panels, None, self.shape[1], self._scale)

    def addmm(self, addend: Tensor, x: Tensor) -> Tensor:
        """addend (M, N) or (N,) plus x (M, K) times the matrix: (M, N). Raises as mm."""
        if self._plain is not None:
            return torch.addmm(addend, x, self._plain)
        return _packed_addmm(x, self._panels, addend, self.shape[1], self._scale)


def rounded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix (K, N) whose products `PackedMatrix(matrix, dtype)` computes, in its own dtype.

    bfloat16: each element to nearest, ties to even. int8: column j is the integers
    round(matrix[:, j] / scale[j]) in [-127, 127] times scale[j] = max |matrix[:, j]| / 127.
    """
    if dtype != torch.int8:
        return matrix.to(dtype).to(matrix.dtype)
    values, scale = _quantized(matrix)
    return values * scale


def _quantized(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers (K, N) in [-127, 127], in the matrix's dtype, and the scales (N,)."""
    if not matrix.isfinite().all():
        raise OpError("packed_addmm: matrix must be finite to be held as int8, got inf or NaN")
    if not len(matrix):
        return matrix, matrix.new_ones(matrix.shape[1])
    scale = matrix.abs().amax(0) / _INT8_MAX
    scale = torch.where(scale > 0, scale, 1.0)  # a column of zeros
    return (matrix / scale).round_().clamp_(-_INT8_MAX, _INT8_MAX), scale


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@register_fake("packed_addmm")
def _fake(
    x: Tensor, panels: Tensor, addend: Tensor | None, columns: int, scale: Tensor | None = None
) -> Tensor:
    return x.new_empty((x.shape[0], columns))


def _packed_addmm(
    x: Tensor, panels: Tensor, addend: Tensor | None, columns: int, scale: Tensor | None
) -> Tensor:
    try:
        y: Tensor = torch.ops.wgpt_kernels.packed_addmm.default(x, panels, addend, columns, scale)
    except ValueError as error:  # a check of csrc/checks.h
        raise OpError(str(error)) from None
    return y
