// feed_forward for torch: down(gelu(up(x))), block of rows by block of rows, so that the GELU and the
// second product find in a cache what the first has written. Only the pre-activations are kept for
// backward; the activations are made again where their gradient is.
#include "kernels/feed_forward.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "kernels/cpu/dispatch.h"
#include "ops/products.h"

namespace wgpt {
namespace {

constexpr const char* kOp = "feed_forward";
constexpr const char* kBackward = "feed_forward_backward";
constexpr int64_t kBlockRows = 256;

void check_inputs(const char* op, const Tensor& x, const Tensor& up, const Tensor& down) {
  element_type(op, "x", x);
  check_shape(op, "x", x, "(N, C)", {kAny, kAny});
  check_shape(op, "up", up, "(F, C)", {kAny, x.size(1)});
  check_shape(op, "down", down, "(C, F)", {x.size(1), up.size(0)});
  check_dtype(op, "up", up, x.scalar_type(), " like x");
  check_dtype(op, "down", down, x.scalar_type(), " like x");
}

// x (N, C), up (F, C), down (C, F) -> y (N, C), z (N, F) the pre-activations
std::tuple<Tensor, Tensor> forward(const Tensor& x_in, const Tensor& up_in, const Tensor& down_in) {
  check_inputs(kOp, x_in, up_in, down_in);
  const Tensor x = contiguous(x_in), up = contiguous(up_in), down = contiguous(down_in);
  const int64_t n = x.size(0), hidden = up.size(0);
  Tensor y = empty(x, {n, x.size(1)}), z = empty(x, {n, hidden});
  for_each_block(n, kBlockRows, [&](int64_t begin, int64_t end) {
    const Tensor active = empty(x, {end - begin, hidden});
    const Matrix z_rows = Matrix(z).slice_rows(begin, end);
    multiply(z_rows, Matrix(x).slice_rows(begin, end), Matrix(up).transposed());
    GeluForward call{element_type(kOp, "x", x), z_rows.numel(), z_rows.data,
                     active.mutable_data_ptr()};
    cpu::active().gelu_forward(call, this_thread());
    multiply(Matrix(y).slice_rows(begin, end), Matrix(active), Matrix(down).transposed());
  });
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_y_in, const Tensor& x_in,
                                            const Tensor& z_in, const Tensor& up_in,
                                            const Tensor& down_in) {
  check_inputs(kBackward, x_in, up_in, down_in);
  const int64_t n = x_in.size(0), channels = x_in.size(1), hidden = up_in.size(0);
  check_shape(kBackward, "d_y", d_y_in, "(N, C)", {n, channels});
  check_shape(kBackward, "z", z_in, "(N, F)", {n, hidden});
  check_dtype(kBackward, "d_y", d_y_in, x_in.scalar_type(), " like x");
  check_dtype(kBackward, "z", z_in, x_in.scalar_type(), " like x");
  const Tensor d_y = contiguous(d_y_in), x = contiguous(x_in), z = contiguous(z_in),
               up = contiguous(up_in), down = contiguous(down_in);
  Tensor d_x = empty(x, {n, channels}), d_up = empty(x, {hidden, channels}),
         d_down = empty(x, {channels, hidden});
  const Tensor active = empty(x, {n, hidden}), d_z = empty(x, {n, hidden});
  for_each_block(n, kBlockRows, [&](int64_t begin, int64_t end) {
    const Matrix d_rows = Matrix(d_z).slice_rows(begin, end);
    multiply(d_rows, Matrix(d_y).slice_rows(begin, end), Matrix(down));
    GeluBackward call{element_type(kBackward, "x", x),
                      d_rows.numel(),
                      Matrix(z).slice_rows(begin, end).data,
                      d_rows.data,
                      Matrix(active).slice_rows(begin, end).data,
                      d_rows.data};
    cpu::active().gelu_backward(call, this_thread());
    multiply(Matrix(d_x).slice_rows(begin, end), d_rows, Matrix(up));
  });
  multiply_transposed(Matrix(d_up), Matrix(d_z), Matrix(x));
  multiply_transposed(Matrix(d_down), Matrix(d_y), Matrix(active));
  return {d_x, d_up, d_down};
}

}  // namespace
}  // namespace wgpt

STABLE_TORCH_LIBRARY_IMPL(wgpt, CPU, m) {
  m.impl("feed_forward", TORCH_BOX(&wgpt::forward));
  m.impl("feed_forward_backward", TORCH_BOX(&wgpt::backward));
}
