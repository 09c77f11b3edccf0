// flash_attention forward on the CPU. Formula, shapes and determinism: kernels/flash_attention.h.
//
//   task = one head, one chunk of queries            chunk: q packed, out and sums in L2
//     for each block of keys                         k packed transposed, v packed by rows
//       for each group of queries, strip of keys     s = q k^T -> p = 2^(s - m), stored
//       for each group of queries, strip of channels out += p v
//
// Here is what both ways of going through a block share; they are in flash_attention_forward_vector.h and
// flash_attention_forward_amx.h.
//
// The maximum m is lazy: it is set kHeadroom above the largest score when a score passes it, so the
// row sums are rescaled a few times a row, and out and p at most once a block, before out += p v.
// Maxima are whole, and powers of two rescale without rounding. Blocks start at fixed keys, and a row's
// bits depend on no other row, nor on chunks or threads. Blocks and strips that no row sees are skipped.
#pragma once

#include <math.h>

#include "kernels/cpu/attention/visibility.h"

namespace wgpt::cpu::WGPT_TARGET {

// How far the maximum is set above the largest score, in powers of two: half of it, but within these
// bounds. More means fewer rescalings of scores that rise along the keys, and longer differences s - m,
// whose rounding a float32 result would show (4e-7 at 8, 8e-7 at 32) where that of s itself is smaller.
// Scores that rise by 19 nats in 64 keys cost, over flat ones, D 64: AMX 7 % (float32) and 8 % (bfloat16),
// AVX-512 6 %, AVX2 6 %.
template <typename Dot>
constexpr float kHeadroom = Dot::kExact      ? 8.0f
                            : Dot::kIsMatrix ? 64.0f
                                             : 32.0f;
constexpr float kMostHeadroom = 32.0f;
constexpr float kLowest = -3.0e38f;  // maximum and limit before any score

// The nearest whole numbers; of |x| > 2^22, where floats lie far apart, some near them.
inline Floats whole(Floats x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }

// 2^n for whole n <= 0; 0 far below.
inline Floats power_of_two(Floats n) { return scale_by_power(splat(1.0f), n); }

// ln(2^maximum * sum). The power of two in the sum goes to the maximum first, where it undoes the
// headroom: the terms are then no larger than the result, and neither are their rounding errors.
inline float log_sum(float maximum, float sum) {
  if (!(sum > 0.0f && sum < INFINITY)) return maximum * kLn2 + logf(sum);
  const uint32_t bits = bit_cast<uint32_t>(sum);
  const int exponent = static_cast<int>(bits >> 23) - 127;
  const float fraction = bit_cast<float>((bits & 0x7fffffu) | 0x3f800000u);
  return (maximum + static_cast<float>(exponent)) * kLn2 + logf(fraction);
}

// A chunk of queries of a head. Derived::attend_block() lets all of it attend to the current block, with
// p of at most kGroups groups at a time.
template <typename Derived, typename Element, int kDim, typename Dot, int kBlockKeys, int kGroups>
class ForwardChunk {
 public:
  static constexpr int kRowGroup = Dot::kRows;
  static constexpr int kChunkStep = Dot::kIsMatrix ? kRowGroup : kGroups * kRowGroup;
  static constexpr int kUnits = kDim / Dot::kPerUnit;
  static constexpr int kPUnits = kBlockKeys / Dot::kPerUnit;
  static constexpr int kOutVectors = kDim / kLanes < kVectors ? kDim / kLanes : kVectors;
  // Keys that p v takes at once; p is 0 for those of them that a row does not see.
  static constexpr int kKeysAtOnce = Dot::kIsMatrix ? 32 : 2;
  static constexpr int kStep = kKeysAtOnce > kLanes ? kKeysAtOnce : kLanes;  // of pieces
  static constexpr int kApart = Dot::kPlanes > 1 ? kLanes : 1;  // keys of a pair, from each other

  // With only_repair, rows that are finite already are left as they are.
  explicit ForwardChunk(const FlashAttentionForward& args, bool only_repair = false)
      : args_(args),
        shape_(args.shape),
        scale_(static_cast<float>(args.shape.scale) * kLog2E),
        only_repair_(only_repair) {}

