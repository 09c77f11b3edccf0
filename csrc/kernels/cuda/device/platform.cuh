// Where a kernel runs: the CUDA toolkit under nvcc, the SIMT emulator (csrc/simt) under any other C++ compiler. Nothing
// above device/ may include a CUDA header, write PTX or use <<<>>>; it includes these files instead.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef __CUDACC__
#include <cuda_runtime.h>
// Static shared memory, poisoned and guarded on the emulator; one name, one array.
#define WGPT_SHARED(Type, name, count) __shared__ Type name[count]
// All dynamic shared memory of the launch, as bytes; at least 128-byte aligned.
#define WGPT_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#else
#include "simt/cuda_names.h"
#define WGPT_SHARED(Type, name, count) SIMT_SHARED(Type, name, count)
#define WGPT_DYNAMIC_SHARED(name) SIMT_DYNAMIC_SHARED(name)
#endif

// Loops to unroll: fully, or by n. A macro, for g++ warns of pragmas that it does not know.
#ifdef __CUDACC__
#define WGPT_PRAGMA(text) _Pragma(#text)
#define WGPT_UNROLL WGPT_PRAGMA(unroll)
#define WGPT_UNROLL_BY(n) WGPT_PRAGMA(unroll n)
#else
#define WGPT_UNROLL
#define WGPT_UNROLL_BY(n)
#endif

#define WGPT_DEVICE __device__ __forceinline__
#define WGPT_HOST_DEVICE __host__ __device__ __forceinline__

namespace wgpt::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;
constexpr size_t kSharedLimit =
    99 * 1024;  // bytes that every architecture from sm_80 on grants one block

template <typename A, typename B>
WGPT_HOST_DEVICE constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// x, of which the compiler knows no more from here on: it derives nothing from it ahead of time, which would take registers.
template <typename T>
WGPT_DEVICE T opaque(T x) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
#endif
  return x;
}

// The one place that starts a kernel. Asks for more than 48 KiB of dynamic shared memory where needed; neither
// allocates nor synchronises, so it can be captured. Returns nullptr or what went wrong.
template <typename... Params, typename... Args>
const char* launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   void* stream, const Args&... args) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    const cudaLaunchConfig_t config = {
        grid, block, shared_bytes, static_cast<cudaStream_t>(stream), nullptr, 0};
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // a launch error is reported once, here
  return cudaGetErrorString(error);
}

}  // namespace wgpt::cuda
