"""The CUDA kernels of the training step's ops on the emulator: add_rms_norm, rotary_qkv, the GELU
of feed_forward, the rows of linear_cross_entropy. Each row by tests/numerics.py's rule."""

import pytest
import torch
from training_cases import (
    DTYPES,
    check_rows,
    concat_norm,
    cross_entropy,
    gelu,
    norm,
    norm_alone,
    rotary,
    scores,
)

F32, BF16, F16 = DTYPES
# stream, delta, y: as in training in one type and under autocast, and each place in each type.
NORM_TYPES = [
    (F32, F32, F32),
    (BF16, BF16, BF16),
    (F32, BF16, BF16),
    (F32, F16, F16),
    (F32, None, BF16),
    (F16, F16, BF16),
    (BF16, None, F32),
]
NORM_SIZES = [  # both sides of a turn of 256 and of 768 channels, of vectors of 4 and of 1
    (1, 1),
    (5, 13),
    (3, 257),
    (35, 256),
    (3, 260),
    (67, 8),
    (2, 768),
    (2, 772),
    (2, 1540),
]
ROTARY_SIZES = [(1, 1, 1, 2), (2, 5, 3, 32), (1, 37, 2, 64), (2, 3, 1, 6), (3, 11, 4, 128)]
# rows, Ct, Cm: of a lane two vectors of four channels, six, and eight of one
CONCAT_NORM_SIZES = [
    (1, 4, 8), (67, 128, 128), (3, 132, 128), (2, 512, 256), (5, 7, 13), (2, 128, 127),
]  # fmt: skip
# rows, vocab: both sides of what a warp holds in float32, 1152, and in 16-bit types, 1280
SCORE_SIZES = [(1, 1), (3, 5), (9, 29), (17, 1024), (5, 1025), (4, 1153), (3, 1281)]


@pytest.mark.parametrize("size", NORM_SIZES, ids=str)
def test_add_rms_norm_matches_float64(emu, size):
    # Of one channel the gradient is a difference that cancels: mixed types have nothing to hold to.
    for types in NORM_TYPES[: 2 if size == (1, 1) else None]:
        check_rows(norm(emu, *size, *types))


def test_add_rms_norm_takes_tensors_that_vectors_cannot(emu):
    check_rows(norm(emu, 5, 64, F32, BF16, BF16, aligned=False))


def test_add_rms_norm_norms_the_sum_that_it_returns(emu):
    """Backward sees that one: rounded."""
    x, delta = torch.randn(5, 72).to(BF16), torch.randn(5, 72).to(BF16)
    total, y = norm_alone(emu, x, delta, F32)
    assert torch.equal(y, norm_alone(emu, total, None, F32)[1])


def test_add_rms_norm_bits_do_not_depend_on_the_order_of_blocks_and_warps(built):
    results = []
    for seed in range(3):
        built.reset(("random", "mixed", seed))
        answers = norm(built, 100, 260, F32, BF16, BF16)
        results.append({name: values[0].clone() for name, values in answers.items()})
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("size", CONCAT_NORM_SIZES, ids=str)
def test_token_concat_norm_matches_float64(emu, size):
    for types in ((F32, F32, F32), (BF16, BF16, BF16), (F32, BF16, BF16), (F32, None, F16)):
        check_rows(concat_norm(emu, *size, *types))


def test_token_concat_norm_is_refused_beyond_its_channels(emu):
    for ct, cm, words in ((384, 388, "768"), (129, 128, "256")):
        with pytest.raises(RuntimeError, match=f"more than {words} channels"):
            concat_norm(emu, 1, ct, cm, F32, None, F32)


@pytest.mark.parametrize("size", ROTARY_SIZES, ids=str)
def test_rotary_qkv_matches_float64(emu, size):
    for dtype in DTYPES:
        check_rows(rotary(emu, *size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_matches_float64(emu, dtype):
    for n in (1, 7, 8, 9, 2047, 2048, 2057):
        check_rows(gelu(emu, n, dtype))


def test_gelu_takes_memory_that_vectors_cannot_and_another_for_the_gradient(emu):
    check_rows(gelu(emu, 300, BF16, in_place=False, offset=1))


@pytest.mark.parametrize("size", SCORE_SIZES, ids=str)
def test_cross_entropy_matches_float64(emu, size):
    for dtype in DTYPES:
        check_rows(scores(emu, *size, dtype))


@pytest.mark.parametrize("vocab", [160, 161])
def test_cross_entropy_takes_rows_that_vectors_cannot(emu, vocab):
    check_rows(scores(emu, 5, vocab, BF16, pitch=vocab + 1 - vocab % 2))


def test_cross_entropy_of_what_does_not_fit(emu):
    """A target outside makes its row NaN; an ignored row is zero whatever it holds."""
    logits = torch.zeros(5, 8)
    logits[3] = torch.nan
    loss, correct, d_logits, total, n_correct = cross_entropy(
        emu, logits, torch.tensor([8, -2, 0, -1, 1 << 40])
    )
    assert loss.isnan().tolist() == [True, True, False, False, True] and loss[3] == 0
    assert d_logits.isnan().all(-1).tolist() == [True, True, False, False, True]
    assert not d_logits[3].any() and correct.tolist() == [0, 0, 1, 0, 0]
    assert total != total and n_correct == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_of_a_target_in_the_padding_is_nan(emu, dtype):
    logits, targets = torch.randn(3, 129).to(dtype), torch.tensor([129, 128, 131])
    loss, correct, d_logits, *_ = cross_entropy(emu, logits, targets, padding=0)
    assert loss.isnan().tolist() == [True, False, True] and not correct[::2].any()
    assert d_logits.isnan().all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_cross_entropy_of_what_is_not_finite_is_not_finite(emu, value):
    logits = torch.randn(3, 40)
    logits[1, 2] = value
    assert not cross_entropy(emu, logits, torch.zeros(3).long())[3] < 1e30


def test_cross_entropy_without_gradients_leaves_the_logits(emu):
    logits = torch.randn(4, 1200)
    targets = torch.tensor([0, 1199, -1, 3])
    loss, _, after, *_ = cross_entropy(emu, logits, targets, gradients=False)
    assert torch.equal(after, logits)
    assert torch.equal(loss, cross_entropy(emu, logits, targets)[0])


def test_cross_entropy_sums_more_rows_than_threads(emu):
    logits, targets = torch.randn(1030, 3), torch.arange(1030) % 3
    loss, correct, _, total, n_correct = cross_entropy(emu, logits, targets)
    assert abs(total - loss.double().sum().item()) < 1e-3 and n_correct == correct.sum()


def test_float64_is_refused_in_words(built):
    built.reset()
    words = "CUDA knows float32, bfloat16 and float16"
    for call in (
        lambda: norm(built, 2, 8, torch.float64, None, torch.float64),
        lambda: rotary(built, 1, 1, 1, 4, torch.float64),
        lambda: gelu(built, 4, torch.float64),
        lambda: cross_entropy(built, torch.ones(1, 4).double(), torch.zeros(1).long()),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()
