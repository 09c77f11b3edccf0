// Elements whose type only the launch knows: an op whose tensors each have a type of their own is one kernel, not one for
// every combination. Elements are converted after they were loaded, not as they are, so that the loads of a row are in
// flight together; the branches on the type are uniform.
#pragma once

#include "kernels/cuda/device/types.cuh"

namespace wgpt::cuda {

// W neighbours (1 or 4) as loaded: 16-bit elements fill the first half.
template <int W>
struct Loaded {
  uint32_t word[W];
};

template <int W>
WGPT_DEVICE Loaded<W> load_any(const void* p, DType dtype, int64_t at) {
  Loaded<W> v = {};
  if (dtype == DType::kFloat32) {
    const Vec<uint32_t, W> e = load_vec<W>(static_cast<const uint32_t*>(p) + at);
    __builtin_memcpy(&v, &e, sizeof(e));
  } else {
    const Vec<uint16_t, W> e = load_vec<W>(static_cast<const uint16_t*>(p) + at);
    __builtin_memcpy(&v, &e, sizeof(e));
  }
  return v;
}

template <int W>
WGPT_DEVICE void to_floats(const Loaded<W>& v, DType dtype, float (&x)[W]) {
  WGPT_UNROLL
  for (int k = 0; k < W; ++k) {
    const uint16_t bits = static_cast<uint16_t>(v.word[k / 2] >> k % 2 * 16);
    x[k] = dtype == DType::kFloat32    ? __uint_as_float(v.word[k])
           : dtype == DType::kBFloat16 ? to_float(Bf16{bits})
                                       : to_float(Half{bits});
  }
}

WGPT_DEVICE float rounded_to(DType dtype, float x) {
  if (dtype == DType::kBFloat16) return to_float(from_float<Bf16>(x));
  if (dtype == DType::kFloat16) return to_float(from_float<Half>(x));
  return x;
}

namespace detail {
template <typename T, int W>
WGPT_DEVICE void store_as(void* p, int64_t at, const float (&x)[W]) {
  Vec<T, W> e;
  WGPT_UNROLL
  for (int k = 0; k < W; ++k) e.e[k] = from_float<T>(x[k]);
  store_vec<W>(static_cast<T*>(p) + at, e);
}
}  // namespace detail

template <int W>
WGPT_DEVICE void store_any(void* p, DType dtype, int64_t at, const float (&x)[W]) {
  if (dtype == DType::kFloat32) return detail::store_as<float>(p, at, x);
  if (dtype == DType::kBFloat16) return detail::store_as<Bf16>(p, at, x);
  detail::store_as<Half>(p, at, x);
}

// The sum over a warp in every lane, in an order of its own: the same bits always.
WGPT_DEVICE float warp_sum(float x) {
  WGPT_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

}  // namespace wgpt::cuda
