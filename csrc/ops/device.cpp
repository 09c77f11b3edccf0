// Which device the CUDA kernels run on, and its current stream.
#include <dlfcn.h>

#include "ops/runtime.h"

namespace wgpt {
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

bool on_cuda(const Tensor& tensor) { return tensor.is_cuda(); }

CudaScope::CudaScope(const char* op, const Tensor& tensor) {
  guard_.emplace(tensor.get_device_index());
  static const CurrentStream current_stream = find_current_stream();
  if (current_stream == nullptr) {
    fail(op, "libtorch_cuda.so must be loaded to run on ", device_text(tensor),
         ": install a CUDA build of torch");
  }
  check_torch(current_stream(tensor.get_device_index(), &stream_));
}

}  // namespace wgpt
