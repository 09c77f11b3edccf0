// flash_attention forward on the CPU. Formula, shapes and determinism: kernels/flash_attention.h.
//
//   task = one head, one chunk of queries            chunk: q packed, out and sums in L2
//     for each block of keys                         k packed transposed, v packed by rows
//       for each group of queries, strip of keys     s = q k^T -> p = 2^(s - m), stored
//       for each group of queries, strip of channels out += p v
//
// The part that the vector kernel (flash_attention_forward_vector.h) and the AMX kernel
// (flash_attention_forward_amx.h) share.
//
// Online softmax with conditional (thresholded) rescaling: the row maximum m is set kHeadroom above the
// largest score only when a score exceeds it, so the row sums are rescaled a few times a row, and out and
// p at most once a key block, before out += p v. m is a whole number: rescaling by powers of two does not
// round. Key blocks start at fixed keys of a segment, so a row's bits depend on no other row, nor on chunks
// or threads, nor on where its document is packed. Key blocks and strips that no row sees are skipped.
#pragma once

#include <float.h>
#include <math.h>

#include "kernels/cpu/attention/scores.h"

namespace wgpt::cpu::WGPT_TARGET {

// How far the maximum is set above the largest score, in powers of two: half of that score, within these
// bounds. More headroom means fewer rescalings where scores rise along the keys, and larger differences
// s - m, whose rounding shows in a float32 result (4e-7 at 8, 8e-7 at 32) where that of s is smaller.
// Scores that rise by 19 nats in 64 keys cost, over flat ones, D 64: AMX 7 % (float32) and 8 % (bfloat16),
// AVX-512 6 %, AVX2 6 %.
template <typename Dot>
constexpr float kHeadroom = Dot::kExact   ? 8.0f
                            : Dot::kIsAmx ? 64.0f
                                          : 32.0f;
constexpr float kMostHeadroom = 32.0f;
constexpr float kLowest = -3.0e38f;  // maximum before any score

// A score above 2^22 (base 2) gets no headroom: where float32 has no digits left for it, the residue of
// rounding the maximum, up to 2^5 at kHugeScore, takes its place.
constexpr float kLargeScore = 0x1p22f;

// x rounded to whole numbers.
inline Floats whole(Floats x) {
  const Floats magic = choose_above(splat(0.0f), x, splat(-0x1p23f), splat(0x1p23f));
  return choose_above(magnitude(x), splat(0x1p23f), x, (x + magic) - magic);
}

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

// A chunk of queries of a head. Derived::attend_block() adds the current key block to all of it, holding
// p of at most kGroups groups at a time.
template <typename Derived, typename Element, int kDim, typename Dot, int kBlockKeys, int kGroups>
class ForwardChunk {
 public:
  static constexpr int kRowGroup = Dot::kRows;
  static constexpr int kChunkStep = Dot::kIsAmx ? kRowGroup : kGroups * kRowGroup;
  static constexpr int kUnits = kDim / Dot::kPerUnit;
  static constexpr int kPUnits = kBlockKeys / Dot::kPerUnit;
  static constexpr int kOutVectors = out_vectors<Dot>(kDim);
  // Step of the k loop of p v, in keys; p is 0 for those of them that a row does not see.
  static constexpr int kKStep = Dot::kIsAmx ? 32 : 2;
  static constexpr int kPieceStep = kKStep > kLanes ? kKStep : kLanes;  // of pieces
  static constexpr int kPairStride =
      Dot::kTerms > 1 ? kLanes : 1;  // keys of a pair, from each other

  // With fp32_fallback, rows that are finite already are left as they are.
  explicit ForwardChunk(const FlashAttentionForward& args, bool fp32_fallback = false)
      : args_(args),
        shape_(args.shape),
        mask_(args.shape, args.first_key, 0),
        transform_(args.shape, args.bias, 0, 0),
        scale_((transform_.is_active() ? 1.0f : static_cast<float>(args.shape.scale)) * kLog2E),
        fp32_fallback_(fp32_fallback) {}

