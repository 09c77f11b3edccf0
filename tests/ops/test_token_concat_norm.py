"""token_concat_norm: its parts by hand, and one kernel with their accuracy on a GPU."""

import pytest
import torch
from op_cases import CUDA_DTYPES, Call, check_accuracy, run

from wgpt import ops


def call(batch, steps, ct, cm, dtype, device, delta=True) -> Call:
    shape = (batch, steps, cm)
    tensors = {
        "tokens": torch.randint(7, (batch, steps)),
        "table": torch.randn(7, ct).mul(0.1).to(dtype),
        "x": torch.randn(shape).to(dtype),
        "delta": torch.randn(shape).to(dtype) if delta else None,
        "mel_weight": torch.randn(cm).mul(0.1).to(dtype),
        "weight": torch.randn(ct + cm).to(dtype),
    }
    tensors = {key: t if t is None else t.to(device) for key, t in tensors.items()}
    return Call("token_concat_norm", tensors, tuple(tensors)[1:], {"mel_eps": 1e-5})


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(2, 9, 16, 8), (1, 33, 5, 3), (1, 2, 384, 388), (1, 3, 128, 131)], ids=str
)
def test_token_concat_norm_is_as_accurate_as_torch(size, dtype, device) -> None:
    check_accuracy(call(*size, dtype, device))
    check_accuracy(call(*size, dtype, device, delta=False))


def test_token_concat_norm_takes_no_steps(device) -> None:
    values = run(ops.token_concat_norm, call(2, 0, 8, 8, torch.float32, device))
    assert not any(value.any() for value in values.values())


def test_token_concat_norm_by_hand(device) -> None:
    """Mel 3 + 1 and -4: rms 4, so 1 and -1, times weights 2; beside the token's 1 and 3: rms 2 by
    1 + 9 + 4 + 4 = 18 over 4, whose root is 2.1213."""
    tensors = [torch.tensor([[1]]), torch.tensor([[9.0, 9.0], [1.0, 3.0]]),
               torch.tensor([[[3.0, -4.0]]]), torch.tensor([[[1.0, 0.0]]]),
               torch.full((2,), 2.0), torch.ones(4)]  # fmt: skip
    tensors = [t.to(device) for t in tensors]
    fused, normed = ops.token_concat_norm(*tensors, mel_eps=0.0, eps=0.0)
    assert fused.flatten().tolist() == [1.0, 3.0, 2.0, -2.0]
    torch.testing.assert_close(normed, fused / 4.5**0.5)
    assert torch.equal(normed.argmax(), fused.argmax())
