"""packed_addmm: accuracy, batch invariance, every CPU target and type of weights, errors."""

import pytest
import torch
from numerics import assert_rows_as_accurate_as_torch, nudge

from wgpt import ops
from wgpt.errors import OpError
from wgpt.ops import PackedMatrix
from wgpt.ops.packed_addmm import rounded

SHAPES = [(1, 1, 1), (1, 300, 70), (6, 64, 64), (7, 257, 65), (53, 700, 130), (9, 0, 5)]  # M, K, N
HELD = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture(params=ops.info()["cpu_targets"])
def target(request: pytest.FixtureRequest, restore_cpu_target: None) -> str:
    ops.set_cpu_target(request.param)
    return request.param


def operands(m: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(m, k), torch.randn(k, n) * max(k, 1) ** -0.5


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("shape", SHAPES)
def test_gemms_are_as_accurate_as_torchs(
    shape: tuple[int, int, int], held: torch.dtype, target: str
) -> None:
    (x, matrix), n = operands(*shape), shape[2]
    packed, matrix = PackedMatrix(matrix, held), rounded(matrix, held)
    exact = x.double() @ matrix.double()
    nudged = nudge(x.double(), x.dtype) @ nudge(matrix.double(), x.dtype)
    assert_rows_as_accurate_as_torch("mm", packed.mm(x), x @ matrix, exact, nudged)
    for addend in (torch.randn(n), torch.randn(len(x), n), torch.randn(n, len(x)).t()):
        ours, plain = packed.addmm(addend, x), torch.addmm(addend, x, matrix)
        assert_rows_as_accurate_as_torch("addmm", ours, plain, addend + exact, addend + nudged)


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_bits_it_has_alone(
    shape: tuple[int, int, int], held: torch.dtype, target: str, restore_threads: None
) -> None:
    x, matrix = operands(*shape)
    addend, packed = torch.randn(len(x), shape[2]), PackedMatrix(matrix, held)
    whole = packed.addmm(addend, x)
    for n_threads in (1, 2, 4):
        torch.set_num_threads(n_threads)
        assert torch.equal(packed.addmm(addend, x), whole)
        for i in range(len(x)):
            for j in (i + 1, i + 2, i + 5):
                assert torch.equal(packed.addmm(addend[i:j], x[i:j]), whole[i:j])


@pytest.mark.parametrize("held", HELD)
def test_a_gemm_of_many_rows_has_the_bits_for_any_threads(
    held: torch.dtype, target: str, restore_threads: None
) -> None:
    x, matrix = operands(150, 300, 200)  # more than one task of rows, and of columns
    packed = PackedMatrix(matrix, held)
    torch.set_num_threads(1)
    whole = packed.mm(x)
    for n_threads in (2, 4):
        torch.set_num_threads(n_threads)
        assert torch.equal(packed.mm(x), whole)
        assert torch.equal(packed.mm(x[40:101]), whole[40:101])


def test_int8_is_symmetric_with_a_scale_for_each_column() -> None:
    matrix = torch.tensor([[2.0, 0.0, -1.0], [-0.7, 0.0, 0.55], [0.3, 0.0, 1e-3]])
    got = PackedMatrix(matrix, torch.int8).mm(torch.eye(3))
    whole = torch.tensor([[127.0, 0.0, -127.0], [-44.0, 0.0, 70.0], [19.0, 0.0, 0.0]])
    torch.testing.assert_close(got, whole * torch.tensor([2.0, 0.0, 1.0]) / 127)
    assert torch.equal(got, rounded(matrix, torch.int8))


def test_a_packed_matrix_takes_the_bytes_of_its_dtype() -> None:
    for held in HELD:
        packed = PackedMatrix(torch.randn(40, 128), held)
        assert packed.dtype == held and packed._panels.nbytes == 40 * 128 * held.itemsize


def test_rows_and_matrix_may_be_strided_and_the_matrix_is_a_copy() -> None:
    wide, matrix = torch.randn(5, 40), torch.randn(9, 20).t()
    x = wide[:, 3:23]
    packed, expected = PackedMatrix(matrix), x @ matrix
    torch.testing.assert_close(packed.mm(x), expected)
    torch.testing.assert_close(packed.mm(x.t().contiguous().t()), expected)
    matrix.zero_()
    torch.testing.assert_close(packed.mm(x), expected)


@pytest.mark.parametrize("held", HELD)
def test_infinities_and_nan_stay_in_their_row(held: torch.dtype) -> None:
    x, matrix = operands(5, 30, 70)
    packed = PackedMatrix(matrix, held)
    clean = packed.mm(x)
    x[1, 3], x[3, 7] = torch.inf, torch.nan
    y = packed.mm(x)
    assert torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])
    is_zero = rounded(matrix, held)[3] == 0  # an int8: 0 * inf is NaN
    assert torch.equal(y[1].isnan(), is_zero) and (y[1].isinf() | is_zero).all()
    assert y[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_torchs_gemm(dtype: torch.dtype) -> None:
    x, matrix = (t.to(dtype) for t in operands(3, 20, 30))
    addend, packed = torch.randn(30, dtype=dtype), PackedMatrix(matrix)
    assert torch.equal(packed.mm(x), x.mm(matrix))
    assert torch.equal(packed.addmm(addend, x), torch.addmm(addend, x, matrix))


def test_op_passes_opcheck() -> None:
    panels, scale = torch.randn(2, 20, 64) * 9, torch.rand(70)
    for op in (torch.ops.wgpt.packed_addmm.default, torch.ops.wgpt_kernels.packed_addmm.default):
        for addend in (None, torch.randn(70), torch.randn(3, 70)):
            for held in HELD:
                arguments = (torch.randn(3, 20), panels.to(held), addend, 70)
                arguments += (scale,) if held == torch.int8 else ()
                torch.library.opcheck(op, arguments)


def test_arguments_outside_the_rules_are_named() -> None:
    with pytest.raises(OpError, match=r"matrix must have shape \(K, N\), got \(3,\)"):
        PackedMatrix(torch.zeros(3))
    packed = PackedMatrix(torch.zeros(4, 70))
    with pytest.raises(OpError, match="x must be float32, got float64"):
        packed.mm(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(OpError, match=r"x must have shape \(M, K\)"):
        packed.mm(torch.zeros(4))
    with pytest.raises(OpError, match=r"panels must have shape .* got \(2, 4, 64\)"):
        packed.mm(torch.zeros(2, 5))
    with pytest.raises(OpError, match=r"addend must have shape \(N,\) = \(70,\), got \(7,\)"):
        packed.addmm(torch.zeros(7), torch.zeros(2, 4))
    with pytest.raises(OpError, match=r"addend must have shape \(M, N\) or \(N,\)"):
        packed.addmm(torch.zeros(3, 70), torch.zeros(2, 4))
    with pytest.raises(OpError, match="addend must be float32"):
        packed.addmm(torch.zeros(70, dtype=torch.float64), torch.zeros(2, 4))
    with pytest.raises(OpError, match="dtype must be float32, bfloat16 or int8, got float16"):
        PackedMatrix(torch.zeros(4, 70), torch.float16)
    with pytest.raises(OpError, match="must be float32 on the CPU to be held as int8, got float64"):
        PackedMatrix(torch.zeros(4, 70, dtype=torch.float64), torch.int8)
    with pytest.raises(OpError, match="matrix must be finite to be held as int8"):
        PackedMatrix(torch.full((4, 70), torch.nan), torch.int8)
    op, x = torch.ops.wgpt.packed_addmm.default, torch.zeros(2, 4)
    for panels, scale, message in (
        (torch.zeros(2, 4, 64, dtype=torch.int32), None, "float32, bfloat16 or int8, got int32"),
        (torch.zeros(2, 4, 64, dtype=torch.int8), None, "got int8 panels and none"),
        (torch.zeros(2, 4, 64), torch.zeros(70), "got float32 panels and a scale"),
        (torch.zeros(2, 4, 64, dtype=torch.int8), torch.zeros(64), r"scale must have shape \(N,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            op(x, panels, None, 70, scale)
