// flash_attention backward on the CPU. Formula, shapes and determinism: kernels/flash_attention.h.
//
//   for each segment (a packed document; without first_key there is one), for each key block
//                                      k, v packed transposed, k by rows; dk, dv in L2
//     for each query head of the group, query block    q, d_out packed by rows (and by row pairs)
//       for each strip of keys, group of rows    p = exp(scale q k^T - lse)
//                                                ds = p * (d_out v^T - delta)
//       for each group of keys                   dv += p^T d_out, dk += ds^T q
//       for each group of rows                   dq += ds k
//
// The part that the vector kernel (flash_attention_backward_vector.h) and the AMX kernel
// (flash_attention_backward_amx.h) share.
//
// Gradients accumulate in ascending order of query heads and queries (dk, dv) or keys (dq). A
// task is a key head's segments, or a key split of it, with all query heads of its group: all of
// its keys where there are many heads; with few, each split has a dq of its own, and these are
// added in order (five GEMMs). Where that gives too few tasks for the threads, a task is first a
// key block (dk, dv) and then a chunk of queries of a head (dq): seven GEMMs. All add the same
// numbers in the same order, and the number of splits does not depend on the threads, so the bits
// are the same. Key and query blocks begin where their segment begins.
#pragma once

#include <float.h>
#include <math.h>

#include "kernels/cpu/attention/scores.h"

namespace wgpt::cpu::WGPT_TARGET {

// Above it a float32 lse loses digits that p would show: 2^-18 of it at 64.
constexpr float kLargeLse = 64.0f;

// A task of a head: segments, a key split, a key block, or a chunk of queries. Derived has, for the current query block
// and key block, score<kDkDv>(), clear_scores<kDkDv>(strip, row), add_key_gradients() and
// add_query_gradients(dq); for the key block write_key_gradients(); and pack_over_queries().
//
// Suffix _over_queries_: the operand of a GEMM whose k loop runs over queries (dv, dk); without it over
// channels, or over keys (ds_).
template <typename Derived, typename Element, int kDim, typename Dot, int kKeys, int kQueries>
class GradientTask {
 public:
  static constexpr int kGradientKeys = kKeys, kGradientQueries = kQueries;
  static constexpr int kPer = Dot::kPerUnit, kTerms = Dot::kTerms;
  static constexpr int kRowGroup = Dot::kRows;
  static constexpr int kUnits = kDim / kPer;
  static constexpr int kOutVectors = out_vectors<Dot>(kDim);
  // Step of a k loop over keys or queries.
  static constexpr int kKStep = Dot::kIsAmx ? 32 : kPer;
  static constexpr int kPieceStep = kKStep > kLanes ? kKStep : kLanes;  // of pieces
  static constexpr int kPairStride =
      kTerms > 1 ? kLanes : 1;  // between the two keys of a pair in ds

  // Of query head h; what runs over keys serves the whole group of heads that h is in.
  // With fp32_fallback, rows that are finite already are left as they are.
  GradientTask(const FlashAttentionBackward& args, int64_t b, int64_t h, bool fp32_fallback)
      : args_(args),
        shape_(args.shape),
        mask_(args.shape, args.first_key, b),
        b_(b),
        kv_h_(h / args.shape.group),
        fp32_fallback_(fp32_fallback),
        transform_(args.shape, args.bias, b, h),
        score_scale_(transform_.is_active() ? 1.0f : static_cast<float>(args.shape.scale)),
        segment_(segment_of(mask_, 0)) {
    select_head(h);
  }

  // Of queries [begin, end): delta, and how their scores become p.
  bool prepare_rows(int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Dot::Scope scope;
    reserve();
    for_segments(begin, end, [&] {
      write_row_facts(max_of(begin, segment_.queries.begin), min_of(end, segment_.queries.end));
    });
    return true;
  }

  // Key splits of a segment of n_keys in every key head: enough for eight tasks in all.
  static int64_t n_key_splits(const FlashAttentionShape& shape, int64_t n_keys) {
    const int64_t n_heads = max_of<int64_t>(1, shape.batch * shape.kv_heads());
    const int64_t n_blocks = ceil_div(n_keys, kGradientKeys);
    return max_of<int64_t>(1, min_of(ceil_div(8, n_heads), n_blocks / 2));
  }

  static int64_t dq_floats(int64_t n_rows) { return round_up(n_rows, kGradientQueries) * kDim; }

