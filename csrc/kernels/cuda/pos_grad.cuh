// The gradient of a position table, shared by token_concat and mel_embed:
//
//   d_pos[t] = sum_b d_y[b,t]    d_y (B, T, C) contiguous, d_pos (pos_rows, C), rows past T become zero
//
// float32 sums in ascending b, so the same bits always. Memory-bound: reads B*T*C elements once. Not yet run on hardware.
#pragma once

#include "kernels/cuda/device/types.cuh"
#include "kernels/cuda/launch.h"

namespace wgpt::cuda {

constexpr int kPosGradThreads = 256;

// One thread owns W channels of one row.
template <typename T, int W>
__global__ void __launch_bounds__(kPosGradThreads)
    pos_grad_kernel(const T* d_y, T* d_pos, int64_t batch, int64_t steps, int64_t pos_rows,
                    int channels) {
  const int vecs_per_row = channels / W;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPosGradThreads + threadIdx.x;
  if (at >= pos_rows * vecs_per_row) return;
  const int64_t t = at / vecs_per_row;
  const int c = static_cast<int>(at - t * vecs_per_row) * W;
  float sum[W] = {};
  if (t < steps) {
    WGPT_UNROLL_BY(4)
    for (int64_t b = 0; b < batch; ++b) {
      const Vec<T, W> v = load_vec<W>(d_y + (b * steps + t) * channels + c);
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) sum[k] += to_float(v.e[k]);
    }
  }
  Vec<T, W> out;
  WGPT_UNROLL
  for (int k = 0; k < W; ++k) out.e[k] = from_float<T>(sum[k]);
  store_vec<W>(d_pos + t * channels + c, out);
}

// Nothing to do without a table. W channels must divide C, and both tensors be aligned to W elements.
template <typename T, int W>
const char* pos_grad(const T* d_y, T* d_pos, int64_t batch, int64_t steps, int64_t pos_rows,
                     int channels, Stream stream) {
  if (d_pos == nullptr || pos_rows == 0 || channels == 0) return nullptr;
  const dim3 grid(
      static_cast<unsigned>(ceil_div(pos_rows * (channels / W), int64_t{kPosGradThreads})));
  return launch(pos_grad_kernel<T, W>, grid, kPosGradThreads, 0, stream, d_y, d_pos, batch, steps,
                pos_rows, channels);
}

}  // namespace wgpt::cuda
