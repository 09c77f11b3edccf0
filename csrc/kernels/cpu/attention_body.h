// flash_attention on the CPU: which code runs for a type and head size, and how its work is cut
// into tasks.
#pragma once

#include "kernels/cpu/attention_backward_tiles.h"
#include "kernels/cpu/attention_backward_vectors.h"
#include "kernels/cpu/attention_decode.h"
#include "kernels/cpu/attention_forward_tiles.h"
#include "kernels/cpu/attention_forward_vectors.h"
#include "kernels/cpu/attention_rows.h"

namespace wgpt::cpu::WGPT_TARGET {

// Calls body(Constant<D>{}).
template <typename Body>
inline void with_head_dim(int64_t head_dim, Body&& body) {
  if (head_dim == 32) return body(Constant<32>{});
  if (head_dim == 64) return body(Constant<64>{});
  if (head_dim == 128) return body(Constant<128>{});
}

inline bool is_decoding(const FlashAttentionShape& shape) {
  return shape.dtype != DType::kFloat64 && shape.q_steps <= kDecodeRows &&
         shape.kv_steps > kDecodeRows;
}

inline size_t flash_attention_forward_workspace_bytes(const FlashAttentionShape& shape) {
  return is_decoding(shape) ? decode_workspace_bytes(shape) : 0;
}

inline size_t flash_attention_backward_workspace_bytes(const FlashAttentionShape& shape) {
  const size_t sum_bytes = shape.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return static_cast<size_t>(shape.batch * shape.heads * shape.q_steps) * sum_bytes;
}

// On vectors or on tiles.
template <typename Element, int kDim, typename Dot, bool kOnTiles = Dot::kIsMatrix>
struct Attention {
  using Forward = VectorForward<Element, kDim, Dot>;
  using Backward = VectorBackward<Element, kDim, Dot>;
};
#if defined(__AMX_BF16__)
template <typename Element, int kDim, typename Dot>
struct Attention<Element, kDim, Dot, true> {
  using Forward = TileForward<Element, kDim, Dot>;
  using Backward = TileBackward<Element, kDim, Dot>;
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
      attend_by_rows<Element>(args, executor);
    } else {
      with_head_dim(args.shape.head_dim, [&](auto dim) {
        if (is_decoding(args.shape)) return decode<Element, dim.value>(args, executor);
        attend_by_chunks<Element, dim.value>(args, executor);
      });
    }
  });
}

template <typename Element, int kDim>
void attend_backward_by_blocks(const FlashAttentionBackward& args, const Executor& executor) {
  using Backward = typename AttentionOf<Element, kDim>::Backward;
  using Repair = VectorBackward<Element, kDim, FloatDot>;
  const FlashAttentionShape& shape = args.shape;
  const int64_t n_heads = shape.batch * shape.heads, n_threads = max_of(1, executor.n_threads);
  const auto run = [&](int64_t head, auto&& make) {
    Backward backward(args, head / shape.heads, head % shape.heads, false);
    if (make(backward)) return;
    Repair repair(args, head / shape.heads, head % shape.heads, true);
    make(repair);
  };
  if (5 * ceil_div(n_heads, n_threads) * n_threads <=
      7 * n_heads) {  // five products a head, or seven spread evenly
    run_tasks(executor, n_heads, [&](int64_t head) {
      run(head, [&](auto& task) {
        task.write_delta(0, shape.q_steps);
        return task.run_head();
      });
    });
    return;
  }
  const int64_t rows = 4 * Backward::kGradientQueries, n_chunks = ceil_div(shape.q_steps, rows);
  const int64_t keys = Backward::kGradientKeys, n_blocks = ceil_div(shape.kv_steps, keys);
  const auto chunk_end = [&](int64_t chunk) { return min_of((chunk + 1) * rows, shape.q_steps); };
  run_tasks(executor, n_heads * n_chunks, [&](int64_t task) {
    run(task % n_heads, [&](auto& of_head) {
      of_head.write_delta(task / n_heads * rows, chunk_end(task / n_heads));
      return true;
    });
  });
  // The longest first: the first keys are seen by most queries, the last queries see most keys.
  run_tasks(executor, n_heads * n_blocks, [&](int64_t task) {
    run(task % n_heads, [&](auto& of_head) {
      return of_head.run_keys(task / n_heads * keys, (task / n_heads + 1) * keys);
    });
  });
  run_tasks(executor, n_heads * n_chunks, [&](int64_t task) {
    const int64_t chunk = n_chunks - 1 - task / n_heads;
    run(task % n_heads,
        [&](auto& of_head) { return of_head.run_queries(chunk * rows, chunk_end(chunk)); });
  });
}

inline void flash_attention_backward(const FlashAttentionBackward& args, const Executor& executor) {
  with_element(args.shape.dtype, [&](auto element) {
    using Element = decltype(element);
    if constexpr (sizeof(Element) == sizeof(double)) {
      attend_backward_by_rows<Element>(args, executor);
    } else {
      with_head_dim(args.shape.head_dim, [&](auto dim) {
        attend_backward_by_blocks<Element, dim.value>(args, executor);
      });
    }
  });
}

}  // namespace wgpt::cpu::WGPT_TARGET