  // Each run_ and add_ returns whether all gradients that it wrote are finite, where Dot splits into terms;
  // else true.
  // The segments whose first query lies in [begin, end).
  bool run_segments(int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Dot::Scope scope;
    reserve();
    if (begin == 0) clear_unseen_keys(0, shape_.kv_steps);
    for_segments(begin, end, [&] {
      const Range& rows = segment_.queries;
      if (rows.begin < begin) return;
      for_group([&](int64_t) { write_row_facts(rows.begin, rows.end); });
      const float* dq = add_over_splits(
          rows, segment_.keys, shape_.group,
          [&](int64_t key_block, float* sums) { run_key_block<true>(key_block, sums); });
      for_group([&](int64_t g) {
        write_dq(rows.begin, rows.end, dq + g * dq_floats(rows.end - rows.begin));
      });
    });
    return all_finite_;
  }

  // Where there is one segment: the split's share goes to dq, dq_floats(q_steps) for each head.
  bool run_key_split(int64_t key_split, int64_t n_key_splits, float* dq) {
    [[maybe_unused]] const typename Dot::Scope scope;
    reserve();
    clear_floats(dq, shape_.group * dq_floats(shape_.q_steps));
    for (int64_t key_block = 0; key_block < shape_.kv_steps; key_block += kGradientKeys) {
      if (is_in_split(key_block, key_split, n_key_splits)) run_key_block<true>(key_block, dq);
    }
    return all_finite_;
  }

  // Queries [begin, end) of dq, summed over all key splits, the first of which is at dq.
  bool add_key_splits(int64_t begin, int64_t end, int64_t n_key_splits, const float* dq) {
    float* sum = reserve_dq(end - begin);
    clear_floats(sum, (end - begin) * kDim);
    for (int64_t key_split = 0; key_split < n_key_splits; ++key_split)
      add_floats(dq + key_split * shape_.group * dq_floats(shape_.q_steps) + begin * kDim,
                 (end - begin) * kDim, sum);
    write_dq(begin, end, sum);
    return all_finite_;
  }

  // dk and dv of the key blocks that begin in [begin, end).
  bool run_keys(int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Dot::Scope scope;
    reserve();
    clear_unseen_keys(begin, end);
    const auto query_at = [&](int64_t key) {
      return min_of(shape_.q_steps - 1, max_of<int64_t>(0, key - mask_.position(0)));
    };
    for_segments(query_at(begin), query_at(end - 1) + 1, [&] {
      const Range blocks = blocks_that_begin_in(segment_.keys, kGradientKeys, begin, end);
      for (int64_t key_block = blocks.begin; key_block < blocks.end; key_block += kGradientKeys)
        run_key_block<false>(key_block, nullptr);
    });
    return all_finite_;
  }

  // dq of the query blocks that begin in [begin, end).
  bool run_queries(int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Dot::Scope scope;
    reserve();
    for_segments(begin, end, [&] {
      const Range rows = blocks_that_begin_in(segment_.queries, kGradientQueries, begin, end);
      if (rows.begin >= rows.end) return;
      const Range keys =
          rows_visibility(mask_, rows.begin, rows.end - rows.begin, rows.end - 1).any;
      const float* dq = add_over_splits(rows, keys, 1, [&](int64_t key_block, float* sums) {
        pack_key_block(key_block);
        for (int64_t query_block = rows.begin; query_block < rows.end;
             query_block += kGradientQueries)
          run_query_block<false, true>(query_block, sums + (query_block - rows.begin) * kDim);
      });
      write_dq(rows.begin, rows.end, dq);
    });
    return all_finite_;
  }

 protected:
  // Floats of one term.
  static constexpr int64_t kKeyFloats = int64_t{kGradientKeys} * kUnits,
                           kQueryFloats = int64_t{kGradientQueries} * kUnits,
                           kScoreFloats = int64_t{kGradientQueries} * kGradientKeys / kPer;

  Derived* derived() { return static_cast<Derived*>(this); }

