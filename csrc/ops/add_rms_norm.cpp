// add_rms_norm for torch: checks, allocation and launch; the formula stands in
// kernels/add_rms_norm.h.
#include "kernels/add_rms_norm.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "kernels/cpu/dispatch/dispatch.h"
#include "kernels/cuda/launch.h"
#include "ops/runtime.h"

namespace wgpt {
namespace {

constexpr const char* kOp = "add_rms_norm";
constexpr const char* kBackward = "add_rms_norm_backward";

void launch(const AddRmsNormForward& call, const Tensor& where) {
  if (!on_cuda(where)) return cpu::active().add_rms_norm_forward(call, torch_executor());
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kOp, where);
  check_launch(kOp, cuda::add_rms_norm_forward(call, scope.stream()));
#else
  fail_without_cuda(kOp);
#endif
}

void launch(AddRmsNormBackward& call, const Tensor& where) {
  if (!on_cuda(where)) {
    const Tensor scratch = workspace(where, add_rms_norm_backward_workspace_bytes(call.shape));
    call.workspace = scratch.mutable_data_ptr();
    return cpu::active().add_rms_norm_backward(call, torch_executor());
  }
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kBackward, where);
  const Tensor scratch = workspace(where, cuda::add_rms_norm_backward_workspace_bytes(call.shape));
  call.workspace = scratch.mutable_data_ptr();
  check_launch(kBackward, cuda::add_rms_norm_backward(call, scope.stream()));
#else
  fail_without_cuda(kBackward);
#endif
}

void check_same_shape(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  if (tensor.sizes() != x.sizes()) {
    fail(op, name, " must have the shape of x, ", shape_text(x.sizes()), ", got ",
         shape_text(tensor.sizes()));
  }
}

// Float64 throughout or nowhere: a float64 stream is for checking gradients.
void check_width(const char* op, const char* name, DType dtype, DType stream) {
  if ((dtype == DType::kFloat64) != (stream == DType::kFloat64))
    fail(op, name, " and x must both be float64 or neither");
}

AddRmsNormShape shape_of(const char* op, const Tensor& x, const Tensor& weight) {
  if (x.dim() < 1) fail(op, "x must have shape (..., C), got ", shape_text(x.sizes()));
  AddRmsNormShape shape{};
  shape.stream = floating_type(op, "x", x);
  shape.delta = shape.y = shape.stream;
  shape.channels = x.size(x.dim() - 1);
  shape.rows = shape.channels == 0 ? 0 : x.numel() / shape.channels;
  check_shape(op, "weight", weight, "(C,)", {shape.channels});
  check_dtype(op, "weight", weight, accumulation_type(shape.stream));
  check_same_device(op, "weight", weight, "x", x);
  return shape;
}

// Whether float64 throughout or nowhere, and the shapes.
AddRmsNormShape check_inputs(const Tensor& x, const std::optional<Tensor>& delta,
                             const Tensor& weight, ScalarType dtype) {
  AddRmsNormShape shape = shape_of(kOp, x, weight);
  if (delta.has_value()) {
    check_same_shape(kOp, "delta", *delta, x);
    check_same_device(kOp, "delta", *delta, "x", x);
    shape.delta = floating_type(kOp, "delta", delta->scalar_type());
    check_width(kOp, "delta", shape.delta, shape.stream);
  }
  shape.y = floating_type(kOp, "dtype", dtype);
  check_width(kOp, "dtype", shape.y, shape.stream);
  return shape;
}

void check(const Tensor& x, const std::optional<Tensor>& delta, const Tensor& weight,
           ScalarType dtype) {
  check_inputs(x, delta, weight, dtype);
}

