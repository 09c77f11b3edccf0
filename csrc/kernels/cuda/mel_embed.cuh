// mel_embed on CUDA: an implicit GEMM with a fused prologue (gather, normalise) and epilogue (bias, GELU, position
// table). Formulas in kernels/mel_embed.h. Not yet run on hardware.
//
//   x (B*T, K) never in memory: K = (c + r) M, row t = frames [t r - c, t r + r) normalised, zeros before frame 0
//   forward    y = gelu(x W^T + bias) + pos        one block: 64 steps x 64 channels, 32 of K at a time; slope beside y
//   backward   partial[s] = g^T x over steps of s  one block: 64 channels x 64 of K, 32 steps at a time;
//                                                  g = d_y * slope, rounded to T, in the prologue
//              d_weight, d_bias = sum_s partial[s] in ascending s, then rounded
//
// Tensor cores with float32 accumulators (float32: 3xTF32); x and g are rounded to T for them, as a plain GEMM in T
// would have them. A warp owns 16 x 64 of a block's 64 x 64 accumulators; they pass through shared memory, so that the
// epilogue reads and writes 16 bytes at a time:
//
//   warp 0 | rows  0-15 |  fragments -> float tile (over the staged inputs) -> thread i: rows of 16-byte vectors
//   warp 1 | rows 16-31 |
//
// Bytes: reads K / (c + r) r frame values and writes Cm a step (frames that overlap come from the caches); at K = Cm =
// 128 in bfloat16 that is 0.4 KB and 33 kFLOP a step, so an H100 is limited by memory. The number of splits depends on
// the shape alone, so the bits depend on neither the device nor the order of blocks.
#pragma once

#include "kernels/cuda/gelu.cuh"
#include "kernels/cuda/mel_embed_gemm.cuh"
#include "kernels/cuda/pos_grad.cuh"