  // Rows of a task: q, out and the sums fit L2 (1 MiB or more on AVX-512 machines), and every thread gets
  // several tasks. Each task packs its keys itself.
  static int64_t chunk_rows(const FlashAttentionShape& shape, int n_threads) {
    const int64_t all = shape.batch * shape.heads * shape.q_steps;
    const int64_t most = (Dot::kTerms > 1 ? 768
                          : kLanes == 16  ? 1152
                                          : 384) *
                         64 / max_of(64, kDim);
    const int64_t wanted =
        max_of<int64_t>(96, min_of<int64_t>(most, all / (4 * max_of(1, n_threads))));
    const int64_t n_chunks = max_of<int64_t>(1, ceil_div(shape.q_steps, wanted));
    return round_up(max_of<int64_t>(1, ceil_div(shape.q_steps, n_chunks)), kChunkStep);
  }

  // Queries [begin, end) of a head. Returns whether all of out and lse is finite, where Dot splits into
  // terms; else true.
  bool run(int64_t b, int64_t h, int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Dot::Scope scope;
    mask_ = Mask(shape_, args_.first_key, b);
    transform_ = ScoreTransform(shape_, args_.bias, b, h);
    bool all_finite = true;
    for (int64_t next = 0; begin < end; begin = next) {
      const Segment segment = segment_of(mask_, begin);
      next = min_of(end, segment.queries.end);
      all_finite = run_rows(b, h, begin, next, segment.keys.begin) && all_finite;
    }
    return all_finite;
  }

 protected:
  static constexpr int kPaddedRows = (kRowGroup + kLanes - 1) / kLanes * kLanes;
  static constexpr int kPRow = Dot::kTerms * kPUnits;
  static constexpr int64_t kKTerm = kBlockKeys * kUnits, kVTerm = kBlockKeys * kDim / Dot::kPerUnit;

  // The rows of one register block.
  struct Group {
    int64_t row;         // the first, in the chunk
    float* p;            // of the key block's keys
    Visibility visible;  // keys
    Range keys;          // k range of p v in the key block, empty if no row sees any
    int n_max_updates;   // so far in the key block
    bool is_seen() const { return keys.begin < keys.end; }
  };

  // Maxima of a group's rows before an update for keys from `key` on.
  struct MaxUpdate {
    int64_t key;
    float before[kPaddedRows];
  };

  // Queries [begin, end) of one segment, whose keys begin at key_origin.
  bool run_rows(int64_t b, int64_t h, int64_t begin, int64_t end, int64_t key_origin) {
    const int64_t kv_h = h / shape_.group;
    begin_ = begin;
    n_rows_ = end - begin;
    const int64_t n_padded = round_up(n_rows_, kChunkStep);
    reserve(n_padded);
    pack_rows<Dot, kDim>(head_rows<Element>(args_.q, b, h, begin), n_rows_, n_padded, q_);
    if (scale_ <= 0.0f) negate_queries(n_padded);
    for (int64_t i = 0; i < n_padded; ++i) {
      maximum_[i] = kLowest;
      limit_[i] = -INFINITY;
      row_scale_[i] = scale_;
    }
    clear_floats(sum_, n_padded * kLanes);
    clear_floats(out_, n_padded * kDim);
    const Range keys = rows_visibility(mask_, begin, n_rows_, end - 1).any;
    for (key_block_ = key_origin + (keys.begin - key_origin) / kBlockKeys * kBlockKeys;
         key_block_ < keys.end; key_block_ += kBlockKeys) {
      const int64_t n_keys = min_of<int64_t>(kBlockKeys, keys.end - key_block_);
      const int64_t n_packed = min_of<int64_t>(kBlockKeys, round_up(n_keys, kStrip));
      pack_columns<Dot, kDim>(head_rows<Element>(args_.k, b, kv_h, key_block_), n_keys, n_packed,
                              k_, kKTerm);
      pack_row_pairs<Dot, kDim, kPairStride>(head_rows<Element>(args_.v, b, kv_h, key_block_),
                                             n_keys, n_packed, v_, kVTerm);
      const int64_t next = key_block_ + kBlockKeys;
      const int64_t n_next = max_of<int64_t>(0, min_of<int64_t>(kBlockKeys, keys.end - next));
      prefetch_rows<kDim>(head_rows<Element>(args_.k, b, kv_h, next), n_next);
      prefetch_rows<kDim>(head_rows<Element>(args_.v, b, kv_h, next), n_next);
      static_cast<Derived*>(this)->attend_block();
    }
    bool all_finite = true;
    for (int64_t i = 0; i < n_rows_; ++i) all_finite = finish_row(b, h, i) && all_finite;
    return all_finite;
  }

