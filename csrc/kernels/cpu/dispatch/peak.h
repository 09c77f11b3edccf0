// Measured peak FLOP/s, for benchmarks: FMAs (or AMX) on registers alone, one register block of
// accumulators.
#pragma once

#include "kernels/cpu/attention/visibility.h"

namespace wgpt::cpu::WGPT_TARGET {

template <typename Dot>
double run_fma_blocks(int64_t n) {
  constexpr int kRowGroup = Dot::kRows;
  // Volatile: equal numbers that the compiler must not merge.
  volatile float zero = 0.0f;
  alignas(64) RegisterBlock<kRowGroup, kVectors> sums;
  WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
    WGPT_UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = splat(zero);
  }
  if constexpr (Dot::kIsAmx) {  // operands come from L1, overlapped
#if defined(__AMX_BF16__)
    // Random numbers, as those of models are: zeros need less power, and a Sapphire Rapids reaches a tenth
    // (bfloat16) to a third (float32) more with them.
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

// n steps of the micro-kernel that attention uses for a dtype; returns their FLOPs.
inline double run_fmas(DType dtype, int64_t n) {
  if (dtype == DType::kBFloat16) return run_fma_blocks<AttentionDot<BFloat16>::Type>(n);
  return run_fma_blocks<AttentionDot<float>::Type>(n);
}

}  // namespace wgpt::cpu::WGPT_TARGET
