"""torch's own grid of cases for scaled_dot_product_attention, under `wgpt.ops.use_for_sdpa()`.

The sizes, types, masks and layouts are those that torch's test suite runs its CPU kernel on
(test/test_transformers.py), and the edges around them. Each case says who serves the call, which
`ops.info()["sdpa"]` must count, and holds out and gradients to the rule of `numerics`: at most
twice the error of torch's own kernel, against float64.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from numerics import assert_as_accurate_as_torch, attention_roundings, nudge
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from wgpt import ops
from wgpt.ops import sdpa

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("out", "d_q", "d_k", "d_v")
# (relative, absolute) of torch's own tests. They hold where a query sees one key: d_q and d_k are
# then 0, to which torch, whose largest weight is exactly 1, comes closer than any other rounding.
TORCH_TOLERANCES = {
    torch.float32: (5e-6, 1e-5),
    torch.bfloat16: (5e-2, 5e-2),
    torch.float16: (1e-2, 1e-2),
}


@pytest.fixture
def any_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ours serves small calls too, where the way into Python costs more than it gains."""
    monkeypatch.setattr(sdpa, "least_work", lambda queries, head_dim, dtype: 0)
    yield


def packed(batch: int, heads: int, steps: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v (B, H, T, D) as models cut them out of one projection: views, steps before heads."""
    qkv = torch.randn(batch, steps, 3, heads, head_dim).to(dtype)
    return [x.transpose(1, 2) for x in qkv.unbind(2)]


def dense(
    q: tuple[int, ...], k: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in (q, k or q, k or q)]


def attend(
    tensors: list[Tensor], trained: tuple[bool, ...] = (True,) * 3, **options: Any
) -> list[Tensor | None]:
    """out, and the gradients of those inputs that are trained."""
    leaves = [x.detach().requires_grad_(wants) for x, wants in zip(tensors, trained, strict=True)]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = {**options, "attn_mask": mask.to(leaves[0].dtype)}
    out = scaled_dot_product_attention(*leaves, **options)
    if any(trained):
        out.backward(gradient_of(out))
    return [out.detach(), *(x.grad for x in leaves)]


def gradient_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)


def nudged(
    tensors: list[Tensor], trained: tuple[bool, ...], options: dict[str, Any]
) -> list[Tensor | None]:
    """`attend` in float64 with inputs moved by one rounding, and without a mask what the backward
    must round too."""
    dtype = tensors[0].dtype
    moved = [nudge(x.double(), dtype) for x in tensors]
    if "attn_mask" in options or not any(trained):
        return attend(moved, trained, **options)
    leaves = [x.requires_grad_(wants) for x, wants in zip(moved, trained, strict=True)]
    out, lse = ops.reference.flash_attention(
        *(x.transpose(1, 2) for x in leaves),
        scale=options.get("scale"),
        causal=options.get("is_causal", False),
        return_lse=True,
    )
    d_out = gradient_of(out.detach().transpose(1, 2)).transpose(1, 2)
    d_out, d_lse = attention_roundings(d_out, out.detach(), lse.detach(), dtype)
    out.backward(d_out, retain_graph=True)
    if lse.requires_grad:  # not where v alone is trained
        lse.backward(d_lse)
    return [out.detach().transpose(1, 2), *(x.grad for x in leaves)]


def check(
    tensors: list[Tensor],
    served: str | None,
    trained: tuple[bool, ...] = (True,) * 3,
    **options: Any,
) -> None:
    """served: whose kernel must run, "ours" or "torch"; None: either; "neither": torch does not
    take the call for its fused kernel, in whose place ours stands."""
    dtype = tensors[0].dtype
    own = attend(tensors, trained, **options)
    before = ops.info()["sdpa"]
    with ops.use_for_sdpa():
        got = attend(tensors, trained, **options)
    after = ops.info()["sdpa"]
    counts = {name: after[name] - before[name] for name in ("ours", "torch")}  # type: ignore[literal-required]
    assert sum(counts.values()) == (0 if served == "neither" else 1)
    if served in ("torch", "neither"):
        assert counts["ours"] == 0
        for name, a, b in zip(NAMES, got, own, strict=True):
            # NaN where torch's kernel meets a mask and a scale that is not positive
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)
        return
    assert served is None or counts["ours"] == 1
    exact = attend([x.double() for x in tensors], trained, **options)
    floor = nudged(tensors, trained, options)
    for name, *values in zip(NAMES, got, own, exact, floor, strict=True):
        if values[1] is None:
            assert values[0] is None, name
            continue
        if tensors[1].shape[2] == 1:
            relative, absolute = TORCH_TOLERANCES[dtype]
            absolute *= tensors[0].shape[2] ** 0.5  # d_k sums over the queries
            torch.testing.assert_close(
                values[0].double(), values[2], rtol=relative, atol=absolute, msg=name
            )
        else:
            assert_as_accurate_as_torch(name, *values)  # type: ignore[arg-type]
        assert values[0].stride() == values[1].stride(), name  # type: ignore[union-attr]


# ---- who serves a call, at the real limit of work


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [2, 12])
@pytest.mark.parametrize("steps", [267, 1030])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_packed_projections(
    dtype: torch.dtype, batch: int, steps: int, heads: int, head_dim: int, causal: bool, train: bool
) -> None:
    work = batch * heads * steps * steps * head_dim
    is_ours = dtype in DTYPES and work >= 1 << 24 and (causal or dtype != torch.float32)
    check(
        packed(batch, heads, steps, head_dim, dtype),
        "ours" if is_ours else "torch",
        (train,) * 3,
        is_causal=causal,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_masked", [True, False])
def test_a_decoding_step(dtype: torch.dtype, is_masked: bool) -> None:
    """One query needs less work than a square call for ours to be faster."""
    for keys, heads in ((2, 4), (1024, 16)):
        tensors = dense((1, heads, 1, 64), (1, heads, keys, 64), dtype)
        mask = torch.arange(keys)[None] < keys - 1 if is_masked else None
        check(tensors, "torch" if keys == 2 else "ours", (False,) * 3, attn_mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 72])
def test_16_bits_need_less_work(head_dim: int, dtype: torch.dtype) -> None:
    """2^22 multiply-adds; of 72 channels, which are padded, too few."""
    is_ours = head_dim == 64 and dtype != torch.float32
    tensors = packed(1, 4, 128, head_dim, dtype)
    check(tensors, "ours" if is_ours else "torch", is_causal=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_bool", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "mask_shape",
    [(t, s) for t in (267, 1) for s in (514, 1)]
    + [(b, h, t, s) for b in (2, 1) for h in (3, 1) for t in (267, 1) for s in (514, 1)],
    ids=str,
)
def test_masks(mask_shape: tuple[int, ...], is_bool: bool, train: bool, dtype: torch.dtype) -> None:
    """Broadcast along any axis, and hiding all keys of some rows."""
    mask = torch.randn(mask_shape)
    tensors = dense((2, 3, 267, 8), (2, 3, 514, 8), dtype)
    check(tensors, None, (train,) * 3, attn_mask=mask > 0 if is_bool else mask.to(dtype))


# ---- what ours computes, at sizes that take no time


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_head_dims(head_dim: int, causal: bool, dtype: torch.dtype, any_work: None) -> None:
    check(packed(2, 3, 37, head_dim, dtype), "ours", is_causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [8, 80, 136])
def test_padded_head_dims(head_dim: int, causal: bool, dtype: torch.dtype, any_work: None) -> None:
    """float32 pays for the padding where torch skips nothing either."""
    is_ours = dtype != torch.float32 or (causal and head_dim < 128)
    check(packed(2, 3, 37, head_dim, dtype), "ours" if is_ours else "torch", is_causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_layouts(causal: bool, dtype: torch.dtype, any_work: None) -> None:
    heads_first = dense((2, 3, 37, 32), dtype=dtype)
    check(heads_first, "ours", is_causal=causal)
    batch_last = [x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for x in heads_first]
    check(batch_last, "neither", is_causal=causal)  # strided channels
    sliced = [x[:, :, 5:, 32:64] for x in dense((2, 3, 42, 96), dtype=dtype)]
    check(sliced, "ours", is_causal=causal)
    q, k, v = heads_first
    check([q, *(x[:1, :1].expand(2, 3, 37, 32) for x in (k, v))], "ours", is_causal=causal)


@pytest.mark.parametrize("trained", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_which_inputs_are_trained(trained: tuple[int, ...], any_work: None) -> None:
    check(packed(2, 3, 37, 32, torch.float32), "ours", tuple(map(bool, trained)), is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 97), (97, 1), (2, 61), (61, 2), (40, 75)], ids=str)
def test_lengths(lengths: tuple[int, int], dtype: torch.dtype, any_work: None) -> None:
    q_steps, k_steps = lengths
    tensors = dense((2, 3, q_steps, 32), (2, 3, k_steps, 32), dtype)
    check(tensors, "ours")
    # torch aligns a causal mask to the first key, ours to the last.
    check(tensors, "ours" if q_steps == k_steps else "torch", is_causal=True)


@pytest.mark.parametrize("q_shape, k_shape", [
    ((0, 3, 7, 32), (0, 3, 7, 32)), ((2, 0, 7, 32), (2, 0, 7, 32)), ((2, 3, 0, 32), (2, 3, 7, 32)),
    ((2, 3, 7, 32), (2, 3, 0, 32)), ((2, 3, 0, 32), (2, 3, 0, 32)),
])  # fmt: skip
def test_nothing(q_shape: tuple[int, ...], k_shape: tuple[int, ...], any_work: None) -> None:
    tensors = dense(q_shape, k_shape)
    own = attend(tensors)
    with ops.use_for_sdpa():
        got = attend(tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, own, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.3, 1e-4, 3.0, -0.5, 0.0])
def test_scales(scale: float, dtype: torch.dtype, any_work: None) -> None:
    served = "ours" if scale > 0 else "torch"
    check(packed(2, 3, 37, 32, dtype), served, scale=scale, is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (6, 3)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads(
    heads: tuple[int, int], causal: bool, dtype: torch.dtype, any_work: None
) -> None:
    tensors = dense((2, heads[0], 37, 32), (2, heads[1], 37, 32), dtype)
    check(tensors, "ours", is_causal=causal, enable_gqa=True)


@pytest.mark.parametrize("head_dim", [32, 80])
def test_scores_beyond_float16(head_dim: int, any_work: None) -> None:
    """256 x 256 x 80 is 5e6: the sum must not be a float16."""
    x = torch.full((1, 4, 23, head_dim), 256.0, dtype=torch.float16)
    check([x, x, x], "ours")


def test_what_is_left_to_torch(any_work: None) -> None:
    check(packed(2, 3, 37, 32, torch.float64), "torch", is_causal=True)
    check(packed(2, 3, 37, 36, torch.float32), "torch", is_causal=True)  # no multiple of 8
    check(packed(2, 3, 37, 264, torch.float32), "torch", is_causal=True)
    q, k, v = dense((2, 3, 37, 32))
    check([q, k, v[..., :16].contiguous()], "neither", is_causal=True)
    check([x[:, 0] for x in (q, k, v)], "neither", is_causal=True)  # three axes
    check([q, k[:1], v[:1]], "neither", is_causal=True)  # to be broadcast


def test_inference_mode(any_work: None) -> None:
    with torch.inference_mode():
        check(packed(2, 3, 37, 32, torch.float32), "ours", (False,) * 3, is_causal=True)
