// feed_forward for torch: down(gelu(up(x))). The products are torch's; one pass makes the activations,
// and in backward one pass makes them again together with the gradient of the pre-activations, in the
// place of theirs. Only the pre-activations are kept.
#include "kernels/feed_forward.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"
#include "kernels/cpu/dispatch.h"
#include "ops/runtime.h"

namespace wgpt {
namespace {

constexpr const char* kOp = "feed_forward";
constexpr const char* kBackward = "feed_forward_backward";

void check_inputs(const char* op, const Tensor& x, const Tensor& up, const Tensor& down) {
  element_type(op, "x", x);
  check_shape(op, "x", x, "(N, C)", {kAny, kAny});
  check_shape(op, "up", up, "(F, C)", {kAny, x.size(1)});
  check_shape(op, "down", down, "(C, F)", {x.size(1), up.size(0)});
  check_dtype(op, "up", up, x.scalar_type(), " like x");
  check_dtype(op, "down", down, x.scalar_type(), " like x");
}

// x (N, C), up (F, C), down (C, F) -> y (N, C), z (N, F) the pre-activations
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& up, const Tensor& down) {
  check_inputs(kOp, x, up, down);
  const int64_t n = x.size(0), hidden = up.size(0);
  Tensor y = empty(x, {n, x.size(1)}), z = empty(x, {n, hidden});
  const Tensor active = empty(x, {n, hidden});
  multiply(z, x, transposed(up));
  const GeluForward call{element_type(kOp, "x", x), z.numel(), z.const_data_ptr(),
                         active.mutable_data_ptr()};
  cpu::active().gelu_forward(call, torch_executor());
  multiply(y, active, transposed(down));
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_y, const Tensor& x, const Tensor& z_in,
                                            const Tensor& up, const Tensor& down) {
  check_inputs(kBackward, x, up, down);
  const int64_t n = x.size(0), channels = x.size(1), hidden = up.size(0);
  check_shape(kBackward, "d_y", d_y, "(N, C)", {n, channels});
  check_shape(kBackward, "z", z_in, "(N, F)", {n, hidden});
  check_dtype(kBackward, "d_y", d_y, x.scalar_type(), " like x");
  check_dtype(kBackward, "z", z_in, x.scalar_type(), " like x");
  const Tensor z = contiguous(z_in), active = empty(x, {n, hidden}), d_z = empty(x, {n, hidden});
  Tensor d_x = empty(x, {n, channels}), d_up = empty(x, {hidden, channels}),
         d_down = empty(x, {channels, hidden});
  multiply(d_z, d_y, down);
  const GeluBackward call{element_type(kBackward, "x", x),
                          z.numel(),
                          z.const_data_ptr(),
                          d_z.const_data_ptr(),
                          active.mutable_data_ptr(),
                          d_z.mutable_data_ptr()};
  cpu::active().gelu_backward(call, torch_executor());
  multiply(d_down, transposed(d_y), active);
  multiply(d_up, transposed(d_z), x);
  multiply(d_x, d_z, up);
  return {d_x, d_up, d_down};
}

}  // namespace
}  // namespace wgpt

STABLE_TORCH_LIBRARY_IMPL(wgpt, CPU, m) {
  m.impl("feed_forward", TORCH_BOX(&wgpt::forward));
  m.impl("feed_forward_backward", TORCH_BOX(&wgpt::backward));
}
