// token_concat_norm on CUDA: one warp per row, which stays in registers between the two norms. Formulas in
// kernels/token_concat_norm.h. Not yet run on hardware.
//
//   a row | Ct channels of the table's row | Cm channels of the mel branch |
//         lane l, vector i: W channels from (32 i + l) W on
//
// Backward: kGradRows rows a block; both weights' gradients are summed over a warp's rows in registers, over the warps
// of the block through shared memory, over the blocks by a second kernel, each in ascending order. No atomics.
//
// Bytes of a row, float32 table and stream and 16-bit delta and y, as in training under autocast: forward reads
// 4 Ct + 6 Cm and writes 6 C + 8; backward reads 10 C + 6 Cm + 8 and writes 4 Ct + 6 Cm. The three ops by themselves
// move 8 Cm more forward, and 8 Cm more backward. Memory-bound: the limit is a copy. At Ct = Cm = 128 and 6000 rows 16.9
// and 27.7 MB: 3.9 and 6.4 us at 4.3 TB/s.
#pragma once

#include "kernels/cuda/add_partials.cuh"
#include "kernels/cuda/any_type.cuh"
#include "kernels/cuda/launch.h"

namespace wgpt::cuda {
namespace token_concat_norm {

constexpr int kWarps = 4;      // of a forward block, one row each
constexpr int kGradWarps = 8;  // of a backward block
constexpr int kGradRows = 32;  // of a backward block: 4 for each warp

template <int W>
WGPT_DEVICE int column(int i) {
  return (i * kWarp + static_cast<int>(threadIdx.x) % kWarp) * W;
}

// x + delta, rounded to the type of x.
template <int W>
WGPT_DEVICE void add(const Loaded<W>& x, DType x_type, const Loaded<W>& delta, DType delta_type,
                     bool has_delta, float (&sum)[W]) {
  to_floats(x, x_type, sum);
  if (!has_delta) return;
  float d[W];
  to_floats(delta, delta_type, d);
  WGPT_UNROLL
  for (int k = 0; k < W; ++k) sum[k] = rounded_to(x_type, sum[k] + d[k]);
}

WGPT_DEVICE float inverse_rms(float squares, int channels, double eps) {
  const float mean = warp_sum(squares) / static_cast<float>(channels);
  return 1.f / sqrtf(mean + static_cast<float>(eps));
}

template <int W, int kVecs>
__global__ void __launch_bounds__(kWarps* kWarp) forward_kernel(TokenConcatNormForward a) {
  const TokenConcatNormShape& s = a.shape;
  const int token_channels = static_cast<int>(s.token_channels);
  const int mel_channels = static_cast<int>(s.mel_channels);
  const int channels = token_channels + mel_channels;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= s.rows) return;
  const bool has_delta = a.delta != nullptr;
  const int64_t token = a.tokens[row];
  const bool known = token >= 0 && token < s.vocab;
  Loaded<W> first[kVecs], delta[kVecs];
  WGPT_UNROLL
  for (int i = 0; i < kVecs; ++i) {
    const int c = column<W>(i);
    if (c >= channels) continue;
    if (c >= token_channels) {
      const int64_t at = row * mel_channels + c - token_channels;
      first[i] = load_any<W>(a.x, s.x, at);
      if (has_delta) delta[i] = load_any<W>(a.delta, s.delta, at);
    } else if (known) {
      first[i] = load_any<W>(a.table, s.table, token * token_channels + c);
    }
  }
  float v[kVecs][W], squares = 0.f;
  WGPT_UNROLL
  for (int i = 0; i < kVecs; ++i) {
    const int c = column<W>(i);
    if (c < token_channels || c >= channels) continue;
    add(first[i], s.x, delta[i], s.delta, has_delta, v[i]);
    WGPT_UNROLL
    for (int k = 0; k < W; ++k) squares += v[i][k] * v[i][k];
  }
  const float mel_inv_rms = inverse_rms(squares, mel_channels, a.mel_eps);
  squares = 0.f;
  WGPT_UNROLL
  for (int i = 0; i < kVecs; ++i) {
    const int c = column<W>(i);
    if (c >= channels) continue;
    if (c < token_channels) {
      if (known) to_floats(first[i], s.table, v[i]);
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) v[i][k] = known ? v[i][k] : __uint_as_float(0x7fffffffu);
    } else {
      const auto weight =
          load_vec<W>(static_cast<const float*>(a.mel_weight) + (c - token_channels));
      WGPT_UNROLL
      for (int k = 0; k < W; ++k)
        v[i][k] = rounded_to(s.table, v[i][k] * mel_inv_rms * weight.e[k]);
    }
    store_any(a.cat, s.table, row * channels + c, v[i]);
    WGPT_UNROLL
    for (int k = 0; k < W; ++k) squares += v[i][k] * v[i][k];
  }
  const float inv_rms = inverse_rms(squares, channels, a.eps);
  if (threadIdx.x % kWarp == 0) {
    static_cast<float*>(a.mel_inv_rms)[row] = mel_inv_rms;
    static_cast<float*>(a.inv_rms)[row] = inv_rms;
  }
  WGPT_UNROLL
  for (int i = 0; i < kVecs; ++i) {
    const int c = column<W>(i);
    if (c >= channels) continue;
    const auto weight = load_vec<W>(static_cast<const float*>(a.weight) + c);
    WGPT_UNROLL
    for (int k = 0; k < W; ++k) v[i][k] *= inv_rms * weight.e[k];
    store_any(a.y, s.y, row * channels + c, v[i]);
  }
}

