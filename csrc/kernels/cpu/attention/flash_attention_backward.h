// flash_attention backward on the CPU. Formula, shapes and determinism: kernels/flash_attention.h.
//
//   for each key block                 k, v packed transposed, k by rows; dk, dv in L2
//     for each query block             q, d_out packed by rows (and by row pairs)
//       for each strip of keys, group of rows    p = exp(scale q k^T - lse)
//                                                ds = p * (d_out v^T - delta)
//       for each group of keys                   dv += p^T d_out, dk += ds^T q
//       for each group of rows                   dq += ds k
//
// The part that the vector kernel (flash_attention_backward_vector.h) and the AMX kernel
// (flash_attention_backward_amx.h) share.
//
// Gradients accumulate in ascending order of queries (dk, dv) or keys (dq). A task is a key split of a
// head: all of its keys where there are many heads; with few, each split has a dq of its own, and these
// are added in order (five GEMMs). Where that gives too few tasks for the threads, a task is first a key
// block (dk, dv) and then a chunk of queries (dq): seven GEMMs. Both add the same numbers in the same order,
// and the number of splits does not depend on the threads, so the bits are the same.
#pragma once

#include <math.h>

#include "kernels/cpu/attention/visibility.h"

namespace wgpt::cpu::WGPT_TARGET {

// A key split of a head, or a key block, or a chunk of queries. Derived has, for the current query block
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
  static constexpr int kOutVectors = kDim / kLanes < kVectors ? kDim / kLanes : kVectors;
  // Step of a k loop over keys or queries.
  static constexpr int kKStep = Dot::kIsAmx ? 32 : kPer;
  static constexpr int kPieceStep = kKStep > kLanes ? kKStep : kLanes;  // of pieces
  static constexpr int kPairStride =
      kTerms > 1 ? kLanes : 1;  // between the two keys of a pair in ds

  // With fp32_fallback, rows that are finite already are left as they are.
  GradientTask(const FlashAttentionBackward& args, int64_t b, int64_t h, bool fp32_fallback)
      : args_(args), shape_(args.shape), b_(b), h_(h), fp32_fallback_(fp32_fallback) {
    const int64_t offset = (b * shape_.heads + h) * shape_.q_steps;
    lse_ = static_cast<const float*>(args.lse) + offset;
    d_lse_ = args.d_lse == nullptr ? nullptr : static_cast<const float*>(args.d_lse) + offset;
    delta_ = static_cast<float*>(args.workspace) + offset;
  }

