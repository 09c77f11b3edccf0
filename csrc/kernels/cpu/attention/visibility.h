// Which keys a query sees, and where the rows of a head lie.
#pragma once

#include "kernels/cpu/gemm/pack.h"
#include "kernels/cpu/threads/tasks.h"
#include "kernels/flash_attention.h"

namespace wgpt::cpu::WGPT_TARGET {

struct Range {
  int64_t begin, end;
};

// Which keys the queries of one batch item see.
struct Mask {
  int64_t q_steps, kv_steps, window;
  bool is_causal;
  const int32_t* first_key;  // (Tq), or nullptr for 0

  Mask(const FlashAttentionShape& shape, const int32_t* first_key_of_batch, int64_t b)
      : q_steps(shape.q_steps),
        kv_steps(shape.kv_steps),
        window(shape.window),
        is_causal(shape.causal),
        first_key(first_key_of_batch == nullptr ? nullptr : first_key_of_batch + b * q_steps) {}

  int64_t position(int64_t i) const { return i + kv_steps - q_steps; }
};

// The keys that query i sees; both ends rise with i.
inline Range visible_keys(const Mask& mask, int64_t i) {
  const int64_t position = mask.position(i);
  Range keys{0, mask.is_causal ? position + 1 : mask.kv_steps};
  if (mask.window > 0) {
    keys.begin = max_of<int64_t>(0, position - mask.window + 1);
    if (!mask.is_causal) keys.end = min_of(mask.kv_steps, position + mask.window);
  }
  if (mask.first_key != nullptr) keys.begin = max_of<int64_t>(keys.begin, mask.first_key[i]);
  keys.end = max_of(keys.begin, min_of(keys.end, mask.kv_steps));
  return keys;
}

// The queries among [lo, hi) that see key j, if some do; both ends rise with j.
inline Range seeing_queries(const Mask& mask, int64_t j, int64_t lo, int64_t hi) {
  const int64_t i = j - (mask.kv_steps - mask.q_steps);  // the query at key j's position
  Range queries{mask.is_causal ? i : 0, hi};
  if (mask.window > 0) {
    queries.end = min_of(hi, i + mask.window);
    if (!mask.is_causal) queries.begin = i - mask.window + 1;
  }
  queries.begin = min_of(mask.q_steps, max_of(lo, queries.begin));
  if (mask.first_key != nullptr && queries.begin < queries.end &&
      mask.first_key[queries.end - 1] > j) {
    int64_t low = queries.begin;  // the first query that does not see j lies in [low, end)
    for (--queries.end; low < queries.end;) {
      const int64_t middle = (low + queries.end) / 2;
      if (mask.first_key[middle] <= j) {
        low = middle + 1;
      } else {
        queries.end = middle;
      }
    }
  }
  queries.end = max_of(queries.begin, queries.end);
  return queries;
}

// Consecutive queries and keys of which no other query sees one: a packed document, or everything.
struct Segment {
  Range queries, keys;
};

// Whether query i sees only keys that no query before it sees.
inline bool begins_segment(const Mask& mask, int64_t i) {
  return i == 0 ||
         (mask.is_causal && mask.first_key != nullptr && mask.first_key[i] == mask.position(i));
}

inline Segment segment_of(const Mask& mask, int64_t i) {
  if (!mask.is_causal || mask.first_key == nullptr) return {{0, mask.q_steps}, {0, mask.kv_steps}};
  Range queries{i, i + 1};
  while (!begins_segment(mask, queries.begin)) --queries.begin;
  while (queries.end < mask.q_steps && !begins_segment(mask, queries.end)) ++queries.end;
  return {queries, {mask.first_key[queries.begin], mask.position(queries.end - 1) + 1}};
}

// The keys that consecutive rows see: some of them, and all of them.
struct Visibility {
  Range any, all;
};

// Of n rows from i on; `last` is seen in place of rows past it.
inline Visibility rows_visibility(const Mask& mask, int64_t i, int64_t n, int64_t last) {
  const Range first = visible_keys(mask, min_of(i, last));
  const Range end = visible_keys(mask, min_of(i + n - 1, last));
  return {{first.begin, end.end}, {end.begin, first.end}};
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
WGPT_INLINE void mask_keys(const Mask& mask, int64_t i, int64_t first, Floats otherwise,
                           Floats (&x)[kWidth]) {
  const Range keys = visible_keys(mask, i);
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

// Vectors of a register block whose columns are channels: the most that divide a row (3 for 96 channels and
// 16 lanes). AMX tiles come in pairs.
template <typename Dot>
constexpr int out_vectors(int dim) {
  int n = kVectors;
  while (dim / kLanes % n != 0 || (Dot::kIsAmx && n % 2 != 0)) --n;
  return n;
}

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

// Above 2^30 (scaled), scores that differ at all differ by more than 2^6, and any scale near the true one
// gives the same softmax: a row with such a maximum is scaled by a power of two, so that s - m does not round.
constexpr float kHugeScore = 0x1p30f;

// The largest power of two that is at most x.
inline float power_below(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) & 0x7f800000u); }

}  // namespace wgpt::cpu::WGPT_TARGET
