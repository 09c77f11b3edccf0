#include "ops/runtime.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "checks.h"

namespace wgpt {

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  // The shim's own call: torch::stable::new_empty goes through the boxed dispatcher.
  std::array<int64_t, 8> strides{};
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  const auto error =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
                               shim_dtype, device_type, like.get_device_index(), &handle);
  if (error != 0) {  // torch's own words do not pass its C interface; sizes were checked before
    throw std::runtime_error("out of memory: cannot allocate " + shape_text(sizes) + " of " +
                             dtype_text(dtype) + " on " + device_text(like));
  }
  return Tensor(handle);
}

Tensor empty_shaped_like(const Tensor& like, ScalarType dtype) {
  Tensor flat = empty(like, {like.numel()}, dtype);
  return torch::stable::view(flat, like.sizes());
}

Tensor contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor zeroed(Tensor tensor) { return torch::stable::zero_(tensor); }

Tensor with_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool dense = tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return dense ? tensor : torch::stable::contiguous(tensor);
}

Tensor rows_of(const Tensor& tensor, int64_t begin, int64_t n) {
  Tensor whole = tensor;
  return torch::stable::narrow(whole, 0, begin, n);
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

Executor torch_executor() {
  uint32_t n_threads = 1;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&n_threads));
  const auto run = [](int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t),
                      void* context) {
    struct Task {
      void (*body)(void*, int64_t, int64_t);
      void* context;
    } task{body, context};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(
        0, n, grain,
        [](int64_t begin, int64_t end, void* opaque) {
          const Task& task = *static_cast<Task*>(opaque);
          task.body(task.context, begin, end);
        },
        &task));
  };
  return {run, static_cast<int>(n_threads)};
}

namespace {

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// Looked up in the libtorch_cuda already loaded, never linked: one binary serves CPU-only torch
// too.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace

CudaScope::CudaScope(const char* op, const Tensor& tensor) : guard_(tensor.get_device_index()) {
  static const CurrentStream current_stream = find_current_stream();
  if (current_stream == nullptr) {
    fail(op, "libtorch_cuda.so must be loaded to run on ", device_text(tensor),
         ": install a CUDA build of torch");
  }
  STABLE_TORCH_ERROR_CODE_CHECK(current_stream(tensor.get_device_index(), &stream_));
}

void check_launch(const char* op, const char* failure) {
  if (failure != nullptr)
    throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + failure);
}

}  // namespace wgpt
