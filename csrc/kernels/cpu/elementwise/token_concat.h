// token_concat on the CPU: a gather of table rows beside a copy of mel rows, and the bucketed
// gradient of the table. Formula, shapes and determinism: kernels/token_concat.h.
#pragma once

#include "kernels/cpu/elementwise/batch_sum.h"
#include "kernels/cpu/simd/rows.h"
#include "kernels/cpu/threads/tasks.h"
#include "kernels/token_concat.h"

namespace wgpt::cpu::WGPT_TARGET {

constexpr int64_t kConcatStepsPerTask = 16;  // of every sequence: their rows of pos stay in L1

template <typename Element>
void token_concat_forward_as(const TokenConcatForward& args, const Executor& executor) {
  const TokenConcatShape& shape = args.shape;
  const int64_t steps = shape.steps, ct = shape.token_channels, cm = shape.mel_channels,
                c = ct + cm;
  const auto* table = static_cast<const Element*>(args.table);
  const auto* mel = static_cast<const Element*>(args.mel_hidden);
  const auto* pos = static_cast<const Element*>(args.pos);
  auto* y = static_cast<Element*>(args.y);
  run_tasks(executor, ceil_div(steps, kConcatStepsPerTask), [&](int64_t task) {
    const int64_t begin = task * kConcatStepsPerTask,
                  end = min_of(begin + kConcatStepsPerTask, steps);
    for (int64_t b = 0; b < shape.batch; ++b) {
      const int64_t* tokens = args.tokens + b * steps;
      for (int64_t t = begin; t < end; ++t) {
        const Element* pos_row = pos == nullptr ? nullptr : pos + t * c;
        Element* y_row = y + (b * steps + t) * c;
        add_rows(table + tokens[t] * ct, pos_row, ct, y_row);
        if (cm == 0) continue;
        const Element* mel_row = mel + b * shape.mel_batch_stride + t * shape.mel_step_stride;
        add_rows(mel_row, pos == nullptr ? nullptr : pos_row + ct, cm, y_row + ct);
      }
    }
  });
}

// The steps of each token, in ascending order: order[first[v] .. first[v + 1]).
struct TokenBuckets {
  int64_t* first;  // V + 1
  int64_t* order;  // B T
};

inline size_t token_concat_backward_workspace_bytes(const TokenConcatShape& shape) {
  return static_cast<size_t>(2 * shape.vocab + 2 + shape.batch * shape.steps) * sizeof(int64_t);
}

inline TokenBuckets sort_by_token(const int64_t* tokens, const TokenConcatShape& shape,
                                  void* workspace) {
  const int64_t n_rows = shape.batch * shape.steps;
  auto* first = static_cast<int64_t*>(workspace);
  int64_t *next = first + shape.vocab + 1, *order = next + shape.vocab + 1;
  for (int64_t v = 0; v <= shape.vocab; ++v) first[v] = 0;
  for (int64_t row = 0; row < n_rows; ++row) ++first[tokens[row] + 1];
  for (int64_t v = 0; v < shape.vocab; ++v) {
    next[v] = first[v];
    first[v + 1] += first[v];
  }
  for (int64_t row = 0; row < n_rows; ++row) order[next[tokens[row]]++] = row;
  return {first, order};
}

inline void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename Element>
void token_concat_backward_as(const TokenConcatBackward& args, const Executor& executor) {
  const TokenConcatShape& shape = args.shape;
  const int64_t ct = shape.token_channels, c = ct + shape.mel_channels;
  const auto* d_y = static_cast<const Element*>(args.d_y);
  auto *d_table = static_cast<Element*>(args.d_table), *d_pos = static_cast<Element*>(args.d_pos);
  TokenBuckets buckets{};
  bool is_sorted = false;
  constexpr int64_t kRowsPerTask = 16;
  const int64_t n_table = ceil_div(shape.vocab, kRowsPerTask),
                n_pos = d_pos == nullptr ? 0 : sum_over_batch_tasks(args.pos_rows);
  // One thread sorts, which takes 5 to 15 % of the time, while others sum d_pos. Tasks are handed out in
  // order, so whoever waits for the sorting waits for a thread at work.
  run_tasks(executor, 1 + n_pos + n_table, [&](int64_t task) {
    if (task == 0) {
      buckets = sort_by_token(args.tokens, shape, args.workspace);
      return __atomic_store_n(&is_sorted, true, __ATOMIC_RELEASE);
    }
    if (task <= n_pos) {
      return sum_over_batch(task - 1, d_y, shape.batch, shape.steps, c, args.pos_rows, d_pos);
    }
    while (!__atomic_load_n(&is_sorted, __ATOMIC_ACQUIRE)) pause_thread();
    const int64_t first = (task - 1 - n_pos) * kRowsPerTask,
                  end = min_of(first + kRowsPerTask, shape.vocab);
    for (int64_t v = first; v < end; ++v) {
      const int64_t* order = buckets.order + buckets.first[v];
      sum_rows(
          buckets.first[v + 1] - buckets.first[v], [&](int64_t k) { return d_y + order[k] * c; },
          ct, d_table + v * ct);
    }
  });
}

inline void token_concat_forward(const TokenConcatForward& args, const Executor& executor) {
  with_element(args.shape.dtype,
               [&](auto e) { token_concat_forward_as<decltype(e)>(args, executor); });
}
inline void token_concat_backward(const TokenConcatBackward& args, const Executor& executor) {
  with_element(args.shape.dtype,
               [&](auto e) { token_concat_backward_as<decltype(e)>(args, executor); });
}

}  // namespace wgpt::cpu::WGPT_TARGET
