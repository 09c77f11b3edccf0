// flash_attention on the CPU: which code runs for a dtype and head_dim, and how the work is split into
// tasks.
#pragma once

#include "kernels/cpu/attention/flash_attention_backward_amx.h"
#include "kernels/cpu/attention/flash_attention_backward_vector.h"
#include "kernels/cpu/attention/flash_attention_decode.h"
#include "kernels/cpu/attention/flash_attention_float64.h"
#include "kernels/cpu/attention/flash_attention_forward_amx.h"
#include "kernels/cpu/attention/flash_attention_forward_vector.h"

namespace wgpt::cpu::WGPT_TARGET {

// Calls body(Constant<D>{}).
template <typename Body>
inline void with_head_dim(int64_t head_dim, Body&& body) {
  if (head_dim == 32) return body(Constant<32>{});
  if (head_dim == 64) return body(Constant<64>{});
  if (head_dim == 96) return body(Constant<96>{});
  if (head_dim == 128) return body(Constant<128>{});
  if (head_dim == 256) return body(Constant<256>{});
}

inline bool is_decoding(const FlashAttentionShape& shape) {
  return shape.dtype != DType::kFloat64 && shape.q_steps <= kDecodeRows &&
         shape.kv_steps > kDecodeRows;
}

inline size_t flash_attention_forward_workspace_bytes(const FlashAttentionShape& shape) {
  return is_decoding(shape) ? decode_workspace_bytes(shape) : 0;
}

// Vector kernels, or AMX kernels where Dot is one of AMX.
template <typename Element, int kDim, typename Dot, bool kOnAmx = Dot::kIsAmx>
struct Attention {
  using Forward = VectorForward<Element, kDim, Dot>;
  using Backward = VectorBackward<Element, kDim, Dot>;
};
#if defined(__AMX_BF16__)
template <typename Element, int kDim, typename Dot>
struct Attention<Element, kDim, Dot, true> {
  using Forward = AmxForward<Element, kDim, Dot>;
  using Backward = AmxBackward<Element, kDim, Dot>;
};
#endif
template <typename Element, int kDim>
using AttentionOf = Attention<Element, kDim, typename AttentionDot<Element>::Type>;

template <typename Element, int kDim>
void attend_by_chunks(const FlashAttentionForward& args, const Executor& executor) {
  using Forward = typename AttentionOf<Element, kDim>::Forward;
  const FlashAttentionShape& shape = args.shape;
  const int64_t n_heads = shape.batch * shape.heads;
  const int64_t rows = Forward::chunk_rows(shape, executor.n_threads),
                n_chunks = ceil_div(shape.q_steps, rows);
  run_tasks(executor, n_heads * n_chunks, [&](int64_t task) {
    const int64_t chunk = n_chunks - 1 - task / n_heads,
                  head = task % n_heads;  // the longest rows first
    const auto run = [&](auto&& forward) {
      return forward.run(head / shape.heads, head % shape.heads, chunk * rows,
                         min_of((chunk + 1) * rows, shape.q_steps));
    };
    if (!run(Forward(args))) run(VectorForward<Element, kDim, FloatDot>(args, true));
  });
}

inline void flash_attention_forward(const FlashAttentionForward& args, const Executor& executor) {
  with_element(args.shape.dtype, [&](auto element) {
    using Element = decltype(element);
    if constexpr (sizeof(Element) == sizeof(double)) {
      attend_float64<Element>(args, executor);
    } else {
      with_head_dim(args.shape.head_dim, [&](auto dim) {
        if (is_decoding(args.shape)) return decode<Element, dim.value>(args, executor);
        attend_by_chunks<Element, dim.value>(args, executor);
      });
    }
  });
}

// Workspace of the backward, in floats: four facts of every query, a flag per key head of whose group
// not all gradients are finite, and a dq per key split where there are several.
template <typename Element, int kDim>
struct BackwardWorkspace {
  using Backward = typename AttentionOf<Element, kDim>::Backward;
  int64_t has_nonfinite, dq, all;  // offsets; all: the size

