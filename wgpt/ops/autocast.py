"""How the ops behave under torch.autocast: the rules of torch's own ops of their kind.

GEMMs (flash_attention, linear, mel_embed's weights, ...) run in the autocast dtype, as matmul does.
Gathering and concatenating (token_concat) runs in the widest dtype among its arguments, as cat
does. float64 is left alone, and outside autocast nothing is cast: mixed dtypes are then an error.
The casts are in the public functions, not in `torch.library.register_autocast`: that casts every
floating argument, also constants that must stay float32, and to a dtype fixed at registration.
"""

import torch
from torch import Tensor


def _castable(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64


def _enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def cast_to_autocast_type(first: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype that the enclosing autocast wants for GEMMs, if there is one."""
    device = first.device.type
    if not _enabled(device):
        return first, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and _castable(t) else t for t in (first, *others))


def cast_to_widest_type(first: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in their widest common dtype, under autocast only."""
    if not _enabled(first.device.type):
        return first, *others
    dtype = first.dtype
    for tensor in others:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(None if t is None else t.to(dtype) for t in (first, *others))


def autocast_type(tensor: Tensor) -> torch.dtype:
    """The dtype that the enclosing autocast wants for GEMMs of `tensor`, else its own."""
    device = tensor.device.type
    wanted = _enabled(device) and _castable(tensor)
    return torch.get_autocast_dtype(device) if wanted else tensor.dtype


def statistic_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of statistics and constants: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
