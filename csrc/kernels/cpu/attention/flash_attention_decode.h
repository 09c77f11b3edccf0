// flash_attention forward for a few queries against a long key/value cache. Formula and shapes:
// kernels/flash_attention.h.
//
// Split-K (flash decoding). Only the few queries reuse a key, so nothing is packed: keys and values are
// read once, in place, and memory bandwidth is the limit (2 Tk D elements a head against 4 Tq Tk D FLOPs).
// Tasks are spans of kDecodeSpan keys of a head, so that one head feeds many threads; each leaves a
// maximum, a sum and an unscaled out, which are merged in ascending order of keys. Spans start at fixed
// keys, so the bits do not depend on the number of threads.
#pragma once

#include "kernels/cpu/attention/flash_attention_forward.h"

namespace wgpt::cpu::WGPT_TARGET {

constexpr int kDecodeRows = 4;
constexpr int kDecodeSpan = 512;
constexpr int kDecodeKeys = 64;  // scored, then added, at a time

inline int64_t decode_spans(const FlashAttentionShape& shape) {
  return ceil_div(shape.kv_steps, kDecodeSpan);
}

inline size_t decode_workspace_bytes(const FlashAttentionShape& shape) {
  const int64_t n_partials = shape.batch * shape.heads * decode_spans(shape) * shape.q_steps;
  return static_cast<size_t>(n_partials * (shape.head_dim + 2)) * sizeof(float);
}

template <typename Element, int kDim>
class DecodeSpan {
 public:
  static constexpr int kVectorsOfRow = kDim / kLanes;
  static constexpr int kPartial = kDim + 2;  // out, maximum (base 2), sum

  // partial (Tq, kPartial) of keys [begin, end) of a head.
  DecodeSpan(const FlashAttentionForward& args, int64_t b, int64_t h, float* partial)
      : args_(args),
        shape_(args.shape),
        b_(b),
        h_(h),
        partial_(partial),
        n_rows_(static_cast<int>(shape_.q_steps)) {
    for (int r = 0; r < n_rows_; ++r) {
      const Element* q = head_row<Element>(args.q, b, h, r);
      for (int c = 0; c < kDim; c += kLanes) store(q_ + r * kDim + c, load(q + c));
      clear_floats(out(r), kPartial);
      maximum(r) = -INFINITY;
    }
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t key = begin; key < end; key += kDecodeKeys) {
      const int n = static_cast<int>(min_of<int64_t>(kDecodeKeys, end - key));
      score(key, n);
      for (int r = 0; r < n_rows_; ++r) exp_and_sum(key, n, r);
      add_values(key, n);
    }
  }

 private:
  float* out(int r) { return partial_ + r * kPartial; }
  float& maximum(int r) { return partial_[r * kPartial + kDim]; }
  float& sum(int r) { return partial_[r * kPartial + kDim + 1]; }

  void score(int64_t key, int n) {
    const float scale = static_cast<float>(shape_.scale) * kLog2E;
    for (int j = 0; j < n; ++j) {
      const Element* k = head_row<Element>(args_.k, b_, h_, key + j);
      Floats row[kVectorsOfRow];
      WGPT_UNROLL for (int v = 0; v < kVectorsOfRow; ++v) row[v] = load(k + v * kLanes);
      for (int r = 0; r < n_rows_; ++r) {
        Floats s = splat(0.0f);
        WGPT_UNROLL for (int v = 0; v < kVectorsOfRow; ++v) s =
            fma(row[v], load(q_ + r * kDim + v * kLanes), s);
        p_[r * kDecodeKeys + j] = reduce_add(s) * scale;
      }
    }
  }

  // p = 2^(s - maximum) of row r, 0 for keys that it does not see; sum and out so far are rescaled.
  void exp_and_sum(int64_t key, int n, int r) {
    const Range keys = visible_keys(shape_, r);
    const int64_t end = min_of(keys.end, key + n);
    float* p = p_ + r * kDecodeKeys;
    Floats largest = splat(-INFINITY);
    for (int j = 0; j < kDecodeKeys; j += kLanes) {
      const int64_t first = key + j;
      const Floats s =
          keep_lanes(load(p + j), splat(-INFINITY), static_cast<int>(keys.begin - first),
                     static_cast<int>(end - first));
      largest = max_or_second(s, largest);
      store(p + j, s);
    }
    const float now = max_of(maximum(r), reduce_max(largest)), base = now == -INFINITY ? 0.0f : now;
    const Floats shrink = exp2_of<true>(splat(maximum(r) - base));
    Floats total = splat(0.0f);
    for (int j = 0; j < kDecodeKeys; j += kLanes) {
      const Floats x = exp2_of<true>(load(p + j) - splat(base));
      total = total + x;
      store(p + j, x);
    }
    maximum(r) = now;
    sum(r) = sum(r) * first_lane(shrink) + reduce_add(total);
    for (int c = 0; c < kDim; c += kLanes) store(out(r) + c, load(out(r) + c) * shrink);
  }

