// GEMM micro-kernel on AMX, 32 x 32: bfloat16, and float32 as three bfloat16 terms (bf16x3).
//
// Three terms of eight significant bits hold the 24 of a float32: a = a0 + a1 + a2 exactly (except that
// below 2^-110 the last terms are flushed to zero), and with b = b0 + b1 + b2
//
//   a b = a0 b0 + a0 b1 + a1 b0 + a0 b2 + a1 b1 + a2 b0 + terms below 2^-24 of it
//
// Six tdpbf16ps of 16 cycles replace 128 cycles of two FMA units, and leave the vector units free. An
// operand that is not finite, or rounds to infinity as a bfloat16, becomes NaN.
#pragma once

#include "kernels/cpu/gemm/bf16x3.h"
#include "kernels/cpu/gemm/microkernel.h"

namespace wgpt::cpu::WGPT_TARGET {

#if defined(__AMX_BF16__)

// x, y -> units (x[i], y[i]) of each term, truncated instead of rounded: half the instructions. A truncated
// term has the sign of its number, so the other operand's terms should be rounded ones, or the error of the
// terms left out would be biased.
WGPT_INLINE void split_pairs_truncated(Floats x, Floats y, Floats (&units)[kBf16x3Terms]) {
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  WGPT_UNROLL for (int s = 0; s < kBf16x3Terms; ++s) {
    const __m512i a = _mm512_castps_si512(x), b = _mm512_castps_si512(y);
    units[s] = _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, top, 0xf8));  // a >> 16 | b & top
    if (s + 1 == kBf16x3Terms) break;
    x = x - _mm512_castsi512_ps(_mm512_and_si512(a, top));
    y = y - _mm512_castsi512_ps(_mm512_and_si512(b, top));
  }
}

// Register blocks of 32 x 32. An operand is kTerms panels of pairs, laid out as for Amx16x64Dot: bfloat16 as
// they are, or the three terms of float32. The k loop runs over whole tiles of kDepth units.
template <int kTerms_>
struct Amx32x32Dot {
  static constexpr int kPerUnit = 2;
  static constexpr int kTerms = kTerms_;
  static constexpr int kTermPairs = kTerms == 1 ? 1 : 6;  // tdpbf16ps per block of four tiles
  static constexpr int kRows = 32;
  static constexpr int kDepth = 16;
  static constexpr bool kIsAmx = true;
  static constexpr bool kExact = kTerms > 1;
  using Scope = Amx16x64Dot::Scope;
};

// c[r, :] (+)= sum over n units of a[r, k] b[k, :] for 32 rows and kColumns vectors. The terms of a are
// a_term floats apart, those of b b_term. With kFromZero c is overwritten. overlapped() is called after
// every four tdpbf16ps, which take 64 cycles and hardly any instructions.
template <typename Dot, int kColumns, bool kFromZero, typename Overlapped>
WGPT_INLINE void amx_gemm_32x32(const float* a, int64_t a_row, int64_t a_term, const float* b,
                                int64_t b_step, int64_t b_term, int64_t n, float* c, int64_t c_row,
                                Overlapped&& overlapped) {
  static_assert(kColumns % 2 == 0);
  const int64_t a_bytes = a_row * 4, b_bytes = b_step * 4, c_bytes = c_row * 4;
#define WGPT_LOAD_A(term)                          \
  _tile_loadd(4, left + (term) * a_term, a_bytes); \
  _tile_loadd(5, left + (term) * a_term + 16 * a_row, a_bytes)
#define WGPT_LOAD_B(term)                           \
  _tile_loadd(6, right + (term) * b_term, b_bytes); \
  _tile_loadd(7, right + (term) * b_term + kLanes, b_bytes)
#define WGPT_DPBF16        \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7); \
  overlapped()
  for (int column = 0; column < kColumns * kLanes; column += 2 * kLanes) {
    float *upper = c + column, *lower = upper + 16 * c_row;
    asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
    if constexpr (kFromZero) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, upper, c_bytes);
      _tile_loadd(1, upper + kLanes, c_bytes);
      _tile_loadd(2, lower, c_bytes);
      _tile_loadd(3, lower + kLanes, c_bytes);
    }
    for (int64_t k = 0; k < n; k += Dot::kDepth) {
      const float *left = a + k, *right = b + k * b_step + column;
      WGPT_LOAD_B(0);
      if constexpr (Dot::kTerms > 1) {  // the smallest terms first
        WGPT_LOAD_A(2);
        WGPT_DPBF16;
        WGPT_LOAD_A(1);
        WGPT_DPBF16;
      }
      WGPT_LOAD_A(0);
      WGPT_DPBF16;
      if constexpr (Dot::kTerms > 1) {
        WGPT_LOAD_B(2);
        WGPT_DPBF16;
        WGPT_LOAD_B(1);
        WGPT_DPBF16;
        WGPT_LOAD_A(1);
        WGPT_DPBF16;
      }
    }
    _tile_stored(0, upper, c_bytes);
    _tile_stored(1, upper + kLanes, c_bytes);
    _tile_stored(2, lower, c_bytes);
    _tile_stored(3, lower + kLanes, c_bytes);
    asm volatile("" ::: "memory");
  }
#undef WGPT_DPBF16
#undef WGPT_LOAD_B
#undef WGPT_LOAD_A
}

// Units (x[i], y[i]) of two vectors of results into the three terms of an operand.
WGPT_INLINE void store_pair_terms_truncated(float* out, int64_t term, Floats x, Floats y) {
  Floats units[kBf16x3Terms];
  split_pairs_truncated(x, y, units);
  WGPT_UNROLL for (int s = 0; s < kBf16x3Terms; ++s) store(out + s * term, units[s]);
}

#endif

// A row of results as the a operand of a GEMM whose k loop runs along that row. With three terms, pairs are
// of elements kLanes apart.
template <typename Dot, int kColumns>
WGPT_INLINE void store_row_terms(float* out, [[maybe_unused]] int64_t term,
                                 const Floats (&row)[kColumns]) {
#if defined(__AMX_BF16__)
  if constexpr (Dot::kTerms > 1) {
    static_assert(kColumns % 2 == 0);
    WGPT_UNROLL for (int v = 0; v < kColumns; v += 2)
        store_pair_terms_truncated(out + v / 2 * kLanes, term, row[v], row[v + 1]);
    return;
  }
#endif
  store_row<Dot>(out, row);
}

// Two rows of results as a row of pairs: the b operand of a GEMM whose k loop runs over the rows.
template <typename Dot, int kColumns>
WGPT_INLINE void store_pairs_over_rows([[maybe_unused]] float* out, [[maybe_unused]] int64_t term,
                                       [[maybe_unused]] const Floats (&x)[kColumns],
                                       [[maybe_unused]] const Floats (&y)[kColumns]) {
#if defined(__AMX_BF16__)
  WGPT_UNROLL for (int v = 0; v < kColumns; ++v) {
    if constexpr (Dot::kTerms > 1) {
      store_pair_terms_truncated(out + v * kLanes, term, x[v], y[v]);
    } else {
      store(out + v * kLanes, narrow_pairs(x[v], y[v]));
    }
  }
#endif
}

}  // namespace wgpt::cpu::WGPT_TARGET
