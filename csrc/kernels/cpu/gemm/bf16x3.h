// bf16x3: a float32 as the sum of three bfloat16 terms, for GEMMs on AMX. The formula, its error and its
// limits: kernels/gemm.h.
#pragma once

#include "kernels/cpu/simd/vec.h"

namespace wgpt::cpu::WGPT_TARGET {

#if defined(__AMX_BF16__)

constexpr int kBf16x3Terms = 3;

// x, y -> 32 values of each term, those of x first.
inline __attribute__((always_inline)) void split_bf16x3(Floats x, Floats y,
                                                        __m512i (&terms)[kBf16x3Terms]) {
#pragma GCC unroll 3
  for (int s = 0; s < kBf16x3Terms; ++s) {
    terms[s] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x));
    if (s + 1 == kBf16x3Terms) break;
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(terms[s]));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(terms[s], 1));
    x = x - _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
    y = y - _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
  }
}

#endif

}  // namespace wgpt::cpu::WGPT_TARGET
