// Which keys a query sees, and where the rows of a head lie.
#pragma once

#include "kernels/cpu/pack.h"
#include "kernels/cpu/tasks.h"
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

template <typename Element>
inline Element* head_row(const HeadsView& view, int64_t b, int64_t h, int64_t t) {
  return static_cast<Element*>(view.data) + b * view.batch_stride + t * view.step_stride +
         h * view.head_stride;
}

template <typename Element>
inline Rows<Element> head_rows(const HeadsView& view, int64_t b, int64_t h, int64_t t) {
  return {head_row<Element>(view, b, h, t), view.step_stride};
}

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

}  // namespace wgpt::cpu::WGPT_TARGET