namespace wgpt::cuda {
namespace mel_embed {

constexpr int kMaxSplits = 64;
// At least: adding up smaller splits would cost more than they save.
constexpr int64_t kStepsPerSplit = 256;

// The first n of v's values, or all of them at once where `wide`.
template <typename T, int kW>
WGPT_DEVICE void store_channels(T* to, const Vec<T, kW>& v, int n, bool wide) {
  if (wide) return store_vec<kW>(to, v);
  WGPT_UNROLL
  for (int c = 0; c < kW; ++c) {
    if (c < n) to[c] = v.e[c];
  }
}

template <typename T>
struct ProjectParams {
  Slices slices;
  const T *weight, *bias;
  const T* pos;  // may be nullptr
  T *y, *slope;  // slope may be nullptr
  int channels;
  bool wide_weight, wide_out;
};

// y and slope from the pre-activation z = sums + bias.
template <typename T>
__global__ void __launch_bounds__(kThreads) project_kernel(ProjectParams<T> p) {
  WGPT_SHARED(Vec16, shared, Staged<T>::kBytes / 16);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int n0 = blockIdx.y * kTile;
  const SmemTile<float, kTile> sums = project(p.slices, p.weight, p.wide_weight, p.channels, row0,
                                              n0, reinterpret_cast<unsigned char*>(shared));
  constexpr int kW = kVecLanes<T>, kChunks = kTile / kW;
  WGPT_UNROLL_BY(2)
  for (int i = 0; i < kTile * kChunks / kThreads; ++i) {
    const int at = threadIdx.x + i * kThreads, r = at / kChunks, column = at % kChunks * kW;
    const int64_t row = row0 + r;
    const int n = n0 + column;
    if (row >= p.slices.rows || n >= p.channels) continue;
    const Vec<T, kW> bias = load_matrix<T, kW>(p.bias, 0, 1, n, p.channels, p.wide_out);
    Vec<T, kW> pos, y, slope;
    if (p.pos != nullptr) {
      pos = load_matrix<T, kW>(p.pos, row % p.slices.steps, p.slices.steps, n, p.channels,
                               p.wide_out);
    }
    WGPT_UNROLL
    for (int j = 0; j < kW; j += 4) {
      const Vec<float, 4> sum = load_vec<4>(sums.base + r * sums.kPitch + column + j);
      WGPT_UNROLL
      for (int c = 0; c < 4; ++c) {
        float slope_of_z, active = gelu(sum.e[c] + to_float(bias.e[j + c]), slope_of_z);
        if (p.pos != nullptr) active += to_float(pos.e[j + c]);
        y.e[j + c] = from_float<T>(active);
        slope.e[j + c] = from_float<T>(slope_of_z);
      }
    }
    const int64_t to = row * p.channels + n;
    store_channels(p.y + to, y, p.channels - n, p.wide_out);
    if (p.slope != nullptr) store_channels(p.slope + to, slope, p.channels - n, p.wide_out);
  }
}

template <typename T>
struct WeightGradParams {
  Slices slices;
  const T *d_y, *slope;
  float* partial;  // (splits, channels, K + 1): the last column is the bias
  int64_t steps_per_split;
  int channels;
  bool wide_g;
};

// One block sums one 64 x 64 tile of (channel, k) over the steps of one split; warp w owns channels 16 w .. 16 w + 15.
template <typename T>
__global__ void __launch_bounds__(kThreads) weight_grad_kernel(WeightGradParams<T> p) {
  constexpr int kW = kVecLanes<T>, kChunks = kTile / kW, kLoads = kDepth * kChunks / kThreads;
  using Rows = SmemTile<T, kTile>;  // kDepth steps of 64 channels, or of 64 of K
  WGPT_SHARED(Vec16, shared, sizeof(T) * Rows::elements(2 * kDepth) / 16);
  const Rows g_tile = {reinterpret_cast<T*>(shared)},
             x_tile = {g_tile.base + Rows::elements(kDepth)};
  const int warp = threadIdx.x / kWarp, lane_g = lane_id() / 4, lane_t = lane_id() % 4;
  const int k0 = blockIdx.x * kTile, n0 = blockIdx.y * kTile;
  const int64_t begin = blockIdx.z * p.steps_per_split;
  const int64_t end =
      begin + p.steps_per_split < p.slices.rows ? begin + p.steps_per_split : p.slices.rows;
  Vec<T, kW> g[kLoads], x[kLoads];
  const auto fetch = [&](int64_t row0) {
    WGPT_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int at = threadIdx.x + i * kThreads, column = at % kChunks * kW;
      const int64_t row = row0 + at / kChunks;
      g[i] = load_matrix<T, kW>(p.d_y, row, end, n0 + column, p.channels, p.wide_g);
      const Vec<T, kW> slope =
          load_matrix<T, kW>(p.slope, row, end, n0 + column, p.channels, p.wide_g);
      WGPT_UNROLL
      for (int c = 0; c < kW; ++c)
        g[i].e[c] = from_float<T>(to_float(g[i].e[c]) * to_float(slope.e[c]));
      // Steps of the next split meet a zero of g.
      x[i] = load_slice<T, kW>(p.slices, row, k0 + column);
    }
  };
  float c[kTile / 8][4], bias_sum = 0.f;
  clear(c);
  for (int64_t row0 = begin - kDepth; row0 < end;
       row0 += kDepth) {  // first iteration: prologue, fetch only
    if (row0 >= begin) {
      WGPT_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        const int at = threadIdx.x + i * kThreads, r = at / kChunks, column = at % kChunks * kW;
        store_vec<kW>(g_tile.chunk(r, column), g[i]);
        store_vec<kW>(x_tile.chunk(r, column), x[i]);
      }
    }
    __syncthreads();
    if (row0 + kDepth < end) fetch(row0 + kDepth);
    if (row0 < begin) continue;
    WGPT_UNROLL
    for (int step = 0; step < kDepth; step += 16) {
      FragmentA<T> a;
      load_a_columns(a, g_tile, step, 16 * warp);
      WGPT_UNROLL
      for (int n = 0; n < kTile / 8; n += 2) {
        FragmentB<T> b[2];
        load_b_columns(b, x_tile, step, 8 * n);
        mma<T>(c[n], a, b[0]);
        mma<T>(c[n + 1], a, b[1]);
      }
    }
    if (blockIdx.x == 0 && threadIdx.x < kTile) {
      const int chunk = threadIdx.x / kW * kW, at = threadIdx.x % kW;
      WGPT_UNROLL_BY(8)
      for (int r = 0; r < kDepth; ++r) bias_sum += to_float(g_tile.chunk(r, chunk)[at]);
    }
    __syncthreads();
  }
  const int pitch = p.slices.k_total + 1;
  float* partial = p.partial + static_cast<int64_t>(blockIdx.z) * p.channels * pitch;
  WGPT_UNROLL
  for (int j = 0; j < kTile / 8; ++j) {
    WGPT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int n = n0 + 16 * warp + lane_g + i / 2 * 8, k = k0 + 8 * j + 2 * lane_t + i % 2;
      if (n < p.channels && k < p.slices.k_total)
        partial[static_cast<int64_t>(n) * pitch + k] = c[j][i];
    }
  }
  const int n = n0 + threadIdx.x;
  if (blockIdx.x == 0 && threadIdx.x < kTile && n < p.channels) {
    partial[static_cast<int64_t>(n) * pitch + p.slices.k_total] = bias_sum;
  }
}

