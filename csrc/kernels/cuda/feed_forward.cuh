// feed_forward's GELU on CUDA, between cuBLAS's GEMMs. Formulas in kernels/feed_forward.h. Not yet run on hardware.
//
// A thread owns 16 bytes of each tensor. Bytes of an element: forward reads and writes it once; backward reads z and
// d_active and writes active and d_z, so recomputing the activations costs one write, not a pass. Limits: a copy, or the
// 30 to 40 instructions of erf and exp: 6000 x 1024 in bfloat16 are 25 and 49 MB, 5.7 and 11 us at 4.3 TB/s.
#pragma once

#include "kernels/cuda/device/types.cuh"
#include "kernels/cuda/gelu.cuh"
#include "kernels/cuda/launch.h"

namespace wgpt::cuda {
namespace feed_forward {

constexpr int kThreads = 256;

// backward: d_active is not nullptr, and d_z may be d_active.
template <typename T, int W>
__global__ void __launch_bounds__(kThreads)
    gelu_kernel(const T* z, const T* d_active, T* active, T* d_z, int64_t n) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * W;
  if (at >= n) return;
  const bool whole = at + W <= n;
  const auto load = [&](const T* from) {
    if (whole) return load_vec<W>(from + at);
    Vec<T, W> v = {};
    WGPT_UNROLL
    for (int k = 0; k < W; ++k) {
      if (at + k < n) v.e[k] = from[at + k];
    }
    return v;
  };
  const auto store = [&](T* to, const Vec<T, W>& v) {
    if (whole) return store_vec<W>(to + at, v);
    WGPT_UNROLL
    for (int k = 0; k < W; ++k) {
      if (at + k < n) to[at + k] = v.e[k];
    }
  };
  const bool has_gradient = d_active != nullptr;
  const Vec<T, W> x = load(z);
  Vec<T, W> y, d = {};
  if (has_gradient) d = load(d_active);
  WGPT_UNROLL
  for (int k = 0; k < W; ++k) {
    float slope;
    y.e[k] = from_float<T>(gelu(to_float(x.e[k]), slope));
    d.e[k] = from_float<T>(to_float(d.e[k]) * slope);
  }
  store(active, y);
  if (has_gradient) store(d_z, d);
}

inline const char* gelu_as(DType dtype, int64_t n, const void* z, const void* d_active,
                           void* active, void* d_z, Stream stream) {
  const char* error = nullptr;
  if (n == 0) return error;
  const bool wide = aligned16(z) && aligned16(d_active) && aligned16(active) && aligned16(d_z);
  const bool known = with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const int w = wide ? kVecLanes<T> : 1;
    const int64_t n_blocks = ceil_div(n, int64_t{w} * kThreads);
    if (n_blocks > INT32_MAX) {
      error = "feed_forward: more than 2^39 elements in one call";
      return;
    }
    const auto kernel = wide ? gelu_kernel<T, kVecLanes<T>> : gelu_kernel<T, 1>;
    error = launch(kernel, static_cast<unsigned>(n_blocks), kThreads, 0, stream,
                   static_cast<const T*>(z), static_cast<const T*>(d_active),
                   static_cast<T*>(active), static_cast<T*>(d_z), n);
  });
  return known ? error : "feed_forward: CUDA knows float32, bfloat16 and float16";
}

}  // namespace feed_forward

const char* gelu_forward(const GeluForward& a, Stream stream) {
  return feed_forward::gelu_as(a.dtype, a.n, a.z, nullptr, a.active, nullptr, stream);
}

const char* gelu_backward(const GeluBackward& a, Stream stream) {
  return feed_forward::gelu_as(a.dtype, a.n, a.z, a.d_active, a.active, a.d_z, stream);
}

}  // namespace wgpt::cuda
