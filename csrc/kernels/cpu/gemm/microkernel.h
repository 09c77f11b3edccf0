// GEMM micro-kernel: an MR x NR register block of accumulators, c[r, n] += sum_k a[r, k] b[k, n].
//
// Everything is counted in 32-bit units: a float, or a pair of bfloat16 that one vdpbf16ps lane multiplies
// and adds. a is read one unit at a time and broadcast, b by whole vectors from a packed panel; six rows by
// four vectors fill 24 of 32 registers (six by two: 12 of 16) and take 10 loads for 24 FMAs. With AMX the
// block is sixteen rows by four vectors, kept in memory between calls.
#pragma once

#include "kernels/cpu/simd/vec.h"

namespace wgpt::cpu::WGPT_TARGET {

#define WGPT_INLINE inline __attribute__((always_inline))
#define WGPT_UNROLL _Pragma("GCC unroll 32")

// float32 FMAs, whatever the elements were.
struct FloatDot {
  static constexpr int kPerUnit = 1;     // elements in a unit
  static constexpr int kTerms = 1;       // bfloat16 terms that an element is split into
  static constexpr int kRows = 6;        // rows of a register block
  static constexpr bool kIsAmx = false;  // whether the k loop runs over whole AMX tiles
  static constexpr bool kExact = true;
  struct Scope {};  // a thread's register state during a GEMM (AMX tile configuration)
  static WGPT_INLINE Floats fma(Floats a, Floats b, Floats c) { return WGPT_TARGET::fma(a, b, c); }
};

#if defined(__AVX512BF16__)
// vdpbf16ps: pairs of bfloat16, accumulated in float32.
struct BFloat16Dot {
  static constexpr int kPerUnit = 2;
  static constexpr int kTerms = 1;
  static constexpr int kRows = 6;
  static constexpr bool kIsAmx = false;
  static constexpr bool kExact = false;
  struct Scope {};
  static WGPT_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#endif

#if defined(__AMX_BF16__)
// The same with AMX: a block of 16 rows by 64 columns. An AMX tile is 16 rows of 16 units; the k loop runs
// over whole tiles of kDepth units, so operands are zero-padded to that; a is contiguous along its units.
// The tile registers belong to one Scope of a thread at a time.
struct Amx16x64Dot {
  static constexpr int kPerUnit = 2;
  static constexpr int kTerms = 1;
  static constexpr int kRows = 16;
  static constexpr int kDepth = 16;
  static constexpr bool kIsAmx = true;
  static constexpr bool kExact = false;
  class Scope {
   public:
    Scope() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } static const config;
      _tile_loadconfig(&config);
    }
    ~Scope() { _tile_release(); }
    Scope(const Scope&) = delete;
  };
};
#endif

// The micro-kernel for elements of a type on this target.
template <typename Element>
struct DotOf {
  using Type = FloatDot;
};
#if defined(__AMX_BF16__)
template <>
struct DotOf<BFloat16> {
  using Type = Amx16x64Dot;
};
#elif defined(__AVX512BF16__)
template <>
struct DotOf<BFloat16> {
  using Type = BFloat16Dot;
};
#endif

constexpr int kVectors = kRegisters == 32 ? 4 : 2;  // vectors of a full-width register block
constexpr int kStrip = kVectors * kLanes;           // columns of one (NR)

template <int kRows, int kColumns>
using RegisterBlock = Floats[kRows][kColumns];

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
WGPT_INLINE void fill_block(RegisterBlock<kRows, kColumns>& c, float x) {
  WGPT_UNROLL for (int r = 0; r < kRows; ++r) {
    WGPT_UNROLL for (int v = 0; v < kColumns; ++v) c[r][v] = splat(x);
  }
}

