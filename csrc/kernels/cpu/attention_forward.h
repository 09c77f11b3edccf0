// flash_attention forward on the CPU. Formula, shapes and determinism: kernels/flash_attention.h.
//
//   task = one head, one chunk of queries          chunk: q packed, out and sums in L2
//     for each block of kBlockKeys keys            k packed transposed, v packed by rows
//       for each tile of kQueryTile queries
//         for each strip of keys, group of 6 rows  s = q k^T in registers -> p = 2^(s - m), stored
//         for each strip of channels, group        out = out * shrink + p v
//
// The softmax never leaves the registers that hold the scores, and its maximum m is lazy: it is set
// kHeadroom above the largest score when a score passes it, so out and the row sums are rescaled a
// few times a row, not at every block. Blocks start at fixed keys and groups at fixed rows, so bits
// depend on neither chunks nor threads. Blocks and strips that no row sees are skipped; on the
// diagonal single vectors are.
#pragma once

#include <math.h>

#include "kernels/cpu/attention_shape.h"

namespace wgpt::cpu::WGPT_TARGET {

// Measured on one Zen 5 thread, D 32 to 128, both types: kBlockKeys 128 to 256 and tiles of 24 or 48
// queries differ by no more than the noise (3 %).
constexpr int kBlockKeys = 192;
// How far the maximum is set above the largest score, in powers of two. More means fewer rescalings
// of scores that rise along the keys, and longer differences s - m, whose rounding a float32 result
// would show (4e-7 at 8, 8e-7 at 32). 19 nats in 64 keys over flat scores, D 64: vdpbf16ps 9 % at 8,
// 3 % at 32; AMX, whose products cost little, 12 % at 32.
template <typename Dot>
constexpr float kHeadroom = Dot::kIsMatrix ? 64.0f
                            : Dot::kExact  ? 8.0f
                                           : 32.0f;
constexpr float kLowest = -3.0e38f;  // maximum and limit before any score

// ln(2^maximum * sum). The power of two in the sum goes to the maximum first, where it undoes the
// headroom: the terms are then no larger than the result, and neither are their rounding errors.
inline float log_sum(float maximum, float sum) {
  if (!(sum > 0.0f && sum < INFINITY)) return maximum * kLn2 + logf(sum);
  const uint32_t bits = bit_cast<uint32_t>(sum);
  const int exponent = static_cast<int>(bits >> 23) - 127;
  const float fraction = bit_cast<float>((bits & 0x7fffffu) | 0x3f800000u);
  return (maximum + static_cast<float>(exponent)) * kLn2 + logf(fraction);
}

template <typename Element, int kDim>
class AttentionForward {
 public:
  using Dot = typename DotOf<Element>::Type;
  static constexpr int kRowGroup = Dot::kRows;
  static constexpr int kGroupsPerTile = 4;
  static constexpr int kQueryTile = kGroupsPerTile * kRowGroup;
  static constexpr int kUnits = kDim / Dot::kPerUnit;
  static constexpr int kPUnits = kBlockKeys / Dot::kPerUnit;
  static constexpr int kOutVectors = kDim / kLanes < kVectors ? kDim / kLanes : kVectors;
  static constexpr int kJoined =
      Dot::kIsMatrix ? 1 : kVectors / kOutVectors;  // row groups that fill the registers of p v
  // Keys that p v takes at once; p is 0 for those of them that a row does not see.
  static constexpr int kKeysAtOnce = Dot::kIsMatrix ? 32 : 2;

  explicit AttentionForward(const FlashAttentionForward& args)
      : args_(args), shape_(args.shape), scale_(static_cast<float>(args.shape.scale)) {}

  // Rows of a task: the product of q, out and the sums fits L2, and every thread gets several
  // tasks.
  static int64_t chunk_rows(const FlashAttentionShape& shape, int n_threads) {
    const int64_t all = shape.batch * shape.heads * shape.q_steps;
    const int64_t most = 384 * 64 / max_of(64, kDim);
    const int64_t wanted =
        max_of<int64_t>(96, min_of<int64_t>(most, all / (4 * max_of(1, n_threads))));
    const int64_t n_chunks = max_of<int64_t>(1, ceil_div(shape.q_steps, wanted));
    return round_up(max_of<int64_t>(1, ceil_div(shape.q_steps, n_chunks)), kQueryTile);
  }