  // Rows of a task: q, out and the sums fit L2, which is 1 MiB or more where vectors are that long, and
  // every thread gets several tasks. Keys are packed for every task anew.
  static int64_t chunk_rows(const FlashAttentionShape& shape, int n_threads) {
    const int64_t all = shape.batch * shape.heads * shape.q_steps;
    const int64_t most = (Dot::kPlanes > 1 ? 768
                          : kLanes == 16   ? 1152
                                           : 384) *
                         64 / max_of(64, kDim);
    const int64_t wanted =
        max_of<int64_t>(96, min_of<int64_t>(most, all / (4 * max_of(1, n_threads))));
    const int64_t n_chunks = max_of<int64_t>(1, ceil_div(shape.q_steps, wanted));
    return round_up(max_of<int64_t>(1, ceil_div(shape.q_steps, n_chunks)), kChunkStep);
  }

  // Queries [begin, end) of a head. Gives whether all of out and lse is finite, if Dot has planes.
  bool run(int64_t b, int64_t h, int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Dot::Scope scope;
    begin_ = begin;
    n_rows_ = end - begin;
    const int64_t n_padded = round_up(n_rows_, kChunkStep);
    reserve(n_padded);
    pack_rows<Dot, kDim>(head_rows<Element>(args_.q, b, h, begin), n_rows_, n_padded, q_);
    if (scale_ <= 0.0f) turn_queries(n_padded);
    for (int64_t i = 0; i < n_padded; ++i) limit_[i] = maximum_[i] = kLowest;
    clear_floats(sum_, n_padded * kLanes);
    clear_floats(out_, n_padded * kDim);
    const Range keys = rows_visibility(shape_, begin, n_rows_).any;
    for (block_ = keys.begin / kBlockKeys * kBlockKeys; block_ < keys.end; block_ += kBlockKeys) {
      const int64_t n_keys = min_of<int64_t>(kBlockKeys, keys.end - block_);
      const int64_t n_packed = min_of<int64_t>(kBlockKeys, round_up(n_keys, kStrip));
      pack_columns<Dot, kDim>(head_rows<Element>(args_.k, b, h, block_), n_keys, n_packed, k_,
                              kKPlane);
      pack_row_pairs<Dot, kDim, kApart>(head_rows<Element>(args_.v, b, h, block_), n_keys, n_packed,
                                        v_, kVPlane);
      const int64_t next = block_ + kBlockKeys;
      const int64_t n_next = max_of<int64_t>(0, min_of<int64_t>(kBlockKeys, keys.end - next));
      prefetch_rows<kDim>(head_rows<Element>(args_.k, b, h, next), n_next);
      prefetch_rows<kDim>(head_rows<Element>(args_.v, b, h, next), n_next);
      static_cast<Derived*>(this)->attend_block();
    }
    bool all_finite = true;
    for (int64_t i = 0; i < n_rows_; ++i) all_finite = finish_row(b, h, i) && all_finite;
    return all_finite;
  }

 protected:
  static constexpr int kPaddedRows = (kRowGroup + kLanes - 1) / kLanes * kLanes;
  static constexpr int kPRow = Dot::kPlanes * kPUnits;
  static constexpr int64_t kKPlane = kBlockKeys * kUnits,
                           kVPlane = kBlockKeys * kDim / Dot::kPerUnit;

  // Rows that are multiplied at once.
  struct Group {
    int64_t row;         // the first, in the chunk
    float* p;            // of the block's keys
    Visibility visible;  // keys
    Range keys;          // those of the block that p v takes, empty if no row sees any
    int n_raises;        // so far in the block
    bool is_seen() const { return keys.begin < keys.end; }
  };

  // Maxima of a group's rows before some of them were raised for keys from `key` on.
  struct Raise {
    int64_t key;
    float before[kPaddedRows];
  };

