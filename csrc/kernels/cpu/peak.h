// The machine's arithmetic limit, for benchmarks: multiply-adds on registers alone, as many as a
// tile keeps busy.
#pragma once

#include "kernels/cpu/attention_shape.h"

namespace wgpt::cpu::WGPT_TARGET {

template <typename Dot>
double multiply_add_tiles(int64_t n) {
  constexpr int kRowGroup = Dot::kRows;
  // Read anew for every register: equal numbers that the compiler must not merge.
  volatile float zero = 0.0f;
  alignas(64) Tile<kRowGroup, kVectors> sums;
  WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
    WGPT_UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = splat(zero);
  }
  if constexpr (Dot::kIsMatrix) {  // operands come from L1, under cover of the products
#if defined(__AMX_BF16__)
    constexpr int kSpan = 1024;
    alignas(64) static const float zeros[kSpan] = {};
    const typename Dot::Scope scope;
    n = round_up(n, kSpan);
    for (int64_t i = 0; i < n; i += kSpan) {
      multiply_tiles<Dot, kVectors, true>(zeros, 0, 0, zeros, 0, 0, kSpan,
                                          reinterpret_cast<float*>(&sums), kStrip, [] {});
    }
#endif
  } else {
    const Floats a = splat(zero), b = splat(zero);
    for (int64_t i = 0; i < n; ++i) {
      WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
        WGPT_UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = Dot::fma(a, b, sums[r][v]);
      }
    }
  }
  WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
    WGPT_UNROLL for (int v = 0; v < kVectors; ++v) zero = first_lane(sums[r][v]);
  }
  return 2.0 * kRowGroup * kStrip * Dot::kPerUnit * static_cast<double>(n);
}

// Does n tiles of the products that attention makes for a dtype; gives their FLOPs.
inline double multiply_adds(DType dtype, int64_t n) {
  if (dtype == DType::kBFloat16) return multiply_add_tiles<AttentionDot<BFloat16>::Type>(n);
  return multiply_add_tiles<AttentionDot<float>::Type>(n);
}

}  // namespace wgpt::cpu::WGPT_TARGET
