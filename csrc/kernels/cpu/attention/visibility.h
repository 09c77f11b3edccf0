// Which keys a query sees, and where the rows of a head lie.
#pragma once

#include "kernels/cpu/gemm/pack.h"
#include "kernels/cpu/threads/tasks.h"
#include "kernels/flash_attention.h"

namespace wgpt::cpu::WGPT_TARGET {

struct Range {
  int64_t begin, end;
};

// The keys that query i sees; both ends rise with i.
inline Range visible_keys(const FlashAttentionShape& shape, int64_t i) {
  const int64_t position = i + shape.kv_steps - shape.q_steps;
  Range keys{0, shape.causal ? position + 1 : shape.kv_steps};
  if (shape.window > 0) {
    keys.begin = max_of<int64_t>(0, position - shape.window + 1);
    if (!shape.causal) keys.end = min_of(shape.kv_steps, position + shape.window);
  }
  keys.end = max_of(keys.begin, min_of(keys.end, shape.kv_steps));
  return keys;
}

// The queries that see key j; both ends rise with j.
inline Range seeing_queries(const FlashAttentionShape& shape, int64_t j) {
  const int64_t i = j - (shape.kv_steps - shape.q_steps);  // the query at key j's position
  Range queries{shape.causal ? i : 0, shape.q_steps};
  if (shape.window > 0) {
    queries.end = i + shape.window;
    if (!shape.causal) queries.begin = i - shape.window + 1;
  }
  queries.begin = min_of(shape.q_steps, max_of<int64_t>(0, queries.begin));
  queries.end = max_of(queries.begin, min_of(queries.end, shape.q_steps));
  return queries;
}

// The keys that consecutive rows see: some of them, and all of them.
struct Visibility {
  Range any, all;
};

inline Visibility rows_visibility(const FlashAttentionShape& shape, int64_t i, int64_t n) {
  const Range first = visible_keys(shape, min_of(i, shape.q_steps - 1));
  const Range last = visible_keys(shape, min_of(i + n - 1, shape.q_steps - 1));
  return {{first.begin, last.end}, {last.begin, first.end}};
}

// The keys of a strip that some row of a group sees, in multiples of kPieceStep.
struct Piece {
  int key, n_vectors;  // the first, counted from the key block; n_vectors <= 0 if no row sees any
  bool is_masked;      // whether some row does not see all of them
};

template <int kPieceStep>
inline Piece piece_of(const Visibility& visible, int64_t key_block, int strip) {
  const int64_t first = key_block + strip;
  if (visible.all.begin <= first && visible.all.end >= first + kStrip)
    return {strip, kVectors, false};
  const int begin = static_cast<int>(max_of<int64_t>(0, visible.any.begin - first)) / kPieceStep;
  const int end =
      static_cast<int>(ceil_div(min_of<int64_t>(kStrip, visible.any.end - first), kPieceStep));
  return {strip + begin * kPieceStep, (end - begin) * (kPieceStep / kLanes), true};
}

// x of keys from `first` on where query i sees them, else `otherwise`.
template <int kWidth>
WGPT_INLINE void mask_keys(const FlashAttentionShape& shape, int64_t i, int64_t first,
                           Floats otherwise, Floats (&x)[kWidth]) {
  const Range keys = visible_keys(shape, min_of(i, shape.q_steps - 1));
  const int lo = static_cast<int>(keys.begin - first), hi = static_cast<int>(keys.end - first);
  WGPT_UNROLL for (int v = 0; v < kWidth; ++v) x[v] =
      keep_lanes(x[v], otherwise, lo - v * kLanes, hi - v * kLanes);
}

template <typename Element>
inline Element* head_row(const HeadsView& view, int64_t b, int64_t h, int64_t t) {
  return static_cast<Element*>(view.data) + b * view.batch_stride + t * view.step_stride +
         h * view.head_stride;
}

template <typename Element>
inline Rows<Element> head_rows(const HeadsView& view, int64_t b, int64_t h, int64_t t) {
  return {head_row<Element>(view, b, h, t), view.step_stride};
}

// The GEMM micro-kernel that attention uses for a type; on AMX float32 and float16 are three bfloat16
// terms each (bf16x3).
template <typename Element>
struct AttentionDot {
  using Type = typename DotOf<Element>::Type;
};
#if defined(__AMX_BF16__)
template <>
struct AttentionDot<float> {
  using Type = Amx32x32Dot<3>;
};
template <>
struct AttentionDot<Float16> {
  using Type = Amx32x32Dot<3>;
};
template <>
struct AttentionDot<BFloat16> {
  using Type = Amx32x32Dot<1>;
};
#endif

// Whether n elements are finite.
template <typename Element>
inline bool are_finite(const Element* x, int n) {
  Floats check = splat(0.0f);
  for (int c = 0; c < n; c += kLanes) check = fma(load(x + c), splat(0.0f), check);
  return reduce_add(check) == 0.0f;
}

// Prefetches n rows of a head, which lie far apart, from L3 to L2: overlapped with the GEMMs of the block
// packed before.
template <int kDim, typename Element>
inline void prefetch_rows(Rows<Element> rows, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const char* row = reinterpret_cast<const char*>(rows[i]);
    for (size_t c = 0; c < kDim * sizeof(Element); c += 64) __builtin_prefetch(row + c, 0, 2);
  }
}

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

}  // namespace wgpt::cpu::WGPT_TARGET
