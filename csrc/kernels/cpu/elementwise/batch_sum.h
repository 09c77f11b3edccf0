// Sums of rows in a fixed order, and the gradient of a position table: a sum over the batch.
#pragma once

#include "kernels/cpu/simd/rows.h"

namespace wgpt::cpu::WGPT_TARGET {

// out[i] = the sum of n rows' i-th elements in their order, rounded once; row(k) points to one. Sums
// stay in registers over the rows.
template <typename Element, typename Row>
inline void sum_rows(int64_t n, Row&& row, int64_t channels, Element* out) {
  const int64_t n_vector = vector_part<Element>(channels);
  int64_t c = 0;
  if constexpr (sizeof(Element) < sizeof(double)) {
    constexpr int kWidth = kRegisters / 4;
    for (; c + kWidth * kLanes <= n_vector; c += kWidth * kLanes) {
      Floats sums[kWidth];
      for (int i = 0; i < kWidth; ++i) sums[i] = splat(0.0f);
      for (int64_t k = 0; k < n; ++k) {
        const auto* x = row(k) + c;
        for (int i = 0; i < kWidth; ++i) sums[i] = sums[i] + load(x + i * kLanes);
      }
      for (int i = 0; i < kWidth; ++i) store(out + c + i * kLanes, sums[i]);
    }
    for (; c < n_vector; c += kLanes) {
      Floats sum = splat(0.0f);
      for (int64_t k = 0; k < n; ++k) sum = sum + load(row(k) + c);
      store(out + c, sum);
    }
  }
  for (; c < channels; ++c) {
    Arithmetic<Element> sum = 0;
    for (int64_t k = 0; k < n; ++k) sum += widen(row(k)[c]);
    out[c] = narrow<Element>(sum);
  }
}

constexpr int64_t kBatchSumStepsPerTask = 16;

// Task of sum_over_batch: d_pos[t] = sum_b d_y[b,t] in ascending b; rows from steps on are zeroed.
inline int64_t sum_over_batch_tasks(int64_t pos_rows) {
  return ceil_div(pos_rows, kBatchSumStepsPerTask);
}
template <typename Element>
void sum_over_batch(int64_t task, const Element* d_y, int64_t batch, int64_t steps,
                    int64_t channels, int64_t pos_rows, Element* d_pos) {
  const int64_t begin = task * kBatchSumStepsPerTask,
                end = min_of(begin + kBatchSumStepsPerTask, pos_rows);
  for (int64_t t = begin; t < end; ++t) {
    sum_rows(
        t < steps ? batch : 0, [&](int64_t b) { return d_y + (b * steps + t) * channels; },
        channels, d_pos + t * channels);
  }
}

}  // namespace wgpt::cpu::WGPT_TARGET
