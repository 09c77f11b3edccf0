// The CUDA spellings of the emulator, so that kernel source reads the same under nvcc and under a C++ compiler. Include
// it last: threadIdx and its kin are macros here.
#pragma once

#include <cmath>
#include <cstring>

#include "simt/numbers.h"
#include "simt/simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx (::simt::current_view->thread)
#define blockIdx (::simt::current_view->block)
#define blockDim (::simt::current_view->block_dim)
#define gridDim (::simt::current_view->grid_dim)

using dim3 = simt::Dim3;

inline void __syncthreads() { simt::sync_threads(); }
inline int __syncthreads_count(int p) { return simt::sync_threads_count(p); }
inline int __syncthreads_or(int p) { return simt::sync_threads_count(p) > 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::sync_warp(mask); }
inline unsigned __ballot_sync(unsigned mask, int p) { return simt::ballot(mask, p); }
inline int __any_sync(unsigned mask, int p) { return simt::ballot(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return simt::ballot(mask, !p) == 0; }
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  static_assert(sizeof(T) == 4, "32-bit values");
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return simt::match_any(mask, bits);
}

namespace simt {
template <typename T, typename Move>
T shuffle_as(T value, const Move& move) {
  static_assert(sizeof(T) == 4, "32-bit values");
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = move(bits);
  std::memcpy(&value, &bits, 4);
  return value;
}
}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return simt::shuffle_as(
      value, [=](uint32_t v) { return simt::shuffle(mask, v, lane, width, "__shfl_sync"); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return simt::shuffle_as(value,
                          [=](uint32_t v) { return simt::shuffle_xor(mask, v, bits, width); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  return simt::shuffle_as(value,
                          [=](uint32_t v) { return simt::shuffle_up(mask, v, delta, width); });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  return simt::shuffle_as(value,
                          [=](uint32_t v) { return simt::shuffle_down(mask, v, delta, width); });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __uint_as_float(unsigned x) { return simt::bits_float(x); }
inline unsigned __float_as_uint(float x) { return simt::float_bits(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// ---- the part of the runtime that starts a kernel ----------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {  // positions are the toolkit's; two of its names are macros here
  dim3 grid, block;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

namespace simt {
inline const char* launch_report = "no error";  // of the latest cudaLaunchKernelEx
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (simt::allow_shared(kernel, static_cast<size_t>(bytes))) return cudaSuccess;
  simt::launch_report = "invalid argument: more than 227 KiB of dynamic shared memory";
  return cudaErrorInvalidValue;
}
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
  const bool other = simt::current_stream != nullptr && config->stream != simt::current_stream;
  const char* report =
      other ? "launched on another stream than the current one"
            : simt::launch(config->grid, config->block, config->dynamicSmemBytes, kernel, args...);
  if (report == nullptr) return cudaSuccess;
  simt::launch_report = report;
  return cudaErrorLaunchFailure;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return simt::launch_report; }

// The race build must not take an atomic for a plain access, hence no instrumentation here.
#define SIMT_ATOMIC     \
  template <typename T> \
  __attribute__((no_sanitize("thread"), noinline))
SIMT_ATOMIC T atomicAdd(T* p, T value) {
  simt::atomic_access(p, sizeof(T));
  const T old = *p;
  *p = old + value;
  return old;
}
SIMT_ATOMIC T atomicMax(T* p, T value) {
  simt::atomic_access(p, sizeof(T));
  const T old = *p;
  if (value > old) *p = value;
  return old;
}
SIMT_ATOMIC T atomicCAS(T* p, T expected, T value) {
  simt::atomic_access(p, sizeof(T));
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}
#undef SIMT_ATOMIC