  bool write_delta(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Element* out = head_row<Element>(args_.out, b_, h_, i);
      const Element* d_out = head_row<Element>(args_.d_out, b_, h_, i);
      Floats sum = splat(0.0f);
      for (int c = 0; c < kDim; c += kLanes) sum = fma(load(out + c), load(d_out + c), sum);
      delta_[i] = reduce_add(sum) - (d_lse_ == nullptr ? 0.0f : d_lse_[i]);
    }
    return true;
  }

  // Key splits of every head: enough for eight tasks in all.
  static int64_t n_key_splits(const FlashAttentionShape& shape) {
    const int64_t n_heads = max_of<int64_t>(1, shape.batch * shape.heads);
    const int64_t n_blocks = ceil_div(shape.kv_steps, kGradientKeys);
    return max_of<int64_t>(1, min_of(ceil_div(8, n_heads), n_blocks / 2));
  }

  static int64_t dq_floats(int64_t n_rows) { return round_up(n_rows, kGradientQueries) * kDim; }

  // Each run_ and add_ returns whether all gradients that it wrote are finite, where Dot splits into terms;
  // else true.
  bool run_head() {
    float* dq = reserve_dq(shape_.q_steps);
    run_key_split(0, 1, dq);
    write_dq(0, shape_.q_steps, dq);
    return all_finite_;
  }

  // The split's share of dq goes to dq_floats(q_steps) floats at dq.
  bool run_key_split(int64_t key_split, int64_t n_key_splits, float* dq) {
    [[maybe_unused]] const typename Dot::Scope scope;
    reserve();
    clear_floats(dq, dq_floats(shape_.q_steps));
    for (int64_t key_block = 0; key_block < shape_.kv_steps; key_block += kGradientKeys) {
      if (is_in_split(key_block, key_split, n_key_splits)) run_key_block<true>(key_block, dq);
    }
    return all_finite_;
  }

  // Queries [begin, end) of dq, summed over all key splits, which lie side by side.
  bool add_key_splits(int64_t begin, int64_t end, int64_t n_key_splits, const float* dq) {
    float* sum = reserve_dq(end - begin);
    clear_floats(sum, (end - begin) * kDim);
    for (int64_t key_split = 0; key_split < n_key_splits; ++key_split)
      add_floats(dq + key_split * dq_floats(shape_.q_steps) + begin * kDim, (end - begin) * kDim,
                 sum);
    write_dq(begin, end, sum);
    return all_finite_;
  }

  bool run_keys(int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Dot::Scope scope;
    reserve();
    for (int64_t key_block = begin; key_block < min_of(end, shape_.kv_steps);
         key_block += kGradientKeys)
      run_key_block<false>(key_block, nullptr);
    return all_finite_;
  }

  bool run_queries(int64_t begin, int64_t end, int64_t n_key_splits) {
    [[maybe_unused]] const typename Dot::Scope scope;
    reserve();
    const int64_t n_floats = dq_floats(end - begin);
    float* dq = reserve_dq(2 * round_up(end - begin, kGradientQueries));
    float* of_split = n_key_splits == 1 ? dq : dq + n_floats;
    if (n_key_splits > 1) clear_floats(dq, n_floats);
    const Range keys = rows_visibility(shape_, begin, end - begin).any;
    for (int64_t key_split = 0; key_split < n_key_splits; ++key_split) {
      clear_floats(of_split, n_floats);
      for (int64_t key_block = keys.begin / kGradientKeys * kGradientKeys; key_block < keys.end;
           key_block += kGradientKeys) {
        if (!is_in_split(key_block, key_split, n_key_splits)) continue;
        pack_key_block(key_block);
        for (int64_t query_block = begin; query_block < end; query_block += kGradientQueries)
          run_query_block<false, true>(query_block, of_split + (query_block - begin) * kDim);
      }
      if (n_key_splits > 1) add_floats(of_split, n_floats, dq);
    }
    write_dq(begin, end, dq);
    return all_finite_;
  }

 protected:
  // Floats of one term.
  static constexpr int64_t kKeyFloats = int64_t{kGradientKeys} * kUnits,
                           kQueryFloats = int64_t{kGradientQueries} * kUnits,
                           kScoreFloats = int64_t{kGradientQueries} * kGradientKeys / kPer;

  Derived* derived() { return static_cast<Derived*>(this); }

  void reserve() {
    const int64_t n_floats = kTerms * (3 * kKeyFloats + 5 * kQueryFloats + 3 * kScoreFloats) +
                             2 * kGradientKeys * kDim + 2 * kGradientQueries + 64;
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
    block_lse_ = take(kGradientQueries);
    block_delta_ = take(kGradientQueries);
  }

  static float* reserve_dq(int64_t n_rows) {
    thread_local Scratch scratch;
    const int64_t n_floats = dq_floats(n_rows);
    return static_cast<float*>(scratch.reserve(static_cast<size_t>(n_floats) * sizeof(float)));
  }

  // Zig-zag assignment of key blocks (causal load balance): later blocks are seen by fewer queries.
  static bool is_in_split(int64_t key_block, int64_t key_split, int64_t n_key_splits) {
    const int64_t step = key_block / kGradientKeys % (2 * n_key_splits);
    return key_split == (step < n_key_splits ? step : 2 * n_key_splits - 1 - step);
  }

  static void add_floats(const float* x, int64_t n, float* sum) {
    for (int64_t i = 0; i < n; i += kLanes) store(sum + i, load(sum + i) + load(x + i));
  }

  void pack_key_block(int64_t key_block) {
    key_block_ = key_block;
    n_keys_ = min_of<int64_t>(kGradientKeys, shape_.kv_steps - key_block);
    const int64_t n_packed = min_of<int64_t>(kGradientKeys, round_up(n_keys_, kStrip));
    const Rows<Element> k = head_rows<Element>(args_.k, b_, h_, key_block);
    pack_columns<Dot, kDim>(k, n_keys_, n_packed, k_columns_, kKeyFloats);
    pack_columns<Dot, kDim>(head_rows<Element>(args_.v, b_, h_, key_block), n_keys_, n_packed,
                            v_columns_, kKeyFloats);
    pack_row_pairs<Dot, kDim, kPairStride>(k, n_keys_, n_packed, k_rows_, kKeyFloats);
  }

  // dk and dv of a key block, and its share of dq.
  template <bool kDq>
  void run_key_block(int64_t key_block, float* dq) {
    pack_key_block(key_block);
    clear_floats(dk_, 2 * kGradientKeys * kDim);
    const int64_t begin = seeing_queries(shape_, key_block).begin,
                  end = seeing_queries(shape_, key_block + n_keys_ - 1).end;
    for (int64_t query_block = begin / kGradientQueries * kGradientQueries; query_block < end;
         query_block += kGradientQueries) {
      run_query_block<true, kDq>(query_block, kDq ? dq + query_block * kDim : nullptr);
    }
    derived()->write_key_gradients();
  }

  template <bool kDkDv, bool kDq>
  void run_query_block(int64_t query_block, float* dq) {
    const int64_t end = min_of(query_block + kGradientQueries, shape_.q_steps);
    const Range keys = rows_visibility(shape_, query_block, end - query_block).any;
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
      block_lse_[i] = i < n_rows_ ? lse_[query_block + i] : INFINITY;
      block_delta_[i] = i < n_rows_ ? delta_[query_block + i] : 0.0f;
    }
    // Rows past the last have p = 0, and fill up the k loop over rows.
    n_scored_ = static_cast<int>(round_up(n_rows_, Dot::kIsAmx ? kKStep : 1));
    for (int row = 0; row < n_scored_; row += kRowGroup)
      visible_[row / kRowGroup] = rows_visibility(shape_, query_block + row, kRowGroup);
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
        piece.is_masked = piece.is_masked || row + kRowGroup > n_rows_;
        if (piece.n_vectors < kVectors) derived()->template clear_scores<kDkDv>(strip, row);
        if (piece.n_vectors > 0) body(piece, row);
      }
    }
  }

  template <int kWidth>
  WGPT_INLINE void mask(const Piece& piece, int row, Floats (&x)[kWidth]) {
    if (row < n_rows_)
      return mask_keys(shape_, query_block_ + row, key_block_ + piece.key, splat(0.0f), x);
    for (Floats& of_keys : x) of_keys = splat(0.0f);  // else a key at infinity would make it NaN
  }

  // Queries of the query block that see some of n keys from j on, in units (pairs if kPer is 2).
  Range seeing_units(int64_t j, int64_t n) const {
    const int64_t last = min_of<int64_t>(j + n, n_keys_) - 1;
    const int64_t begin = seeing_queries(shape_, key_block_ + j).begin - query_block_;
    const int64_t end = seeing_queries(shape_, key_block_ + last).end - query_block_;
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
  const int64_t b_, h_;
  const bool fp32_fallback_;
  bool all_finite_ = true;
  const float *lse_, *d_lse_;
  float* delta_;
  int64_t key_block_ = 0, n_keys_ = 0, query_block_ = 0, n_rows_ = 0;
  int n_scored_ = 0;
  Visibility visible_[(kGradientQueries + kRowGroup - 1) / kRowGroup];
  float *k_columns_, *v_columns_, *k_rows_, *dk_, *dv_, *q_, *d_out_, *q_over_queries_,
      *d_out_over_queries_;
  float *p_over_queries_, *ds_over_queries_, *ds_, *block_lse_, *block_delta_;
  float* pairs_;  // row pairs before their transpose
};

}  // namespace wgpt::cpu::WGPT_TARGET
