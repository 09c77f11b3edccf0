// packed_addmm for torch, a GEMM with prepacked b: checks, allocation and launch. The formula: kernels/gemm.h.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "checks.h"
#include "kernels/cpu/dispatch/dispatch.h"
#include "kernels/gemm.h"
#include "ops/runtime.h"

namespace wgpt {
namespace {

constexpr const char* kOp = "packed_addmm";

PanelType panel_type_of(const Tensor& panels) {
  switch (panels.scalar_type()) {
    case ScalarType::Float:
      return PanelType::kFloat32;
    case ScalarType::BFloat16:
      return PanelType::kBFloat16;
    case ScalarType::Char:
      return PanelType::kInt8;
    default:
      fail(kOp, "panels must be float32, bfloat16 or int8, got ", dtype_text(panels.scalar_type()));
  }
}

// x (M, K), panels (P, K, 64), addend (M, N) or (N,) or none, scale (N,) exactly with int8 -> (M, N)
Tensor forward(const Tensor& x_in, const Tensor& panels, const std::optional<Tensor>& addend_in,
               int64_t n, const std::optional<Tensor>& scale_in) {
  check_dtype(kOp, "x", x_in, ScalarType::Float);
  check_shape(kOp, "x", x_in, "(M, K)", {kAny, kAny});
  check_at_least(kOp, "columns", n, 0);
  const PanelType b_type = panel_type_of(panels);
  check_shape(kOp, "panels", panels, "(P, K, 64)",
              {n / kPanelColumns + (n % kPanelColumns != 0), x_in.size(1), kPanelColumns});
  if (!panels.is_contiguous()) fail(kOp, "panels must be contiguous");
  const Tensor x = with_dense_rows(x_in);
  Gemm call{};
  call.dtype = DType::kFloat32;
  call.m = x.size(0);
  call.n = n;
  call.k = x.size(1);
  call.a = x.const_data_ptr();
  call.a_row = x.stride(0);
  call.a_column = 1;
  call.b = panels.const_data_ptr();
  call.b_packing = Packing::kPrepacked;
  call.b_type = b_type;
  if (scale_in.has_value() != (b_type == PanelType::kInt8)) {
    fail(kOp, "scale must be given with int8 panels and with no others, got ",
         dtype_text(panels.scalar_type()), " panels and ",
         scale_in.has_value() ? "a scale" : "none");
  }
  std::optional<Tensor> scale;
  if (scale_in.has_value()) {
    check_dtype(kOp, "scale", *scale_in, ScalarType::Float);
    check_shape(kOp, "scale", *scale_in, "(N,)", {n});
    scale = contiguous(*scale_in);
    call.b_scale = scale->const_data_ptr<float>();
  }
  std::optional<Tensor> addend;
  if (addend_in.has_value()) {
    check_dtype(kOp, "addend", *addend_in, ScalarType::Float);
    const bool is_row = addend_in->dim() == 1;
    if (is_row) {
      check_shape(kOp, "addend", *addend_in, "(N,)", {n});
    } else {
      check_shape(kOp, "addend", *addend_in, "(M, N) or (N,)", {call.m, n});
    }
    addend = with_dense_rows(*addend_in);
    call.addend = addend->const_data_ptr();
    call.addend_row = is_row ? 0 : addend->stride(0);
  }
  Tensor y = empty(x, {call.m, n});
  call.c = y.mutable_data_ptr();
  call.c_row = n;
  if (call.m > 0 && n > 0) cpu::active().gemm(call, torch_executor());
  return y;
}

void register_ops(Library& m) { m.impl("packed_addmm", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace wgpt

WGPT_REGISTER_OPS(CPU)
