// add_rms_norm on the CPU: a row at a time, in a scratch row that stays in the first cache.
// Formula, shapes and determinism: kernels/add_rms_norm.h.
#pragma once

#include <math.h>

#include "kernels/add_rms_norm.h"
#include "kernels/cpu/simd/typed_rows.h"
#include "kernels/cpu/threads/tasks.h"

namespace wgpt::cpu::WGPT_TARGET {

// sum_i a[i] b[i], over kLanes running sums and then the rest.
inline float dot_rows(const float* a, const float* b, int64_t n) {
  const int64_t n_vector = n - n % kLanes;
  Floats sums = splat(0.0f);
  for (int64_t i = 0; i < n_vector; i += kLanes) sums = fma(load(a + i), load(b + i), sums);
  float sum = reduce_add(sums);
  for (int64_t i = n_vector; i < n; ++i) sum += a[i] * b[i];
  return sum;
}
inline double dot_rows(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename Sum>
void add_rms_norm_forward_as(const AddRmsNormForward& args, const Executor& executor) {
  const AddRmsNormShape& shape = args.shape;
  const int64_t c = shape.channels;
  const auto* weight = static_cast<const Sum*>(args.weight);
  run_tasks(executor, ceil_div(shape.rows, kAddRmsNormRows), [&](int64_t task) {
    auto* s = static_cast<Sum*>(thread_scratch(static_cast<size_t>(2 * c) * sizeof(Sum)));
    Sum* delta = s + c;
    const int64_t begin = task * kAddRmsNormRows, end = min_of(begin + kAddRmsNormRows, shape.rows);
    for (int64_t row = begin; row < end; ++row) {
      read_row(shape.stream, args.x, row * c, c, s);
      if (args.delta != nullptr) {
        read_row(shape.delta, args.delta, row * c, c, delta);
        for (int64_t i = 0; i < c; ++i) s[i] += delta[i];
        write_row(shape.stream, s, c, args.sum, row * c);
        read_row(shape.stream, args.sum, row * c, c, s);
      }
      const Sum mean = dot_rows(s, s, c) / static_cast<Sum>(c);
      const Sum r = 1 / static_cast<Sum>(sqrt(mean + static_cast<Sum>(args.eps)));
      for (int64_t i = 0; i < c; ++i) s[i] = s[i] * r * weight[i];
      write_row(shape.y, s, c, args.y, row * c);
      static_cast<Sum*>(args.inv_rms)[row] = r;
    }
  });
}

template <typename Sum>
void add_rms_norm_backward_as(const AddRmsNormBackward& args, const Executor& executor) {
  const AddRmsNormShape& shape = args.shape;
  const int64_t c = shape.channels, n_blocks = ceil_div(shape.rows, kAddRmsNormRows);
  const auto* weight = static_cast<const Sum*>(args.weight);
  auto* partials = static_cast<Sum*>(args.workspace);
  run_tasks(executor, n_blocks, [&](int64_t task) {
    auto* h = static_cast<Sum*>(thread_scratch(static_cast<size_t>(3 * c) * sizeof(Sum)));
    Sum *g = h + c, *d_sum = g + c, *d_weight = partials + task * c;
    for (int64_t i = 0; i < c; ++i) d_weight[i] = 0;
    const int64_t begin = task * kAddRmsNormRows, end = min_of(begin + kAddRmsNormRows, shape.rows);
    for (int64_t row = begin; row < end; ++row) {
      read_row(shape.stream, args.sum, row * c, c, h);
      read_row(shape.y, args.d_y, row * c, c, g);
      const Sum r = static_cast<const Sum*>(args.inv_rms)[row];
      for (int64_t i = 0; i < c; ++i) {
        h[i] *= r;
        d_weight[i] += g[i] * h[i];
        g[i] *= weight[i];
      }
      const Sum mean = dot_rows(g, h, c) / static_cast<Sum>(c);
      if (args.d_sum != nullptr) {
        read_row(shape.stream, args.d_sum, row * c, c, d_sum);
        for (int64_t i = 0; i < c; ++i) g[i] = d_sum[i] + r * (g[i] - h[i] * mean);
      } else {
        for (int64_t i = 0; i < c; ++i) g[i] = r * (g[i] - h[i] * mean);
      }
      write_row(shape.stream, g, c, args.d_x, row * c);
      if (args.d_delta != nullptr) write_row(shape.delta, g, c, args.d_delta, row * c);
    }
  });
  auto* d_weight = static_cast<Sum*>(args.d_weight);
  for (int64_t i = 0; i < c; ++i) d_weight[i] = 0;
  for (int64_t block = 0; block < n_blocks; ++block) {
    for (int64_t i = 0; i < c; ++i) d_weight[i] += partials[block * c + i];
  }
}

inline void add_rms_norm_forward(const AddRmsNormForward& args, const Executor& executor) {
  if (args.shape.stream == DType::kFloat64) return add_rms_norm_forward_as<double>(args, executor);
  add_rms_norm_forward_as<float>(args, executor);
}
inline void add_rms_norm_backward(const AddRmsNormBackward& args, const Executor& executor) {
  if (args.shape.stream == DType::kFloat64) return add_rms_norm_backward_as<double>(args, executor);
  add_rms_norm_backward_as<float>(args, executor);
}

}  // namespace wgpt::cpu::WGPT_TARGET
