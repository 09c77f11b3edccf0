// What mel_embed's passes share: the gathered, normalised slices, and the GEMM of 64 of them with 64 channels.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/cuda/smem_tile.cuh"

namespace wgpt::cuda::mel_embed {

constexpr int kTile = 64;      // steps, and channels, of a block's GEMM tile
constexpr int kThreads = 128;  // four warps, 16 rows of the tile each
constexpr int kDepth = 32;     // of k, staged in shared memory at a time

// What the kernels need to know of the slices x (B*T, K). The element type of frames and the width of its loads are
// uniform branches, which a wide load hides.
struct Slices {
  const void* frames;
  const float *mean, *inv_std;
  int64_t rows, steps, batch_stride, frame_stride;
  DType frames_dtype;
  int mels, frames_per_step, context_frames, k_total;
  bool wide;  // four neighbours of a slice may be loaded as one vector
};

// n frame values from `at` on, n = 4 as one vector, or n = 1.
template <int kN>
WGPT_DEVICE void load_frame(const Slices& s, int64_t at, float (&x)[kN]) {
  if (s.frames_dtype == DType::kFloat32) {
    const Vec<float, kN> v = load_vec<kN>(static_cast<const float*>(s.frames) + at);
    WGPT_UNROLL
    for (int i = 0; i < kN; ++i) x[i] = v.e[i];
  } else {
    const Vec<uint16_t, kN> v = load_vec<kN>(static_cast<const uint16_t*>(s.frames) + at);
    WGPT_UNROLL
    for (int i = 0; i < kN; ++i) {
      x[i] = s.frames_dtype == DType::kFloat16 ? to_float(Half{v.e[i]}) : to_float(Bf16{v.e[i]});
    }
  }
}

// x[row, k .. k + kN - 1] of step t of batch row b, before rounding.
template <int kN>
WGPT_DEVICE void load_normalised(const Slices& s, int64_t b, int64_t t, int k, float (&x)[kN]) {
  const int f = k / s.mels, m = k - f * s.mels;
  const int64_t frame = t * s.frames_per_step - s.context_frames + f;
  if (frame < 0) return;  // before the first frame: the mean, which is 0
  load_frame<kN>(s, b * s.batch_stride + frame * s.frame_stride + m, x);
  const Vec<float, kN> mean = load_vec<kN>(s.mean + m), inv_std = load_vec<kN>(s.inv_std + m);
  WGPT_UNROLL
  for (int i = 0; i < kN; ++i) x[i] = (x[i] - mean.e[i]) * inv_std.e[i];
}

// x[row, k .. k + W - 1] rounded to T, zeros outside the matrix.
template <typename T, int W>
WGPT_DEVICE Vec<T, W> load_slice(const Slices& s, int64_t row, int k) {
  Vec<T, W> out;
  WGPT_UNROLL
  for (int i = 0; i < W; ++i) out.e[i] = T{};
  if (row >= s.rows) return out;
  const int64_t b = row / s.steps, t = row - b * s.steps;
  if (s.wide) {
    WGPT_UNROLL
    for (int i = 0; i < W; i += 4) {
      float x[4] = {};
      if (k + i < s.k_total) load_normalised<4>(s, b, t, k + i, x);
      WGPT_UNROLL
      for (int j = 0; j < 4; ++j) out.e[i + j] = from_float<T>(x[j]);
    }
  } else {
    WGPT_UNROLL
    for (int i = 0; i < W; ++i) {
      float x[1] = {};
      if (k + i < s.k_total) load_normalised<1>(s, b, t, k + i, x);
      out.e[i] = from_float<T>(x[0]);
    }
  }
  return out;
}

// matrix[row, column .. column + W - 1] of a contiguous matrix, zeros outside.
template <typename T, int W>
WGPT_DEVICE Vec<T, W> load_matrix(const T* matrix, int64_t row, int64_t n_rows, int column,
                                  int n_columns, bool wide) {
  Vec<T, W> out;
  WGPT_UNROLL
  for (int i = 0; i < W; ++i) out.e[i] = T{};
  if (row >= n_rows || column >= n_columns) return out;
  const T* p = matrix + row * n_columns + column;
  if (wide) return load_vec<W>(p);
  WGPT_UNROLL
  for (int i = 0; i < W; ++i) {
    if (column + i < n_columns) out.e[i] = p[i];
  }
  return out;
}

// The staged operands of a GEMM tile: two SmemTiles of kTile rows, kDepth deep; afterwards its sums, one float tile.
template <typename T>
struct Staged {
  static constexpr int kW = kVecLanes<T>, kChunks = kDepth / kW;  // 16-byte chunks per staged row
  static constexpr int kLoads = kTile * kChunks / kThreads;       // chunks per thread and tile
  static constexpr size_t kInputs = sizeof(T) * SmemTile<T, kDepth>::elements(2 * kTile);
  static constexpr size_t kSums = sizeof(float) * SmemTile<float, kTile>::elements(kTile);
  static constexpr size_t kBytes = kInputs > kSums ? kInputs : kSums;
};

// sums[step][channel] = x weight^T for 64 steps and 64 channels, left in shared memory as floats; ends with a barrier.
// Register prefetch: loads of the next depth overlap with the mma of this one. Warp w owns steps 16 w .. 16 w + 15.
template <typename T>
WGPT_DEVICE SmemTile<float, kTile> project(const Slices& s, const T* weight, bool wide_weight,
                                           int channels, int64_t row0, int n0,
                                           unsigned char* shared) {
  using S = Staged<T>;
  const SmemTile<T, kDepth> x_tile = {reinterpret_cast<T*>(shared)};
  const SmemTile<T, kDepth> w_tile = {x_tile.base + SmemTile<T, kDepth>::elements(kTile)};
  Vec<T, S::kW> x[S::kLoads], w[S::kLoads];
  const auto fetch = [&](int k0) {
    WGPT_UNROLL
    for (int i = 0; i < S::kLoads; ++i) {
      const int at = threadIdx.x + i * kThreads, r = at / S::kChunks,
                k = k0 + at % S::kChunks * S::kW;
      x[i] = load_slice<T, S::kW>(s, row0 + r, k);
      w[i] = load_matrix<T, S::kW>(weight, n0 + r, channels, k, s.k_total, wide_weight);
    }
  };
  const int warp = threadIdx.x / kWarp;
  float c[kTile / 8][4];
  clear(c);
  for (int k0 = -kDepth; k0 < s.k_total; k0 += kDepth) {  // first iteration: prologue, fetch only
    if (k0 >= 0) {
      WGPT_UNROLL
      for (int i = 0; i < S::kLoads; ++i) {
        const int at = threadIdx.x + i * kThreads, r = at / S::kChunks,
                  column = at % S::kChunks * S::kW;
        store_vec<S::kW>(x_tile.chunk(r, column), x[i]);
        store_vec<S::kW>(w_tile.chunk(r, column), w[i]);
      }
    }
    __syncthreads();
    if (k0 + kDepth < s.k_total) fetch(k0 + kDepth);
    if (k0 < 0) continue;
    WGPT_UNROLL
    for (int k = 0; k < kDepth; k += 16) {
      FragmentA<T> a;
      load_a(a, x_tile, 16 * warp, k);
      WGPT_UNROLL
      for (int n = 0; n < kTile / 8; n += 2) {
        FragmentB<T> b[2];
        load_b_rows(b, w_tile, 8 * n, k);
        mma<T>(c[n], a, b[0]);
        mma<T>(c[n + 1], a, b[1]);
      }
    }
    __syncthreads();
  }
  const SmemTile<float, kTile> sums = {reinterpret_cast<float*>(shared)};
  const int g = lane_id() / 4, t = lane_id() % 4;
  WGPT_UNROLL
  for (int n = 0; n < kTile / 8; ++n) {
    WGPT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Vec<float, 2> pair = {{c[n][2 * half], c[n][2 * half + 1]}};
      store_vec<2>(sums.base + (16 * warp + g + 8 * half) * sums.kPitch + 8 * n + 2 * t, pair);
    }
  }
  __syncthreads();
  return sums;
}

}  // namespace wgpt::cuda::mel_embed
