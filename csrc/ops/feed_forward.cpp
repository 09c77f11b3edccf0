// feed_forward for torch: down(gelu(up(x))), by blocks of rows. Between the GEMMs one pass computes the
// activations; backward recomputes them in one pass with the gradient of the pre-activations, in place. Only
// the pre-activations are saved.
#include "kernels/feed_forward.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "kernels/cpu/dispatch/dispatch.h"
#include "kernels/cuda/launch.h"
#include "ops/gemm.h"

namespace wgpt {
namespace {

constexpr const char* kOp = "feed_forward";
constexpr const char* kBackward = "feed_forward_backward";

void launch(const GeluForward& call, const Tensor& where) {
  if (!on_cuda(where)) return cpu::active().gelu_forward(call, torch_executor());
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kOp, where);
  check_launch(kOp, cuda::gelu_forward(call, scope.stream()));
#else
  fail_without_cuda(kOp);
#endif
}

void launch(const GeluBackward& call, const Tensor& where) {
  if (!on_cuda(where)) return cpu::active().gelu_backward(call, torch_executor());
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kBackward, where);
  check_launch(kBackward, cuda::gelu_backward(call, scope.stream()));
#else
  fail_without_cuda(kBackward);
#endif
}

void check_inputs(const char* op, const Tensor& x, const Tensor& up, const Tensor& down) {
  floating_type(op, "x", x);
  check_shape(op, "x", x, "(N, C)", {kAny, kAny});
  check_shape(op, "up", up, "(F, C)", {kAny, x.size(1)});
  check_shape(op, "down", down, "(C, F)", {x.size(1), up.size(0)});
  check_dtype(op, "up", up, x.scalar_type(), " like x");
  check_dtype(op, "down", down, x.scalar_type(), " like x");
  check_same_device(op, "up", up, "x", x);
  check_same_device(op, "down", down, "x", x);
}

void check(const Tensor& x, const Tensor& up, const Tensor& down) {
  check_inputs(kOp, x, up, down);
}

// x (N, C), up (F, C), down (C, F) -> y (N, C), z (N, F) the pre-activations
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& up, const Tensor& down) {
  check_inputs(kOp, x, up, down);
  const DType dtype = element_type(kOp, "x", x);
  const int64_t n = x.size(0), hidden = up.size(0), block_rows = rows_per_block(x);
  Tensor y = empty(x, {n, x.size(1)}), z = empty(x, {n, hidden});
  const Tensor active_memory = empty(x, {block_rows, hidden});
  ReusedOperand up_columns{transposed(up)}, down_columns{transposed(down)};
  for (int64_t begin = 0; begin < n; begin += block_rows) {
    const int64_t n_rows = std::min(block_rows, n - begin);
    const Tensor z_rows = rows_of(z, begin, n_rows), active = rows_of(active_memory, 0, n_rows);
    gemm(z_rows, rows_of(x, begin, n_rows), up_columns);
    const GeluForward call{dtype, z_rows.numel(), z_rows.const_data_ptr(),
                           active.mutable_data_ptr()};
    launch(call, x);
    gemm(rows_of(y, begin, n_rows), active, down_columns);
  }
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_y, const Tensor& x, const Tensor& z_in,
                                            const Tensor& up, const Tensor& down) {
  check_inputs(kBackward, x, up, down);
  const DType dtype = element_type(kBackward, "x", x);
  const int64_t n = x.size(0), channels = x.size(1), hidden = up.size(0),
                block_rows = rows_per_block(x);
  const bool by_blocks = accumulates_by_blocks(dtype);
  check_shape(kBackward, "d_y", d_y, "(N, C)", {n, channels});
  check_shape(kBackward, "z", z_in, "(N, F)", {n, hidden});
  check_dtype(kBackward, "d_y", d_y, x.scalar_type(), " like x");
  check_dtype(kBackward, "z", z_in, x.scalar_type(), " like x");
  check_same_device(kBackward, "d_y", d_y, "x", x);
  check_same_device(kBackward, "z", z_in, "x", x);
  const Tensor z = contiguous(z_in);
  const int64_t n_kept = by_blocks ? block_rows : n;
  const Tensor active_memory = empty(x, {n_kept, hidden}), d_z_memory = empty(x, {n_kept, hidden});
  Tensor d_x = empty(x, {n, channels}), d_up = empty(x, {hidden, channels}),
         d_down = empty(x, {channels, hidden});
  if (n == 0) return {d_x, zeroed(d_up), zeroed(d_down)};
  ReusedOperand up_rows{up}, down_rows{down};
  for (int64_t begin = 0; begin < n; begin += block_rows) {
    const int64_t n_rows = std::min(block_rows, n - begin), at = by_blocks ? 0 : begin;
    const Tensor x_rows = rows_of(x, begin, n_rows), z_rows = rows_of(z, begin, n_rows),
                 d_y_rows = rows_of(d_y, begin, n_rows),
                 active = rows_of(active_memory, at, n_rows), d_z = rows_of(d_z_memory, at, n_rows);
    gemm(d_z, d_y_rows, down_rows);
    const GeluBackward call{dtype,
                            z_rows.numel(),
                            z_rows.const_data_ptr(),
                            d_z.const_data_ptr(),
                            active.mutable_data_ptr(),
                            d_z.mutable_data_ptr()};
    launch(call, x);
    gemm(rows_of(d_x, begin, n_rows), d_z, up_rows);
    if (!by_blocks) continue;
    gemm(d_down, transposed(d_y_rows), active, begin > 0);
    gemm(d_up, transposed(d_z), x_rows, begin > 0);
  }
  if (!by_blocks) {
    gemm(d_down, transposed(d_y), active_memory);
    gemm(d_up, transposed(d_z_memory), x);
  }
  return {d_x, d_up, d_down};
}

void register_ops(Library& m) {
  m.impl("feed_forward", TORCH_BOX(&forward));
  m.impl("feed_forward_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace wgpt

WGPT_REGISTER_OPS(CPU)
WGPT_REGISTER_OPS(CUDA)
WGPT_REGISTER_CHECK("feed_forward")
