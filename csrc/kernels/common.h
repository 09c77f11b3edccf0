// What every kernel contract shares: the element types, the executor that CPU kernels run on, and the alphabet.
//
//   B batch   T steps (1/75 s)   M mel bins   V entries of a codebook   C channels (Cm mel, Ct token)
//   H heads   D channels per head
//
// Contracts know no torch: they are pointers, sizes and strides. All strides count elements, not bytes.
#pragma once

#include <cstdint>
#include <type_traits>

namespace wgpt {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// How a CPU kernel spreads its tasks. The caller brings the thread pool (torch's, in the extension; a plain loop, in a
// test), so the kernels need none of their own. Results must not depend on how [0, n) is cut.
struct Executor {
  void (*run)(int64_t n, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end),
              void* context);
  int n_threads;
};

// Calls body(begin, end) over disjoint ranges that cover [0, n), perhaps concurrently; grain is the smallest range.
template <typename Body>
void parallel_for(const Executor& executor, int64_t n, int64_t grain, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  executor.run(
      n, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<Plain*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace wgpt