  void reserve(int64_t n_padded) {
    const int64_t n_floats = n_padded * (Dot::kPlanes * kUnits + kDim + kLanes + 2) +
                             Dot::kPlanes * (kKPlane + kVPlane) + kGroups * kRowGroup * kPRow +
                             2 * kPaddedRows;
    q_ = static_cast<float*>(thread_scratch(static_cast<size_t>(n_floats) * sizeof(float)));
    out_ = q_ + Dot::kPlanes * n_padded * kUnits;
    sum_ = out_ + n_padded * kDim;
    k_ = sum_ + n_padded * kLanes;
    v_ = k_ + Dot::kPlanes * kKPlane;
    p_ = v_ + Dot::kPlanes * kVPlane;
    maximum_ = p_ + kGroups * kRowGroup * kPRow;
    limit_ = maximum_ + n_padded + kPaddedRows;
  }

  // The lazy maximum needs a positive scale: a negative one moves into q's signs, and 0 makes q 0.
  void turn_queries(int64_t n_padded) {
    const int64_t n_units = Dot::kPlanes * n_padded * kUnits;
    if (scale_ == 0.0f) clear_floats(q_, n_units);
    auto* words = reinterpret_cast<uint32_t*>(q_);
    for (int64_t i = 0; i < n_units; ++i)
      words[i] ^= Dot::kPerUnit == 2 ? 0x80008000u : 0x80000000u;
    scale_ = scale_ == 0.0f ? 1.0f : -scale_;
  }

  // The group that begins at a row, before it attends to the block.
  Group& start_group(int index, int64_t row) {
    Group& group = groups_[index];
    group.row = row;
    group.n_raises = 0;
    group.p = p_ + index * kRowGroup * kPRow;
    group.visible = rows_visibility(shape_, begin_ + row, kRowGroup);
    const int64_t lo = max_of<int64_t>(0, group.visible.any.begin - block_);
    const int64_t hi = min_of<int64_t>(kBlockKeys, group.visible.any.end - block_);
    const bool is_seen = row < n_rows_ && lo < hi;
    group.keys = is_seen ? Range{lo & -kKeysAtOnce, round_up(hi, kKeysAtOnce)} : Range{0, 0};
    return group;
  }

  const float* q_of(const Group& group) const { return q_ + group.row * (Dot::kPlanes * kUnits); }
  const float* k_of(int key) const { return k_ + key / kStrip * (kStrip * kUnits) + key % kStrip; }
  static float* p_of(const Group& group, int r, int64_t key) {
    return group.p + r * kPRow + key / Dot::kPerUnit;
  }

  template <int kWidth>
  static WGPT_INLINE Floats largest_of(const Floats (&s)[kWidth]) {
    Floats largest = s[0];
    WGPT_UNROLL for (int v = 1; v < kWidth; ++v) largest = max_or_second(s[v], largest);
    return largest;
  }

  // Scores of row r and of keys from `key` on become p, which is summed and stored.
  template <int kWidth>
  WGPT_INLINE void soften(const Group& group, int key, int r, Floats scale, Floats (&s)[kWidth]) {
    const Floats m = splat(-maximum_[group.row + r]);
    WGPT_UNROLL for (int v = 0; v < kWidth; ++v) s[v] = exp2_of<Dot::kExact>(fma(s[v], scale, m));
    float* sum = sum_ + (group.row + r) * kLanes;
    Floats total = s[0];
    WGPT_UNROLL for (int v = 1; v < kWidth; ++v) total = total + s[v];
    store(sum, load(sum) + total);
    store_planes<Dot>(p_of(group, r, key), kPUnits, s);
  }

  template <int kWidth>
  WGPT_INLINE void mask_scores(const Group& group, int key, int r, Floats (&s)[kWidth]) {
    mask_keys(shape_, begin_ + group.row + r, block_ + key, splat(-INFINITY), s);
  }

  // Whether raise_maxima() was called for these keys.
  bool is_raised(const Group& group, int key) const {
    return group.n_raises > 0 && raises_[&group - groups_][group.n_raises - 1].key == key;
  }

