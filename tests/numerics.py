"""The one tolerance rule: as accurate as plain torch in the same type, judged against float64.

A constant tolerance is either too loose for float32 or too tight for bfloat16, and says nothing
about inputs that lose digits in every implementation. So the error of `ours` may be at most twice
that of plain torch, both against a float64 computation of the same (already rounded) inputs, plus
a measured floor for where plain torch happens to hit the exact answer: how far one rounding of
every input in the accumulation type moves the exact answer, and two units in the last place of the
largest value. Both the largest and the root-mean-square error must hold.

A wrong row of small values hides behind the largest value of a tensor, so kernels whose rows have
owners of their own (a thread, a tile) are also held to the rule row by row. A few dozen values
leave room for luck, in ours and in plain torch's: a row's limit is ROW_LUCK times as far.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FACTOR = 2.0
LAST_PLACES = 2.0  # the rounding of the result, and a vector exp that is good to one place
# float64 is judged against torch's float64, whose own error is then unknown: a multiple of the
# floor.
FLOAT64_FLOORS = 8.0
ROW_LUCK = 4.0  # float32 needed 1.2 in 5,700 rows of attention on the emulator


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def nudge(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Every float64 value moved up or down, at random, by one rounding of the accumulation type."""
    generator = torch.Generator().manual_seed(2)
    signs = torch.randint(2, tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return tensor * (1 + signs.to(tensor.device) * torch.finfo(accumulation_dtype(dtype)).eps)


def assert_as_accurate_as_torch(
    name: str, ours: Tensor, plain: Tensor, exact: Tensor, nudged: Tensor
) -> None:
    """`ours` (type under test) against `plain` (torch, same type), both against float64 `exact`.

    `nudged` is the float64 answer for inputs moved by `nudge`.
    """
    assert exact.dtype == torch.float64
    assert ours.shape == exact.shape, f"{name}: shape {ours.shape}, expected {exact.shape}"
    if exact.numel() == 0:
        return
    exact = exact.to(ours.device)
    error = (ours.double() - exact).abs()
    plain_error = (plain.to(ours.device).double() - exact).abs()
    input_error = (nudged.to(ours.device) - exact).abs()
    last_places = LAST_PLACES * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    floors = FLOAT64_FLOORS if ours.dtype == torch.float64 else 1.0
    for statistic in ("max", "rms"):
        got, reference = _reduce(error, statistic), _reduce(plain_error, statistic)
        floor = floors * (_reduce(input_error, statistic) + last_places)
        limit = FACTOR * reference + floor
        if not got <= limit:  # also catches NaN
            worst = _worst_index(error)
            raise AssertionError(
                f"{name} ({ours.dtype}, {tuple(ours.shape)}): {statistic} error {got:.3e} exceeds "
                f"{FACTOR:g} x torch's {reference:.3e} + floor {floor:.3e}; worst at {worst}: "
                f"got {ours[worst].item():.8g}, torch {plain[worst].item():.8g}, "
                f"exact {exact[worst].item():.8g}"
            )


def worst_row(
    ours: Tensor, plain: Tensor, exact: Tensor, nudged: Tensor
) -> tuple[float, tuple[int, ...]]:
    """The largest error of a row (last axis) in parts of its limit, and where; NaN is infinite."""

    def largest(values: Tensor) -> Tensor:
        return values.abs().amax(-1)

    exact = exact.to(ours.device)
    last_places = LAST_PLACES * torch.finfo(ours.dtype).eps * largest(exact)
    floors = FLOAT64_FLOORS if ours.dtype == torch.float64 else 1.0
    floor = floors * (largest(nudged.to(ours.device) - exact) + last_places)
    limit = ROW_LUCK * (FACTOR * largest(plain.to(ours.device).double() - exact) + floor)
    error = largest(ours.double() - exact)
    ratio = torch.where(error == 0, 0.0, error / limit)  # a row of zeros has no room at all
    worst = _worst_index(ratio)
    return torch.nan_to_num(ratio[worst], nan=float("inf")).item(), worst


def assert_rows_as_accurate_as_torch(
    name: str, ours: Tensor, plain: Tensor, exact: Tensor, nudged: Tensor
) -> None:
    """`assert_as_accurate_as_torch`, and the same for each row (last axis) by itself."""
    assert_as_accurate_as_torch(name, ours, plain, exact, nudged)
    if exact.numel() == 0:
        return
    ratio, worst = worst_row(ours, plain, exact, nudged)
    assert ratio <= 1, (
        f"{name} ({ours.dtype}, {tuple(ours.shape)}): the error of row {worst} is {ratio:.3g} "
        f"times its limit: got {ours[worst].tolist()}, exact {exact[worst].tolist()}"
    )


# Rows of a larger |lse| take d_out . out from their scores (kLargeLse).
MOST_LSE_OF_STORED_OUT = 64.0


class RoundedTanh(TorchFunctionMode):
    """torch.tanh rounded once more, by `nudge`: the rounding is all that its slope 1 - tanh^2 has
    left where tanh is near 1."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.tanh:
            return _NudgedTanh.apply(args[0], self._dtype)
        return func(*args, **(kwargs or {}))


class _NudgedTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        y = nudge(torch.tanh(x), dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return d_y * (1 - y * y), None


def attention_roundings(
    d_out: Tensor, out: Tensor, lse: Tensor, dtype: torch.dtype, *, of_stored_out: bool = False
) -> tuple[Tensor, Tensor]:
    """What a backward without a T x T matrix must round (float64): d_out (B, T, H, D), d_lse.

    It subtracts d_out . out, a sum over D that is rounded; to the gradients that is an error of
    d_lse. And it recomputes exp(s - lse) from a rounded lse, which is a relative error like one of
    d_out, |lse| roundings large. Returns the moved d_out, and what d_lse (B, H, T) moves by.

    of_stored_out: count that out is stored in 16 bits before that sum. In a row that one key rules
    this is most of the error of d_q; plain torch, which keeps the weights, has none of it.
    """
    magnitude = (d_out * out).abs().sum(-1).transpose(1, 2)
    scale = (1 + lse.abs()).transpose(1, 2)[..., None]  # (B, T, H, 1)
    moved = nudge(magnitude, dtype) - magnitude
    if of_stored_out:
        of_out = (d_out * (out.to(dtype).double() - out)).sum(-1).transpose(1, 2)
        moved = moved + torch.where(lse.abs() <= MOST_LSE_OF_STORED_OUT, of_out, 0.0)
    return d_out + (nudge(d_out, dtype) - d_out) * scale, moved


def _reduce(error: Tensor, statistic: str) -> float:
    return (error.max() if statistic == "max" else error.square().mean().sqrt()).item()


def _worst_index(error: Tensor) -> tuple[int, ...]:
    flat = torch.nan_to_num(error, nan=float("inf")).argmax()
    return tuple(int(i) for i in torch.unravel_index(flat, error.shape))
