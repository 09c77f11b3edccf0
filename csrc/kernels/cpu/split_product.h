// Products of small blocks of split numbers on tile registers, six products of bfloat16 each. The
// formula and its error: kernels/matmul.h.
#pragma once

#include "kernels/cpu/microkernel.h"
#include "kernels/cpu/split_bf16.h"

namespace wgpt::cpu::WGPT_TARGET {

#if defined(__AMX_BF16__)

struct SplitDot {
  static constexpr int kRows = 32, kColumns = 32;  // of a product
  using Scope = MatrixDot::Scope;
};

// A split operand: a plane of pairs of bfloat16 for each split.
struct SplitPlanes {
  const float* data;
  int64_t row, plane;  // floats from row to row and from plane to plane
};

// c (32 x 32) = or += a b over n units, a multiple of MatrixDot::kDepth. a: rows of units along k, b:
// rows of units across columns.
template <bool kFromZero>
inline void multiply_split(SplitPlanes a, SplitPlanes b, int64_t n, float* c, int64_t c_row) {
  const int64_t a_bytes = a.row * 4, b_bytes = b.row * 4, c_bytes = c_row * 4;
  const float* a_lower = a.data + 16 * a.row;
  float* c_lower = c + 16 * c_row;
  asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
  if constexpr (kFromZero) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + kLanes, c_bytes);
    _tile_loadd(2, c_lower, c_bytes);
    _tile_loadd(3, c_lower + kLanes, c_bytes);
  }
#define WGPT_LOAD_A(split)                                 \
  _tile_loadd(4, a.data + k + (split) * a.plane, a_bytes); \
  _tile_loadd(5, a_lower + k + (split) * a.plane, a_bytes)
#define WGPT_LOAD_B(split)                          \
  _tile_loadd(6, row + (split) * b.plane, b_bytes); \
  _tile_loadd(7, row + kLanes + (split) * b.plane, b_bytes)
#define WGPT_PRODUCTS      \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)
  for (int64_t k = 0; k < n; k += MatrixDot::kDepth) {
    const float* row = b.data + k * b.row;
    WGPT_LOAD_B(0);
    WGPT_LOAD_A(2);
    WGPT_PRODUCTS;
    WGPT_LOAD_A(1);
    WGPT_PRODUCTS;
    WGPT_LOAD_A(0);
    WGPT_PRODUCTS;
    WGPT_LOAD_B(2);
    WGPT_PRODUCTS;
    WGPT_LOAD_B(1);
    WGPT_PRODUCTS;
    WGPT_LOAD_A(1);
    WGPT_PRODUCTS;
  }
#undef WGPT_PRODUCTS
#undef WGPT_LOAD_B
#undef WGPT_LOAD_A
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kLanes, c_bytes);
  _tile_stored(2, c_lower, c_bytes);
  _tile_stored(3, c_lower + kLanes, c_bytes);
  asm volatile("" ::: "memory");
}

// (x[i], y[i]) as pairs of each split, planes apart.
WGPT_INLINE void store_split_pairs(Floats x, Floats y, float* out, int64_t plane) {
  alignas(64) static constexpr uint16_t kPairs[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_load_si512(kPairs);
  __m512i parts[kSplits];
  split_values(x, y, parts);
  WGPT_UNROLL for (int s = 0; s < kSplits; ++s)
      _mm512_storeu_si512(out + s * plane, _mm512_permutexvar_epi16(pairs, parts[s]));
}

// n values, a multiple of 32, as planes.
inline void store_split_row(const float* row, int64_t n, float* out, int64_t plane) {
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    __m512i parts[kSplits];
    split_values(load(row + i), load(row + i + kLanes), parts);
    WGPT_UNROLL for (int s = 0; s < kSplits; ++s)
        _mm512_storeu_si512(out + i / 2 + s * plane, parts[s]);
  }
}

// NaN if one of the numbers is not finite, else 0.
inline Floats check_finite(const float* x, int64_t n, Floats check) {
  const int64_t n_vector = n - n % kLanes;
  for (int64_t i = 0; i < n_vector; i += kLanes) check = fma(load(x + i), splat(0.0f), check);
  const auto rest = static_cast<__mmask16>((1u << (n - n_vector)) - 1);
  return fma(_mm512_maskz_loadu_ps(rest, x + n_vector), splat(0.0f), check);
}

#endif

}  // namespace wgpt::cpu::WGPT_TARGET
