// What every op needs of torch besides its arguments: memory, torch's thread pool, and the current
// CUDA stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "checks.h"
#include "kernels/common.h"
#include "kernels/out_of_memory.h"

namespace wgpt {

// Throws what torch itself says about a failed call of its C interface, where this torch tells (2.13 does).
void check_torch(AOTITorchError status);

// An uninitialised contiguous tensor on the device of `like`. Throws OutOfMemory.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty(like, sizes, like.scalar_type());
}

// An uninitialised contiguous tensor with the shape and device of `like`.
Tensor empty_shaped_like(const Tensor& like, ScalarType dtype);

// `tensor`, or a copy of it, with contiguous memory.
Tensor contiguous(const Tensor& tensor);

// The values of `from`, of the same shape, written to the memory of `to`.
void copy_to(const Tensor& to, const Tensor& from);

// `tensor` filled with zeros: the gradient of what no step used.
Tensor zeroed(Tensor tensor);

// `tensor`, or a contiguous copy where its last axis is strided. Alignment is for kernels to check.
Tensor with_dense_rows(const Tensor& tensor);

Tensor transposed(const Tensor& matrix);

// [begin, begin + n) along an axis of `tensor`, in its memory.
Tensor narrow(const Tensor& tensor, int64_t axis, int64_t begin, int64_t n);

// Rows [begin, begin + n) of `tensor`, in its memory.
inline Tensor rows_of(const Tensor& tensor, int64_t begin, int64_t n) {
  return narrow(tensor, 0, begin, n);
}

// The first n columns of `matrix`, in its memory.
inline Tensor first_columns(const Tensor& matrix, int64_t n) { return narrow(matrix, 1, 0, n); }

// Kernel scratch memory: torch aligns every allocation to 64 bytes or more.
inline Tensor workspace(const Tensor& like, size_t n_bytes) {
  return empty(like, {static_cast<int64_t>(n_bytes)}, ScalarType::Byte);
}

// torch's intra-op thread pool. It cuts [0, n) into at most one contiguous range per thread. What a range throws is
// thrown again, as it is, when all are done.
Executor torch_executor();

// Whether the CUDA kernels take `tensor`. This and CudaScope are ops/device.cpp, in whose place tests put a
// file that lets the SIMT emulator stand for a GPU.
bool on_cuda(const Tensor& tensor);
inline bool on_cpu(const Tensor& tensor) { return tensor.is_cpu() && !on_cuda(tensor); }

// The device of `tensor` made current for a scope, and torch's stream there.
class CudaScope {
 public:
  CudaScope(const char* op, const Tensor& tensor);
  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

// Throws what a launcher answers, nullptr excepted: its refusal, "OP: reason", or what CUDA says.
void check_launch(const char* op, const char* failure);

[[noreturn]] inline void fail_without_cuda(const char* op) {
  fail(op,
       "this build of wgpt has no CUDA kernels for tensors on CUDA devices. Build it where nvcc is "
       "found: "
       "WGPT_CUDA=ON pip install .");
}

using Library = torch::stable::detail::StableLibrary;

}  // namespace wgpt

// Registers wgpt::check as the checks by themselves of the op `name` (ops/schemas.cpp), for any device.
#define WGPT_REGISTER_CHECK(name)                                         \
  STABLE_TORCH_LIBRARY_IMPL(wgpt_kernels, CompositeExplicitAutograd, m) { \
    m.impl("check_" name, TORCH_BOX(&wgpt::check));                       \
  }

// Gives the ops that wgpt::register_ops of this file names their kernel on a device, under both of their
// names (ops/schemas.cpp).
#define WGPT_REGISTER_OPS(device)                                       \
  STABLE_TORCH_LIBRARY_IMPL(wgpt, device, m) { wgpt::register_ops(m); } \
  STABLE_TORCH_LIBRARY_IMPL(wgpt_kernels, device, m) { wgpt::register_ops(m); }