// x (..., C), delta (..., C) or none, weight (C,) -> sum (..., C), or (0,) without delta; y (..., C)
// of type dtype; inv_rms (rows,)
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_in,
                                           const std::optional<Tensor>& delta_in,
                                           const Tensor& weight_in, double eps, ScalarType dtype) {
  AddRmsNormForward call{};
  call.shape = check_inputs(x_in, delta_in, weight_in, dtype);
  element_type(kOp, "x", x_in);
  call.eps = eps;
  const Tensor x = contiguous(x_in), weight = contiguous(weight_in);
  std::optional<Tensor> delta;
  if (delta_in.has_value()) {
    delta = contiguous(*delta_in);
    call.delta = delta->const_data_ptr();
  }
  Tensor y = empty_shaped_like(x, dtype);
  Tensor sum = delta.has_value() ? empty_shaped_like(x, x.scalar_type()) : empty(x, {0});
  Tensor inv_rms = empty(x, {call.shape.rows}, weight.scalar_type());
  if (call.shape.rows == 0) return {sum, y, inv_rms};
  call.x = x.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.sum = delta.has_value() ? sum.mutable_data_ptr() : nullptr;
  call.y = y.mutable_data_ptr();
  call.inv_rms = inv_rms.mutable_data_ptr();
  launch(call, x);
  return {sum, y, inv_rms};
}

// sum is what was normalised (x where there was no delta). delta_dtype: none where there was no
// delta or it has the type of x; d_delta is then (0,).
std::tuple<Tensor, Tensor, Tensor> backward(const std::optional<Tensor>& d_sum_in,
                                            const Tensor& d_y_in, const Tensor& sum_in,
                                            const Tensor& inv_rms_in, const Tensor& weight_in,
                                            std::optional<ScalarType> delta_dtype) {
  AddRmsNormBackward call{};
  call.shape = shape_of(kBackward, sum_in, weight_in);
  check_same_shape(kBackward, "d_y", d_y_in, sum_in);
  check_same_device(kBackward, "d_y", d_y_in, "x", sum_in);
  check_shape(kBackward, "inv_rms", inv_rms_in, "(rows,)", {call.shape.rows});
  check_same_device(kBackward, "inv_rms", inv_rms_in, "x", sum_in);
  check_dtype(kBackward, "inv_rms", inv_rms_in, weight_in.scalar_type());
  call.shape.y = element_type(kBackward, "d_y", d_y_in);
  check_width(kBackward, "d_y", call.shape.y, call.shape.stream);
  const Tensor d_y = contiguous(d_y_in), sum = contiguous(sum_in), weight = contiguous(weight_in),
               inv_rms = contiguous(inv_rms_in);
  std::optional<Tensor> d_sum;
  if (d_sum_in.has_value()) {
    check_same_shape(kBackward, "d_sum", *d_sum_in, sum);
    check_same_device(kBackward, "d_sum", *d_sum_in, "x", sum);
    check_dtype(kBackward, "d_sum", *d_sum_in, sum.scalar_type(), " like x");
    d_sum = contiguous(*d_sum_in);
    call.d_sum = d_sum->const_data_ptr();
  }
  Tensor d_x = empty_shaped_like(sum, sum.scalar_type()),
         d_weight = empty(weight, {call.shape.channels});
  Tensor d_delta = delta_dtype.has_value() ? empty_shaped_like(sum, *delta_dtype) : empty(sum, {0});
  if (call.shape.rows == 0) return {d_x, d_delta, zeroed(d_weight)};
  if (delta_dtype.has_value()) {
    call.shape.delta = element_type(kBackward, "delta_dtype", d_delta);
    check_width(kBackward, "delta_dtype", call.shape.delta, call.shape.stream);
    call.d_delta = d_delta.mutable_data_ptr();
  }
  call.d_y = d_y.const_data_ptr();
  call.sum = sum.const_data_ptr();
  call.inv_rms = inv_rms.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.d_x = d_x.mutable_data_ptr();
  call.d_weight = d_weight.mutable_data_ptr();
  launch(call, sum);
  return {d_x, d_delta, d_weight};
}

void register_ops(Library& m) {
  m.impl("add_rms_norm", TORCH_BOX(&forward));
  m.impl("add_rms_norm_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace wgpt

WGPT_REGISTER_OPS(CPU)
WGPT_REGISTER_OPS(CUDA)
WGPT_REGISTER_CHECK("add_rms_norm")
