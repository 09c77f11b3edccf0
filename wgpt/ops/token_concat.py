"""token_concat: embed the tokens and put the mel representation of the same step beside them."""

from typing import Any

from torch import Tensor

from wgpt.ops import plain
from wgpt.ops.autocast import cast_to_widest_type
from wgpt.ops.cuda import runs_plain_torch
from wgpt.ops.gradient import backward_op, checks_of, differentiable, register_fake


def token_concat(
    tokens: Tensor, table: Tensor, mel_hidden: Tensor | None = None, pos: Tensor | None = None
) -> Tensor:
    """cat(table[tokens], mel_hidden) (+ pos[:T]) over the channels, in one pass.

    Differentiable in table, mel_hidden and pos; the gradient of table sums each row in a fixed
    order, so it has the same bits for any number of threads. On CUDA a token outside [0, V) makes
    its step's token channels NaN: a check would wait for the device.

    Args:
        tokens: (B, T) int64 in [0, V).
        table: (V, Ct); float32, bfloat16, float16, or float64 on the CPU.
        mel_hidden: (B, T, Cm) in the dtype of table, or None for tokens only; a slice of a wider
            tensor is read in place.
        pos: (>= T, Ct + Cm) in the dtype of table, or None.

    Returns:
        (B, T, Ct + Cm), contiguous, in the dtype of table.

    Raises:
        OpError: for other shapes or dtypes; on the CPU also for a token outside [0, V).
    """
    table, mel_hidden, pos = cast_to_widest_type(table, mel_hidden, pos)  # type: ignore[assignment]
    if runs_plain_torch(table.device):
        _check(tokens, table, mel_hidden, pos)
        return plain.token_concat(tokens, table, mel_hidden, pos)
    y: Tensor = _token_concat(tokens, table, mel_hidden, pos)
    return y


@register_fake("token_concat")
def _fake(tokens: Tensor, table: Tensor, mel_hidden: Tensor | None, pos: Tensor | None) -> Tensor:
    mel_channels = 0 if mel_hidden is None else mel_hidden.shape[2]
    return table.new_empty((*tokens.shape, table.shape[1] + mel_channels))


@register_fake("token_concat_backward")
def _fake_backward(
    d_y: Tensor, tokens: Tensor, vocab: int, token_channels: int, pos_rows: int
) -> tuple[Tensor, Tensor]:
    channels = d_y.shape[2]
    return d_y.new_empty((vocab, token_channels)), d_y.new_empty((max(pos_rows, 0), channels))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, table, _, pos = inputs
    ctx.save_for_backward(tokens)
    ctx.vocab, ctx.token_channels = table.shape
    ctx.pos_rows = -1 if pos is None else pos.shape[0]


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    d_table = d_pos = d_mel_hidden = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
        (tokens,) = ctx.saved_tensors
        d_table, d_pos = _token_concat_backward(
            d_y, tokens, ctx.vocab, ctx.token_channels, ctx.pos_rows
        )
    if ctx.needs_input_grad[2]:
        # A view: the copy is the next op's business.
        d_mel_hidden = d_y.narrow(2, ctx.token_channels, d_y.shape[2] - ctx.token_channels)
    return None, d_table, d_mel_hidden, None if ctx.pos_rows < 0 else d_pos


_token_concat = differentiable("token_concat", _setup_context, _backward, folded=(0, 2))
_token_concat_backward = backward_op("token_concat")
_check = checks_of("token_concat")