// Adds the warps' sums of one weight: sums (kGradWarps, 32 W kVecs), partial the block's own.
template <int W, int kVecs>
WGPT_DEVICE void add_warps(const float (&d_weight)[kVecs][W], float* sums, int first, int last,
                           float* partial) {
  constexpr int kChannels = kWarp * W * kVecs;
  __syncthreads();
  WGPT_UNROLL
  for (int i = 0; i < kVecs; ++i) {
    Vec<float, W> v;
    WGPT_UNROLL
    for (int k = 0; k < W; ++k) v.e[k] = d_weight[i][k];
    store_vec<W>(sums + threadIdx.x / kWarp * kChannels + column<W>(i), v);
  }
  __syncthreads();
  for (int c = first + static_cast<int>(threadIdx.x); c < last; c += kGradWarps * kWarp) {
    float sum = 0.f;
    WGPT_UNROLL
    for (int w = 0; w < kGradWarps; ++w) sum += sums[w * kChannels + c];
    partial[c - first] = sum;
  }
}

template <int W, int kVecs>
__global__ void __launch_bounds__(kGradWarps* kWarp)
    backward_kernel(TokenConcatNormBackward a, float* partial) {
  constexpr int kChannels = kWarp * W * kVecs;
  WGPT_SHARED(Vec16, shared, kGradWarps * kChannels / 4);
  const TokenConcatNormShape& s = a.shape;
  const int token_channels = static_cast<int>(s.token_channels);
  const int mel_channels = static_cast<int>(s.mel_channels);
  const int channels = token_channels + mel_channels;
  const bool has_delta = a.delta != nullptr, has_d_cat = a.d_cat != nullptr;
  float d_weight[kVecs][W] = {}, d_mel_weight[kVecs][W] = {};
  for (int r = threadIdx.x / kWarp; r < kGradRows; r += kGradWarps) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kGradRows + r;
    if (row >= s.rows) break;
    const float inv_rms = static_cast<const float*>(a.inv_rms)[row];
    const float mel_inv_rms = static_cast<const float*>(a.mel_inv_rms)[row];
    Loaded<W> d_cat[kVecs], x[kVecs], delta[kVecs];
    float h[kVecs][W], d[kVecs][W], dot = 0.f;
    WGPT_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      const int c = column<W>(i);
      if (c >= channels) continue;
      const int64_t at = row * channels + c, mel_at = row * mel_channels + c - token_channels;
      const Loaded<W> cat = load_any<W>(a.cat, s.table, at), d_y = load_any<W>(a.d_y, s.y, at);
      if (has_d_cat) d_cat[i] = load_any<W>(a.d_cat, s.table, at);
      if (c >= token_channels) {
        x[i] = load_any<W>(a.x, s.x, mel_at);
        if (has_delta) delta[i] = load_any<W>(a.delta, s.delta, mel_at);
      }
      to_floats(cat, s.table, h[i]);
      to_floats(d_y, s.y, d[i]);
      const auto weight = load_vec<W>(static_cast<const float*>(a.weight) + c);
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) {
        h[i][k] *= inv_rms;
        d_weight[i][k] += d[i][k] * h[i][k];
        d[i][k] *= weight.e[k];
        dot += d[i][k] * h[i][k];
      }
    }
    const float mean = warp_sum(dot) / static_cast<float>(channels);
    dot = 0.f;
    WGPT_UNROLL
    for (int i = 0; i < kVecs; ++i) {  // d becomes the gradient of cat, h the mel branch's own
      const int c = column<W>(i);
      if (c >= channels) continue;
      float more[W] = {};
      if (has_d_cat) to_floats(d_cat[i], s.table, more);
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) d[i][k] = more[k] + inv_rms * (d[i][k] - h[i][k] * mean);
      if (c < token_channels) {
        store_any(a.d_tokens, s.table, row * token_channels + c, d[i]);
        continue;
      }
      add(x[i], s.x, delta[i], s.delta, has_delta, h[i]);
      const auto weight =
          load_vec<W>(static_cast<const float*>(a.mel_weight) + (c - token_channels));
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) {
        h[i][k] *= mel_inv_rms;
        d_mel_weight[i][k] += d[i][k] * h[i][k];
        d[i][k] *= weight.e[k];
        dot += d[i][k] * h[i][k];
      }
    }
    const float mel_mean = warp_sum(dot) / static_cast<float>(mel_channels);
    WGPT_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      const int c = column<W>(i);
      if (c < token_channels || c >= channels) continue;
      const int64_t at = row * mel_channels + c - token_channels;
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) d[i][k] = mel_inv_rms * (d[i][k] - h[i][k] * mel_mean);
      store_any(a.d_x, s.x, at, d[i]);
      if (a.d_delta != nullptr) store_any(a.d_delta, s.delta, at, d[i]);
    }
  }
  float* sums = reinterpret_cast<float*>(shared);
  partial += static_cast<int64_t>(blockIdx.x) * (channels + mel_channels);
  add_warps(d_weight, sums, 0, channels, partial);
  add_warps(d_mel_weight, sums, token_channels, channels, partial + channels);
}

