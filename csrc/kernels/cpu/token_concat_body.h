// token_concat on the CPU: a gather of table rows beside a copy of mel rows, and the bucketed
// gradient of the table. Formula, shapes and determinism: kernels/token_concat.h.
#pragma once

#include "kernels/cpu/rows.h"
#include "kernels/cpu/tasks.h"
#include "kernels/token_concat.h"

namespace wgpt::cpu::WGPT_TARGET {

constexpr int64_t kTokenConcatStepsPerTask = 64;

template <typename Element>
void token_concat_forward_as(const TokenConcatForward& args, const Executor& executor) {
  const TokenConcatShape& shape = args.shape;
  const int64_t n_rows = shape.batch * shape.steps, ct = shape.token_channels,
                cm = shape.mel_channels, c = ct + cm;
  const auto* table = static_cast<const Element*>(args.table);
  const auto* mel = static_cast<const Element*>(args.mel_hidden);
  const auto* pos = static_cast<const Element*>(args.pos);
  auto* y = static_cast<Element*>(args.y);
  run_tasks(executor, ceil_div(n_rows, kTokenConcatStepsPerTask), [&](int64_t task) {
    const int64_t begin = task * kTokenConcatStepsPerTask,
                  end = min_of(begin + kTokenConcatStepsPerTask, n_rows);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / shape.steps, t = row % shape.steps;
      const Element* pos_row = pos == nullptr ? nullptr : pos + t * c;
      add_rows(table + args.tokens[row] * ct, pos_row, ct, y + row * c);
      if (cm == 0) continue;
      const Element* mel_row = mel + b * shape.mel_batch_stride + t * shape.mel_step_stride;
      add_rows(mel_row, pos == nullptr ? nullptr : pos_row + ct, cm, y + row * c + ct);
    }
  });
}

// d_pos[t] = sum_b d_y[b,t] in ascending b; rows from steps on are zeroed.
template <typename Element>
void sum_over_batch(const Element* d_y, int64_t batch, int64_t steps, int64_t channels,
                    int64_t pos_rows, Element* d_pos, const Executor& executor) {
  using Sum = Arithmetic<Element>;
  run_tasks(executor, ceil_div(pos_rows, kTokenConcatStepsPerTask), [&](int64_t task) {
    auto* sum = static_cast<Sum*>(thread_scratch(static_cast<size_t>(channels) * sizeof(Sum)));
    const int64_t begin = task * kTokenConcatStepsPerTask,
                  end = min_of(begin + kTokenConcatStepsPerTask, pos_rows);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < channels; ++i) sum[i] = 0;
      for (int64_t b = 0; t < steps && b < batch; ++b) {
        const Element* row = d_y + (b * steps + t) * channels;
        accumulate_row(row, channels, sum);
      }
      round_row(sum, channels, d_pos + t * channels);
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

template <typename Element>
void token_concat_backward_as(const TokenConcatBackward& args, const Executor& executor) {
  using Sum = Arithmetic<Element>;
  const TokenConcatShape& shape = args.shape;
  const int64_t ct = shape.token_channels, c = ct + shape.mel_channels;
  const auto* d_y = static_cast<const Element*>(args.d_y);
  auto* d_table = static_cast<Element*>(args.d_table);
  const TokenBuckets buckets = sort_by_token(args.tokens, shape, args.workspace);
  constexpr int64_t kRowsPerTask = 16;
  run_tasks(executor, ceil_div(shape.vocab, kRowsPerTask), [&](int64_t task) {
    auto* sum = static_cast<Sum*>(thread_scratch(static_cast<size_t>(ct) * sizeof(Sum)));
    for (int64_t v = task * kRowsPerTask; v < min_of((task + 1) * kRowsPerTask, shape.vocab); ++v) {
      for (int64_t i = 0; i < ct; ++i) sum[i] = 0;
      for (int64_t k = buckets.first[v]; k < buckets.first[v + 1]; ++k) {
        const Element* row = d_y + buckets.order[k] * c;
        accumulate_row(row, ct, sum);
      }
      round_row(sum, ct, d_table + v * ct);
    }
  });
  if (args.d_pos != nullptr) {
    sum_over_batch(d_y, shape.batch, shape.steps, c, args.pos_rows,
                   static_cast<Element*>(args.d_pos), executor);
  }
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