  void run(int64_t b, int64_t h, int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Dot::Scope scope;
    begin_ = begin;
    n_rows_ = end - begin;
    const int64_t n_padded = round_up(n_rows_, kQueryTile);
    reserve(n_padded);
    pack_rows<Dot, kDim>(head_rows<Element>(args_.q, b, h, begin), n_rows_, n_padded, q_);
    if (scale_ <= 0.0f) turn_queries(n_padded);
    for (int64_t i = 0; i < n_padded + kLanes; ++i) limit_[i] = maximum_[i] = kLowest;
    clear_floats(sum_, n_padded * kLanes);
    clear_floats(out_, n_padded * kDim);
    const Range keys = rows_visibility(shape_, begin, n_rows_).any;
    for (block_ = keys.begin / kBlockKeys * kBlockKeys; block_ < keys.end; block_ += kBlockKeys) {
      const int64_t n_keys = min_of<int64_t>(kBlockKeys, keys.end - block_);
      const int64_t n_packed = min_of<int64_t>(kBlockKeys, round_up(n_keys, kStrip));
      pack_columns<Dot, kDim>(head_rows<Element>(args_.k, b, h, block_), n_keys, n_packed, k_);
      pack_row_pairs<Dot, kDim>(head_rows<Element>(args_.v, b, h, block_), n_keys, n_packed, v_);
      for (int64_t row = 0; row < n_rows_; row += kQueryTile) attend_tile(row);
    }
    for (int64_t i = 0; i < n_rows_; ++i) finish_row(b, h, i);
  }

 private:
  void reserve(int64_t n_padded) {
    const int64_t n_floats = n_padded * (kUnits + kDim + kLanes + 2) +
                             kBlockKeys * (kUnits + kDim / Dot::kPerUnit) + kQueryTile * kPUnits +
                             64;
    q_ = static_cast<float*>(thread_scratch(static_cast<size_t>(n_floats) * sizeof(float)));
    out_ = q_ + n_padded * kUnits;
    sum_ = out_ + n_padded * kDim;
    k_ = sum_ + n_padded * kLanes;
    v_ = k_ + kBlockKeys * kUnits;
    p_ = v_ + kBlockKeys * kDim / Dot::kPerUnit;
    maximum_ = p_ + kQueryTile * kPUnits;
    limit_ = maximum_ + n_padded + kLanes;
  }

  // The lazy maximum needs a positive scale: a negative one moves into q's signs, and 0 makes q 0.
  void turn_queries(int64_t n_padded) {
    if (scale_ == 0.0f) clear_floats(q_, n_padded * kUnits);
    auto* words = reinterpret_cast<uint32_t*>(q_);
    for (int64_t i = 0; i < n_padded * kUnits; ++i)
      words[i] ^= Dot::kPerUnit == 2 ? 0x80008000u : 0x80000000u;
    scale_ = scale_ == 0.0f ? 1.0f : -scale_;
  }

  // A tile of rows against the current block.
  void attend_tile(int64_t row) {
    Range pending[kGroupsPerTile];  // keys of the block whose p waits for its product with v
    Visibility visible[kGroupsPerTile];
    float shrink[kQueryTile];
    for (int i = 0; i < kQueryTile; ++i) shrink[i] = 1.0f;
    for (int g = 0; g < kGroupsPerTile; ++g) {
      visible[g] = rows_visibility(shape_, begin_ + row + g * kRowGroup, kRowGroup);
      const int64_t lo = max_of<int64_t>(0, visible[g].any.begin - block_);
      const int64_t hi = min_of<int64_t>(kBlockKeys, visible[g].any.end - block_);
      const bool is_seen = row + g * kRowGroup < n_rows_ && lo < hi;
      pending[g] = is_seen ? Range{lo & -kKeysAtOnce, round_up(hi, kKeysAtOnce)} : Range{0, 0};
    }
    for (int strip = 0; strip < kBlockKeys; strip += kStrip) {
      for (int g = 0; g < kGroupsPerTile; ++g) {
        if (pending[g].begin >= strip + kStrip || pending[g].end <= strip) continue;
        attend_strip({row + g * kRowGroup, g, strip, shrink + g * kRowGroup, &pending[g]},
                     visible[g]);
      }
    }
    add_values_of_tile(row, shrink, pending);
  }