  void reserve(int64_t n_padded) {
    const int64_t n_floats = n_padded * (Dot::kTerms * kUnits + kDim + kLanes + 3) +
                             Dot::kTerms * (kKTerm + kVTerm) + kGroups * kRowGroup * kPRow +
                             3 * kPaddedRows;
    q_ = static_cast<float*>(thread_scratch(static_cast<size_t>(n_floats) * sizeof(float)));
    out_ = q_ + Dot::kTerms * n_padded * kUnits;
    sum_ = out_ + n_padded * kDim;
    k_ = sum_ + n_padded * kLanes;
    v_ = k_ + Dot::kTerms * kKTerm;
    p_ = v_ + Dot::kTerms * kVTerm;
    maximum_ = p_ + kGroups * kRowGroup * kPRow;
    limit_ = maximum_ + n_padded + kPaddedRows;
    row_scale_ = limit_ + n_padded + kPaddedRows;
  }

  // Conditional rescaling needs a positive scale: a negative sign moves into q, and scale 0 makes q 0.
  void negate_queries(int64_t n_padded) {
    const int64_t n_units = Dot::kTerms * n_padded * kUnits;
    if (scale_ == 0.0f) clear_floats(q_, n_units);
    auto* words = reinterpret_cast<uint32_t*>(q_);
    for (int64_t i = 0; i < n_units; ++i)
      words[i] ^= Dot::kPerUnit == 2 ? 0x80008000u : 0x80000000u;
    scale_ = scale_ == 0.0f ? 1.0f : -scale_;
  }

  // The group that begins at `row`, before it attends to the key block.
  Group& start_group(int index, int64_t row) {
    Group& group = groups_[index];
    group.row = row;
    group.n_max_updates = 0;
    group.p = p_ + index * kRowGroup * kPRow;
    group.visible = rows_visibility(mask_, begin_ + row, kRowGroup, begin_ + n_rows_ - 1);
    const int64_t lo = max_of<int64_t>(0, group.visible.any.begin - key_block_);
    const int64_t hi = min_of<int64_t>(kBlockKeys, group.visible.any.end - key_block_);
    const bool is_seen = row < n_rows_ && lo < hi;
    group.keys = is_seen ? Range{lo & -kKStep, round_up(hi, kKStep)} : Range{0, 0};
    return group;
  }

  const float* q_of(const Group& group) const { return q_ + group.row * (Dot::kTerms * kUnits); }
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

  // p = 2^(scale s - m) of row r and of keys from `key` on: added to the row sum and stored.
  template <int kWidth>
  WGPT_INLINE void exp_and_sum(const Group& group, int key, int r, Floats (&s)[kWidth]) {
    const Floats m = splat(-maximum_[group.row + r]), scale = splat(row_scale_[group.row + r]);
    WGPT_UNROLL for (int v = 0; v < kWidth; ++v) s[v] = exp2_of<Dot::kExact>(fma(s[v], scale, m));
    float* sum = sum_ + (group.row + r) * kLanes;
    Floats total = s[0];
    WGPT_UNROLL for (int v = 1; v < kWidth; ++v) total = total + s[v];
    store(sum, load(sum) + total);
    store_row_terms<Dot>(p_of(group, r, key), kPUnits, s);
  }

