// add_rms_norm on CUDA: one warp per row, whose values stay in registers. Formulas in kernels/add_rms_norm.h. Not yet run
// on hardware.
//
//   a row | turn 0: kTurn = 32 lanes x kVecs vectors of W channels | turn 1 | ...
//
// Rows of one turn (up to 768 channels where 4 divide them, else up to 256) are read once. Longer ones are read again for
// the second pass, in backward once for each turn: blockIdx.y owns one turn of every row of its block.
//
// Backward: kGradRows rows a block; d_weight is summed over a warp's rows in registers, over the warps of the block
// through shared memory, over the blocks by a second kernel, each in ascending order. No atomics: the same bits always.
//
// Bytes of a row, float32 stream and 16-bit branches, as in training under autocast: forward reads 6 C and writes 6 C + 4;
// backward reads 10 C + 4 and writes 6 C (and C / 8 for the partial sums). Memory-bound: the limit is a copy. At C = 256
// and 6000 rows 18.4 and 24.6 MB: 4.3 and 5.7 us at 4.3 TB/s.
#pragma once

#include "kernels/cuda/add_partials.cuh"
#include "kernels/cuda/any_type.cuh"
#include "kernels/cuda/launch.h"

namespace wgpt::cuda {
namespace add_rms_norm {

constexpr int kWarps = 4;      // of a forward block, one row each
constexpr int kGradWarps = 8;  // of a backward block
constexpr int kGradRows = 32;  // of a backward block: 4 for each warp

template <int W, int kVecs>
constexpr int kTurn = kWarp * W * kVecs;

// The first channel of this lane's i-th vector.
template <int W, int kVecs>
WGPT_DEVICE int column(int turn, int i) {
  return turn * kTurn<W, kVecs> + (i * kWarp + static_cast<int>(threadIdx.x) % kWarp) * W;
}

template <int W, int kVecs>
__global__ void __launch_bounds__(kWarps* kWarp) forward_kernel(AddRmsNormForward a) {
  const int channels = static_cast<int>(a.shape.channels);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= a.shape.rows) return;
  const int64_t begin = row * channels;
  const int n_turns = ceil_div(channels, kTurn<W, kVecs>);
  const bool has_delta = a.delta != nullptr;
  float s[kVecs][W], squares = 0.f;
  for (int turn = 0; turn < n_turns; ++turn) {
    Loaded<W> x[kVecs], delta[kVecs];
    WGPT_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      const int c = column<W, kVecs>(turn, i);
      if (c >= channels) continue;
      x[i] = load_any<W>(a.x, a.shape.stream, begin + c);
      if (has_delta) delta[i] = load_any<W>(a.delta, a.shape.delta, begin + c);
    }
    WGPT_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      const int c = column<W, kVecs>(turn, i);
      if (c >= channels) continue;
      to_floats(x[i], a.shape.stream, s[i]);
      if (has_delta) {
        float d[W];
        to_floats(delta[i], a.shape.delta, d);
        WGPT_UNROLL
        for (int k = 0; k < W; ++k) s[i][k] = rounded_to(a.shape.stream, s[i][k] + d[k]);
        store_any(a.sum, a.shape.stream, begin + c, s[i]);
      }
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) squares += s[i][k] * s[i][k];
    }
  }
  const float mean = warp_sum(squares) / static_cast<float>(channels);
  const float inv_rms = 1.f / sqrtf(mean + static_cast<float>(a.eps));
  if (threadIdx.x % kWarp == 0) static_cast<float*>(a.inv_rms)[row] = inv_rms;
  const void* total = has_delta ? a.sum : a.x;
  for (int turn = 0; turn < n_turns; ++turn) {
    WGPT_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      const int c = column<W, kVecs>(turn, i);
      if (c >= channels) continue;
      if (n_turns > 1) {
        to_floats(load_any<W>(total, a.shape.stream, begin + c), a.shape.stream, s[i]);
      }
      const Vec<float, W> weight = load_vec<W>(static_cast<const float*>(a.weight) + c);
      float y[W];
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) y[k] = s[i][k] * inv_rms * weight.e[k];
      store_any(a.y, a.shape.y, begin + c, y);
    }
  }
}

