// Packing: strided rows of any element type into the panels of 32-bit units that the micro-kernel
// reads.
//
//   pack_rows       [row][unit]            a operand, k loop over channels
//   pack_columns    [strip][unit][row]     b operand, k loop over channels: strips, transposed
//   pack_row_pairs  [row / pair][channel]  b operand, k loop over rows
//
// With FloatDot a unit is one float; with BFloat16Dot it is a pair: two channels, or the same
// channel of two rows. With Amx32x32Dot<3> there are three such panels, one per term of the bf16x3 split.
// The terms of a b operand are `term_stride` apart; those of an a operand lie side by side in each row.
// Rows past the last are zero.
#pragma once

#include "kernels/cpu/gemm/amx.h"

namespace wgpt::cpu::WGPT_TARGET {

template <typename Element>
struct Rows {
  const Element* data;
  int64_t stride;
  const Element* operator[](int64_t row) const { return data + row * stride; }
};

template <typename Dot, int kDim, typename Element>
inline void pack_row(const Element* row, float* out) {
  if constexpr (Dot::kPerUnit == 2) {
    std::memcpy(out, row, kDim * sizeof(Element));
  } else {
    WGPT_UNROLL for (int i = 0; i < kDim; i += kLanes) store(out + i, load(row + i));
  }
}

#if defined(__AMX_BF16__)
// The same in three terms.
template <int kDim, typename Element>
inline void pack_row_terms(const Element* row, float* out, int64_t term_stride) {
  WGPT_UNROLL for (int c = 0; c < kDim; c += 2 * kLanes) {
    __m512i terms[kBf16x3Terms];
    split_bf16x3(load(row + c), load(row + c + kLanes), terms);
    WGPT_UNROLL for (int s = 0; s < kBf16x3Terms; ++s)
        store(out + s * term_stride + c / 2, _mm512_castsi512_ps(terms[s]));
  }
}

// Units (x[i], y[i]) of kDim channels of two rows, in three terms.
template <int kDim, typename Element>
inline void pack_pair_terms(const Element* x, const Element* y, float* out, int64_t term_stride) {
  const __m512i order = _mm512_load_si512(kPairOrder);
  WGPT_UNROLL for (int c = 0; c < kDim; c += kLanes) {
    __m512i terms[kBf16x3Terms];
    split_bf16x3(load(x + c), load(y + c), terms);
    WGPT_UNROLL for (int s = 0; s < kBf16x3Terms; ++s) {
      store(out + s * term_stride + c,
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, terms[s])));
    }
  }
}
#endif

template <typename Dot, int kDim, typename Element>
inline void pack_rows(Rows<Element> rows, int64_t n, int64_t n_padded, float* out) {
  constexpr int kUnits = kDim / Dot::kPerUnit, kRow = Dot::kTerms * kUnits;
  for (int64_t i = 0; i < n; ++i) {
#if defined(__AMX_BF16__)
    if constexpr (Dot::kTerms > 1) {
      pack_row_terms<kDim>(rows[i], out + i * kRow, kUnits);
      continue;
    }
#endif
    pack_row<Dot, kDim>(rows[i], out + i * kRow);
  }
  clear_floats(out + n * kRow, (n_padded - n) * kRow);
}

template <typename Dot, int kDim, typename Element>
inline void pack_columns(Rows<Element> rows, int64_t n, int64_t n_padded, float* out,
                         int64_t term_stride = 0) {
  constexpr int kUnits = kDim / Dot::kPerUnit, kRow = Dot::kTerms * kUnits;
  alignas(64) float block[kLanes * kRow];
  for (int64_t i = 0; i < n_padded; i += kLanes) {
    const int64_t n_here = max_of<int64_t>(0, min_of<int64_t>(kLanes, n - i));
    pack_rows<Dot, kDim>(Rows<Element>{rows.data + i * rows.stride, rows.stride}, n_here, kLanes,
                         block);
    float* strip = out + i / kStrip * kStrip * kUnits + i % kStrip;
    for (int s = 0; s < Dot::kTerms; ++s) {
      for (int unit = 0; unit < kUnits; unit += kLanes)
        transpose_block(block + s * kUnits + unit, kRow, strip + s * term_stride + unit * kStrip,
                        kStrip);
    }
  }
}

#if defined(__AVX512BF16__)
// out[i] = (a[i], b[i]) for 32 channels.
WGPT_INLINE void interleave(const BFloat16* a, const BFloat16* b, float* out) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kFirst),
                second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(x, first, y));
  _mm512_storeu_si512(out + kLanes, _mm512_permutex2var_epi16(x, second, y));
}
#endif

// Pairs are of rows kPairStride apart: row i of 2 kPairStride with row i + kPairStride.
template <typename Dot, int kDim, int kPairStride = 1, typename Element>
inline void pack_row_pairs(Rows<Element> rows, int64_t n, int64_t n_padded, float* out,
                           [[maybe_unused]] int64_t term_stride = 0) {
  if constexpr (Dot::kPerUnit == 1) {
    pack_rows<Dot, kDim>(rows, n, n_padded, out);
  } else if constexpr (Dot::kTerms > 1) {
#if defined(__AMX_BF16__)
    static constexpr Element kZeros[kDim] = {};
    const auto row_or_zeros = [&](int64_t i) { return i < n ? rows[i] : kZeros; };
    for (int64_t pair = 0; pair < n_padded / 2; ++pair) {
      const int64_t i = pair / kPairStride * (2 * kPairStride) + pair % kPairStride;
      pack_pair_terms<kDim>(row_or_zeros(i), row_or_zeros(i + kPairStride), out + pair * kDim,
                            term_stride);
    }
#endif
  } else {
    static_assert(kPairStride == 1);
    static constexpr Element kZeros[kDim] = {};
    for (int64_t i = 0; i < n; i += 2) {
      const Element* second = i + 1 < n ? rows[i + 1] : kZeros;
      for (int c = 0; c < kDim; c += 32)
        interleave(rows[i] + c, second + c, out + i / 2 * kDim + c);
    }
    const int64_t n_pairs = ceil_div(n, 2);
    clear_floats(out + n_pairs * kDim, (n_padded / 2 - n_pairs) * kDim);
  }
}

}  // namespace wgpt::cpu::WGPT_TARGET
