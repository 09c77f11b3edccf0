#include "ops/gemm.h"

#include <dlfcn.h>
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

// A function of the libtorch_cuda already loaded, as in ops/device.cpp.
template <typename Function>
Function in_torch_cuda(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  void* symbol = library == nullptr ? nullptr : dlsym(library, name);
  if (symbol == nullptr) throw std::runtime_error(std::string("libtorch_cuda.so has no ") + name);
  return reinterpret_cast<Function>(symbol);
}

// Torch's own kernels, without its dispatcher: no autograd and no autocast between.
void gemm_by_torch(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (out.is_cuda()) {
    if (accumulate) {
      static const auto addmm_out =
          in_torch_cuda<decltype(&aoti_torch_cpu_addmm_out)>("aoti_torch_cuda_addmm_out");
      return check_torch(addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
    }
    static const auto mm_out =
        in_torch_cuda<decltype(&aoti_torch_cpu_mm_out)>("aoti_torch_cuda_mm_out");
    return check_torch(mm_out(out.get(), a.get(), b.get()));
  }
  if (accumulate) {
    return check_torch(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  }
  check_torch(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

}  // namespace

void gemm(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (on_cpu(out) && gemm_by_target(out, a, b, accumulate)) return;
  gemm_by_torch(out, a, b, accumulate);
}

void gemm(const Tensor& out, const Tensor& a, ReusedOperand& b) {
  if (on_cpu(out) && gemm_by_target(out, a, b.b, false, &b.packed)) return;
  gemm_by_torch(out, a, b.b, false);
}

int64_t rows_per_block(const Tensor& x) {
  // Measured, float32, two cores of a Sapphire Rapids, forward and backward of feed_forward: 1536 takes
  // 2 to 3 % less than 768; 3000 the same or more, and more memory.
  constexpr int64_t kRows = 1536;
  // One GEMM for a batch of training: 16384 x 1025 logits in float32 are 67 MB.
  constexpr int64_t kCudaRows = 16384;
  return std::min(x.size(0), on_cuda(x) ? kCudaRows : kRows);
}

bool accumulates_by_blocks(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64;
}

}  // namespace wgpt