  void select_head(int64_t h) {
    h_ = h;
    transform_ = ScoreTransform(shape_, args_.bias, b_, h);
    const int64_t offset = (b_ * shape_.heads + h) * shape_.q_steps;
    lse_ = static_cast<const float*>(args_.lse) + offset;
    d_lse_ = args_.d_lse == nullptr ? nullptr : static_cast<const float*>(args_.d_lse) + offset;
    float* const facts = static_cast<float*>(args_.workspace) + offset;
    const int64_t n = shape_.batch * shape_.heads * shape_.q_steps;
    facts_ = {facts, facts + n, facts + 2 * n, facts + 3 * n};
  }

  // Calls body(g) with query head g of the group selected.
  template <typename Body>
  WGPT_INLINE void for_group(Body&& body) {
    for (int64_t g = 0; g < shape_.group; ++g) {
      select_head(kv_h_ * shape_.group + g);
      body(g);
    }
  }

  void reserve() {
    const int64_t n_floats = kTerms * (3 * kKeyFloats + 5 * kQueryFloats + 3 * kScoreFloats) +
                             2 * kGradientKeys * kDim + 4 * kGradientQueries + 64;
    float* next =
        static_cast<float*>(thread_scratch(static_cast<size_t>(n_floats) * sizeof(float)));
    const auto take = [&](int64_t n) { return next += n, next - n; };
    k_columns_ = take(kTerms * kKeyFloats);
    v_columns_ = take(kTerms * kKeyFloats);
    k_rows_ = take(kTerms * kKeyFloats);
    dk_ = take(kGradientKeys * kDim);
    dv_ = take(kGradientKeys * kDim);
    q_ = take(kTerms * kQueryFloats);
    d_out_ = take(kTerms * kQueryFloats);
    q_over_queries_ = kPer == 1 ? q_ : take(kTerms * kQueryFloats);
    d_out_over_queries_ = kPer == 1 ? d_out_ : take(kTerms * kQueryFloats);
    pairs_ = take(kTerms * kQueryFloats);
    p_over_queries_ = take(kTerms * kScoreFloats);
    ds_over_queries_ = take(kTerms * kScoreFloats);
    ds_ = kPer == 1 ? ds_over_queries_ : take(kTerms * kScoreFloats);
    block_ = {take(kGradientQueries), take(kGradientQueries), take(kGradientQueries),
              take(kGradientQueries)};
  }

  static float* reserve_dq(int64_t n_rows) {
    thread_local Scratch scratch;
    const int64_t n_floats = dq_floats(n_rows);
    return static_cast<float*>(scratch.reserve(static_cast<size_t>(n_floats) * sizeof(float)));
  }

  // Calls body() for every segment that has queries in [begin, end).
  template <typename Body>
  void for_segments(int64_t begin, int64_t end, Body&& body) {
    for (int64_t i = begin; i < end; i = segment_.queries.end) {
      segment_ = segment_of(mask_, i);
      body();
    }
  }

  // From the first to the end of the last of a range's blocks whose beginning lies in [begin, end).
  static Range blocks_that_begin_in(const Range& range, int64_t step, int64_t begin, int64_t end) {
    const auto next = [&](int64_t x) {
      return min_of(range.end, range.begin + round_up(max_of<int64_t>(0, x - range.begin), step));
    };
    return {next(begin), next(end)};
  }

  void write_delta(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Element* out = head_row<Element>(args_.out, b_, h_, i);
      const Element* d_out = head_row<Element>(args_.d_out, b_, h_, i);
      Floats sum = splat(0.0f);
      for (int c = 0; c < kDim; c += kLanes) sum = fma(load(out + c), load(d_out + c), sum);
      facts_.delta[i] = reduce_add(sum) - (d_lse_ == nullptr ? 0.0f : d_lse_[i]);
    }
  }

  // p = 2^(log2 e (scale s - lse) - rest) with the row's own scale and lse. Of most rows these are the call's
  // scale, the forward's lse and no rest. A float32 lse of thousands has no digits left for the logarithm of
  // the sum, and the rounding of out in delta would be multiplied by a key as large: such rows get a lse of
  // two floats, and delta = sum_j p_j d_out v_j, from their scores computed again.
  struct RowFacts {
    float *delta, *scale, *lse, *rest;
  };

