// The vector API on AVX2, FMA and F16C: eight floats a register, sixteen registers. See vec.h.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/simd/elements.h"

namespace wgpt::cpu::WGPT_TARGET {

using Floats = __m256;
constexpr int kLanes = 8, kRegisters = 16;

inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }

inline Floats load(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Floats load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Floats load(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
inline void store(BFloat16* p, Floats x) {
  const __m256i bits = _mm256_castps_si256(x), top = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, is_nan);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store(Float16* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats max_or_second(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline bool any_above(Floats a, Floats b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}

inline Floats reciprocal(Floats x) { return splat(1.0f) / x; }
inline float first_lane(Floats x) { return _mm256_cvtss_f32(x); }
inline float reduce_add(Floats x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(Floats x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// x = n + f with n the nearest integer.
inline Floats split_integer(Floats x, Floats& f) {
  const Floats n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  f = x - n;
  return n;
}
// Below -126 the exponent would leave its field: 0.
inline Floats scale_by_power(Floats y, Floats n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const Floats scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
  const Floats is_kept = _mm256_cmp_ps(n, splat(-126.0f), _CMP_NLE_UQ);  // true at NaN
  return _mm256_and_ps(_mm256_blendv_ps(scaled, y, _mm256_cmp_ps(n, n, _CMP_UNORD_Q)), is_kept);
}

// x where a > b, else y; y where either is NaN.
inline Floats choose_above(Floats a, Floats b, Floats x, Floats y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

inline Floats choose_by_bytes(const uint8_t* p, Floats x, Floats y) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m256i is_zero = _mm256_cmpeq_epi32(wide, _mm256_setzero_si256());
  return _mm256_blendv_ps(x, y, _mm256_castsi256_ps(is_zero));
}

inline Floats keep_lanes(Floats x, Floats otherwise, int lo, int hi) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane);
  const __m256i kept = _mm256_andnot_si256(before, _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), lane));
  return _mm256_blendv_ps(otherwise, x, _mm256_castsi256_ps(kept));
}

// out[j * out_stride + i] = in[i * in_stride + j] for i, j < kLanes, in 32-bit units.
inline void transpose_block(const void* in, int64_t in_stride, void* out, int64_t out_stride) {
  const auto* rows = static_cast<const float*>(in);
  auto* columns = static_cast<float*>(out);
  __m256 r[8], s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = load(rows + i * in_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      r[4 * i + 2 * j] = _mm256_shuffle_ps(s[4 * i + j], s[4 * i + 2 + j], 0x44);
      r[4 * i + 2 * j + 1] = _mm256_shuffle_ps(s[4 * i + j], s[4 * i + 2 + j], 0xee);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    store(columns + j * out_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
    store(columns + (4 + j) * out_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
  }
}

}  // namespace wgpt::cpu::WGPT_TARGET