  struct Group {
    int64_t row;  // in the chunk
    int index;    // in the tile
    int key;      // first key in the block
    float* shrink;
    Range* pending;
  };

  void attend_strip(Group group, const Visibility& visible) {
    const int64_t first_key = block_ + group.key;
    if (visible.all.begin <= first_key && visible.all.end >= first_key + kStrip) {
      return attend_keys<kVectors, false>(group);
    }
    constexpr int kStep = kKeysAtOnce > kLanes ? kKeysAtOnce : kLanes;
    const int begin = static_cast<int>(max_of<int64_t>(0, visible.any.begin - first_key)) / kStep *
                      (kStep / kLanes);
    const int end =
        static_cast<int>(ceil_div(min_of<int64_t>(kStrip, visible.any.end - first_key), kStep)) *
        (kStep / kLanes);
    group.key += begin * kLanes;
    with_width(end - begin, [&](auto width) { attend_keys<width.value, true>(group); });
  }

  // p = 2^(scale s - m) for kWidth vectors of keys; masked where some rows do not see all of them.
  template <int kWidth, bool kMasked>
  __attribute__((noinline)) void attend_keys(const Group& group) {
    alignas(64) Tile<kRowGroup, kWidth> s;
    const float* k = k_ + group.key / kStrip * (kStrip * kUnits) + group.key % kStrip;
    multiply_fresh_tile<Dot>(q_ + group.row * kUnits, kUnits, 1, k, kStrip, kUnits, s);
    if constexpr (kMasked) mask_scores(group, s);
    Floats worst = splat(-1.0f);
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      Floats largest = s[r][0];
      WGPT_UNROLL for (int v = 1; v < kWidth; ++v) largest = max_or_second(s[r][v], largest);
      worst = max_or_second(largest - splat(limit_[group.row + r]), worst);
    }
    if (__builtin_expect(any_above(worst, splat(0.0f)), 0)) {
      Floats largest[kRowGroup];
      WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
        largest[r] = s[r][0];
        WGPT_UNROLL for (int v = 1; v < kWidth; ++v) largest[r] =
            max_or_second(s[r][v], largest[r]);
      }
      raise_maxima(group, largest);
    }
    float* p = p_ + group.index * kRowGroup * kPUnits + group.key / Dot::kPerUnit;
    const Floats scale = splat(scale_ * kLog2E);
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      const Floats m = splat(-maximum_[group.row + r]);
      WGPT_UNROLL for (int v = 0; v < kWidth; ++v) s[r][v] =
          exp2_of<Dot::kExact>(fma(s[r][v], scale, m));
      float* sum = sum_ + (group.row + r) * kLanes;
      Floats total = s[r][0];
      WGPT_UNROLL for (int v = 1; v < kWidth; ++v) total = total + s[r][v];
      store(sum, load(sum) + total);
      store_row<Dot>(p + r * kPUnits, s[r]);
    }
  }

  template <int kWidth>
  WGPT_INLINE void mask_scores(const Group& group, Tile<kRowGroup, kWidth>& s) {
    const int64_t first_key = block_ + group.key;
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      const Range keys = visible_keys(shape_, min_of(begin_ + group.row + r, shape_.q_steps - 1));
      const int lo = static_cast<int>(keys.begin - first_key),
                hi = static_cast<int>(keys.end - first_key);
      WGPT_UNROLL for (int v = 0; v < kWidth; ++v) {
        s[r][v] = keep_lanes(s[r][v], splat(-INFINITY), lo - v * kLanes, hi - v * kLanes);
      }
    }
  }

  // Some score passed its row's limit: what waits is added under the old maximum, then sums and out
  // are rescaled.
  __attribute__((noinline)) void raise_maxima(const Group& group,
                                              const Floats (&largest)[kRowGroup]) {
    if (group.pending->begin < group.key) {
      const Range before{group.pending->begin, group.key};
      for (int column = 0; column < kDim; column += kOutVectors * kLanes) {
        add_values<1>(group.row, group.index, column, group.shrink, before);
      }
      group.pending->begin = group.key;
      for (int r = 0; r < kRowGroup; ++r) group.shrink[r] = 1.0f;
    }
    constexpr int kPadded = (kRowGroup + kLanes - 1) / kLanes * kLanes;
    float now[kPadded], factor[kPadded];
    for (int r = 0; r < kPadded; ++r) now[r] = r < kRowGroup ? reduce_max(largest[r]) : -INFINITY;
    const Floats scale = splat(scale_ * kLog2E), headroom = splat(kHeadroom<Dot>);
    for (int r = 0; r < kPadded; r += kLanes) {  // rows past the group keep what they had
      float *maximum = maximum_ + group.row + r, *limit = limit_ + group.row + r;
      const Floats score = load(now + r), old_limit = load(limit), before = load(maximum);
      const Floats after = choose_above(score, old_limit, fma(score, scale, headroom), before);
      store(limit, choose_above(score, old_limit, score + headroom / scale, old_limit));
      store(maximum, after);
      store(factor + r, exp2_of<true>(before - after));
    }
    for (int r = 0; r < kRowGroup; ++r) {
      float* sum = sum_ + (group.row + r) * kLanes;
      store(sum, load(sum) * splat(factor[r]));
      group.shrink[r] *= factor[r];
    }
  }

  // out = out * shrink + p v for groups [index, index + kGroups) and one strip of channels.
  template <int kGroups>
  WGPT_INLINE void add_values(int64_t row, int index, int column, const float* shrink, Range keys) {
    alignas(64) Tile<kGroups * kRowGroup, kOutVectors> sums;
    const int64_t first = keys.begin / Dot::kPerUnit, n = keys.end / Dot::kPerUnit - first;
    multiply_fresh_tile<Dot>(p_ + index * kRowGroup * kPUnits + first, kPUnits, 1,
                             v_ + first * kDim + column, kDim, n, sums);
    add_tile(sums, shrink, out_ + row * kDim + column, kDim);
  }

  void add_values_of_tile(int64_t row, const float* shrink, const Range* pending) {
    for (int column = 0; column < kDim; column += kOutVectors * kLanes) {
      for (int g = 0; g < kGroupsPerTile; g += kJoined) {
        bool is_same = true;
        for (int j = 1; j < kJoined; ++j) {
          is_same = is_same && pending[g + j].begin == pending[g].begin &&
                    pending[g + j].end == pending[g].end;
        }
        if (is_same && pending[g].begin < pending[g].end) {
          add_values<kJoined>(row + g * kRowGroup, g, column, shrink + g * kRowGroup, pending[g]);
          continue;
        }
        for (int j = g; j < g + kJoined; ++j) {
          if (pending[j].begin >= pending[j].end) continue;
          add_values<1>(row + j * kRowGroup, j, column, shrink + j * kRowGroup, pending[j]);
        }
      }
    }
  }

  void finish_row(int64_t b, int64_t h, int64_t i) {
    const float sum = reduce_add(load(sum_ + i * kLanes));
    const Floats inverse = splat(1.0f / sum);
    Element* out = head_row<Element>(args_.out, b, h, begin_ + i);
    for (int c = 0; c < kDim; c += kLanes) store(out + c, load(out_ + i * kDim + c) * inverse);
    float* lse =
        static_cast<float*>(args_.lse) + (b * shape_.heads + h) * shape_.q_steps + begin_ + i;
    *lse = log_sum(maximum_[i], sum);
  }

  const FlashAttentionForward& args_;
  const FlashAttentionShape& shape_;
  float scale_;
  int64_t begin_ = 0, n_rows_ = 0, block_ = 0;
  float *q_, *out_, *sum_, *k_, *v_, *p_;
  // Of each row: what is taken from its scores (base 2), and the score, unscaled, that raises it.
  float *maximum_, *limit_;
};

}  // namespace wgpt::cpu::WGPT_TARGET