  // Queries [begin, end) of the segment.
  void write_row_facts(int64_t begin, int64_t end) {
    write_delta(begin, end);
    for (int64_t query_block = begin; query_block < end; query_block += kGradientQueries) {
      const int64_t block_end = min_of(query_block + kGradientQueries, end);
      bool is_large = false;
      for (int64_t i = query_block; i < block_end; ++i) {
        const bool is_blind = transform_.is_active() && lse_[i] == -INFINITY;  // p = 2^-infinity
        facts_.scale[i] = score_scale_;
        facts_.lse[i] = is_blind ? 0.0f : lse_[i];
        facts_.rest[i] = 0.0f;
        is_large = is_large || is_large_lse(lse_[i]);
      }
      if (is_large) recompute_facts(query_block, block_end);
    }
  }

  static bool is_large_lse(float lse) { return fabsf(lse) > kLargeLse && fabsf(lse) < INFINITY; }

  // Of a query, for the keys of each lane: largest score, sum of p and of p d_out v^T, p being relative to it.
  struct LaneSums {
    alignas(64) float maximum[kLanes], sum[kLanes], weighted[kLanes];
  };

  // The online softmax of queries [begin, end), at most a query block, lane by lane. A score's distance to the
  // maximum is taken before it is scaled, and so does not round where it matters.
  __attribute__((noinline)) void recompute_facts(int64_t begin, int64_t end) {
    alignas(64) float scores[kRowGroup * kStrip], dp[kRowGroup * kStrip];
    LaneSums sums[kGradientQueries];
    for (LaneSums& row : sums) {
      store(row.maximum, splat(-FLT_MAX));
      store(row.sum, splat(0.0f));
      store(row.weighted, splat(0.0f));
    }
    const auto n_rows = static_cast<int>(end - begin);
    pack_rows<Dot, kDim>(head_rows<Element>(args_.q, b_, h_, begin), n_rows, kGradientQueries, q_);
    pack_rows<Dot, kDim>(head_rows<Element>(args_.d_out, b_, h_, begin), n_rows, kGradientQueries,
                         d_out_);
    const Range keys = rows_visibility(mask_, begin, n_rows, end - 1).any;
    const int64_t origin = segment_.keys.begin;  // a lane holds the same keys, whatever the block
    for (int64_t key_block = origin + (keys.begin - origin) / kGradientKeys * kGradientKeys;
         key_block < keys.end; key_block += kGradientKeys) {
      const int64_t n_keys = min_of<int64_t>(kGradientKeys, keys.end - key_block);
      const int64_t n_packed = round_up(n_keys, kStrip);
      pack_columns<Dot, kDim>(head_rows<Element>(args_.k, b_, kv_h_, key_block), n_keys, n_packed,
                              k_columns_, kKeyFloats);
      pack_columns<Dot, kDim>(head_rows<Element>(args_.v, b_, kv_h_, key_block), n_keys, n_packed,
                              v_columns_, kKeyFloats);
      for (int strip = 0; strip < n_keys; strip += kStrip) {
        for (int row = 0; row < n_rows; row += kRowGroup) {
          derived()->score_strip(q_, k_columns_, strip, row, scores);
          derived()->score_strip(d_out_, v_columns_, strip, row, dp);
          for (int r = row; r < min_of(row + kRowGroup, n_rows); ++r) {
            const int at = (r - row) * kStrip;
            add_to_lanes(begin + r, key_block + strip, scores + at, dp + at, sums[r]);
          }
        }
      }
    }
    for (int r = 0; r < n_rows; ++r) {
      if (is_large_lse(lse_[begin + r])) write_facts(begin + r, sums[r]);
    }
  }

  // A strip of keys, from `key` on, of query i.
  void add_to_lanes(int64_t i, int64_t key, const float* scores, const float* dp, LaneSums& sums) {
    const Floats factor = splat(score_scale_ * kLog2E);
    Floats s[kVectors];
    WGPT_UNROLL for (int v = 0; v < kVectors; ++v) s[v] = load(scores + v * kLanes);
    if (transform_.is_active()) transform_.apply(i, key, s);
    mask_keys(mask_, i, key, splat(-INFINITY), s);
    Floats top = load(sums.maximum), sum = load(sums.sum), weighted = load(sums.weighted);
    WGPT_UNROLL for (int v = 0; v < kVectors; ++v) {
      const Floats now = max_or_second(s[v], top), shrink = exp2_of<true>((top - now) * factor);
      const Floats p = exp2_of<true>((s[v] - now) * factor);
      sum = fma(sum, shrink, p);
      // A key that is not seen may hold anything: no 0 times infinity.
      const Floats seen_dp = choose_above(p, splat(0.0f), load(dp + v * kLanes), splat(0.0f));
      weighted = fma(weighted, shrink, p * seen_dp);
      top = now;
    }
    store(sums.maximum, top);
    store(sums.sum, sum);
    store(sums.weighted, weighted);
  }