  // `lanes` hold the scores of a group's rows for some keys, from `key` on, the largest in some lane.
  // Maxima of rows whose scores passed their limits are raised and their sums rescaled; out, and p of
  // the block's earlier keys, wait for rescale().
  __attribute__((noinline)) void raise_maxima(Group& group, int key,
                                              const Floats (&lanes)[kRowGroup]) {
    float *maximum = maximum_ + group.row, *limit = limit_ + group.row;
    Raise& raise = raises_[&group - groups_][group.n_raises++];
    raise.key = key;
    float largest[kPaddedRows], factor[kPaddedRows];
    for (int r = 0; r < kPaddedRows; ++r)
      largest[r] = r < kRowGroup ? reduce_max(lanes[r]) : -INFINITY;
    const Floats inverse = splat(1.0f / scale_);
    for (int r = 0; r < kPaddedRows; r += kLanes) {
      const Floats s = load(largest + r), bound = load(limit + r), before = load(maximum + r);
      const Floats scaled = s * splat(scale_), headroom = headroom_of(scaled);
      const Floats raised = whole(scaled + headroom);
      store(raise.before + r, before);
      store(maximum + r, choose_above(s, bound, raised, before));
      store(limit + r, choose_above(s, bound, limit_of(fma(headroom, inverse, s)), bound));
      store(factor + r, choose_above(s, bound, power_of_two(before - raised), splat(1.0f)));
    }
    for (int r = 0; r < kRowGroup; ++r) {
      float* sum = sum_ + (group.row + r) * kLanes;
      store(sum, load(sum) * splat(factor[r]));
    }
  }

  static Floats headroom_of(Floats scaled) {
    const Floats half = max_or_second(scaled * splat(0.5f), scaled * splat(-0.5f));
    const Floats most = splat(kMostHeadroom);
    return max_or_second(choose_above(half, most, most, half), splat(kHeadroom<Dot>));
  }

  // Not so close to 0 that what a score is above it could be flushed to 0.
  static Floats limit_of(Floats x) {
    const Floats tiny = splat(1e-30f);
    return choose_above(max_or_second(x, splat(0.0f) - x), tiny, x, tiny);
  }

  // Out and p that were made with maxima which the block has raised since.
  WGPT_INLINE void rescale(const Group& group) {
    if (__builtin_expect(group.n_raises > 0, 0)) rescale_raised(group);
  }

  __attribute__((noinline)) void rescale_raised(const Group& group) {
    const Raise* raises = raises_[&group - groups_];
    for (int r = 0; r < kRowGroup; ++r) {
      const float maximum = maximum_[group.row + r];
      int64_t key = group.keys.begin;
      for (int i = 0; i < group.n_raises && raises[i].before[r] != maximum; ++i) {
        const Floats factor = power_of_two(splat(raises[i].before[r] - maximum));
        if (i == 0) {
          float* out = out_ + (group.row + r) * kDim;
          WGPT_UNROLL for (int c = 0; c < kDim; c += kLanes) store(out + c, load(out + c) * factor);
        }
        const int64_t end = max_of<int64_t>(key, raises[i].key);
        float* p = p_of(group, r, key);
        for (int s = 0; s < Dot::kPlanes && key < end; ++s)
          scale_units<Dot>(p + s * kPUnits, (end - key) / Dot::kPerUnit, factor);
        key = end;
      }
    }
  }

  bool finish_row(int64_t b, int64_t h, int64_t i) {
    const float sum = reduce_add(load(sum_ + i * kLanes));
    const Floats inverse = splat(1.0f / sum);
    Element* out = head_row<Element>(args_.out, b, h, begin_ + i);
    float* lse =
        static_cast<float*>(args_.lse) + (b * shape_.heads + h) * shape_.q_steps + begin_ + i;
    const auto is_finite = [&] { return are_finite(out, kDim) && *lse - *lse == 0.0f; };
    if (only_repair_ && is_finite()) return true;
    for (int c = 0; c < kDim; c += kLanes) store(out + c, load(out_ + i * kDim + c) * inverse);
    *lse = log_sum(maximum_[i], sum);
    return Dot::kPlanes == 1 || is_finite();
  }

  const FlashAttentionForward& args_;
  const FlashAttentionShape& shape_;
  float scale_;  // of scores, base 2
  const bool only_repair_;
  int64_t begin_ = 0, n_rows_ = 0, block_ = 0;
  float *q_, *out_, *sum_, *k_, *v_, *p_;
  // Of each row: what is taken from its scores (base 2), and the score, unscaled, that raises it.
  float *maximum_, *limit_;
  Group groups_[kGroups];
  Raise raises_[kGroups][kBlockKeys / kStrip];  // one a strip at most
};

}  // namespace wgpt::cpu::WGPT_TARGET