inline const char* check(const TokenConcatNormShape& s) {
  for (const DType dtype : {s.table, s.x, s.delta, s.y}) {
    if (dtype == DType::kFloat64)
      return "token_concat_norm: CUDA knows float32, bfloat16 and float16";
  }
  if (s.token_channels + s.mel_channels > kTokenConcatNormChannels)
    return "token_concat_norm: more than 768 channels";
  if (s.rows > INT32_MAX) return "token_concat_norm: more than 2^31 - 1 rows";
  return nullptr;
}

// Calls f with the channels of a vector and how many vectors of a row a lane holds.
template <typename F>
const char* with_width(bool wide, int64_t channels, F&& f) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Four = std::integral_constant<int, 4>;
  using Six = std::integral_constant<int, 6>;
  using Eight = std::integral_constant<int, 8>;
  if (!wide && channels > kTokenConcatNormOddChannels)
    return "token_concat_norm: more than 256 channels that 4 does not divide, or unaligned ones";
  if (!wide) return f(One{}, Eight{});
  return channels <= kWarp * 4 * 2 ? f(Four{}, Two{}) : f(Four{}, Six{});
}

}  // namespace token_concat_norm

const char* token_concat_norm_forward(const TokenConcatNormForward& a, Stream stream) {
  using namespace token_concat_norm;
  const TokenConcatNormShape& s = a.shape;
  const int64_t channels = s.token_channels + s.mel_channels;
  const char* error = check(s);
  if (error != nullptr || s.rows * channels == 0) return error;
  const bool wide = s.token_channels % 4 == 0 && s.mel_channels % 4 == 0 && aligned16(a.table) &&
                    aligned16(a.x) && aligned16(a.delta) && aligned16(a.mel_weight) &&
                    aligned16(a.weight) && aligned16(a.cat) && aligned16(a.y);
  const dim3 grid(static_cast<unsigned>(ceil_div(s.rows, int64_t{kWarps})));
  return with_width(wide, channels, [&](auto w, auto vecs) {
    return launch(forward_kernel<w.value, vecs.value>, grid, kWarps * kWarp, 0, stream, a);
  });
}

const char* token_concat_norm_backward(const TokenConcatNormBackward& a, Stream stream) {
  using namespace token_concat_norm;
  const TokenConcatNormShape& s = a.shape;
  const int channels = static_cast<int>(s.token_channels + s.mel_channels);
  const char* error = check(s);
  if (error != nullptr || s.rows * channels == 0) return error;
  const bool wide = s.token_channels % 4 == 0 && s.mel_channels % 4 == 0 && aligned16(a.d_cat) &&
                    aligned16(a.d_y) && aligned16(a.cat) && aligned16(a.x) && aligned16(a.delta) &&
                    aligned16(a.mel_weight) && aligned16(a.weight) && aligned16(a.d_tokens) &&
                    aligned16(a.d_x) && aligned16(a.d_delta);
  const int64_t n_partials = ceil_div(s.rows, int64_t{kGradRows});
  float* partial = static_cast<float*>(a.workspace);
  error = with_width(wide, channels, [&](auto w, auto vecs) {
    return launch(backward_kernel<w.value, vecs.value>, dim3(static_cast<unsigned>(n_partials)),
                  kGradWarps * kWarp, 0, stream, a, partial);
  });
  if (error != nullptr) return error;
  return add_partials(partial, static_cast<float*>(a.d_weights), n_partials,
                      channels + static_cast<int>(s.mel_channels), stream);
}

size_t token_concat_norm_backward_workspace_bytes(const TokenConcatNormShape& s) {
  const int64_t n_partials = ceil_div(s.rows, int64_t{token_concat_norm::kGradRows});
  return static_cast<size_t>(n_partials * (s.token_channels + 2 * s.mel_channels)) * sizeof(float);
}

}  // namespace wgpt::cuda
