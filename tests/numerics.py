"""The one tolerance rule: as accurate as plain torch in the same type, judged against float64.

A constant tolerance is either too loose for float32 or too tight for bfloat16, and says nothing
about inputs that lose digits in every implementation. So the error of `ours` may be at most twice
that of plain torch, both against a float64 computation of the same (already rounded) inputs, plus
a measured floor for where plain torch happens to hit the exact answer: how far one rounding of
every input in the accumulation type moves the exact answer, and two units in the last place of the
largest value. Both the largest and the root-mean-square error must hold.
"""

import torch
from torch import Tensor

FACTOR = 2.0
LAST_PLACES = 2.0  # the rounding of the result, and a vector exp that is good to one place
# float64 is judged against torch's float64, whose own error is then unknown: a multiple of the
# floor.
FLOAT64_FLOORS = 8.0


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


def _reduce(error: Tensor, statistic: str) -> float:
    return (error.max() if statistic == "max" else error.square().mean().sqrt()).item()


def _worst_index(error: Tensor) -> tuple[int, ...]:
    flat = torch.nan_to_num(error, nan=float("inf")).argmax()
    return tuple(int(i) for i in torch.unravel_index(flat, error.shape))
