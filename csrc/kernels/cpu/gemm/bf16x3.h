// A float32 as the sum of three bfloat16, for products on tile registers. The formula, its error and
// its limits: kernels/matmul.h.
#pragma once

#include "kernels/cpu/simd/vec.h"

namespace wgpt::cpu::WGPT_TARGET {

#if defined(__AMX_BF16__)

constexpr int kSplits = 3;

// x, y -> 32 values of each split, those of x first.
inline __attribute__((always_inline)) void split_values(Floats x, Floats y,
                                                        __m512i (&parts)[kSplits]) {
#pragma GCC unroll 3
  for (int s = 0; s < kSplits; ++s) {
    parts[s] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x));
    if (s + 1 == kSplits) break;
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(parts[s]));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(parts[s], 1));
    x = x - _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
    y = y - _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
  }
}

#endif

}  // namespace wgpt::cpu::WGPT_TARGET
