// The second stage of a weight's gradient, shared by add_rms_norm and token_concat_norm:
//
//   d_weight[c] = sum_n partial[n, c]    partial (n_partials, channels) float32, of blocks of rows
//
// In a fixed order, so the same bits always. Not yet run on hardware.
#pragma once

#include "kernels/cuda/device/platform.cuh"
#include "kernels/cuda/launch.h"

namespace wgpt::cuda {

constexpr int kPartialWarps = 8;

// Warp w adds n = w, w + kWarps, ..., then the warps in order. A lane owns a channel.
template <int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp)
    add_partials_kernel(const float* partial, float* d_weight, int64_t n_partials, int channels) {
  WGPT_SHARED(float, sums, kWarps* kWarp);
  const int lane = threadIdx.x % kWarp, c = static_cast<int>(blockIdx.x) * kWarp + lane;
  float sum = 0.f;
  if (c < channels) {
    WGPT_UNROLL_BY(8)
    for (int64_t n = threadIdx.x / kWarp; n < n_partials; n += kWarps)
      sum += partial[n * channels + c];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp || c >= channels) return;
  WGPT_UNROLL
  for (int w = 1; w < kWarps; ++w) sum += sums[w * kWarp + lane];
  d_weight[c] = sum;
}

inline const char* add_partials(const float* partial, float* d_weight, int64_t n_partials,
                                int channels, Stream stream) {
  return launch(add_partials_kernel<kPartialWarps>, ceil_div(channels, kWarp),
                kPartialWarps * kWarp, 0, stream, partial, d_weight, n_partials, channels);
}

}  // namespace wgpt::cuda
