// linear for torch: y = x weight^T and its two gradients, three GEMMs (ops/gemm.h).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"
#include "ops/gemm.h"

namespace wgpt {
namespace {

void check_inputs(const char* op, const Tensor& x, const Tensor& weight) {
  floating_type(op, "x", x);
  check_shape(op, "x", x, "(N, C)", {kAny, kAny});
  check_shape(op, "weight", weight, "(F, C)", {kAny, x.size(1)});
  check_dtype(op, "weight", weight, x.scalar_type(), " like x");
  check_same_device(op, "weight", weight, "x", x);
}

void check(const Tensor& x, const Tensor& weight) { check_inputs("linear", x, weight); }

// x (N, C), weight (F, C) -> y (N, F)
Tensor forward(const Tensor& x, const Tensor& weight) {
  check_inputs("linear", x, weight);
  Tensor y = empty(x, {x.size(0), weight.size(0)});
  gemm(y, x, transposed(weight));
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& d_y, const Tensor& x, const Tensor& weight) {
  constexpr const char* kOp = "linear_backward";
  check_inputs(kOp, x, weight);
  check_shape(kOp, "d_y", d_y, "(N, F)", {x.size(0), weight.size(0)});
  check_dtype(kOp, "d_y", d_y, x.scalar_type(), " like x");
  Tensor d_x = empty(x, {x.size(0), x.size(1)});
  Tensor d_weight = empty(weight, {weight.size(0), weight.size(1)});
  gemm(d_x, d_y, weight);
  gemm(d_weight, transposed(d_y), x);
  return {d_x, d_weight};
}

void register_ops(Library& m) {
  m.impl("linear", TORCH_BOX(&forward));
  m.impl("linear_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace wgpt

WGPT_REGISTER_OPS(CPU)
WGPT_REGISTER_CHECK("linear")