  void write_facts(int64_t i, const LaneSums& sums) {
    const float scale = score_scale_, top = reduce_max(load(sums.maximum));
    double sum = 0.0, weighted = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const double factor = exp2((double{sums.maximum[lane]} - top) * scale * double{kLog2E});
      sum += sums.sum[lane] * factor;
      weighted += sums.weighted[lane] * factor;
    }
    const double scaled = double{top} * scale;
    const bool is_huge = fabs(scaled) > double{kHugeScore};
    const float of_row = is_huge ? power_below(scale) : scale;
    const float lse = static_cast<float>(is_huge ? double{top} * of_row : scaled);
    const double residue = is_huge ? 0.0 : scaled - double{lse};
    facts_.scale[i] = of_row;
    facts_.lse[i] = lse;
    facts_.rest[i] = static_cast<float>(residue * double{kLog2E} + log2(sum));
    facts_.delta[i] = static_cast<float>(weighted / sum) - (d_lse_ == nullptr ? 0.0f : d_lse_[i]);
  }

  // Gradients of keys in [begin, end) in front of all that is seen.
  void clear_unseen_keys(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < min_of(end, segment_of(mask_, 0).keys.begin); ++j) {
      for (int c = 0; c < kDim; c += kLanes) {
        store(head_row<Element>(args_.dk, b_, kv_h_, j) + c, splat(0.0f));
        store(head_row<Element>(args_.dv, b_, kv_h_, j) + c, splat(0.0f));
      }
    }
  }

  // dq of consecutive rows of the segment, which see `keys`, for n_heads, each in dq_floats():
  // body(key_block, dq) adds the share of one key block to the rows at dq. Key splits are summed
  // each by itself, then added in order.
  template <typename Body>
  const float* add_over_splits(const Range& rows, const Range& keys, int64_t n_heads, Body&& body) {
    const Range& all = segment_.keys;
    const int64_t first = all.begin + (keys.begin - all.begin) / kGradientKeys * kGradientKeys;
    const int64_t n_rows = n_heads * round_up(rows.end - rows.begin, kGradientQueries);
    const int64_t n_floats = n_rows * kDim;
    const int64_t n_splits = fp32_fallback_ ? 1 : n_key_splits(shape_, all.end - all.begin);
    float* dq = reserve_dq(n_splits == 1 ? n_rows : 2 * n_rows);
    float* of_split = n_splits == 1 ? dq : dq + n_floats;
    if (n_splits > 1) clear_floats(dq, n_floats);
    for (int64_t key_split = 0; key_split < n_splits; ++key_split) {
      clear_floats(of_split, n_floats);
      for (int64_t key_block = first; key_block < keys.end; key_block += kGradientKeys) {
        if (is_in_split(key_block, key_split, n_splits)) body(key_block, of_split);
      }
      if (n_splits > 1) add_floats(of_split, n_floats, dq);
    }
    return dq;
  }

  // Zig-zag assignment of key blocks (causal load balance): later blocks are seen by fewer queries.
  bool is_in_split(int64_t key_block, int64_t key_split, int64_t n_key_splits) const {
    const int64_t step = (key_block - segment_.keys.begin) / kGradientKeys % (2 * n_key_splits);
    return key_split == (step < n_key_splits ? step : 2 * n_key_splits - 1 - step);
  }

  static void add_floats(const float* x, int64_t n, float* sum) {
    for (int64_t i = 0; i < n; i += kLanes) store(sum + i, load(sum + i) + load(x + i));
  }

  void pack_key_block(int64_t key_block) {
    key_block_ = key_block;
    n_keys_ = min_of<int64_t>(kGradientKeys, segment_.keys.end - key_block);
    const int64_t n_packed = min_of<int64_t>(kGradientKeys, round_up(n_keys_, kStrip));
    const Rows<Element> k = head_rows<Element>(args_.k, b_, kv_h_, key_block);
    pack_columns<Dot, kDim>(k, n_keys_, n_packed, k_columns_, kKeyFloats);
    pack_columns<Dot, kDim>(head_rows<Element>(args_.v, b_, kv_h_, key_block), n_keys_, n_packed,
                            v_columns_, kKeyFloats);
    pack_row_pairs<Dot, kDim, kPairStride>(k, n_keys_, n_packed, k_rows_, kKeyFloats);
  }

  // dk and dv of a key block, and its share of the segment's dq, that of every head of the group.
  template <bool kDq>
  void run_key_block(int64_t key_block, float* dq) {
    pack_key_block(key_block);
    clear_floats(dk_, 2 * kGradientKeys * kDim);
    const int64_t first = segment_.queries.begin, last = segment_.queries.end;
    const int64_t begin = seeing_queries(mask_, key_block, first, last).begin,
                  end = seeing_queries(mask_, key_block + n_keys_ - 1, first, last).end;
    for_group([&](int64_t g) {
      float* of_head = kDq ? dq + g * dq_floats(last - first) : nullptr;
      for (int64_t row = (begin - first) / kGradientQueries * kGradientQueries; first + row < end;
           row += kGradientQueries)
        run_query_block<true, kDq>(first + row, kDq ? of_head + row * kDim : nullptr);
    });
    derived()->write_key_gradients();
  }

  template <bool kDkDv, bool kDq>
  void run_query_block(int64_t query_block, float* dq) {
    const int64_t end = min_of(query_block + kGradientQueries, segment_.queries.end);
    const Range keys = rows_visibility(mask_, query_block, end - query_block, end - 1).any;
    if (keys.end <= key_block_ || keys.begin >= key_block_ + n_keys_) return;
    query_block_ = query_block;
    n_rows_ = end - query_block;
    const Rows<Element> q = head_rows<Element>(args_.q, b_, h_, query_block);
    const Rows<Element> d_out = head_rows<Element>(args_.d_out, b_, h_, query_block);
    pack_rows<Dot, kDim>(q, n_rows_, kGradientQueries, q_);
    pack_rows<Dot, kDim>(d_out, n_rows_, kGradientQueries, d_out_);
    if constexpr (kDkDv && kPer > 1) {
      derived()->pack_over_queries(q, q_over_queries_);
      derived()->pack_over_queries(d_out, d_out_over_queries_);
    }
    const int64_t n_next =
        max_of<int64_t>(0, min_of<int64_t>(kGradientQueries, shape_.q_steps - end));
    prefetch_rows<kDim>(head_rows<Element>(args_.q, b_, h_, end), n_next);
    prefetch_rows<kDim>(head_rows<Element>(args_.d_out, b_, h_, end), n_next);
    for (int64_t i = 0; i < kGradientQueries; ++i) {
      const bool is_row = i < n_rows_;
      block_.delta[i] = is_row ? facts_.delta[query_block + i] : 0.0f;
      block_.scale[i] = is_row ? facts_.scale[query_block + i] : 0.0f;
      block_.lse[i] = is_row ? facts_.lse[query_block + i] : INFINITY;
      block_.rest[i] = is_row ? facts_.rest[query_block + i] : 0.0f;
    }
    // Rows past the last have p = 0, and fill up the k loop over rows.
    n_scored_ = static_cast<int>(round_up(n_rows_, Dot::kIsAmx ? kKStep : 1));
    for (int row = 0; row < n_scored_; row += kRowGroup)
      visible_[row / kRowGroup] = rows_visibility(mask_, query_block + row, kRowGroup, end - 1);
    derived()->template score<kDkDv>();
    if constexpr (kDkDv) derived()->add_key_gradients();
    if constexpr (kDq) derived()->add_query_gradients(dq);
  }

  // Calls body(piece, row) for every strip of the key block and group of rows. Where no row of the group
  // sees a key, p and ds are 0.
  template <bool kDkDv, typename Body>
  WGPT_INLINE void for_pieces(Body&& body) {
    const auto n_strips_end = static_cast<int>(round_up(n_keys_, kStrip));
    for (int strip = 0; strip < n_strips_end; strip += kStrip) {
      for (int row = 0; row < n_scored_; row += kRowGroup) {
        Piece piece = piece_of<kPieceStep>(visible_[row / kRowGroup], key_block_, strip);
        piece.is_masked = piece.is_masked || row + kRowGroup > n_rows_ || transform_.is_active();
        if (piece.n_vectors < kVectors) derived()->template clear_scores<kDkDv>(strip, row);
        if (piece.n_vectors > 0) body(piece, row);
      }
    }
  }

  // p of row `row` of the query block.
  template <int kWidth>
  WGPT_INLINE void exp_of_scores(int row, const Floats (&s)[kWidth], Floats (&p)[kWidth]) const {
    const Floats scale = splat(block_.scale[row]), lse = splat(-block_.lse[row]);
    const Floats rest = splat(-block_.rest[row]);
    WGPT_UNROLL for (int v = 0; v < kWidth; ++v) p[v] =
        exp2_of<Dot::kExact>(fma(fma_unrounded(s[v], scale, lse), splat(kLog2E), rest));
  }

  // q k^T of row `row` of the query block -> scores, with their slopes; where there is nothing to do as they are.
  template <int kWidth>
  WGPT_INLINE void transform(const Piece& piece, int row, Floats (&s)[kWidth],
                             Floats (&slope)[kWidth]) const {
    const int64_t i = query_block_ + min_of<int64_t>(row, n_rows_ - 1);
    if (transform_.is_active()) transform_.apply(i, key_block_ + piece.key, s, slope);
  }

  template <int kWidth>
  WGPT_INLINE void mask(const Piece& piece, int row, Floats (&x)[kWidth]) {
    if (row < n_rows_)
      return mask_keys(mask_, query_block_ + row, key_block_ + piece.key, splat(0.0f), x);
    for (Floats& of_keys : x) of_keys = splat(0.0f);  // else a key at infinity would make it NaN
  }

  // Queries of the query block that see some of n keys from j on, in units (pairs if kPer is 2).
  Range seeing_units(int64_t j, int64_t n) const {
    const int64_t last = min_of<int64_t>(j + n, n_keys_) - 1;
    const auto queries_of = [&](int64_t key) {
      return seeing_queries(mask_, key_block_ + key, query_block_, query_block_ + n_rows_);
    };
    const int64_t begin = queries_of(j).begin - query_block_;
    const int64_t end = queries_of(last).end - query_block_;
    return {max_of<int64_t>(0, begin) / kKStep * kKStep / kPer,
            round_up(min_of(n_rows_, end), kKStep) / kPer};
  }

  // Keys [slab, slab + n) of the key block that some of the groups from row to last see, in units.
  Range seen_units(int row, int last, int64_t slab, int64_t n) const {
    const int64_t begin = visible_[row / kRowGroup].any.begin - key_block_;
    const int64_t end = visible_[last / kRowGroup].any.end - key_block_;
    return {max_of(slab, begin) / kKStep * kKStep / kPer,
            round_up(min_of(min_of(slab + n, n_keys_), end), kKStep) / kPer};
  }

  void write_row(const float* sums, float factor, Element* out) {
    if (fp32_fallback_ && are_finite(out, kDim)) return;
    for (int c = 0; c < kDim; c += kLanes) store(out + c, load(sums + c) * splat(factor));
    if constexpr (kTerms > 1) all_finite_ = all_finite_ && are_finite(out, kDim);
  }

  void write_dq(int64_t begin, int64_t end, const float* dq) {
    for (int64_t i = begin; i < end; ++i) {
      write_row(dq + (i - begin) * kDim, static_cast<float>(shape_.scale),
                head_row<Element>(args_.dq, b_, h_, i));
    }
  }

  const FlashAttentionBackward& args_;
  const FlashAttentionShape& shape_;
  const Mask mask_;
  const int64_t b_, kv_h_;
  const bool fp32_fallback_;
  ScoreTransform transform_;  // of query head h_
  const float score_scale_;   // of what it gives
  Segment segment_;
  bool all_finite_ = true;
  int64_t h_;  // the query head, with its rows of lse_, d_lse_ and facts_
  const float *lse_, *d_lse_;
  RowFacts facts_, block_;  // of all rows; of those of the query block
  int64_t key_block_ = 0, n_keys_ = 0, query_block_ = 0, n_rows_ = 0;
  int n_scored_ = 0;
  Visibility visible_[(kGradientQueries + kRowGroup - 1) / kRowGroup];
  float *k_columns_, *v_columns_, *k_rows_, *dk_, *dv_, *q_, *d_out_, *q_over_queries_,
      *d_out_over_queries_;
  float *p_over_queries_, *ds_over_queries_, *ds_;
  float* pairs_;  // row pairs before their transpose
};

}  // namespace wgpt::cpu::WGPT_TARGET
