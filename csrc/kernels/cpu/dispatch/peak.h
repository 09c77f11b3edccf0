// The machine's arithmetic limit, for benchmarks: multiply-adds on registers alone, as many as a
// tile keeps busy.
#pragma once

#include "kernels/cpu/attention/visibility.h"

namespace wgpt::cpu::WGPT_TARGET {

template <typename Dot>
double multiply_add_blocks(int64_t n) {
  constexpr int kRowGroup = Dot::kRows;
  // Read anew for every register: equal numbers that the compiler must not merge.
  volatile float zero = 0.0f;
  alignas(64) RegisterBlock<kRowGroup, kVectors> sums;
  WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
    WGPT_UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = splat(zero);
  }
  if constexpr (Dot::kIsAmx) {  // operands come from L1, under cover of the products
#if defined(__AMX_BF16__)
    // Numbers that differ in every bit, as those of models do: products of zeros need less power, and a
    // Sapphire Rapids makes a tenth (bfloat16) to a third (float32) more of them.
    constexpr int kSpan = 256;
    alignas(64) uint32_t units[(kSpan + 2 * kRowGroup) * kLanes];
    uint32_t state = 1;
    for (uint32_t& unit : units) {
      state = state * 1664525u + 1013904223u;
      unit = ((state >> 8) & 0x807f807fu) | 0x3f803f80u;  // two bfloat16 of 1 to 2, with any sign
    }
    const auto* operand = reinterpret_cast<const float*>(units);
    const typename Dot::Scope scope;
    n = round_up(n, kSpan);
    for (int64_t i = 0; i < n; i += kSpan) {
      amx_gemm_32x32<Dot, kVectors, true>(operand, kLanes, 0, operand, kLanes, 0, kSpan,
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
  if (dtype == DType::kBFloat16) return multiply_add_blocks<AttentionDot<BFloat16>::Type>(n);
  return multiply_add_blocks<AttentionDot<float>::Type>(n);
}

}  // namespace wgpt::cpu::WGPT_TARGET
