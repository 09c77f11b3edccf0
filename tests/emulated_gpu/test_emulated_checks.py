"""What the ops refuse before a CUDA kernel runs, and in which words."""

import pytest
import torch

from wgpt import ops

BACKWARD = torch.ops.wgpt_kernels.token_concat_norm_backward.default
NAMES = ("d_cat", "d_y", "cat", "tokens", "x", "delta", "mel_inv_rms", "inv_rms", "mel_weight",
         "weight")  # fmt: skip


def arguments():
    shapes = [(2, 3, 12), (2, 3, 12), (2, 3, 12), (2, 3), (2, 3, 4), (2, 3, 4), (6,), (6,), (4,),
              (12,)]  # fmt: skip
    tensors = {name: torch.rand(shape) for name, shape in zip(NAMES, shapes, strict=True)}
    return tensors | {"tokens": torch.randint(5, (2, 3))}


def backward(tensors, vocab=5):
    """Past the dispatcher, which would take a tensor on `meta` elsewhere."""
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return BACKWARD.redispatch(cpu, *tensors.values(), vocab)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"x"}))
def test_token_concat_norm_backward_refuses_a_tensor_on_another_device(emulated_gpu, name):
    tensors = arguments()
    tensors[name] = tensors[name].to("meta")
    with emulated_gpu.on(), pytest.raises(ValueError, match=f" {name} must be on cpu like x"):
        backward(tensors)


@pytest.mark.parametrize("name", ["inv_rms", "mel_inv_rms"])
def test_token_concat_norm_backward_refuses_roots_of_another_type(emulated_gpu, name):
    tensors = arguments()
    tensors[name] = tensors[name].double()
    with emulated_gpu.on(), pytest.raises(ValueError, match=f" {name} must be float32"):
        backward(tensors)


@pytest.mark.parametrize("vocab", [-1, 1 << 60])
def test_token_concat_norm_backward_refuses_a_vocab_that_no_memory_holds(emulated_gpu, vocab):
    with emulated_gpu.on(), pytest.raises(ValueError, match="vocab must be at"):
        backward(arguments(), vocab)


def test_token_concat_norm_backward_takes_what_is_not_contiguous(emulated_gpu):
    tensors = arguments()
    strided = {n: torch.stack([t, torch.zeros_like(t)], -1)[..., 0] for n, t in tensors.items()}
    with emulated_gpu.on():
        for a, b in zip(backward(tensors), backward(strided), strict=True):
            assert torch.equal(a, b)


def test_what_a_launcher_refuses_names_its_op_once(emulated_gpu):
    with emulated_gpu.on(), pytest.raises(RuntimeError) as raised:
        ops.add_rms_norm(torch.ones(1, 65540), None, torch.ones(65540))
    assert str(raised.value) == "add_rms_norm: more than 65536 channels"
