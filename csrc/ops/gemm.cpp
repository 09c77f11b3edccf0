#include "ops/gemm.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "kernels/cpu/dispatch/dispatch.h"

namespace wgpt {

namespace {

// `matrix`, or a contiguous copy where neither of its strides is 1.
Tensor with_unit_stride(const Tensor& matrix) {
  return matrix.stride(0) == 1 || matrix.stride(1) == 1 ? matrix : wgpt::contiguous(matrix);
}

// Whether the target in use has computed the GEMM. Where it could not, an accumulated `out` stays as it is:
// it holds NaN. packed: of b, written or reused.
bool gemm_by_target(const Tensor& out, const Tensor& a_in, const Tensor& b_in, bool accumulate,
                    std::optional<Tensor>* packed = nullptr) {
  const cpu::Kernels& kernels = cpu::active();
  const Tensor a = with_unit_stride(a_in), b = with_unit_stride(b_in);
  Gemm call{element_type("gemm", "out", out),
            a.size(0),
            b.size(1),
            a.size(1),
            a.const_data_ptr(),
            b.const_data_ptr(),
            a.stride(0),
            a.stride(1),
            b.stride(0),
            b.stride(1),
            out.mutable_data_ptr(),
            out.stride(0),
            accumulate,
            packed == nullptr     ? Packing::kPackPerCall
            : packed->has_value() ? Packing::kPackedBefore
                                  : Packing::kPackAndKeep,
            nullptr};
  if (!kernels.prefers_own_gemm(call)) return false;
  const Tensor scratch = call.b_packing == Packing::kPackedBefore
                             ? **packed
                             : workspace(out, kernels.gemm_workspace_bytes(call));
  call.workspace = scratch.mutable_data_ptr();
  if (packed != nullptr) *packed = scratch;
  return kernels.gemm(call, torch_executor()) || accumulate;
}

void gemm_by_torch(const Tensor& out, const Tensor& a, const Tensor& b) {
  check_torch(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

}  // namespace

void gemm(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (gemm_by_target(out, a, b, accumulate)) return;
  if (!accumulate) return gemm_by_torch(out, a, b);
  check_torch(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

void gemm(const Tensor& out, const Tensor& a, ReusedOperand& b) {
  if (!gemm_by_target(out, a, b.b, false, &b.packed)) gemm_by_torch(out, a, b.b);
}

int64_t rows_per_block(int64_t n) {
  // Measured, float32, two cores of a Sapphire Rapids, forward and backward of feed_forward: 1536 takes
  // 2 to 3 % less than 768; 3000 the same or more, and more memory.
  constexpr int64_t kRows = 1536;
  return std::min(n, kRows);
}

bool accumulates_by_blocks(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64;
}

}  // namespace wgpt
