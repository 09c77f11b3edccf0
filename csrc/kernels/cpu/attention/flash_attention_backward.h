// flash_attention backward on the CPU. Formula, shapes and determinism: kernels/flash_attention.h.
//
//   for each block of keys             k, v packed transposed, k by rows; dk, dv in L2
//     for each tile of queries         q, d_out packed by rows (and by row pairs)
//       for each strip of keys, group of rows    p = exp(scale q k^T - lse)
//                                                ds = p * (d_out v^T - delta)
//       for each group of keys                   dv += p^T d_out, dk += ds^T q
//       for each group of rows                   dq += ds k
//
// Here is what both ways of making a tile share; they are in flash_attention_backward_vector.h and
// flash_attention_backward_amx.h.
//
// Products are added in ascending order of queries (dk, dv) or keys (dq). A task is a part of the keys of a
// head, which is all of them where there are many heads; with few, parts have a dq each, and these are
// added in order (five products). Or, where threads could use more tasks than that, one is first a block
// of keys of a head (dk, dv) and then a chunk of its queries (dq): seven products. Both make the same sums
// in the same order, and parts depend on no threads, so they give the same bits.
#pragma once

#include <math.h>

#include "kernels/cpu/attention/visibility.h"

namespace wgpt::cpu::WGPT_TARGET {

// A part of a head, or a block of its keys, or a chunk of its queries. Derived has, for the current tile and
// block, score<kDkDv>(), clear_scores<kDkDv>(strip, row), add_key_gradients() and
// add_query_gradients(dq), and for the block write_key_gradients(), beside packing of its own.
template <typename Derived, typename Element, int kDim, typename Dot, int kKeys, int kQueries>
class GradientTask {
 public:
  static constexpr int kGradientKeys = kKeys, kGradientQueries = kQueries;
  static constexpr int kPer = Dot::kPerUnit, kPlanes = Dot::kPlanes;
  static constexpr int kRowGroup = Dot::kRows;
  static constexpr int kUnits = kDim / kPer;
  static constexpr int kOutVectors = kDim / kLanes < kVectors ? kDim / kLanes : kVectors;
  // Keys, or queries, that a product over them takes at once.
  static constexpr int kAtOnce = Dot::kIsMatrix ? 32 : kPer;
  static constexpr int kStep = kAtOnce > kLanes ? kAtOnce : kLanes;  // of pieces
  static constexpr int kApart = kPlanes > 1 ? kLanes : 1;  // keys of a pair in ds, from each other