  explicit BackwardWorkspace(const FlashAttentionShape& shape) {
    const int64_t n_heads = shape.batch * shape.heads,
                  n_key_splits = Backward::n_key_splits(shape, shape.kv_steps);
    has_nonfinite = 4 * n_heads * shape.q_steps;
    dq = round_up(has_nonfinite + shape.batch * shape.kv_heads(), 16);
    all =
        dq + (n_key_splits == 1 ? 0 : n_heads * n_key_splits * Backward::dq_floats(shape.q_steps));
  }
};

inline size_t flash_attention_backward_workspace_bytes(const FlashAttentionShape& shape) {
  size_t n_bytes = 0;
  with_element(shape.dtype, [&](auto element) {
    using Element = decltype(element);
    if constexpr (sizeof(Element) == sizeof(double)) {
      n_bytes = static_cast<size_t>(shape.batch * shape.heads * shape.q_steps) * sizeof(double);
    } else {
      with_head_dim(shape.head_dim, [&](auto dim) {
        const BackwardWorkspace<Element, dim.value> workspace(shape);
        n_bytes = static_cast<size_t>(workspace.all) * sizeof(float);
      });
    }
  });
  return n_bytes;
}

// Segments that begin in as many queries are one task.
constexpr int64_t kSegmentSpan = 256;

// Whether whole segments, handed out to n_threads one by one, keep all of them busy: the longest then takes
// less than the two GEMMs in seven that splitting it would cost.
inline bool segments_are_balanced(const FlashAttentionBackward& args, int64_t n_threads) {
  int64_t longest = 0, all = 0;  // squares of lengths
  for (int64_t b = 0; b < args.shape.batch; ++b) {
    const Mask mask(args.shape, args.first_key, b);
    for (int64_t i = 0; i < mask.q_steps;) {
      const Segment segment = segment_of(mask, i);
      const int64_t n_keys = segment.keys.end - segment.keys.begin;
      const int64_t pairs = (segment.queries.end - i) * n_keys;
      longest = max_of(longest, pairs);
      all += pairs * args.shape.kv_heads();
      i = segment.queries.end;
    }
  }
  return n_threads == 1 || 5 * longest * n_threads <= 2 * all;
}

template <typename Element, int kDim>
void attend_backward_by_blocks(const FlashAttentionBackward& args, const Executor& executor) {
  using Backward = typename AttentionOf<Element, kDim>::Backward;
  const FlashAttentionShape& shape = args.shape;
  const int64_t n_heads = shape.batch * shape.heads, n_threads = max_of(1, executor.n_threads);
  const int64_t group = shape.group, n_groups = shape.batch * shape.kv_heads();
  const BackwardWorkspace<Element, kDim> workspace(shape);
  float* const has_nonfinite = static_cast<float*>(args.workspace) + workspace.has_nonfinite;
  clear_floats(has_nonfinite, n_groups);
  const auto run = [&](int64_t head, auto&& body) {
    Backward backward(args, head / shape.heads, head % shape.heads, false);
    const float one = 1.0f;
    if (!body(backward)) __atomic_store(has_nonfinite + head / group, &one, __ATOMIC_RELAXED);
  };
  const int64_t rows = 4 * Backward::kGradientQueries, n_chunks = ceil_div(shape.q_steps, rows);
  const auto for_chunks = [&](auto&& body) {  // the last queries, which see most keys, first
    run_tasks(executor, n_heads * n_chunks, [&](int64_t task) {
      const int64_t head = task % n_heads, begin = (n_chunks - 1 - task / n_heads) * rows;
      const int64_t end = min_of(begin + rows, shape.q_steps);
      run(head, [&](auto& of_head) { return body(of_head, head, begin, end); });
    });
  };
  const auto prepare_rows = [](auto& of_head, int64_t, int64_t begin, int64_t end) {
    return of_head.prepare_rows(begin, end);
  };
  const bool is_packed = shape.causal && args.first_key != nullptr;
  const int64_t n_key_splits = Backward::n_key_splits(shape, shape.kv_steps),
                n_tasks = n_groups * n_key_splits;
  const bool is_balanced = is_packed ? segments_are_balanced(args, n_threads)
                                     : 5 * ceil_div(n_tasks, n_threads) * n_threads <= 7 * n_tasks;
  if (is_balanced && (is_packed || n_key_splits == 1)) {
    const int64_t span = is_packed ? kSegmentSpan : shape.q_steps;  // queries of a task
    run_tasks(executor, n_groups * ceil_div(shape.q_steps, span), [&](int64_t task) {
      const int64_t begin = task / n_groups * span;
      run(task % n_groups * group, [&](auto& of_head) {
        return of_head.run_segments(begin, min_of(begin + span, shape.q_steps));
      });
    });
  } else if (is_balanced) {
    for_chunks(prepare_rows);
    float* dq = static_cast<float*>(args.workspace) + workspace.dq;
    const int64_t dq_floats = Backward::dq_floats(shape.q_steps);
    run_tasks(executor, n_tasks, [&](int64_t task) {
      run(task / n_key_splits * group, [&](auto& of_head) {
        return of_head.run_key_split(task % n_key_splits, n_key_splits,
                                     dq + task * group * dq_floats);
      });
    });
    for_chunks([&](auto& of_head, int64_t head, int64_t begin, int64_t end) {
      const int64_t first = head / group * n_key_splits * group + head % group;
      return of_head.add_key_splits(begin, end, n_key_splits, dq + first * dq_floats);
    });
  } else {
    for_chunks(prepare_rows);
    const int64_t keys = Backward::kGradientKeys;
    run_tasks(executor, n_groups * ceil_div(shape.kv_steps, keys), [&](int64_t task) {
      const int64_t begin = task / n_groups * keys;  // the first keys, seen by most queries, first
      run(task % n_groups * group,
          [&](auto& of_head) { return of_head.run_keys(begin, begin + keys); });
    });
    for_chunks([&](auto& of_head, int64_t, int64_t begin, int64_t end) {
      return of_head.run_queries(begin, end);
    });
  }
  if constexpr (AttentionDot<Element>::Type::kTerms > 1) {
    run_tasks(executor, n_groups, [&](int64_t task) {
      if (has_nonfinite[task] == 0.0f) return;
      const int64_t head = task * group;
      VectorBackward<Element, kDim, FloatDot> fallback(args, head / shape.heads, head % shape.heads,
                                                       true);
      fallback.run_segments(0, shape.q_steps);
    });
  }
}

inline void flash_attention_backward(const FlashAttentionBackward& args, const Executor& executor) {
  with_element(args.shape.dtype, [&](auto element) {
    using Element = decltype(element);
    if constexpr (sizeof(Element) == sizeof(double)) {
      attend_backward_float64<Element>(args, executor);
    } else {
      with_head_dim(args.shape.head_dim, [&](auto dim) {
        attend_backward_by_blocks<Element, dim.value>(args, executor);
      });
    }
  });
}

}  // namespace wgpt::cpu::WGPT_TARGET
