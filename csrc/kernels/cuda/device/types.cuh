// Element types and 16-byte accesses. Bf16 and Half are plain 16-bit patterns with explicit conversions, the same on the
// device and on the emulator, so neither needs cuda_bf16.h or cuda_fp16.h. All conversions round to nearest even.
#pragma once

#include "kernels/common.h"
#include "kernels/cuda/device/platform.cuh"

namespace wgpt::cuda {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

WGPT_DEVICE float to_float(float x) { return x; }
WGPT_DEVICE float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
WGPT_DEVICE float to_float(Half x) {
#ifdef __CUDACC__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return simt::half_to_float(x.bits);
#endif
}

template <typename T>
WGPT_DEVICE T from_float(float x);
template <>
WGPT_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
WGPT_DEVICE Bf16 from_float<Bf16>(float x) {
  Bf16 y;
#ifdef __CUDACC__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  y.bits = simt::float_to_bf16(x);
#endif
  return y;
}
template <>
WGPT_DEVICE Half from_float<Half>(float x) {
  Half y;
#ifdef __CUDACC__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  y.bits = simt::float_to_half(x);
#endif
  return y;
}

// Two neighbours in one register: the lower half holds the first, as mma fragments want them.
template <typename T>
WGPT_DEVICE uint32_t pack2(float first, float second);
template <>
WGPT_DEVICE uint32_t pack2<Bf16>(float first, float second) {
#ifdef __CUDACC__
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
#else
  return simt::float_to_bf16(first) | static_cast<uint32_t>(simt::float_to_bf16(second)) << 16;
#endif
}
template <>
WGPT_DEVICE uint32_t pack2<Half>(float first, float second) {
#ifdef __CUDACC__
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
#else
  return simt::float_to_half(first) | static_cast<uint32_t>(simt::float_to_half(second)) << 16;
#endif
}

// N elements moved as one access of N * sizeof(T) in {2, 4, 8, 16} bytes, aligned to that size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T e[N];
};

using Vec16 = Vec<uint32_t, 4>;  // sixteen bytes of anything

template <typename T>
constexpr int kVecLanes = 16 / sizeof(T);  // elements of a 16-byte access

namespace detail {
template <int kBytes>
struct Word;
#ifdef __CUDACC__
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};
#endif
}  // namespace detail

template <int N, typename T>
WGPT_DEVICE Vec<T, N> load_vec(const T* p) {
  Vec<T, N> v;
#ifdef __CUDACC__
  using Word = typename detail::Word<sizeof(v)>::Type;
  const Word word = *reinterpret_cast<const Word*>(p);
  __builtin_memcpy(&v, &word, sizeof(v));
#else
  simt::load_bytes<sizeof(v)>(&v, p);
#endif
  return v;
}

template <int N, typename T>
WGPT_DEVICE void store_vec(T* p, const Vec<T, N>& v) {
#ifdef __CUDACC__
  using Word = typename detail::Word<sizeof(v)>::Type;
  Word word;
  __builtin_memcpy(&word, &v, sizeof(v));
  *reinterpret_cast<Word*>(p) = word;
#else
  simt::store_bytes<sizeof(v)>(p, &v);
#endif
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls f with a value of the element type; false when CUDA kernels do not know the type.
template <typename F>
bool with_element_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{}), true;
    case DType::kBFloat16:
      return f(Bf16{}), true;
    case DType::kFloat16:
      return f(Half{}), true;
    default:
      return false;
  }
}

}  // namespace wgpt::cuda