  Piece piece_of_group(const Group& group, int strip) const {
    Piece piece = piece_of<kPieceStep>(group.visible, key_block_, strip);
    piece.is_masked = piece.is_masked || transform_.is_active();
    return piece;
  }

  template <int kWidth>
  WGPT_INLINE void mask_scores(const Group& group, int key, int r, Floats (&s)[kWidth]) {
    const int64_t row = min_of(group.row + r, n_rows_ - 1);
    if (transform_.is_active()) {
      transform_.apply(begin_ + row, key_block_ + key, s);
      const Range all = group.visible.all,
                  keys{key_block_ + key, key_block_ + key + kWidth * kLanes};
      if (all.begin <= keys.begin && keys.end <= all.end) return;
    }
    mask_keys(mask_, begin_ + row, key_block_ + key, splat(-INFINITY), s);
  }

  // Whether update_row_max() was called for these keys.
  bool is_max_updated(const Group& group, int key) const {
    return group.n_max_updates > 0 &&
           max_updates_[&group - groups_][group.n_max_updates - 1].key == key;
  }

  // lanes[r] holds the scores of row r for some keys from `key` on, the largest in some lane. Updates the
  // maxima of rows whose scores exceed their limits and rescales their sums; out, and p of the key block's
  // earlier keys, are left to rescale().
  __attribute__((noinline)) void update_row_max(Group& group, int key,
                                                const Floats (&lanes)[kRowGroup]) {
    float *maximum = maximum_ + group.row, *limit = limit_ + group.row;
    MaxUpdate& update = max_updates_[&group - groups_][group.n_max_updates++];
    update.key = key;
    float largest[kPaddedRows], factor[kPaddedRows];
    for (int r = 0; r < kPaddedRows; ++r)
      largest[r] = r < kRowGroup ? reduce_max(lanes[r]) : -INFINITY;
    const Floats inverse = splat(1.0f / scale_), of_huge = splat(power_below(scale_));
    const Floats infinity = splat(INFINITY);
    float* const row_scale = row_scale_ + group.row;
    for (int r = 0; r < kPaddedRows; r += kLanes) {
      const Floats s = load(largest + r), bound = load(limit + r), before = load(maximum + r);
      const Floats scaled = s * splat(scale_), headroom = headroom_of(scaled);
      const Floats huge = splat(kHugeScore), size = magnitude(scaled),
                   old_scale = load(row_scale + r);
      const Floats new_scale = choose_above(size, huge, of_huge, splat(scale_));
      const Floats new_max = choose_above(size, huge, s * of_huge, whole(scaled + headroom));
      // -infinity, whose power is 0, before the first score, and where the scale changes: the scores before
      // and after then lie more than 2^6 apart.
      Floats from = choose_above(splat(-FLT_MAX), bound, splat(0.0f) - infinity, before);
      from =
          choose_above(magnitude(new_scale - old_scale), splat(0.0f), splat(0.0f) - infinity, from);
      const Floats update_before = choose_above(s, bound, from, before);
      store(update.before + r, update_before);
      for (MaxUpdate* earlier = max_updates_[&group - groups_]; earlier < &update; ++earlier) {
        const Floats value = load(earlier->before + r);
        store(earlier->before + r,
              choose_above(splat(-FLT_MAX), update_before, update_before, value));
      }
      store(maximum + r, choose_above(s, bound, new_max, before));
      store(limit + r, choose_above(s, bound, limit_of(fma(headroom, inverse, s)), bound));
      store(row_scale + r, choose_above(s, bound, new_scale, old_scale));
      store(factor + r, choose_above(s, bound, power_of_two(from - new_max), splat(1.0f)));
    }
    for (int r = 0; r < kRowGroup; ++r) {
      float* sum = sum_ + (group.row + r) * kLanes;
      store(sum, load(sum) * splat(factor[r]));
    }
  }

