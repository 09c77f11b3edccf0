// flash_attention forward for a few queries against a long key/value cache. Formula and shapes:
// kernels/flash_attention.h.
//
// Split-K (flash decoding). Only the few queries reuse a key, so nothing is packed: keys and values are
// read once, in place, and memory bandwidth is the limit (2 Tk D elements a head against 4 Tq Tk D FLOPs).
// Tasks are spans of kDecodeSpan keys of a head, so that one head feeds many threads; each leaves a
// maximum, a sum and an unscaled out, which are merged in ascending order of keys. Spans start at fixed
// keys, counted from the first key of the item's first query: the bits do not depend on the number of
// threads, nor on what lies before that key (left padding of a batch).
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

// What turns a difference of scores into an exponent of two: transformed ones are in nats, others in powers of two.
inline float exponent_unit(const FlashAttentionShape& shape, const ScoreBias& bias) {
  return ScoreTransform::is_active(shape, bias) ? kLog2E : 1.0f;
}

template <typename Element, int kDim>
class DecodeSpan {
 public:
  static constexpr int kVectorsOfRow = kDim / kLanes;
  static constexpr int kPartial = kDim + 2;  // out, maximum, sum

  // partial (Tq, kPartial) of keys [begin, end) of a head.
  DecodeSpan(const FlashAttentionForward& args, int64_t b, int64_t h, float* partial)
      : args_(args),
        shape_(args.shape),
        mask_(args.shape, args.first_key, b),
        transform_(args.shape, args.bias, b, h),
        b_(b),
        kv_h_(h / shape_.group),
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
    const float scale = transform_.is_active() ? 1.0f : static_cast<float>(shape_.scale) * kLog2E;
    for (int j = 0; j < n; ++j) {
      const Element* k = head_row<Element>(args_.k, b_, kv_h_, key + j);
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

  // p = 2^(unit (s - maximum)) of row r, 0 for keys that it does not see; sum and out so far are rescaled.
  void exp_and_sum(int64_t key, int n, int r) {
    const Range keys = visible_keys(mask_, r);
    const int64_t end = min_of(keys.end, key + n);
    float* p = p_ + r * kDecodeKeys;
    Floats largest = splat(-INFINITY);
    for (int j = 0; j < kDecodeKeys; j += kLanes) {
      const int64_t first = key + j;
      Floats scores[1] = {load(p + j)};
      if (transform_.is_active()) transform_.apply(r, first, scores);
      const Floats s = keep_lanes(scores[0], splat(-INFINITY), static_cast<int>(keys.begin - first),
                                  static_cast<int>(end - first));
      largest = max_or_second(s, largest);
      store(p + j, s);
    }
    const float now = max_of(maximum(r), reduce_max(largest)), base = now == -INFINITY ? 0.0f : now;
    const Floats unit = splat(exponent_unit(shape_, args_.bias));
    const Floats shrink = exp2_of<true>(splat(maximum(r) - base) * unit);
    Floats total = splat(0.0f);
    for (int j = 0; j < kDecodeKeys; j += kLanes) {
      const Floats x = exp2_of<true>((load(p + j) - splat(base)) * unit);
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
      // 0 times an infinite value of another document would be NaN.
      const Range seen = mask_.first_key == nullptr ? Range{key, key + n} : visible_keys(mask_, r);
      const int64_t begin = max_of<int64_t>(0, seen.begin - key),
                    end = min_of<int64_t>(n, seen.end - key);
      for (int64_t j = begin; j < end; ++j) {
        const Element* row = head_row<Element>(args_.v, b_, kv_h_, key + j);
        const Floats p = splat(p_[r * kDecodeKeys + j]);
        WGPT_UNROLL for (int v = 0; v < kVectorsOfRow; ++v) sums[v] =
            fma(p, load(row + v * kLanes), sums[v]);
      }
      WGPT_UNROLL for (int v = 0; v < kVectorsOfRow; ++v) store(out(r) + v * kLanes, sums[v]);
    }
  }

  const FlashAttentionForward& args_;
  const FlashAttentionShape& shape_;
  const Mask mask_;
  const ScoreTransform transform_;
  const int64_t b_, kv_h_;
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
  const bool is_transformed = ScoreTransform::is_active(shape, args.bias);
  const float unit = exponent_unit(shape, args.bias);
  float maximum = -INFINITY, sum = 0.0f;
  for (int64_t span = first; span < last; ++span) maximum = max_of(maximum, partial(span)[kDim]);
  const float base = maximum == -INFINITY ? 0.0f : maximum;
  alignas(64) float out[kDim] = {};
  for (int64_t span = first; span < last; ++span) {
    const Floats factor = exp2_of<true>(splat((partial(span)[kDim] - base) * unit));
    sum += partial(span)[kDim + 1] * first_lane(factor);
    for (int c = 0; c < kDim; c += kLanes)
      store(out + c, fma(load(partial(span) + c), factor, load(out + c)));
  }
  Element* result = head_row<Element>(args.out, head / shape.heads, head % shape.heads, row);
  // Of a query that bias leaves no key, out is 0 already.
  const float inverse = is_transformed && sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int c = 0; c < kDim; c += kLanes) store(result + c, load(out + c) * splat(inverse));
  static_cast<float*>(args.lse)[head * shape.q_steps + row] =
      is_transformed ? maximum + logf(sum) : log_sum(maximum, sum);
}