  void add_values(int64_t key, int n) {
    for (int r = 0; r < n_rows_; ++r) {
      Floats sums[kVectorsOfRow];
      WGPT_UNROLL for (int v = 0; v < kVectorsOfRow; ++v) sums[v] = load(out(r) + v * kLanes);
      for (int j = 0; j < n; ++j) {
        const Element* row = head_row<Element>(args_.v, b_, h_, key + j);
        const Floats p = splat(p_[r * kDecodeKeys + j]);
        WGPT_UNROLL for (int v = 0; v < kVectorsOfRow; ++v) sums[v] =
            fma(p, load(row + v * kLanes), sums[v]);
      }
      WGPT_UNROLL for (int v = 0; v < kVectorsOfRow; ++v) store(out(r) + v * kLanes, sums[v]);
    }
  }

  const FlashAttentionForward& args_;
  const FlashAttentionShape& shape_;
  const int64_t b_, h_;
  float* partial_;
  const int n_rows_;
  alignas(64) float q_[kDecodeRows * kDim];
  alignas(64) float p_[kDecodeRows * kDecodeKeys] = {};
};

// Merges the spans [first, last) of a row in ascending order.
template <typename Element, int kDim>
void join_spans(const FlashAttentionForward& args, int64_t head, int64_t row, int64_t first,
                int64_t last) {
  constexpr int kPartial = kDim + 2;
  const FlashAttentionShape& shape = args.shape;
  const auto partial = [&](int64_t span) {
    const int64_t index = (head * decode_spans(shape) + span) * shape.q_steps + row;
    return static_cast<const float*>(args.workspace) + index * kPartial;
  };
  float maximum = -INFINITY, sum = 0.0f;
  for (int64_t span = first; span < last; ++span) maximum = max_of(maximum, partial(span)[kDim]);
  const float base = maximum == -INFINITY ? 0.0f : maximum;
  alignas(64) float out[kDim] = {};
  for (int64_t span = first; span < last; ++span) {
    const Floats factor = exp2_of<true>(splat(partial(span)[kDim] - base));
    sum += partial(span)[kDim + 1] * first_lane(factor);
    for (int c = 0; c < kDim; c += kLanes)
      store(out + c, fma(load(partial(span) + c), factor, load(out + c)));
  }
  Element* result = head_row<Element>(args.out, head / shape.heads, head % shape.heads, row);
  for (int c = 0; c < kDim; c += kLanes) store(result + c, load(out + c) * splat(1.0f / sum));
  static_cast<float*>(args.lse)[head * shape.q_steps + row] = log_sum(maximum, sum);
}

template <typename Element, int kDim>
void decode(const FlashAttentionForward& args, const Executor& executor) {
  const FlashAttentionShape& shape = args.shape;
  const int64_t n_heads = shape.batch * shape.heads;
  const Range keys = rows_visibility(shape, 0, shape.q_steps).any;
  const int64_t first = keys.begin / kDecodeSpan, last = ceil_div(keys.end, kDecodeSpan);
  run_tasks(executor, n_heads * (last - first), [&](int64_t task) {
    const int64_t head = task / (last - first), span = first + task % (last - first);
    float* partial = static_cast<float*>(args.workspace) + (head * decode_spans(shape) + span) *
                                                               shape.q_steps *
                                                               DecodeSpan<Element, kDim>::kPartial;
    DecodeSpan<Element, kDim>(args, head / shape.heads, head % shape.heads, partial)
        .run(max_of(keys.begin, span * kDecodeSpan),
             min_of<int64_t>(keys.end, (span + 1) * kDecodeSpan));
  });
  for (int64_t row = 0; row < n_heads * shape.q_steps; ++row) {
    join_spans<Element, kDim>(args, row / shape.q_steps, row % shape.q_steps, first, last);
  }
}

}  // namespace wgpt::cpu::WGPT_TARGET