// AMX block of 16 rows by kColumns vectors: c[r, :] (+)= sum over n units, a multiple of kDepth, of
// a[r, k] b[k, :]. c[r, :] is at c + r * c_row; with kFromZero c is overwritten.
template <int kColumns, bool kFromZero>
WGPT_INLINE void amx_gemm_16x64([[maybe_unused]] const float* a, [[maybe_unused]] int64_t a_row,
                                [[maybe_unused]] const float* b, [[maybe_unused]] int64_t b_step,
                                [[maybe_unused]] int64_t n, [[maybe_unused]] float* c,
                                [[maybe_unused]] int64_t c_row) {
#if defined(__AMX_BF16__)
  const int64_t a_bytes = a_row * 4, b_bytes = b_step * 4, c_bytes = c_row * 4;
  asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
  if constexpr (kFromZero) {
    _tile_zero(0);
    if constexpr (kColumns > 1) _tile_zero(1);
    if constexpr (kColumns > 2) _tile_zero(2);
    if constexpr (kColumns > 3) _tile_zero(3);
  } else {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kColumns > 1) _tile_loadd(1, c + kLanes, c_bytes);
    if constexpr (kColumns > 2) _tile_loadd(2, c + 2 * kLanes, c_bytes);
    if constexpr (kColumns > 3) _tile_loadd(3, c + 3 * kLanes, c_bytes);
  }
  for (int64_t k = 0; k < n; k += Amx16x64Dot::kDepth) {
    const float* row = b + k * b_step;
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(5, row, b_bytes);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (kColumns > 1) {
      _tile_loadd(6, row + kLanes, b_bytes);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (kColumns > 2) {
      _tile_loadd(7, row + 2 * kLanes, b_bytes);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (kColumns > 3) {
      _tile_loadd(5, row + 3 * kLanes, b_bytes);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kColumns > 1) _tile_stored(1, c + kLanes, c_bytes);
  if constexpr (kColumns > 2) _tile_stored(2, c + 2 * kLanes, c_bytes);
  if constexpr (kColumns > 3) _tile_stored(3, c + 3 * kLanes, c_bytes);
#endif
}

// One step of the k loop with vectors: c[r, :] += a[r * a_row] b. b holds units, or elements that load
// converts to float.
template <typename Dot, int kRows, int kColumns, typename Element>
WGPT_INLINE void gemm_unit(const float* a, int64_t a_row, const Element* b,
                           RegisterBlock<kRows, kColumns>& c) {
  Floats row[kColumns];
  WGPT_UNROLL for (int v = 0; v < kColumns; ++v) row[v] = load(b + v * kLanes);
  WGPT_UNROLL for (int r = 0; r < kRows; ++r) {
    const Floats factor = splat(a[r * a_row]);
    WGPT_UNROLL for (int v = 0; v < kColumns; ++v) c[r][v] = Dot::fma(factor, row[v], c[r][v]);
  }
}

// c += a b over n units: a[r, k] is a[r * a_row + k * a_step], b[k, :] is at b + k * b_step.
template <typename Dot, int kRows, int kColumns>
WGPT_INLINE void gemm_block(const float* a, int64_t a_row, int64_t a_step, const float* b,
                            int64_t b_step, int64_t n, RegisterBlock<kRows, kColumns>& c) {
  if constexpr (Dot::kIsAmx) {
    amx_gemm_16x64<kColumns, false>(a, a_row, b, b_step, n, reinterpret_cast<float*>(&c),
                                    kColumns * kLanes);
  } else {
    for (int64_t k = 0; k < n; ++k) gemm_unit<Dot>(a + k * a_step, a_row, b + k * b_step, c);
  }
}

// c = a b.
template <typename Dot, int kRows, int kColumns>
WGPT_INLINE void gemm_fresh_block(const float* a, int64_t a_row, int64_t a_step, const float* b,
                                  int64_t b_step, int64_t n, RegisterBlock<kRows, kColumns>& c) {
  if constexpr (Dot::kIsAmx) {
    amx_gemm_16x64<kColumns, true>(a, a_row, b, b_step, n, reinterpret_cast<float*>(&c),
                                   kColumns * kLanes);
  } else {
    fill_block(c, 0.0f);
    gemm_block<Dot>(a, a_row, a_step, b, b_step, n, c);
  }
}

// c += block, for the rows of c in memory.
template <int kRows, int kColumns>
WGPT_INLINE void add_block(const RegisterBlock<kRows, kColumns>& block, float* c, int64_t c_row) {
  WGPT_UNROLL for (int r = 0; r < kRows; ++r) {
    WGPT_UNROLL for (int v = 0; v < kColumns; ++v) {
      float* out = c + r * c_row + v * kLanes;
      store(out, load(out) + block[r][v]);
    }
  }
}

// c = block.
template <int kRows, int kColumns>
WGPT_INLINE void store_block(const RegisterBlock<kRows, kColumns>& block, float* c, int64_t c_row) {
  WGPT_UNROLL for (int r = 0; r < kRows; ++r) {
    WGPT_UNROLL for (int v = 0; v < kColumns; ++v) store(c + r * c_row + v * kLanes, block[r][v]);
  }
}

#if defined(__AVX512BF16__)
// vpermw index that interleaves the lower and the upper 16 values of 16 bits.
alignas(64) constexpr uint16_t kPairOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                 21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// out[i] = (a[i], b[i]) as bfloat16.
WGPT_INLINE Floats narrow_pairs(Floats a, Floats b) {
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  return reinterpret_cast<Floats>(_mm512_permutexvar_epi16(_mm512_load_si512(kPairOrder), both));
}
#endif

// A block of results as the a operand of a GEMM whose k loop runs over the rows: [row / pair][column].
template <typename Dot, int kRows, int kColumns>
WGPT_INLINE void store_over_rows(float* out, int64_t out_row,
                                 const RegisterBlock<kRows, kColumns>& block) {
  if constexpr (Dot::kPerUnit == 1) {
    store_block(block, out, out_row);
  } else {
#if defined(__AVX512BF16__)
    WGPT_UNROLL for (int r = 0; r < kRows; r += 2) {
      WGPT_UNROLL for (int v = 0; v < kColumns; ++v) {
        store(out + r / 2 * out_row + v * kLanes, narrow_pairs(block[r][v], block[r + 1][v]));
      }
    }
#endif
  }
}

// A row of results as the a operand of a GEMM whose k loop runs along that row.
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

// x = x * factor, a power of two: n units.
template <typename Dot>
inline void scale_units(float* x, int64_t n, Floats factor) {
  if constexpr (Dot::kPerUnit == 1) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, load(x + i) * factor);
    for (; i < n; ++i) x[i] *= first_lane(factor);
  } else {
#if defined(__AVX512BF16__)
    const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int64_t i = 0; i < n; i += kLanes) {
      const auto lanes =
          static_cast<__mmask16>(0xffffu >> (kLanes - min_of<int64_t>(n - i, kLanes)));
      const __m512i both = _mm512_maskz_loadu_epi32(lanes, x + i);
      const Floats low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)) * factor;
      const Floats high = _mm512_castsi512_ps(_mm512_and_si512(both, top)) * factor;
      const __m512i bits = _mm512_and_si512(_mm512_castps_si512(high), top);
      _mm512_mask_storeu_epi32(
          x + i, lanes, _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), bits));
    }
#endif
  }
}

}  // namespace wgpt::cpu::WGPT_TARGET
