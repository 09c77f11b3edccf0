// The product at the heart of attention: a tile of sums in registers, c[r, n] += sum_k a[r, k] b[k,
// n].
//
// Everything is seen in 32-bit units: a float, or a pair of bfloat16 that vdpbf16ps multiplies and
// adds at once. a is read one unit at a time and broadcast, b by whole vectors from a packed panel;
// six rows by four vectors fill 24 of 32 registers (six by two: 12 of 16) and take 10 loads for 24
// multiplications.
#pragma once

#include "kernels/cpu/vec.h"

namespace wgpt::cpu::WGPT_TARGET {

#define WGPT_INLINE inline __attribute__((always_inline))
#define WGPT_UNROLL _Pragma("GCC unroll 32")

// Products in float32, whatever the elements were.
struct FloatDot {
  static constexpr int kPerUnit = 1;  // elements in a unit
  static constexpr bool kExact = true;
  static WGPT_INLINE Floats fma(Floats a, Floats b, Floats c) { return WGPT_TARGET::fma(a, b, c); }
};

#if defined(__AVX512BF16__)
// Products of bfloat16 pairs, summed in float32.
struct BFloat16Dot {
  static constexpr int kPerUnit = 2;
  static constexpr bool kExact = false;
  static WGPT_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#endif

// How products over elements of a type are made on this target.
template <typename Element>
struct DotOf {
  using Type = FloatDot;
};
#if defined(__AVX512BF16__)
template <>
struct DotOf<BFloat16> {
  using Type = BFloat16Dot;
};
#endif

constexpr int kVectors = kRegisters == 32 ? 4 : 2;  // vectors of a full-width tile
constexpr int kRowGroup = 6;                        // rows of one
constexpr int kStrip = kVectors * kLanes;           // columns of one

template <int kRows, int kColumns>
using Tile = Floats[kRows][kColumns];

// Calls body(Constant<kWidth>{}) for width in [1, kVectors].
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <typename Body>
WGPT_INLINE void with_width(int width, Body&& body) {
  if (width == 1) return body(Constant<1>{});
  if constexpr (kVectors == 4) {
    if (width == 2) return body(Constant<2>{});
    if (width == 3) return body(Constant<3>{});
  }
  return body(Constant<kVectors>{});
}

template <int kRows, int kColumns>
WGPT_INLINE void fill_tile(Tile<kRows, kColumns>& c, float x) {
  WGPT_UNROLL for (int r = 0; r < kRows; ++r) {
    WGPT_UNROLL for (int v = 0; v < kColumns; ++v) c[r][v] = splat(x);
  }
}

// a[r, k] lies at a[r * a_row + k * a_step], b[k, :] at b + k * b_step; n units are summed.
template <typename Dot, int kRows, int kColumns>
WGPT_INLINE void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b,
                               int64_t b_step, int64_t n, Tile<kRows, kColumns>& c) {
  for (int64_t k = 0; k < n; ++k) {
    Floats row[kColumns];
    WGPT_UNROLL for (int v = 0; v < kColumns; ++v) row[v] = load(b + k * b_step + v * kLanes);
    WGPT_UNROLL for (int r = 0; r < kRows; ++r) {
      const Floats factor = splat(a[r * a_row + k * a_step]);
      WGPT_UNROLL for (int v = 0; v < kColumns; ++v) c[r][v] = Dot::fma(factor, row[v], c[r][v]);
    }
  }
}

// c = c * shrink[r] + tile, for the rows of c in memory; shrink may be nullptr for 1.
template <int kRows, int kColumns>
WGPT_INLINE void add_tile(const Tile<kRows, kColumns>& tile, const float* shrink, float* c,
                          int64_t c_row) {
  WGPT_UNROLL for (int r = 0; r < kRows; ++r) {
    WGPT_UNROLL for (int v = 0; v < kColumns; ++v) {
      float* out = c + r * c_row + v * kLanes;
      store(out, shrink == nullptr ? load(out) + tile[r][v]
                                   : fma(load(out), splat(shrink[r]), tile[r][v]));
    }
  }
}

#if defined(__AVX512BF16__)
// out[i] = (a[i], b[i]) as bfloat16.
WGPT_INLINE Floats narrow_pairs(Floats a, Floats b) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  return reinterpret_cast<Floats>(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}
#endif

// Rows of results as the a operand of a product over the rows: [row / pair][column].
template <typename Dot, int kRows, int kColumns>
WGPT_INLINE void store_rows_across(float* out, int64_t out_row, const Tile<kRows, kColumns>& tile) {
  if constexpr (Dot::kPerUnit == 1) {
    WGPT_UNROLL for (int r = 0; r < kRows; ++r) {
      WGPT_UNROLL for (int v = 0; v < kColumns; ++v)
          store(out + r * out_row + v * kLanes, tile[r][v]);
    }
  } else {
#if defined(__AVX512BF16__)
    WGPT_UNROLL for (int r = 0; r < kRows; r += 2) {
      WGPT_UNROLL for (int v = 0; v < kColumns; ++v) {
        store(out + r / 2 * out_row + v * kLanes, narrow_pairs(tile[r][v], tile[r + 1][v]));
      }
    }
#endif
  }
}

// A row of results as the a operand of a product along that row.
template <typename Dot, int kColumns>
WGPT_INLINE void store_row(float* out, const Floats (&row)[kColumns]) {
  if constexpr (Dot::kPerUnit == 1) {
    WGPT_UNROLL for (int v = 0; v < kColumns; ++v) store(out + v * kLanes, row[v]);
  } else {
#if defined(__AVX512BF16__)
    WGPT_UNROLL for (int v = 0; v + 1 < kColumns; v += 2) {
      store(out + v / 2 * kLanes,
            reinterpret_cast<Floats>(_mm512_cvtne2ps_pbh(row[v + 1], row[v])));
    }
    if constexpr (kColumns % 2 == 1) {
      _mm256_storeu_ps(out + kColumns / 2 * kLanes,
                       reinterpret_cast<__m256>(_mm512_cvtneps_pbh(row[kColumns - 1])));
    }
#endif
  }
}

}  // namespace wgpt::cpu::WGPT_TARGET
