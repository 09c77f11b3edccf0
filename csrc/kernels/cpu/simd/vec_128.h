// The vector API over the compiler's own 128-bit vectors: SSE2 on x86-64, Advanced SIMD on aarch64,
// or scalar code where there are neither. See vec.h.
#pragma once

#include "kernels/cpu/simd/elements.h"

namespace wgpt::cpu::WGPT_TARGET {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

inline Floats splat(float x) { return Floats{x, x, x, x}; }
inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof(x)); }
inline Floats load(const BFloat16* p) {
  typedef uint16_t Halves __attribute__((vector_size(8)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  Halves top;
  std::memcpy(&top, p, sizeof(top));
  return reinterpret_cast<Floats>(__builtin_convertvector(top, Bits) << 16);
}
inline Floats load(const Float16* p) {
  return Floats{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
inline Floats load(const int8_t* p) {
  typedef int8_t Bytes __attribute__((vector_size(4)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(__builtin_convertvector(bytes, Integers), Floats);
}
inline void store(BFloat16* p, Floats x) {
  for (int i = 0; i < kLanes; ++i) p[i] = narrow<BFloat16>(x[i]);
}
inline void store(Float16* p, Floats x) {
  for (int i = 0; i < kLanes; ++i) p[i] = narrow<Float16>(x[i]);
}

// Lanes of a where mask is set, else of b.
inline Floats select(Integers mask, Floats a, Floats b) {
  return reinterpret_cast<Floats>((mask & reinterpret_cast<Integers>(a)) |
                                  (~mask & reinterpret_cast<Integers>(b)));
}

inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats max_or_second(Floats a, Floats b) { return select(a > b, a, b); }
inline bool any_above(Floats a, Floats b) {
  const Integers above = a > b;
  return (above[0] | above[1] | above[2] | above[3]) != 0;
}
inline Floats reciprocal(Floats x) { return splat(1.0f) / x; }
inline float first_lane(Floats x) { return x[0]; }
inline float reduce_add(Floats x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float reduce_max(Floats x) { return max_of(max_of(x[0], x[2]), max_of(x[1], x[3])); }

// x = n + f with n the nearest integer. Adding and taking away 1.5 * 2^23 rounds to an integer
// while |x| < 2^22; where x is smaller, scale_by_power gives 0 anyway.
inline Floats split_integer(Floats x, Floats& f) {
  const Floats bounded = max_or_second(splat(-1000.0f), x);
  const Floats n = (bounded + splat(12582912.0f)) - splat(12582912.0f);
  f = bounded - n;
  return n;
}
inline Floats scale_by_power(Floats y, Floats n) {
  const Integers is_kept = ~(n <= splat(-126.0f));  // true at NaN
  const Integers is_number = n == n;
  const Floats bounded = select(is_kept & is_number, n, splat(0.0f));
  const Integers exponent = __builtin_convertvector(bounded, Integers) << 23;
  const Floats scaled = reinterpret_cast<Floats>(reinterpret_cast<Integers>(y) + exponent);
  return select(is_kept, select(is_number, scaled, y), splat(0.0f));
}

// x where a > b, else y; y where either is NaN.
inline Floats choose_above(Floats a, Floats b, Floats x, Floats y) { return select(a > b, x, y); }

inline Floats choose_by_bytes(const uint8_t* p, Floats x, Floats y) {
  const Integers wide = {p[0], p[1], p[2], p[3]};
  return select(wide != 0, x, y);
}

inline Floats keep_lanes(Floats x, Floats otherwise, int lo, int hi) {
  const Integers lane = {0, 1, 2, 3};
  return select((lane >= lo) & (lane < hi), x, otherwise);
}

// out[j * out_stride + i] = in[i * in_stride + j] for i, j < kLanes, in 32-bit units.
inline void transpose_block(const void* in, int64_t in_stride, void* out, int64_t out_stride) {
  const auto* rows = static_cast<const float*>(in);
  auto* columns = static_cast<float*>(out);
  for (int j = 0; j < kLanes; ++j) {
    store(columns + j * out_stride,
          Floats{rows[j], rows[in_stride + j], rows[2 * in_stride + j], rows[3 * in_stride + j]});
  }
}

}  // namespace wgpt::cpu::WGPT_TARGET