  static Floats headroom_of(Floats scaled) {
    const Floats size = magnitude(scaled), half = size * splat(0.5f), most = splat(kMostHeadroom);
    const Floats headroom =
        max_or_second(choose_above(half, most, most, half), splat(kHeadroom<Dot>));
    return choose_above(size, splat(kLargeScore), splat(0.0f), headroom);
  }

  // At least 1e-30: the difference of a score to a limit closer to 0 could be flushed to 0.
  static Floats limit_of(Floats x) {
    const Floats tiny = splat(1e-30f);
    return choose_above(max_or_second(x, splat(0.0f) - x), tiny, x, tiny);
  }

  // Rescales out, and p computed with maxima that the key block has updated since.
  WGPT_INLINE void rescale(const Group& group) {
    if (__builtin_expect(group.n_max_updates > 0, 0)) rescale_updated(group);
  }

  __attribute__((noinline)) void rescale_updated(const Group& group) {
    const MaxUpdate* updates = max_updates_[&group - groups_];
    for (int r = 0; r < kRowGroup; ++r) {
      const float maximum = maximum_[group.row + r];
      int64_t key = group.keys.begin;
      for (int i = 0; i < group.n_max_updates && updates[i].before[r] != maximum; ++i) {
        const Floats factor = power_of_two(splat(updates[i].before[r] - maximum));
        if (i == 0) {
          float* out = out_ + (group.row + r) * kDim;
          WGPT_UNROLL for (int c = 0; c < kDim; c += kLanes) store(out + c, load(out + c) * factor);
        }
        const int64_t end = max_of<int64_t>(key, updates[i].key);
        float* p = p_of(group, r, key);
        for (int s = 0; s < Dot::kTerms && key < end; ++s)
          scale_units<Dot>(p + s * kPUnits, (end - key) / Dot::kPerUnit, factor);
        key = end;
      }
    }
  }

  // Of a row scaled by a power of two, in nats.
  float unscaled_maximum(int64_t i) const {
    const double scale = transform_.is_active() ? 1.0 : fabs(shape_.scale);
    return static_cast<float>(double{maximum_[i]} / row_scale_[i] * scale);
  }

  bool finish_row(int64_t b, int64_t h, int64_t i) {
    const float sum = reduce_add(load(sum_ + i * kLanes));
    const Floats inverse = splat(1.0f / sum);
    Element* out = head_row<Element>(args_.out, b, h, begin_ + i);
    float* lse =
        static_cast<float*>(args_.lse) + (b * shape_.heads + h) * shape_.q_steps + begin_ + i;
    const auto is_finite = [&] { return are_finite(out, kDim) && *lse - *lse == 0.0f; };
    if (fp32_fallback_ && is_finite()) return true;
    if (transform_.is_active() && sum == 0.0f) {  // no key is left
      for (int c = 0; c < kDim; c += kLanes) store(out + c, splat(0.0f));
      *lse = -INFINITY;
      return true;
    }
    for (int c = 0; c < kDim; c += kLanes) store(out + c, load(out_ + i * kDim + c) * inverse);
    *lse = row_scale_[i] == scale_ ? log_sum(maximum_[i], sum) : unscaled_maximum(i) + logf(sum);
    return Dot::kTerms == 1 || is_finite();
  }

  const FlashAttentionForward& args_;
  const FlashAttentionShape& shape_;
  Mask mask_;
  ScoreTransform transform_;
  float scale_;  // of scores, base 2
  const bool fp32_fallback_;
  int64_t begin_ = 0, n_rows_ = 0, key_block_ = 0;
  float *q_, *out_, *sum_, *k_, *v_, *p_;
  // Of each row: its maximum (base 2), the unscaled score above which it is updated, and what scales it.
  float *maximum_, *limit_, *row_scale_;
  Group groups_[kGroups];
  MaxUpdate max_updates_[kGroups][kBlockKeys / kStrip];  // one a strip at most
};

}  // namespace wgpt::cpu::WGPT_TARGET
