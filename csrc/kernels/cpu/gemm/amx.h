// Products on the tile registers of AMX: of bfloat16, and of float32 as three bfloat16 each.
//
// Eight bits each make the 24 of a float32, so a = a0 + a1 + a2 exactly (the smallest numbers apart:
// below 2^-110 the last parts are flushed to zero), and with b = b0 + b1 + b2
//
//   a b = a0 b0 + a0 b1 + a1 b0 + a0 b2 + a1 b1 + a2 b0 + what is below 2^-24 of it
//
// Six tile products of 16 cycles do what takes two multiply-add units 128, and leave the vector units
// free. What is not finite, or rounds to infinity as a bfloat16, becomes NaN.
#pragma once

#include "kernels/cpu/gemm/bf16x3.h"
#include "kernels/cpu/gemm/microkernel.h"

namespace wgpt::cpu::WGPT_TARGET {

#if defined(__AMX_BF16__)

// x, y -> units (x[i], y[i]) of each split, by cutting instead of rounding: half the instructions.
// A cut part has the sign of its number, so the other operand's parts should be rounded ones, or what is
// left out of the product would lean to one side.
WGPT_INLINE void cut_pairs(Floats x, Floats y, Floats (&units)[kSplits]) {
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  WGPT_UNROLL for (int s = 0; s < kSplits; ++s) {
    const __m512i a = _mm512_castps_si512(x), b = _mm512_castps_si512(y);
    units[s] = _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, top, 0xf8));  // a >> 16 | b & top
    if (s + 1 == kSplits) break;
    x = x - _mm512_castsi512_ps(_mm512_and_si512(a, top));
    y = y - _mm512_castsi512_ps(_mm512_and_si512(b, top));
  }
}

// Tiles of 32 rows. An operand is kPlanes panels of pairs, as MatrixDot has them: bfloat16 as they
// are, or the three parts of float32. Sums run over whole tiles of kDepth units.
template <int kPlanes_>
struct TileDot {
  static constexpr int kPerUnit = 2;
  static constexpr int kPlanes = kPlanes_;
  static constexpr int kRounds = kPlanes == 1 ? 1 : 6;  // of tile products, for one of numbers
  static constexpr int kRows = 32;
  static constexpr int kDepth = 16;
  static constexpr bool kIsMatrix = true;
  static constexpr bool kExact = kPlanes > 1;
  using Scope = MatrixDot::Scope;
};

// c[r, :] = or += sum over n units of a[r, k] b[k, :] for 32 rows and kColumns vectors. Planes of a lie
// a_plane apart, of b b_plane. With kFromZero what lies at c is not read. shadow() is called behind
// every four tile products, which take 64 cycles and hardly any instructions.
template <typename Dot, int kColumns, bool kFromZero, typename Shadow>
WGPT_INLINE void multiply_tiles(const float* a, int64_t a_row, int64_t a_plane, const float* b,
                                int64_t b_step, int64_t b_plane, int64_t n, float* c, int64_t c_row,
                                Shadow&& shadow) {
  static_assert(kColumns % 2 == 0);
  const int64_t a_bytes = a_row * 4, b_bytes = b_step * 4, c_bytes = c_row * 4;
#define WGPT_LOAD_A(plane)                           \
  _tile_loadd(4, left + (plane) * a_plane, a_bytes); \
  _tile_loadd(5, left + (plane) * a_plane + 16 * a_row, a_bytes)
#define WGPT_LOAD_B(plane)                            \
  _tile_loadd(6, right + (plane) * b_plane, b_bytes); \
  _tile_loadd(7, right + (plane) * b_plane + kLanes, b_bytes)
#define WGPT_PRODUCTS      \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7); \
  shadow()
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
      if constexpr (Dot::kPlanes > 1) {  // the smallest first
        WGPT_LOAD_A(2);
        WGPT_PRODUCTS;
        WGPT_LOAD_A(1);
        WGPT_PRODUCTS;
      }
      WGPT_LOAD_A(0);
      WGPT_PRODUCTS;
      if constexpr (Dot::kPlanes > 1) {
        WGPT_LOAD_B(2);
        WGPT_PRODUCTS;
        WGPT_LOAD_B(1);
        WGPT_PRODUCTS;
        WGPT_LOAD_A(1);
        WGPT_PRODUCTS;
      }
    }
    _tile_stored(0, upper, c_bytes);
    _tile_stored(1, upper + kLanes, c_bytes);
    _tile_stored(2, lower, c_bytes);
    _tile_stored(3, lower + kLanes, c_bytes);
    asm volatile("" ::: "memory");
  }
#undef WGPT_PRODUCTS
#undef WGPT_LOAD_B
#undef WGPT_LOAD_A
}

// Units (x[i], y[i]) of two vectors of results into the three planes of an operand.
WGPT_INLINE void store_cut(float* out, int64_t plane, Floats x, Floats y) {
  Floats units[kSplits];
  cut_pairs(x, y, units);
  WGPT_UNROLL for (int s = 0; s < kSplits; ++s) store(out + s * plane, units[s]);
}

#endif

// A row of results as the a operand of a product along that row. In planes, pairs are of elements
// kLanes apart.
template <typename Dot, int kColumns>
WGPT_INLINE void store_planes(float* out, [[maybe_unused]] int64_t plane,
                              const Floats (&row)[kColumns]) {
#if defined(__AMX_BF16__)
  if constexpr (Dot::kPlanes > 1) {
    static_assert(kColumns % 2 == 0);
    WGPT_UNROLL for (int v = 0; v < kColumns; v += 2)
        store_cut(out + v / 2 * kLanes, plane, row[v], row[v + 1]);
    return;
  }
#endif
  store_row<Dot>(out, row);
}

// Two rows of results as a row of pairs: the b operand of a product over the rows.
template <typename Dot, int kColumns>
WGPT_INLINE void store_pairs_across([[maybe_unused]] float* out, [[maybe_unused]] int64_t plane,
                                    [[maybe_unused]] const Floats (&x)[kColumns],
                                    [[maybe_unused]] const Floats (&y)[kColumns]) {
#if defined(__AMX_BF16__)
  WGPT_UNROLL for (int v = 0; v < kColumns; ++v) {
    if constexpr (Dot::kPlanes > 1) {
      store_cut(out + v * kLanes, plane, x[v], y[v]);
    } else {
      store(out + v * kLanes, narrow_pairs(x[v], y[v]));
    }
  }
#endif
}

}  // namespace wgpt::cpu::WGPT_TARGET
