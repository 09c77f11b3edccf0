// The vector API that the kernels' bodies are written in; one implementation per target, chosen by
// the flags it is compiled with. All of it is inlined into the target's own namespace.
//
//   Floats                    kLanes floats in one register; + - * / work on it
//   load store splat          unaligned; load and store also convert BFloat16 and Float16, load int8_t
//   fma(a, b, c)              a * b + c, rounded once where the target can
//   max_or_second(a, b)       b where either is NaN
//   reciprocal(x)             1 / x for 0 < x, within a unit in the last place or two; NaN at NaN
//   exp2_of<kExact>(x)        2^x for x <= 127; 0 at -inf, NaN at NaN; relative error 8e-8, or 8e-5
//   any_above(a, b)           whether a > b in some lane; false at NaN
//   choose_above(a, b, x, y)  x where a > b, else y
//   choose_by_bytes(p, x, y)  x where the byte of the lane is not 0, else y
//   keep_lanes(x, y, lo, hi)  x in lanes [lo, hi), y elsewhere
//   reduce_add reduce_max     over the lanes, in one fixed order
//   transpose_block(...)      a kLanes x kLanes block of 32-bit units
//
// kRegisters says how many registers a micro-kernel may count on.
#pragma once

#if defined(__AVX512F__)
#include "kernels/cpu/simd/vec_avx512.h"
#elif defined(__AVX2__)
#include "kernels/cpu/simd/vec_avx2.h"
#else
#include "kernels/cpu/simd/vec_128.h"
#endif

namespace wgpt::cpu::WGPT_TARGET {

// a * b + c without rounding a * b, also where fma has to round it: a score of 150 minus its lse
// would otherwise lose two digits more than torch does.
inline Floats fma_unrounded(Floats a, Floats b, Floats c) {
#if defined(__FMA__) || defined(__aarch64__)
  return fma(a, b, c);
#else
  Floats y;
  for (int i = 0; i < kLanes; ++i)
    y[i] = static_cast<float>(static_cast<double>(a[i]) * b[i] + c[i]);
  return y;
#endif
}

// 2^f on [-1/2, 1/2], minimax in relative error: degree 5 (7.5e-8), or 3 (7.5e-5) where the result
// becomes a bfloat16.
template <bool kExact>
inline Floats exp2_fraction(Floats f) {
  if constexpr (kExact) {
    Floats y = fma(splat(0x1.5c08e4p-10f), f, splat(0x1.3d0c54p-7f));
    y = fma(y, f, splat(0x1.c6b6e4p-5f));
    y = fma(y, f, splat(0x1.ebf918p-3f));
    y = fma(y, f, splat(0x1.62e428p-1f));
    return fma(y, f, splat(1.0f));
  } else {
    Floats y = fma(splat(0x1.c3f75ep-5f), f, splat(0x1.f0de1cp-3f));
    y = fma(y, f, splat(0x1.62f31ap-1f));
    return fma(y, f, splat(0x1.fff692p-1f));
  }
}

template <bool kExact>
inline Floats exp2_of(Floats x) {
  Floats f;
  const Floats n = split_integer(x, f);
  return scale_by_power(exp2_fraction<kExact>(f), n);
}

}  // namespace wgpt::cpu::WGPT_TARGET