// The keys that item b's queries see, the key at which its spans begin, and which spans hold those keys.
struct DecodeKeys {
  Range keys, spans;
  int64_t origin;

  DecodeKeys(const FlashAttentionForward& args, int64_t b) {
    const Mask mask(args.shape, args.first_key, b);
    keys = rows_visibility(mask, 0, mask.q_steps, mask.q_steps - 1).any;
    origin = mask.first_key == nullptr ? 0 : mask.first_key[0];
    spans = {(keys.begin - origin) / kDecodeSpan, ceil_div(keys.end - origin, kDecodeSpan)};
  }
};

template <typename Element, int kDim>
void decode(const FlashAttentionForward& args, const Executor& executor) {
  const FlashAttentionShape& shape = args.shape;
  const int64_t n_heads = shape.batch * shape.heads;
  Range spans = DecodeKeys(args, 0).spans;  // of all items
  for (int64_t b = 1; b < shape.batch && args.first_key != nullptr; ++b) {
    const Range of_item = DecodeKeys(args, b).spans;
    spans = {min_of(spans.begin, of_item.begin), max_of(spans.end, of_item.end)};
  }
  const int64_t n_spans = spans.end - spans.begin, group = shape.group;
  run_tasks(executor, n_heads * n_spans, [&](int64_t task) {
    // The heads of a group one after the other: they read the same keys.
    const int64_t head = task / (group * n_spans) * group + task % group;
    const int64_t span = spans.begin + task / group % n_spans;
    const DecodeKeys of_item(args, head / shape.heads);
    const int64_t begin = of_item.origin + span * kDecodeSpan;
    const Range keys{max_of(of_item.keys.begin, begin),
                     min_of(of_item.keys.end, begin + kDecodeSpan)};
    if (keys.begin >= keys.end) return;
    float* partial = static_cast<float*>(args.workspace) + (head * decode_spans(shape) + span) *
                                                               shape.q_steps *
                                                               DecodeSpan<Element, kDim>::kPartial;
    DecodeSpan<Element, kDim>(args, head / shape.heads, head % shape.heads, partial)
        .run(keys.begin, keys.end);
  });
  for (int64_t row = 0; row < n_heads * shape.q_steps; ++row) {
    const int64_t head = row / shape.q_steps;
    const Range of_item = DecodeKeys(args, head / shape.heads).spans;
    join_spans<Element, kDim>(args, head, row % shape.q_steps, of_item.begin, of_item.end);
  }
}

}  // namespace wgpt::cpu::WGPT_TARGET
