#include "ops/runtime.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <exception>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>

#include "checks.h"

namespace wgpt {

namespace {

using WhatHappened = const char* (*)();

// torch's own words about the failure of the last call: a symbol of torch 2.13, looked up where it is.
const char* torch_says() {
  static const auto what = reinterpret_cast<WhatHappened>(
      dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return what == nullptr ? "" : what();
}

bool says_out_of_memory(const std::string& words) {
  return words.find("out of memory") != std::string::npos ||
         words.find("t allocate memory") != std::string::npos;
}

int64_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      return 1;  // workspaces
  }
}

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

// numel: of the tensor that torch did not give, or kHuge; words: what torch says.
[[noreturn]] void fail_to_allocate(const Tensor& like, std::initializer_list<int64_t> sizes,
                                   ScalarType dtype, int64_t numel, const std::string& words) {
  if (!words.empty() && !says_out_of_memory(words)) throw std::runtime_error(words);
  std::ostringstream message;
  message << "out of memory on " << device_text(like) << ": a " << dtype_text(dtype)
          << " tensor of shape " << shape_text(sizes) << " needs ";
  if (numel >= kHuge / element_bytes(dtype)) {
    message << "2^63 or more";
  } else {
    message << numel * element_bytes(dtype);
  }
  message << " bytes. Lower the batch size or the length";
  if (!words.empty()) message << ". torch says: " << words;
  throw OutOfMemory(message.str());
}

[[noreturn]] void throw_what_torch_says() {
  const std::string words = torch_says();
  if (says_out_of_memory(words)) throw OutOfMemory(words);
  throw std::runtime_error(words.empty() ? "torch failed, and this torch (before 2.13) says no more"
                                         : words);
}

// What a function of torch's stable headers returns. Those of 2.10 say where a call failed, not why.
template <typename Call>
auto in_torch(Call&& call) {
  try {
    return call();
  } catch (const std::runtime_error&) {
    throw_what_torch_says();
  }
}

}  // namespace

void check_torch(AOTITorchError status) {
  if (status != AOTI_TORCH_SUCCESS) throw_what_torch_says();
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  // The shim's own call: torch::stable::new_empty goes through the boxed dispatcher.
  std::array<int64_t, 8> strides{};
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    const int64_t size = std::max<int64_t>(sizes.begin()[i], 1);
    stride = stride > kHuge / size ? kHuge : stride * size;
  }
  const bool is_empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
  if (stride >= kHuge / element_bytes(dtype) && !is_empty)
    fail_to_allocate(like, sizes, dtype, kHuge, "");
  int32_t device_type = 0;
  check_torch(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
                               shim_dtype, device_type, like.get_device_index(), &handle);
  if (status != AOTI_TORCH_SUCCESS) fail_to_allocate(like, sizes, dtype, stride, torch_says());
  return Tensor(handle);
}

Tensor empty_shaped_like(const Tensor& like, ScalarType dtype) {
  Tensor flat = empty(like, {like.numel()}, dtype);
  return in_torch([&] { return torch::stable::view(flat, like.sizes()); });
}

Tensor contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  Tensor dense = empty_shaped_like(tensor, tensor.scalar_type());
  copy_to(dense, tensor);
  return dense;
}

void copy_to(const Tensor& to, const Tensor& from) {
  in_torch([&] {
    Tensor written = to;
    return torch::stable::copy_(written, from);
  });
}

Tensor zeroed(Tensor tensor) {
  return in_torch([&] { return torch::stable::zero_(tensor); });
}

Tensor with_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool dense = tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return dense ? tensor : wgpt::contiguous(tensor);
}

Tensor narrow(const Tensor& tensor, int64_t axis, int64_t begin, int64_t n) {
  return in_torch([&] {
    Tensor whole = tensor;
    return torch::stable::narrow(whole, axis, begin, n);
  });
}

Tensor transposed(const Tensor& matrix) {
  return in_torch([&] { return torch::stable::transpose(matrix, 0, 1); });
}

Executor torch_executor() {
  uint32_t n_threads = 1;
  check_torch(torch_get_num_threads(&n_threads));
  const auto run = [](int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t),
                      void* context) {
    struct Task {
      void (*body)(void*, int64_t, int64_t);
      void* context;
      std::mutex mutex{};
      std::exception_ptr failure{};  // the first; through torch it would lose its type
    } task{body, context};
    check_torch(torch_parallel_for(
        0, n, grain,
        [](int64_t begin, int64_t end, void* opaque) {
          Task& task = *static_cast<Task*>(opaque);
          try {
            task.body(task.context, begin, end);
          } catch (...) {
            const std::lock_guard<std::mutex> lock(task.mutex);
            if (!task.failure) task.failure = std::current_exception();
          }
        },
        &task));
    if (task.failure) std::rethrow_exception(task.failure);
  };
  return {run, static_cast<int>(n_threads)};
}

void check_launch(const char* op, const char* failure) {
  if (failure == nullptr) return;
  const std::string name = op, words = failure;
  const size_t colon = words.find(": ");
  const bool refused = colon != std::string::npos && name.compare(0, colon, words, 0, colon) == 0;
  throw std::runtime_error(name +
                           (refused ? words.substr(colon) : ": CUDA launch failed: " + words));
}

}  // namespace wgpt
