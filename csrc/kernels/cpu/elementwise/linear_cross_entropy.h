// linear_cross_entropy's rows on the CPU. Formula: kernels/linear_cross_entropy.h.
#pragma once

#include <math.h>

#include "kernels/cpu/simd/typed_rows.h"
#include "kernels/cpu/threads/tasks.h"
#include "kernels/linear_cross_entropy.h"

namespace wgpt::cpu::WGPT_TARGET {

constexpr int64_t kCrossEntropyRowsPerTask = 16;
constexpr float kLog2OfE = 1.4426950408889634f;

inline float row_max(const float* x, int64_t n) {
  const int64_t n_vector = n - n % kLanes;
  float largest = x[0];
  if (n_vector > 0) {
    Floats largest_lanes = load(x);
    for (int64_t i = kLanes; i < n_vector; i += kLanes)
      largest_lanes = max_or_second(largest_lanes, load(x + i));
    largest = reduce_max(largest_lanes);
  }
  for (int64_t i = n_vector; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}
inline double row_max(const double* x, int64_t n) {
  double largest = x[0];
  for (int64_t i = 1; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// x[i] = exp(x[i] - largest); returns their sum.
inline float exponentials(float* x, int64_t n, float largest) {
  const int64_t n_vector = n - n % kLanes;
  Floats sums = splat(0.0f);
  for (int64_t i = 0; i < n_vector; i += kLanes) {
    const Floats p = exp2_of<true>((load(x + i) - splat(largest)) * splat(kLog2OfE));
    store(x + i, p);
    sums = sums + p;
  }
  float sum = reduce_add(sums);
  for (int64_t i = n_vector; i < n; ++i) {
    x[i] = first_lane(exp2_of<true>(splat((x[i] - largest) * kLog2OfE)));
    sum += x[i];
  }
  return sum;
}
inline double exponentials(double* x, int64_t n, double largest) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = exp(x[i] - largest);
    sum += x[i];
  }
  return sum;
}

template <typename Sum>
inline bool is_first_of_largest(const Sum* x, int64_t at, Sum largest) {
  if (!(x[at] == largest)) return false;
  for (int64_t i = 0; i < at; ++i) {
    if (x[i] == largest) return false;
  }
  return true;
}

template <typename Sum>
void cross_entropy_rows_as(const CrossEntropyRows& args, const Executor& executor) {
  const int64_t v = args.vocab;
  run_tasks(executor, ceil_div(args.rows, kCrossEntropyRowsPerTask), [&](int64_t task) {
    auto* x = static_cast<Sum*>(thread_scratch(static_cast<size_t>(v) * sizeof(Sum)));
    const int64_t begin = task * kCrossEntropyRowsPerTask,
                  end = min_of(begin + kCrossEntropyRowsPerTask, args.rows);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t target = args.targets[row];
      const bool scored = target != args.ignore_index;
      Sum loss = 0;
      bool correct = false;
      if (scored) {
        read_row(args.dtype, args.logits, row * args.row_stride, v, x);
        const Sum largest = row_max(x, v), chosen = x[target];
        correct = is_first_of_largest(x, target, largest);
        const Sum sum = exponentials(x, v, largest);
        loss = static_cast<Sum>(log(sum)) + (largest - chosen);
        const Sum scale = 1 / sum;
        for (int64_t i = 0; i < v; ++i) x[i] *= scale;
        x[target] -= 1;
      } else {
        for (int64_t i = 0; i < v; ++i) x[i] = 0;
      }
      static_cast<Sum*>(args.loss)[row] = loss;
      args.correct[row] = correct;
      if (args.gradients) write_row(args.dtype, x, v, args.logits, row * args.row_stride);
    }
  });
}

inline void cross_entropy_rows(const CrossEntropyRows& args, const Executor& executor) {
  if (args.dtype == DType::kFloat64) return cross_entropy_rows_as<double>(args, executor);
  cross_entropy_rows_as<float>(args, executor);
}

}  // namespace wgpt::cpu::WGPT_TARGET
