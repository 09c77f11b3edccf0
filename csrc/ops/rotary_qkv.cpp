// rotary_qkv for torch: checks, allocation and launch; the formula stands in kernels/rotary_qkv.h.
#include "kernels/rotary_qkv.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"
#include "kernels/cpu/dispatch/dispatch.h"
#include "kernels/cuda/launch.h"
#include "ops/runtime.h"

namespace wgpt {
namespace {

constexpr const char* kOp = "rotary_qkv";
constexpr const char* kBackward = "rotary_qkv_backward";

void launch(const RotaryForward& call, const Tensor& where) {
  if (!on_cuda(where)) return cpu::active().rotary_qkv_forward(call, torch_executor());
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kOp, where);
  check_launch(kOp, cuda::rotary_qkv_forward(call, scope.stream()));
#else
  fail_without_cuda(kOp);
#endif
}

void launch(const RotaryBackward& call, const Tensor& where) {
  if (!on_cuda(where)) return cpu::active().rotary_qkv_backward(call, torch_executor());
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kBackward, where);
  check_launch(kBackward, cuda::rotary_qkv_backward(call, scope.stream()));
#else
  fail_without_cuda(kBackward);
#endif
}

RotaryShape shape_of(const char* op, const char* name, const Tensor& like, int64_t batch,
                     int64_t steps, int64_t heads, int64_t head_dim, const Tensor& cos,
                     const Tensor& sin) {
  RotaryShape shape{floating_type(op, name, like), batch, steps, heads, head_dim};
  if (head_dim % 2 != 0) fail(op, "D must be even, got ", head_dim);
  check_shape(op, "cos", cos, "(T, D/2)", {steps, head_dim / 2});
  check_shape(op, "sin", sin, "(T, D/2)", {steps, head_dim / 2});
  check_dtype(op, "cos", cos, accumulation_type(shape.dtype));
  check_dtype(op, "sin", sin, accumulation_type(shape.dtype));
  check_same_device(op, "cos", cos, name, like);
  check_same_device(op, "sin", sin, name, like);
  return shape;
}

RotaryShape check_inputs(const Tensor& qkv, const Tensor& cos, const Tensor& sin) {
  check_shape(kOp, "qkv", qkv, "(B, T, 3, H, D)", {kAny, kAny, 3, kAny, kAny});
  return shape_of(kOp, "qkv", qkv, qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4), cos, sin);
}

void check(const Tensor& qkv, const Tensor& cos, const Tensor& sin) { check_inputs(qkv, cos, sin); }

// qkv (B, T, 3, H, D), cos and sin (T, D/2) -> q, k, v (B, T, H, D)
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& qkv_in, const Tensor& cos_in,
                                           const Tensor& sin_in) {
  RotaryForward call{};
  call.shape = check_inputs(qkv_in, cos_in, sin_in);
  element_type(kOp, "qkv", qkv_in);
  const auto& [dtype, batch, steps, heads, head_dim] = call.shape;
  const Tensor qkv = contiguous(qkv_in), cos = contiguous(cos_in), sin = contiguous(sin_in);
  Tensor q = empty(qkv, {batch, steps, heads, head_dim}),
         k = empty(qkv, {batch, steps, heads, head_dim}),
         v = empty(qkv, {batch, steps, heads, head_dim});
  if (q.numel() == 0) return {q, k, v};
  call.qkv = qkv.const_data_ptr();
  call.cos = cos.const_data_ptr();
  call.sin = sin.const_data_ptr();
  call.q = q.mutable_data_ptr();
  call.k = k.mutable_data_ptr();
  call.v = v.mutable_data_ptr();
  launch(call, qkv);
  return {q, k, v};
}

Tensor backward(const Tensor& dq_in, const Tensor& dk_in, const Tensor& dv_in, const Tensor& cos_in,
                const Tensor& sin_in) {
  check_shape(kBackward, "dq", dq_in, "(B, T, H, D)", {kAny, kAny, kAny, kAny});
  const int64_t batch = dq_in.size(0), steps = dq_in.size(1), heads = dq_in.size(2),
                head_dim = dq_in.size(3);
  check_shape(kBackward, "dk", dk_in, "(B, T, H, D)", {batch, steps, heads, head_dim});
  check_shape(kBackward, "dv", dv_in, "(B, T, H, D)", {batch, steps, heads, head_dim});
  check_dtype(kBackward, "dk", dk_in, dq_in.scalar_type(), " like dq");
  check_dtype(kBackward, "dv", dv_in, dq_in.scalar_type(), " like dq");
  check_same_device(kBackward, "dk", dk_in, "dq", dq_in);
  check_same_device(kBackward, "dv", dv_in, "dq", dq_in);
  RotaryBackward call{};
  call.shape = shape_of(kBackward, "dq", dq_in, batch, steps, heads, head_dim, cos_in, sin_in);
  const Tensor dq = contiguous(dq_in), dk = contiguous(dk_in), dv = contiguous(dv_in),
               cos = contiguous(cos_in), sin = contiguous(sin_in);
  Tensor d_qkv = empty(dq, {batch, steps, 3, heads, head_dim});
  if (d_qkv.numel() == 0) return d_qkv;
  call.dq = dq.const_data_ptr();
  call.dk = dk.const_data_ptr();
  call.dv = dv.const_data_ptr();
  call.cos = cos.const_data_ptr();
  call.sin = sin.const_data_ptr();
  call.d_qkv = d_qkv.mutable_data_ptr();
  launch(call, dq);
  return d_qkv;
}

void register_ops(Library& m) {
  m.impl("rotary_qkv", TORCH_BOX(&forward));
  m.impl("rotary_qkv_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace wgpt

WGPT_REGISTER_OPS(CPU)
WGPT_REGISTER_OPS(CUDA)
WGPT_REGISTER_CHECK("rotary_qkv")
