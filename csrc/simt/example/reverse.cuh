// A kernel written once for nvcc and for the emulator: reverses each block's 256 numbers through shared memory.
#pragma once

#ifdef __CUDACC__
#define EXAMPLE_SHARED(Type, name, count) __shared__ Type name[count]
#else
#include "simt/cuda_names.h"
#define EXAMPLE_SHARED(Type, name, count) SIMT_SHARED(Type, name, count)
#endif

constexpr int kThreads = 256;

// Leave out the barrier (kBarrier = false), and the emulator says so.
template <bool kBarrier>
__global__ void reverse_blocks(const float* x, float* y) {
  EXAMPLE_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  tile[i] = x[blockIdx.x * kThreads + i];
  if (kBarrier) __syncthreads();
  y[blockIdx.x * kThreads + i] = tile[kThreads - 1 - i];
}
