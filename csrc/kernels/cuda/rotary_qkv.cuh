// rotary_qkv on CUDA: one kernel splits and rotates, and rotates back and packs. Formulas in kernels/rotary_qkv.h. Not yet
// run on hardware.
//
// A thread owns W channels of the first half of a head and those they are paired with, of q, k and v alike: six vectors are
// loaded before the first is stored, and cos and sin are read once for q and k.
//
// Bytes of a step: reads and writes 3 H D elements each way; cos and sin, 4 D bytes, come from the caches. Memory-bound:
// the limit is a copy. At B 8, T 750, H 4, D 64 in bfloat16 18.4 MB: 4.3 us at 4.3 TB/s.
#pragma once

#include "kernels/cuda/device/types.cuh"
#include "kernels/cuda/launch.h"

namespace wgpt::cuda {
namespace rotary_qkv {

constexpr int kThreads = 128;

template <typename T>
struct Params {
  const T* from[3];  // of q, k, v: rows of H D channels, from_pitch apart
  T* to[3];
  const float *cos, *sin;
  int64_t from_pitch, to_pitch;
  unsigned rows, steps, heads, half;
  unsigned rows_per_block;
  float sign;  // of the angle
};

template <int W>
WGPT_DEVICE void load_angles(const float* p, float (&angle)[W]) {
  constexpr int kW = W < 4 ? W : 4;
  WGPT_UNROLL
  for (int k = 0; k < W; k += kW) {
    const Vec<float, kW> v = load_vec<kW>(p + k);
    WGPT_UNROLL
    for (int i = 0; i < kW; ++i) angle[k + i] = v.e[i];
  }
}

template <typename T, int W>
__global__ void __launch_bounds__(kThreads) rotate_kernel(Params<T> p) {
  const unsigned vecs_per_head = p.half / W, vecs_per_row = p.heads * vecs_per_head;
  const unsigned first_row = blockIdx.x * p.rows_per_block, rows_left = p.rows - first_row;
  const unsigned n_rows = rows_left < p.rows_per_block ? rows_left : p.rows_per_block;
  for (unsigned at = threadIdx.x; at < n_rows * vecs_per_row; at += kThreads) {
    const unsigned row = first_row + at / vecs_per_row, in_row = at % vecs_per_row;
    const unsigned head = in_row / vecs_per_head, i = in_row % vecs_per_head * W;
    const unsigned channel = head * 2 * p.half + i;
    Vec<T, W> first[3], second[3];
    WGPT_UNROLL
    for (int part = 0; part < 3; ++part) {
      const T* from = p.from[part] + row * p.from_pitch + channel;
      first[part] = load_vec<W>(from);
      second[part] = load_vec<W>(from + p.half);
    }
    float cos[W], sin[W];
    const int64_t angle = static_cast<int64_t>(row % p.steps) * p.half + i;
    load_angles(p.cos + angle, cos);
    load_angles(p.sin + angle, sin);
    WGPT_UNROLL
    for (int k = 0; k < W; ++k) {
      sin[k] *= p.sign;
      WGPT_UNROLL
      for (int part = 0; part < 2; ++part) {
        const float a = to_float(first[part].e[k]), b = to_float(second[part].e[k]);
        first[part].e[k] = from_float<T>(a * cos[k] - b * sin[k]);
        second[part].e[k] = from_float<T>(b * cos[k] + a * sin[k]);
      }
    }
    WGPT_UNROLL
    for (int part = 0; part < 3; ++part) {
      T* to = p.to[part] + row * p.to_pitch + channel;
      store_vec<W>(to, first[part]);
      store_vec<W>(to + p.half, second[part]);
    }
  }
}

// parts: q, k and v, or their gradients; packed: qkv, or its gradient.
template <typename T>
const char* rotate(const RotaryShape& s, const void* cos, const void* sin, Params<T> p,
                   Stream stream) {
  p.cos = static_cast<const float*>(cos);
  p.sin = static_cast<const float*>(sin);
  p.rows = static_cast<unsigned>(s.batch * s.steps);
  p.steps = static_cast<unsigned>(s.steps);
  p.heads = static_cast<unsigned>(s.heads);
  p.half = static_cast<unsigned>(s.head_dim / 2);
  if (p.rows == 0 || p.heads * p.half == 0) return nullptr;
  constexpr int kW = kVecLanes<T>;
  bool wide = p.half % kW == 0 && aligned16(cos) && aligned16(sin);
  for (int part = 0; part < 3; ++part)
    wide = wide && aligned16(p.from[part]) && aligned16(p.to[part]);
  const unsigned vecs_per_row = p.heads * p.half / (wide ? kW : 1);
  p.rows_per_block = vecs_per_row < kThreads ? kThreads / vecs_per_row : 1;
  const dim3 grid(ceil_div(p.rows, p.rows_per_block));
  return wide ? launch(rotate_kernel<T, kW>, grid, kThreads, 0, stream, p)
              : launch(rotate_kernel<T, 1>, grid, kThreads, 0, stream, p);
}

inline const char* check(const RotaryShape& s) {
  if (s.batch * s.steps > INT32_MAX) return "rotary_qkv: more than 2^31 - 1 steps in one call";
  if (s.heads * s.head_dim > 65536) return "rotary_qkv: more than 65536 channels";
  return nullptr;
}

constexpr const char* kTypes = "rotary_qkv: CUDA knows float32, bfloat16 and float16";

}  // namespace rotary_qkv

const char* rotary_qkv_forward(const RotaryForward& a, Stream stream) {
  const char* error = rotary_qkv::check(a.shape);
  if (error != nullptr) return error;
  const bool known = with_element_type(a.shape.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t width = a.shape.heads * a.shape.head_dim;
    rotary_qkv::Params<T> p = {};
    void* const to[3] = {a.q, a.k, a.v};
    for (int part = 0; part < 3; ++part) {
      p.from[part] = static_cast<const T*>(a.qkv) + part * width;
      p.to[part] = static_cast<T*>(to[part]);
    }
    p.from_pitch = 3 * width;
    p.to_pitch = width;
    p.sign = 1.f;
    error = rotary_qkv::rotate(a.shape, a.cos, a.sin, p, stream);
  });
  return known ? error : rotary_qkv::kTypes;
}

const char* rotary_qkv_backward(const RotaryBackward& a, Stream stream) {
  const char* error = rotary_qkv::check(a.shape);
  if (error != nullptr) return error;
  const bool known = with_element_type(a.shape.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t width = a.shape.heads * a.shape.head_dim;
    rotary_qkv::Params<T> p = {};
    const void* const from[3] = {a.dq, a.dk, a.dv};
    for (int part = 0; part < 3; ++part) {
      p.from[part] = static_cast<const T*>(from[part]);
      p.to[part] = static_cast<T*>(a.d_qkv) + part * width;
    }
    p.from_pitch = width;
    p.to_pitch = 3 * width;
    p.sign = -1.f;
    error = rotary_qkv::rotate(a.shape, a.cos, a.sin, p, stream);
  });
  return known ? error : rotary_qkv::kTypes;
}

}  // namespace wgpt::cuda