constexpr int kAddThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kAddThreads)
    add_splits_kernel(const float* partial, T* d_weight, T* d_bias, int n_splits, int channels,
                      int k_total) {
  const int pitch = k_total + 1;
  const int64_t size = static_cast<int64_t>(channels) * pitch;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (at >= size) return;
  float sum = 0.f;
  WGPT_UNROLL_BY(4)
  for (int s = 0; s < n_splits; ++s) sum += partial[s * size + at];
  const int n = static_cast<int>(at / pitch), k = static_cast<int>(at % pitch);
  if (k < k_total) {
    d_weight[static_cast<int64_t>(n) * k_total + k] = from_float<T>(sum);
  } else {
    d_bias[n] = from_float<T>(sum);
  }
}

// ---- launchers -------------------------------------------------------------------------------------------------------

inline int splits_for(int64_t rows) {
  const int64_t n = ceil_div(rows, kStepsPerSplit);
  return static_cast<int>(n < 1 ? 1 : n > kMaxSplits ? kMaxSplits : n);
}

inline const char* check(const MelEmbedShape& s) {
  if (s.dtype == DType::kFloat64 || s.frames_dtype == DType::kFloat64) {
    return "mel_embed: CUDA knows float32, bfloat16 and float16";
  }
  if ((s.context_frames + s.frames_per_step) * s.mels > 65536)
    return "mel_embed: slices of more than 65536 values";
  if (s.channels > 65536) return "mel_embed: more than 65536 channels";
  if (ceil_div(s.batch * s.steps, int64_t{kTile}) > INT32_MAX)
    return "mel_embed: more than 2^37 steps in one call";
  return nullptr;
}

inline Slices make_slices(const MelEmbedShape& s, const void* frames, const void* mean,
                          const void* inv_std) {
  Slices x;
  x.frames = frames;
  x.mean = static_cast<const float*>(mean);
  x.inv_std = static_cast<const float*>(inv_std);
  x.rows = s.batch * s.steps;
  x.steps = s.steps;
  x.batch_stride = s.frames_batch_stride;
  x.frame_stride = s.frames_frame_stride;
  x.frames_dtype = s.frames_dtype;
  x.mels = static_cast<int>(s.mels);
  x.frames_per_step = static_cast<int>(s.frames_per_step);
  x.context_frames = static_cast<int>(s.context_frames);
  x.k_total = static_cast<int>((s.context_frames + s.frames_per_step) * s.mels);
  x.wide = s.mels % 4 == 0 && s.frames_batch_stride % 4 == 0 && s.frames_frame_stride % 4 == 0 &&
           aligned16(frames) && aligned16(mean) && aligned16(inv_std);
  return x;
}

