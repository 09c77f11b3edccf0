// The vector API on AVX-512 (F, BW, DQ, VL): sixteen floats a register, thirty-two registers. See
// vec.h.
#pragma once

// GCC 12 warns about its own _mm512_undefined_ps (PR 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "kernels/cpu/simd/elements.h"

namespace wgpt::cpu::WGPT_TARGET {

using Floats = __m512;
constexpr int kLanes = 16, kRegisters = 32;

inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }

inline Floats load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Floats load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
inline void store(BFloat16* p, Floats x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
  const __m512i bits = _mm512_castps_si512(x), top = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, is_nan, top, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
#endif
}
inline void store(Float16* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats max_or_second(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline bool any_above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
// 1 / x by an estimate and a Newton step: vdivps takes 16 cycles on Intel. x is bounded so that the
// step does not meet 0 * infinity.
inline Floats reciprocal(Floats x) {
  const Floats bounded = _mm512_min_ps(splat(3.0e38f), x);
  const Floats estimate = _mm512_rcp14_ps(bounded);
  return estimate * _mm512_fnmadd_ps(bounded, estimate, splat(2.0f));
}
inline float first_lane(Floats x) { return _mm512_cvtss_f32(x); }
inline float reduce_add(Floats x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(Floats x) { return _mm512_reduce_max_ps(x); }

// x = n + f with n the nearest integer; vreduceps gives f = 0 at infinities.
inline Floats split_integer(Floats x, Floats& f) {
  f = _mm512_reduce_ps(x, 0);
  return x - f;
}
inline Floats scale_by_power(Floats y, Floats n) { return _mm512_scalef_ps(y, n); }

// x where a > b, else y; y where either is NaN.
inline Floats choose_above(Floats a, Floats b, Floats x, Floats y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}

inline Floats choose_by_bytes(const uint8_t* p, Floats x, Floats y) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), y, x);
}

inline Floats keep_lanes(Floats x, Floats otherwise, int lo, int hi) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 from = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(lo));
  return _mm512_mask_blend_ps(_mm512_mask_cmplt_epi32_mask(from, lane, _mm512_set1_epi32(hi)),
                              otherwise, x);
}

// out[j * out_stride + i] = in[i * in_stride + j] for i, j < kLanes, in 32-bit units.
inline void transpose_block(const void* in, int64_t in_stride, void* out, int64_t out_stride) {
  __m512 r[16], s[16];
  const auto* rows = static_cast<const float*>(in);
  auto* columns = static_cast<float*>(out);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = load(rows + i * in_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    s[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(s[4 * i + j]), b = _mm512_castps_pd(s[4 * i + 2 + j]);
      r[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // lane l of r[4 i + j] holds column 4 l + j of rows 4 i .. 4 i + 3
    const __m512 a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88),
                 b = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    store(columns + j * out_stride, _mm512_shuffle_f32x4(a, c, 0x88));
    store(columns + (4 + j) * out_stride, _mm512_shuffle_f32x4(b, d, 0x88));
    store(columns + (8 + j) * out_stride, _mm512_shuffle_f32x4(a, c, 0xdd));
    store(columns + (12 + j) * out_stride, _mm512_shuffle_f32x4(b, d, 0xdd));
  }
}

}  // namespace wgpt::cpu::WGPT_TARGET
