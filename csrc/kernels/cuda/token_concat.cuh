// token_concat on CUDA: gather + concatenate forward; backward in token_concat_backward.cuh. Formulas in
// kernels/token_concat.h. Not yet run on hardware.
//
// Forward: one 16-byte vector per thread and iteration, four in flight; memory-bound, limit = a copy of (2 or 3) B*T*C elements.
// A token outside [0, V) makes its step's token channels NaN; nothing is read out of bounds.
#pragma once

#include "kernels/cuda/device/types.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/token_concat_backward.cuh"

namespace wgpt::cuda {
namespace token_concat {

constexpr int kVecsInFlight = 4;  // independent 16-byte loads per thread before the first store

template <typename T>
struct ForwardParams {
  const int64_t* tokens;
  const T *table, *mel, *pos;
  T* y;
  int64_t rows, steps, vocab, mel_batch_stride, mel_step_stride;
  int token_channels, channels, rows_per_block;
};

template <typename T, int W>
__global__ void __launch_bounds__(kThreads) forward_kernel(ForwardParams<T> p) {
  const unsigned vecs_per_row = p.channels / W;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * p.rows_per_block;
  const int64_t rows_left = p.rows - first_row;
  const unsigned n_vecs =
      static_cast<unsigned>(rows_left < p.rows_per_block ? rows_left : p.rows_per_block) *
      vecs_per_row;
  for (unsigned base = threadIdx.x; base < n_vecs; base += kThreads * kVecsInFlight) {
    Vec<T, W> value[kVecsInFlight];
    WGPT_UNROLL
    for (int i = 0; i < kVecsInFlight; ++i) {
      const unsigned at = base + i * kThreads;
      if (at >= n_vecs) continue;
      const int64_t row = first_row + at / vecs_per_row;
      const int c = static_cast<int>(at % vecs_per_row) * W;
      if (c < p.token_channels) {
        const int64_t token = p.tokens[row];
        if (token >= 0 && token < p.vocab) {
          value[i] = load_vec<W>(p.table + token * p.token_channels + c);
        } else {
          for (int k = 0; k < W; ++k) value[i].e[k] = from_float<T>(__uint_as_float(0x7fffffffu));
        }
      } else {
        const int64_t b = row / p.steps, t = row - b * p.steps;
        value[i] = load_vec<W>(p.mel + b * p.mel_batch_stride + t * p.mel_step_stride +
                               (c - p.token_channels));
      }
    }
    WGPT_UNROLL
    for (int i = 0; i < kVecsInFlight; ++i) {
      const unsigned at = base + i * kThreads;
      if (at >= n_vecs) continue;
      const int64_t row = first_row + at / vecs_per_row;
      const int c = static_cast<int>(at % vecs_per_row) * W;
      if (p.pos != nullptr) {
        const Vec<T, W> pos = load_vec<W>(p.pos + row % p.steps * p.channels + c);
        WGPT_UNROLL
        for (int k = 0; k < W; ++k)
          value[i].e[k] = from_float<T>(to_float(value[i].e[k]) + to_float(pos.e[k]));
      }
      store_vec<W>(p.y + row * p.channels + c, value[i]);
    }
  }
}

inline const char* check(const TokenConcatShape& s) {
  if (s.batch * s.steps > INT32_MAX) return "token_concat: more than 2^31 - 1 steps in one call";
  if (s.token_channels + s.mel_channels > 65536) return "token_concat: more than 65536 channels";
  return nullptr;
}

template <typename T>
const char* forward(const TokenConcatForward& a, Stream stream) {
  const TokenConcatShape& s = a.shape;
  ForwardParams<T> p;
  p.tokens = a.tokens;
  p.table = static_cast<const T*>(a.table);
  p.mel = static_cast<const T*>(a.mel_hidden);
  p.pos = static_cast<const T*>(a.pos);
  p.y = static_cast<T*>(a.y);
  p.rows = s.batch * s.steps;
  p.steps = s.steps;
  p.vocab = s.vocab;
  p.mel_batch_stride = s.mel_batch_stride;
  p.mel_step_stride = s.mel_step_stride;
  p.token_channels = static_cast<int>(s.token_channels);
  p.channels = static_cast<int>(s.token_channels + s.mel_channels);
  if (p.rows == 0 || p.channels == 0) return nullptr;
  constexpr int kW = kVecLanes<T>;
  const bool wide = s.token_channels % kW == 0 && s.mel_channels % kW == 0 &&
                    s.mel_batch_stride % kW == 0 && s.mel_step_stride % kW == 0 &&
                    aligned16(a.table) && aligned16(a.mel_hidden) && aligned16(a.pos) &&
                    aligned16(a.y);
  const int vecs = wide ? p.channels / kW : p.channels;
  p.rows_per_block = ceil_div(kThreads * kVecsInFlight, vecs);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, int64_t{p.rows_per_block})));
  return wide ? launch(forward_kernel<T, kW>, grid, kThreads, 0, stream, p)
              : launch(forward_kernel<T, 1>, grid, kThreads, 0, stream, p);
}

}  // namespace token_concat

const char* token_concat_forward(const TokenConcatForward& a, Stream stream) {
  const char* error = token_concat::check(a.shape);
  if (error != nullptr) return error;
  const bool known = with_element_type(a.shape.dtype, [&](auto element) {
    error = token_concat::forward<decltype(element)>(a, stream);
  });
  return known ? error : "token_concat: CUDA knows float32, bfloat16 and float16";
}

const char* token_concat_backward(const TokenConcatBackward& a, Stream stream) {
  const char* error = token_concat::check(a.shape);
  if (error != nullptr) return error;
  const bool known = with_element_type(a.shape.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kW = kVecLanes<T>;
    const bool wide = a.shape.token_channels % kW == 0 && a.shape.mel_channels % kW == 0 &&
                      aligned16(a.d_y) && aligned16(a.d_table) && aligned16(a.d_pos);
    error =
        wide ? token_concat::backward<T, kW>(a, stream) : token_concat::backward<T, 1>(a, stream);
  });
  return known ? error : "token_concat: CUDA knows float32, bfloat16 and float16";
}

size_t token_concat_backward_workspace_bytes(const TokenConcatShape& shape) {
  token_concat::Buckets plan;
  return token_concat::plan_buckets(shape, nullptr, &plan);
}

}  // namespace wgpt::cuda
