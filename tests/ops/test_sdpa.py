"""use_for_sdpa against torch's own kernel and against float64."""

import pytest
import torch
from numerics import assert_as_accurate_as_torch, nudge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from wgpt.ops.sdpa import sdpa_calls, use_for_sdpa

SHAPE = (2, 4, 300, 64)  # enough work for ours


def inputs(dtype=torch.float32, q_shape=SHAPE, k_shape=SHAPE):
    torch.manual_seed(0)
    shapes = (q_shape, k_shape, k_shape, q_shape)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def attend(q, k, v, d_out, **options):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, **options)
    out.backward(d_out)
    return out.detach(), q.grad, k.grad, v.grad


def served(function):
    """The function's result under the override, and how many calls ours and torch's served."""
    before = sdpa_calls()
    with use_for_sdpa():
        result = function()
    after = sdpa_calls()
    return result, after["ours"] - before["ours"], after["torch"] - before["torch"]


def check_accuracy(arguments, dtype, options):
    """Ours serves the call, as accurately as torch's kernel and laid out like its results."""
    exact = attend(*(x.double() for x in arguments), **options)
    own = attend(*arguments, **options)
    ours, n_ours, n_torch = served(lambda: attend(*arguments, **options))
    assert (n_ours, n_torch) == (1, 0)
    nudged = attend(*(nudge(x.double(), dtype) for x in arguments), **options)
    names = ("out", "dq", "dk", "dv")
    for name, *values in zip(names, ours, own, exact, nudged, strict=True):
        assert_as_accurate_as_torch(name, *values)
        assert values[0].stride() == values[1].stride(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"is_causal": True}, {}, {"is_causal": True, "scale": 0.3}])
def test_ours_is_as_accurate_as_torch_s(dtype, options):
    check_accuracy(inputs(dtype), dtype, options)


@pytest.mark.parametrize(
    ("options", "k_shape"),
    [
        ({"is_causal": True}, (2, 4, 400, 64)),  # aligned to the first key in torch
    ],
)
def test_what_ours_does_not_serve_has_torch_s_bits(options, k_shape):
    arguments = inputs(k_shape=k_shape)
    own = attend(*arguments, **options)
    through, n_ours, n_torch = served(lambda: attend(*arguments, **options))
    assert (n_ours, n_torch) == (0, 1)
    assert all(torch.equal(a, b) for a, b in zip(own, through, strict=True))


MASKS = {
    "tril": torch.ones(300, 300, dtype=torch.bool).tril(),
    "keys of items": torch.rand(2, 1, 1, 300) > 0.3,
    "numbers of heads": torch.randn(1, 4, 300, 300),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_run_ours(mask, dtype):
    attn_mask = MASKS[mask] if MASKS[mask].dtype == torch.bool else MASKS[mask].to(dtype)
    arguments = inputs(dtype)
    exact_mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.double()
    exact = attend(*(x.double() for x in arguments), attn_mask=exact_mask)
    own = attend(*arguments, attn_mask=attn_mask)
    ours, n_ours, n_torch = served(lambda: attend(*arguments, attn_mask=attn_mask))
    assert (n_ours, n_torch) == (1, 0)
    nudged = attend(*(nudge(x.double(), dtype) for x in arguments), attn_mask=exact_mask)
    for name, *values in zip(("out", "dq", "dk", "dv"), ours, own, exact, nudged, strict=True):
        assert_as_accurate_as_torch(name, *values)


@pytest.mark.parametrize("hidden", [False, torch.finfo(torch.float32).min], ids=str)
def test_rows_without_a_key_are_as_torch_gives_them(hidden):
    """A mask of False: 0, and no gradient; the lowest number, as padding has it: the mean."""
    attn_mask = torch.ones(300, 300, dtype=torch.bool).tril()
    if hidden is not False:
        attn_mask = torch.zeros(300, 300).masked_fill(~attn_mask, hidden)
    attn_mask[:7] = hidden
    arguments = inputs()
    # Its formula: of rows at the lowest number, gradients of its fused kernel miss 1 / n.
    with sdpa_kernel(SDPBackend.MATH):
        own = attend(*arguments, attn_mask=attn_mask)
    ours, n_ours, _ = served(lambda: attend(*arguments, attn_mask=attn_mask))
    assert n_ours == 1
    for a, b in zip(own, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_mask_that_wants_a_gradient_is_torch_s():
    arguments = inputs()
    attn_mask = torch.randn(300, 300, requires_grad=True)
    _, n_ours, _ = served(lambda: attend(*arguments, attn_mask=attn_mask))
    assert n_ours == 0 and attn_mask.grad.isfinite().all()


def test_dropout_is_torch_s():
    arguments = inputs()

    def dropped():
        torch.manual_seed(1)
        return attend(*arguments, dropout_p=0.5, is_causal=True)

    own = dropped()
    through, n_ours, _ = served(dropped)
    assert n_ours == 0 and not torch.equal(own[0], attend(*arguments, is_causal=True)[0])
    assert all(torch.equal(a, b) for a, b in zip(own, through, strict=True))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with use_for_sdpa(), pytest.raises(RuntimeError, match="dropout"):
        flash(*arguments[:3], dropout_p=0.5)


@pytest.mark.parametrize("shape", [(2, 4, 8, 64), (2, 4, 300, 36)])
def test_small_calls_and_other_head_sizes_are_torch_s(shape):
    arguments = inputs(q_shape=shape, k_shape=shape)
    own = attend(*arguments, is_causal=True)
    through, n_ours, _ = served(lambda: attend(*arguments, is_causal=True))
    assert n_ours == 0
    assert all(torch.equal(a, b) for a, b in zip(own, through, strict=True))


def test_cross_attention_runs_ours():
    arguments = inputs(k_shape=(2, 4, 500, 64))
    own = attend(*arguments)
    ours, n_ours, _ = served(lambda: attend(*arguments))
    assert n_ours == 1
    for a, b in zip(own, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_run_ours(dtype, kv_heads):
    arguments = inputs(dtype, k_shape=(2, kv_heads, 300, 64))
    check_accuracy(arguments, dtype, {"is_causal": True, "enable_gqa": True})


def test_leaving_gives_torch_its_kernel_back():
    arguments = inputs()
    before = attend(*arguments, is_causal=True)
    with use_for_sdpa() as outer:
        with use_for_sdpa():
            pass
        assert sdpa_calls()["active"], "an inner block must not end the outer one"
        outer.close()
        assert not sdpa_calls()["active"]
    calls = sdpa_calls()
    after = attend(*arguments, is_causal=True)
    assert sdpa_calls() == calls
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_compiled_models_run_ours():
    q, k, v, _ = inputs()

    def block(q, k, v):
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)

    expected = block(q, k, v)
    torch.compiler.reset()
    got, n_ours, _ = served(lambda: torch.compile(block, backend="aot_eager")(q, k, v))
    assert n_ours == 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