// d_x and d_delta of kGradRows rows and one turn, and their part of d_weight: partial (blocks, C) float32.
template <int W, int kVecs>
__global__ void __launch_bounds__(kGradWarps* kWarp)
    backward_kernel(AddRmsNormBackward a, float* partial) {
  constexpr int kChannels = kTurn<W, kVecs>;
  WGPT_SHARED(Vec16, shared, kGradWarps * kChannels / 4);
  float* sums = reinterpret_cast<float*>(shared);  // (kGradWarps, kChannels)
  const int channels = static_cast<int>(a.shape.channels);
  const int warp = threadIdx.x / kWarp;
  const int n_turns = ceil_div(channels, kChannels), own = static_cast<int>(blockIdx.y);
  const float* weight = static_cast<const float*>(a.weight);
  const bool has_d_sum = a.d_sum != nullptr;
  float d_weight[kVecs][W] = {};
  for (int r = warp; r < kGradRows; r += kGradWarps) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kGradRows + r;
    if (row >= a.shape.rows) break;
    const int64_t begin = row * channels;
    const float inv_rms = static_cast<const float*>(a.inv_rms)[row];
    Loaded<W> d_sum[kVecs];
    float h[kVecs][W], d_y[kVecs][W], dot = 0.f;
    for (int n = 1; n <= n_turns; ++n) {  // the own turn last: it is used again
      const int turn = (own + n) % n_turns;
      Loaded<W> loaded_sum[kVecs], loaded_d_y[kVecs];
      WGPT_UNROLL
      for (int i = 0; i < kVecs; ++i) {
        const int c = column<W, kVecs>(turn, i);
        if (c >= channels) continue;
        loaded_sum[i] = load_any<W>(a.sum, a.shape.stream, begin + c);
        loaded_d_y[i] = load_any<W>(a.d_y, a.shape.y, begin + c);
        if (has_d_sum && n == n_turns) d_sum[i] = load_any<W>(a.d_sum, a.shape.stream, begin + c);
      }
      WGPT_UNROLL
      for (int i = 0; i < kVecs; ++i) {
        const int c = column<W, kVecs>(turn, i);
        if (c >= channels) continue;
        to_floats(loaded_sum[i], a.shape.stream, h[i]);
        to_floats(loaded_d_y[i], a.shape.y, d_y[i]);
        const Vec<float, W> w = load_vec<W>(weight + c);
        WGPT_UNROLL
        for (int k = 0; k < W; ++k) {
          h[i][k] *= inv_rms;
          dot += d_y[i][k] * w.e[k] * h[i][k];
        }
      }
    }
    const float mean = warp_sum(dot) / static_cast<float>(channels);
    WGPT_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      const int c = column<W, kVecs>(own, i);
      if (c >= channels) continue;
      const Vec<float, W> w = load_vec<W>(weight + c);
      float d_s[W] = {};
      if (has_d_sum) to_floats(d_sum[i], a.shape.stream, d_s);
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) {
        d_s[k] += inv_rms * (d_y[i][k] * w.e[k] - h[i][k] * mean);
        d_weight[i][k] += d_y[i][k] * h[i][k];
      }
      store_any(a.d_x, a.shape.stream, begin + c, d_s);
      if (a.d_delta != nullptr) store_any(a.d_delta, a.shape.delta, begin + c, d_s);
    }
  }
  WGPT_UNROLL
  for (int i = 0; i < kVecs; ++i) {
    Vec<float, W> v;
    WGPT_UNROLL
    for (int k = 0; k < W; ++k) v.e[k] = d_weight[i][k];
    store_vec<W>(sums + warp * kChannels + column<W, kVecs>(0, i), v);
  }
  __syncthreads();
  for (int at = threadIdx.x; at < kChannels; at += kGradWarps * kWarp) {
    const int c = own * kChannels + at;
    if (c >= channels) return;
    float sum = 0.f;
    WGPT_UNROLL
    for (int w = 0; w < kGradWarps; ++w) sum += sums[w * kChannels + at];
    partial[static_cast<int64_t>(blockIdx.x) * channels + c] = sum;
  }
}

// ---- launchers -------------------------------------------------------------------------------------------------------

inline const char* check(const AddRmsNormShape& s) {
  for (const DType dtype : {s.stream, s.delta, s.y}) {
    if (dtype == DType::kFloat64) return "add_rms_norm: CUDA knows float32, bfloat16 and float16";
  }
  if (s.channels > 65536) return "add_rms_norm: more than 65536 channels";
  if (s.rows > INT32_MAX) return "add_rms_norm: more than 2^31 - 1 rows";
  return nullptr;
}

// Calls f with vectors of 4 channels or of 1, and how many of them a lane holds of a turn.
template <typename F>
const char* with_width(bool wide, int64_t channels, F&& f) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Four = std::integral_constant<int, 4>;
  using Six = std::integral_constant<int, 6>;
  using Eight = std::integral_constant<int, 8>;
  if (!wide) return f(One{}, Eight{});
  return channels <= kTurn<4, 2> ? f(Four{}, Two{}) : f(Four{}, Six{});
}

}  // namespace add_rms_norm

const char* add_rms_norm_forward(const AddRmsNormForward& a, Stream stream) {
  using namespace add_rms_norm;
  const char* error = check(a.shape);
  if (error != nullptr || a.shape.rows * a.shape.channels == 0) return error;
  const bool wide = a.shape.channels % 4 == 0 && aligned16(a.x) && aligned16(a.delta) &&
                    aligned16(a.weight) && aligned16(a.sum) && aligned16(a.y);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.shape.rows, int64_t{kWarps})));
  return with_width(wide, a.shape.channels, [&](auto w, auto vecs) {
    return launch(forward_kernel<w.value, vecs.value>, grid, kWarps * kWarp, 0, stream, a);
  });
}

const char* add_rms_norm_backward(const AddRmsNormBackward& a, Stream stream) {
  using namespace add_rms_norm;
  const char* error = check(a.shape);
  if (error != nullptr || a.shape.rows * a.shape.channels == 0) return error;
  const int channels = static_cast<int>(a.shape.channels);
  const bool wide = channels % 4 == 0 && aligned16(a.d_sum) && aligned16(a.d_y) &&
                    aligned16(a.sum) && aligned16(a.weight) && aligned16(a.d_x) &&
                    aligned16(a.d_delta);
  const int64_t n_partials = ceil_div(a.shape.rows, int64_t{kGradRows});
  float* partial = static_cast<float*>(a.workspace);
  error = with_width(wide, channels, [&](auto w, auto vecs) {
    const dim3 grid(static_cast<unsigned>(n_partials),
                    ceil_div(channels, kTurn<w.value, vecs.value>));
    return launch(backward_kernel<w.value, vecs.value>, grid, kGradWarps * kWarp, 0, stream, a,
                  partial);
  });
  if (error != nullptr) return error;
  return add_partials(partial, static_cast<float*>(a.d_weight), n_partials, channels, stream);
}

size_t add_rms_norm_backward_workspace_bytes(const AddRmsNormShape& shape) {
  const int64_t n_partials = ceil_div(shape.rows, int64_t{add_rms_norm::kGradRows});
  return static_cast<size_t>(n_partials * shape.channels) * sizeof(float);
}

}  // namespace wgpt::cuda