template <typename T>
const char* forward(const MelEmbedForward& a, Stream stream) {
  ProjectParams<T> p = {};
  p.slices = make_slices(a.shape, a.frames, a.mean, a.inv_std);
  p.weight = static_cast<const T*>(a.weight);
  p.bias = static_cast<const T*>(a.bias);
  p.pos = static_cast<const T*>(a.pos);
  p.y = static_cast<T*>(a.y);
  p.slope = static_cast<T*>(a.slope);
  p.channels = static_cast<int>(a.shape.channels);
  p.wide_weight = p.slices.k_total % kVecLanes<T> == 0 && aligned16(a.weight);
  p.wide_out = a.shape.channels % kVecLanes<T> == 0 && aligned16(a.bias) && aligned16(a.pos) &&
               aligned16(a.y) && aligned16(a.slope);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.slices.rows, int64_t{kTile})),
                  ceil_div(p.channels, kTile));
  return launch(project_kernel<T>, grid, kThreads, 0, stream, p);
}

template <typename T>
const char* backward(const MelEmbedBackward& a, Stream stream) {
  const Slices slices = make_slices(a.shape, a.frames, a.mean, a.inv_std);
  const int channels = static_cast<int>(a.shape.channels);
  constexpr int kW = kVecLanes<T>;
  const T* d_y = static_cast<const T*>(a.d_y);
  T* d_pos = static_cast<T*>(a.d_pos);
  float* partial = static_cast<float*>(a.workspace);
  const int n_splits = splits_for(slices.rows);
  const int64_t outputs = static_cast<int64_t>(channels) * (slices.k_total + 1);
  const int64_t per_split =
      ceil_div(ceil_div(slices.rows, int64_t{n_splits}), int64_t{kDepth}) * kDepth;
  const dim3 grid(ceil_div(slices.k_total, kTile), ceil_div(channels, kTile), n_splits);
  const T* slope = static_cast<const T*>(a.slope);
  const bool wide_g = channels % kW == 0 && aligned16(d_y) && aligned16(slope);
  const WeightGradParams<T> p = {slices, d_y, slope, partial, per_split, channels, wide_g};
  const char* error = launch(weight_grad_kernel<T>, grid, kThreads, 0, stream, p);
  if (error == nullptr) {
    error =
        launch(add_splits_kernel<T>, static_cast<unsigned>(ceil_div(outputs, int64_t{kAddThreads})),
               kAddThreads, 0, stream, partial, static_cast<T*>(a.d_weight),
               static_cast<T*>(a.d_bias), n_splits, channels, slices.k_total);
  }
  if (error != nullptr) return error;
  return channels % kW == 0 && aligned16(d_y) && aligned16(d_pos)
             ? pos_grad<T, kW>(d_y, d_pos, a.shape.batch, a.shape.steps, a.pos_rows, channels,
                               stream)
             : pos_grad<T, 1>(d_y, d_pos, a.shape.batch, a.shape.steps, a.pos_rows, channels,
                              stream);
}

}  // namespace mel_embed

const char* mel_embed_forward(const MelEmbedForward& a, Stream stream) {
  const char* error = mel_embed::check(a.shape);
  if (error != nullptr || a.shape.batch * a.shape.steps * a.shape.channels == 0) return error;
  with_element_type(a.shape.dtype, [&](auto element) {
    error = mel_embed::forward<decltype(element)>(a, stream);
  });
  return error;
}

const char* mel_embed_backward(const MelEmbedBackward& a, Stream stream) {
  const char* error = mel_embed::check(a.shape);
  if (error != nullptr || a.shape.channels == 0) return error;
  with_element_type(a.shape.dtype, [&](auto element) {
    error = mel_embed::backward<decltype(element)>(a, stream);
  });
  return error;
}

size_t mel_embed_backward_workspace_bytes(const MelEmbedShape& s) {
  const int64_t outputs = s.channels * ((s.context_frames + s.frames_per_step) * s.mels + 1);
  return static_cast<size_t>(mel_embed::splits_for(s.batch * s.steps) * outputs) * sizeof(float);
}

}  // namespace wgpt::cuda