  // With only_repair, rows that are finite already are left as they are.
  GradientTask(const FlashAttentionBackward& args, int64_t b, int64_t h, bool only_repair)
      : args_(args), shape_(args.shape), b_(b), h_(h), only_repair_(only_repair) {
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

  // Parts of the keys of every head; with eight tasks in all, as many threads have work.
  static int64_t n_parts(const FlashAttentionShape& shape) {
    const int64_t n_heads = max_of<int64_t>(1, shape.batch * shape.heads);
    const int64_t n_blocks = ceil_div(shape.kv_steps, kGradientKeys);
    return max_of<int64_t>(1, min_of(ceil_div(8, n_heads), n_blocks / 2));
  }

  static int64_t dq_floats(int64_t n_rows) { return round_up(n_rows, kGradientQueries) * kDim; }

  // These give whether all gradients are finite, if Dot has planes.
  bool run_head() {
    float* dq = reserve_dq(shape_.q_steps);
    run_part(0, 1, dq);
    write_dq(0, shape_.q_steps, dq);
    return all_finite_;
  }

  // What the part gives to dq goes to dq_floats(q_steps) at dq.
  bool run_part(int64_t part, int64_t n_parts, float* dq) {
    [[maybe_unused]] const typename Dot::Scope scope;
    reserve();
    clear_floats(dq, dq_floats(shape_.q_steps));
    for (int64_t block = 0; block < shape_.kv_steps; block += kGradientKeys) {
      if (is_in_part(block, part, n_parts)) run_block<true>(block, dq);
    }
    return all_finite_;
  }

  // Queries [begin, end) of the dq of all parts, which lie side by side.
  bool add_parts(int64_t begin, int64_t end, int64_t n_parts, const float* dq) {
    float* sum = reserve_dq(end - begin);
    clear_floats(sum, (end - begin) * kDim);
    for (int64_t part = 0; part < n_parts; ++part)
      add_floats(dq + part * dq_floats(shape_.q_steps) + begin * kDim, (end - begin) * kDim, sum);
    write_dq(begin, end, sum);
    return all_finite_;
  }

  bool run_keys(int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Dot::Scope scope;
    reserve();
    for (int64_t block = begin; block < min_of(end, shape_.kv_steps); block += kGradientKeys)
      run_block<false>(block, nullptr);
    return all_finite_;
  }

  bool run_queries(int64_t begin, int64_t end, int64_t n_parts) {
    [[maybe_unused]] const typename Dot::Scope scope;
    reserve();
    const int64_t n_floats = dq_floats(end - begin);
    float* dq = reserve_dq(2 * round_up(end - begin, kGradientQueries));
    float* of_part = n_parts == 1 ? dq : dq + n_floats;
    if (n_parts > 1) clear_floats(dq, n_floats);
    const Range keys = rows_visibility(shape_, begin, end - begin).any;
    for (int64_t part = 0; part < n_parts; ++part) {
      clear_floats(of_part, n_floats);
      for (int64_t block = keys.begin / kGradientKeys * kGradientKeys; block < keys.end;
           block += kGradientKeys) {
        if (!is_in_part(block, part, n_parts)) continue;
        start_block(block);
        for (int64_t tile = begin; tile < end; tile += kGradientQueries)
          run_tile<false, true>(tile, of_part + (tile - begin) * kDim);
      }
      if (n_parts > 1) add_floats(of_part, n_floats, dq);
    }
    write_dq(begin, end, dq);
    return all_finite_;
  }

 protected:
  // Floats of one plane.
  static constexpr int64_t kKeyFloats = int64_t{kGradientKeys} * kUnits,
                           kTileFloats = int64_t{kGradientQueries} * kUnits,
                           kScoreFloats = int64_t{kGradientQueries} * kGradientKeys / kPer;

  Derived* derived() { return static_cast<Derived*>(this); }

  void reserve() {
    const int64_t n_floats = kPlanes * (3 * kKeyFloats + 5 * kTileFloats + 3 * kScoreFloats) +
                             2 * kGradientKeys * kDim + 2 * kGradientQueries + 64;
    float* next =
        static_cast<float*>(thread_scratch(static_cast<size_t>(n_floats) * sizeof(float)));
    const auto take = [&](int64_t n) { return next += n, next - n; };
    k_columns_ = take(kPlanes * kKeyFloats);
    v_columns_ = take(kPlanes * kKeyFloats);
    k_rows_ = take(kPlanes * kKeyFloats);
    dk_ = take(kGradientKeys * kDim);
    dv_ = take(kGradientKeys * kDim);
    q_ = take(kPlanes * kTileFloats);
    d_out_ = take(kPlanes * kTileFloats);
    q_across_ = kPer == 1 ? q_ : take(kPlanes * kTileFloats);
    d_out_across_ = kPer == 1 ? d_out_ : take(kPlanes * kTileFloats);
    pairs_ = take(kPlanes * kTileFloats);
    p_across_ = take(kPlanes * kScoreFloats);
    ds_across_ = take(kPlanes * kScoreFloats);
    ds_ = kPer == 1 ? ds_across_ : take(kPlanes * kScoreFloats);
    tile_lse_ = take(kGradientQueries);
    tile_delta_ = take(kGradientQueries);
  }

  static float* reserve_dq(int64_t n_rows) {
    thread_local Scratch scratch;
    const int64_t n_floats = dq_floats(n_rows);
    return static_cast<float*>(scratch.reserve(static_cast<size_t>(n_floats) * sizeof(float)));
  }

  // Blocks are dealt to and fro: seen by ever fewer queries, they make parts of equal work.
  static bool is_in_part(int64_t block, int64_t part, int64_t n_parts) {
    const int64_t turn = block / kGradientKeys % (2 * n_parts);
    return part == (turn < n_parts ? turn : 2 * n_parts - 1 - turn);
  }

  static void add_floats(const float* x, int64_t n, float* sum) {
    for (int64_t i = 0; i < n; i += kLanes) store(sum + i, load(sum + i) + load(x + i));
  }

  void start_block(int64_t block) {
    block_ = block;
    n_keys_ = min_of<int64_t>(kGradientKeys, shape_.kv_steps - block);
    const int64_t n_packed = min_of<int64_t>(kGradientKeys, round_up(n_keys_, kStrip));
    const Rows<Element> k = head_rows<Element>(args_.k, b_, h_, block);
    pack_columns<Dot, kDim>(k, n_keys_, n_packed, k_columns_, kKeyFloats);
    pack_columns<Dot, kDim>(head_rows<Element>(args_.v, b_, h_, block), n_keys_, n_packed,
                            v_columns_, kKeyFloats);
    pack_row_pairs<Dot, kDim, kApart>(k, n_keys_, n_packed, k_rows_, kKeyFloats);
  }

  // dk and dv of a block of keys, and what it gives to dq.
  template <bool kDq>
  void run_block(int64_t block, float* dq) {
    start_block(block);
    clear_floats(dk_, 2 * kGradientKeys * kDim);
    const int64_t begin = seeing_queries(shape_, block).begin,
                  end = seeing_queries(shape_, block + n_keys_ - 1).end;
    for (int64_t tile = begin / kGradientQueries * kGradientQueries; tile < end;
         tile += kGradientQueries) {
      run_tile<true, kDq>(tile, kDq ? dq + tile * kDim : nullptr);
    }
    derived()->write_key_gradients();
  }

  template <bool kDkDv, bool kDq>
  void run_tile(int64_t tile, float* dq) {
    const int64_t end = min_of(tile + kGradientQueries, shape_.q_steps);
    const Range keys = rows_visibility(shape_, tile, end - tile).any;
    if (keys.end <= block_ || keys.begin >= block_ + n_keys_) return;
    tile_ = tile;
    n_rows_ = end - tile;
    const Rows<Element> q = head_rows<Element>(args_.q, b_, h_, tile);
    const Rows<Element> d_out = head_rows<Element>(args_.d_out, b_, h_, tile);
    pack_rows<Dot, kDim>(q, n_rows_, kGradientQueries, q_);
    pack_rows<Dot, kDim>(d_out, n_rows_, kGradientQueries, d_out_);
    if constexpr (kDkDv && kPer > 1) {
      derived()->pack_across(q, q_across_);
      derived()->pack_across(d_out, d_out_across_);
    }
    const int64_t n_next =
        max_of<int64_t>(0, min_of<int64_t>(kGradientQueries, shape_.q_steps - end));
    prefetch_rows<kDim>(head_rows<Element>(args_.q, b_, h_, end), n_next);
    prefetch_rows<kDim>(head_rows<Element>(args_.d_out, b_, h_, end), n_next);
    for (int64_t i = 0; i < kGradientQueries; ++i) {
      tile_lse_[i] = i < n_rows_ ? lse_[tile + i] : INFINITY;
      tile_delta_[i] = i < n_rows_ ? delta_[tile + i] : 0.0f;
    }
    // Rows past the last have p = 0, and complete a product over rows.
    n_scored_ = static_cast<int>(round_up(n_rows_, Dot::kIsMatrix ? kAtOnce : 1));
    for (int row = 0; row < n_scored_; row += kRowGroup)
      visible_[row / kRowGroup] = rows_visibility(shape_, tile + row, kRowGroup);
    derived()->template score<kDkDv>();
    if constexpr (kDkDv) derived()->add_key_gradients();
    if constexpr (kDq) derived()->add_query_gradients(dq);
  }

  // Calls body(piece, row) for every strip of the block and group of rows. Where no row of it sees a
  // key, p and ds are 0.
  template <bool kDkDv, typename Body>
  WGPT_INLINE void for_pieces(Body&& body) {
    const auto n_strips_end = static_cast<int>(round_up(n_keys_, kStrip));
    for (int strip = 0; strip < n_strips_end; strip += kStrip) {
      for (int row = 0; row < n_scored_; row += kRowGroup) {
        Piece piece = piece_of<kStep>(visible_[row / kRowGroup], block_, strip);
        piece.is_masked = piece.is_masked || row + kRowGroup > n_rows_;
        if (piece.n_vectors < kVectors) derived()->template clear_scores<kDkDv>(strip, row);
        if (piece.n_vectors > 0) body(piece, row);
      }
    }
  }

  template <int kWidth>
  WGPT_INLINE void mask(const Piece& piece, int row, Floats (&x)[kWidth]) {
    if (row < n_rows_) return mask_keys(shape_, tile_ + row, block_ + piece.key, splat(0.0f), x);
    for (Floats& of_keys : x) of_keys = splat(0.0f);  // else a key at infinity would make it NaN
  }

  // Queries of the tile that see some of n keys from j on, in units of pairs if kPer is 2.
  Range seeing_units(int64_t j, int64_t n) const {
    const int64_t last = min_of<int64_t>(j + n, n_keys_) - 1;
    const int64_t begin = seeing_queries(shape_, block_ + j).begin - tile_;
    const int64_t end = seeing_queries(shape_, block_ + last).end - tile_;
    return {max_of<int64_t>(0, begin) / kAtOnce * kAtOnce / kPer,
            round_up(min_of(n_rows_, end), kAtOnce) / kPer};
  }

  // Keys of the block's [slab, slab + n) that some of the groups from row to last see, in units.
  Range seen_units(int row, int last, int64_t slab, int64_t n) const {
    const int64_t begin = visible_[row / kRowGroup].any.begin - block_;
    const int64_t end = visible_[last / kRowGroup].any.end - block_;
    return {max_of(slab, begin) / kAtOnce * kAtOnce / kPer,
            round_up(min_of(min_of(slab + n, n_keys_), end), kAtOnce) / kPer};
  }

  void write_row(const float* sums, float factor, Element* out) {
    if (only_repair_ && are_finite(out, kDim)) return;
    for (int c = 0; c < kDim; c += kLanes) store(out + c, load(sums + c) * splat(factor));
    if constexpr (kPlanes > 1) all_finite_ = all_finite_ && are_finite(out, kDim);
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
  const bool only_repair_;
  bool all_finite_ = true;
  const float *lse_, *d_lse_;
  float* delta_;
  int64_t block_ = 0, n_keys_ = 0, tile_ = 0, n_rows_ = 0;
  int n_scored_ = 0;
  Visibility visible_[(kGradientQueries + kRowGroup - 1) / kRowGroup];
  float *k_columns_, *v_columns_, *k_rows_, *dk_, *dv_, *q_, *d_out_, *q_across_, *d_out_across_;
  float *p_across_, *ds_across_, *ds_, *tile_lse_, *tile_delta_;
  float* pairs_;  // pairs of rows on their way across
};

}  // namespace wgpt::cpu::WGPT_TARGET
