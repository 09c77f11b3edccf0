// flash_attention backward on the CPU. Formula, shapes and determinism: kernels/flash_attention.h.
//
//   for each block of kGradientKeys keys           k, v packed transposed, k by rows; dk, dv in L2
//     for each tile of kGradientQueries queries    q, d_out packed by rows (and by row pairs)
//       for each strip of keys, group of 6 rows    p = exp(scale q k^T - lse)
//                                                  ds = p * (d_out v^T - delta)
//       for each group of 6 keys                   dv += p^T d_out, dk += ds^T q
//       for each group of 6 rows                   dq += ds k
//
// Every product is summed in zeroed registers and then added, in ascending order of queries (dk,
// dv) or keys (dq), which halves the rounding error of one long sum and fixes the order. A task is
// a whole head (five products), or, with fewer heads than threads could use, first a block of keys
// of a head (dk, dv) and then a chunk of its queries (dq): seven products, but many tasks. Both
// make the same sums in the same order, so they give the same bits.
//
// By tiles of AMX, whose left operand cannot be read across, dv^T += d_out^T p and dk^T += q^T ds,
// straight onto the sums in memory: bfloat16 operands have rounded far more.
#pragma once

#include <math.h>

#include "kernels/cpu/attention_shape.h"

namespace wgpt::cpu::WGPT_TARGET {

// Measured on one Zen 5 thread, D 32 to 128, both types: 96 keys cost 8 to 13 % (dq is read and
// written twice as often), 96 queries change nothing (2 %).
constexpr int kGradientKeys = 192;
constexpr int kGradientSlab = 96;  // keys of a dq product: its rows of k stay in L1

template <typename Element, int kDim>
class AttentionBackward {
 public:
  using Dot = typename DotOf<Element>::Type;
  static constexpr int kPer = Dot::kPerUnit;
  static constexpr int kRowGroup = Dot::kRows;
  static constexpr int kGradientQueries = Dot::kIsMatrix ? 64 : 48;
  static constexpr int kUnits = kDim / kPer;
  static constexpr int kOutVectors = kDim / kLanes < kVectors ? kDim / kLanes : kVectors;
  static constexpr int kOutRows = Dot::kIsMatrix ? kRowGroup : kRowGroup * (kVectors / kOutVectors);
  // Keys, or queries, that a product over them takes at once.
  static constexpr int kAtOnce = Dot::kIsMatrix ? 32 : kPer;

  AttentionBackward(const FlashAttentionBackward& args, int64_t b, int64_t h)
      : args_(args), shape_(args.shape), b_(b), h_(h) {
    reserve();
    const int64_t offset = (b * shape_.heads + h) * shape_.q_steps;
    lse_ = static_cast<const float*>(args.lse) + offset;
    d_lse_ = args.d_lse == nullptr ? nullptr : static_cast<const float*>(args.d_lse) + offset;
    delta_ = static_cast<float*>(args.workspace) + offset;
  }

  void write_delta(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Element* out = head_row<Element>(args_.out, b_, h_, i);
      const Element* d_out = head_row<Element>(args_.d_out, b_, h_, i);
      Floats sum = splat(0.0f);
      for (int c = 0; c < kDim; c += kLanes) sum = fma(load(out + c), load(d_out + c), sum);
      delta_[i] = reduce_add(sum) - (d_lse_ == nullptr ? 0.0f : d_lse_[i]);
    }
  }

  void run_head() {
    [[maybe_unused]] const typename Dot::Scope scope;
    float* dq = reserve_dq(shape_.q_steps);
    for (int64_t block = 0; block < shape_.kv_steps; block += kGradientKeys)
      run_block<true, true>(block, dq);
    write_dq(0, shape_.q_steps, dq);
  }

  void run_keys(int64_t block) {
    [[maybe_unused]] const typename Dot::Scope scope;
    run_block<true, false>(block, nullptr);
  }

  void run_queries(int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Dot::Scope scope;
    float* dq = reserve_dq(end - begin);
    const Range keys = rows_visibility(shape_, begin, end - begin).any;
    for (int64_t block = keys.begin / kGradientKeys * kGradientKeys; block < keys.end;
         block += kGradientKeys) {
      start_block<false>(block);
      for (int64_t tile = begin; tile < end; tile += kGradientQueries) {
        run_tile<false, true>(tile, dq + (tile - begin) * kDim);
      }
    }
    write_dq(begin, end, dq);
  }

 private:
  static constexpr int64_t kKeyFloats = kGradientKeys * kUnits,
                           kTileFloats = kGradientQueries * kUnits;
  static constexpr int64_t kScoreFloats = kGradientQueries * kGradientKeys / kPer;

  void reserve() {
    const int64_t n_floats = 3 * kKeyFloats + 2 * kGradientKeys * kDim + 4 * kTileFloats +
                             3 * kScoreFloats + 2 * kGradientQueries +
                             (Dot::kIsMatrix ? kTileFloats : 0) + 64;
    float* next =
        static_cast<float*>(thread_scratch(static_cast<size_t>(n_floats) * sizeof(float)));
    const auto take = [&](int64_t n) { return next += n, next - n; };
    k_columns_ = take(kKeyFloats);
    v_columns_ = take(kKeyFloats);
    k_rows_ = take(kKeyFloats);
    dk_ = take(kGradientKeys * kDim);
    dv_ = take(kGradientKeys * kDim);
    q_ = take(kTileFloats);
    d_out_ = take(kTileFloats);
    q_across_ = kPer == 1 ? q_ : take(kTileFloats);
    d_out_across_ = kPer == 1 ? d_out_ : take(kTileFloats);
    p_across_ = take(kScoreFloats);
    ds_across_ = take(kScoreFloats);
    ds_ = kPer == 1 ? ds_across_ : take(kScoreFloats);
    tile_lse_ = take(kGradientQueries);
    tile_delta_ = take(kGradientQueries);
    if constexpr (Dot::kIsMatrix) pairs_ = take(kTileFloats);
  }

  static float* reserve_dq(int64_t n_rows) {
    thread_local Scratch scratch;
    const int64_t n_floats = round_up(n_rows, kGradientQueries) * kDim;
    auto* dq = static_cast<float*>(scratch.reserve(static_cast<size_t>(n_floats) * sizeof(float)));
    clear_floats(dq, n_floats);
    return dq;
  }

  template <bool kDkDv>
  void start_block(int64_t block) {
    block_ = block;
    n_keys_ = min_of<int64_t>(kGradientKeys, shape_.kv_steps - block);
    const int64_t n_packed = min_of<int64_t>(kGradientKeys, round_up(n_keys_, kStrip));
    const Rows<Element> k = head_rows<Element>(args_.k, b_, h_, block);
    pack_columns<Dot, kDim>(k, n_keys_, n_packed, k_columns_);
    pack_columns<Dot, kDim>(head_rows<Element>(args_.v, b_, h_, block), n_keys_, n_packed,
                            v_columns_);
    pack_row_pairs<Dot, kDim>(k, n_keys_, n_packed, k_rows_);
    if constexpr (kDkDv) clear_floats(dk_, 2 * kGradientKeys * kDim);
  }

  template <bool kDkDv, bool kDq>
  void run_block(int64_t block, float* dq) {
    start_block<kDkDv>(block);
    const int64_t begin = seeing_queries(shape_, block).begin,
                  end = seeing_queries(shape_, block + n_keys_ - 1).end;
    for (int64_t tile = begin / kGradientQueries * kGradientQueries; tile < end;
         tile += kGradientQueries) {
      run_tile<kDkDv, kDq>(tile, kDq ? dq + tile * kDim : nullptr);
    }
    const float scale = static_cast<float>(shape_.scale);
    if constexpr (Dot::kIsMatrix) {
      write_columns(dk_, scale, args_.dk);
      write_columns(dv_, 1.0f, args_.dv);
      return;
    }
    for (int64_t j = 0; j < n_keys_; ++j) {
      write_row(dk_ + j * kDim, scale, head_row<Element>(args_.dk, b_, h_, block + j));
      write_row(dv_ + j * kDim, 1.0f, head_row<Element>(args_.dv, b_, h_, block + j));
    }
  }

  // The block's keys from sums that lie as [channel][key].
  void write_columns(const float* sums, float factor, const HeadsView& out) {
    alignas(64) float rows[kLanes * kDim];
    for (int64_t j = 0; j < n_keys_; j += kLanes) {
      for (int c = 0; c < kDim; c += kLanes)
        transpose_block(sums + c * kGradientKeys + j, kGradientKeys, rows + c, kDim);
      for (int64_t i = j; i < min_of(j + kLanes, n_keys_); ++i)
        write_row(rows + (i - j) * kDim, factor, head_row<Element>(out, b_, h_, block_ + i));
    }
  }

  static void write_row(const float* sums, float factor, Element* out) {
    for (int c = 0; c < kDim; c += kLanes) store(out + c, load(sums + c) * splat(factor));
  }

  void write_dq(int64_t begin, int64_t end, const float* dq) {
    for (int64_t i = begin; i < end; ++i) {
      write_row(dq + (i - begin) * kDim, static_cast<float>(shape_.scale),
                head_row<Element>(args_.dq, b_, h_, i));
    }
  }

  void start_tile(int64_t tile) {
    tile_ = tile;
    n_rows_ = min_of<int64_t>(kGradientQueries, shape_.q_steps - tile);
    const Rows<Element> q = head_rows<Element>(args_.q, b_, h_, tile);
    const Rows<Element> d_out = head_rows<Element>(args_.d_out, b_, h_, tile);
    pack_rows<Dot, kDim>(q, n_rows_, kGradientQueries, q_);
    pack_rows<Dot, kDim>(d_out, n_rows_, kGradientQueries, d_out_);
    if constexpr (Dot::kIsMatrix) {
      pack_across(q, q_across_);
      pack_across(d_out, d_out_across_);
    } else if constexpr (kPer == 2) {
      pack_row_pairs<Dot, kDim>(q, n_rows_, kGradientQueries, q_across_);
      pack_row_pairs<Dot, kDim>(d_out, n_rows_, kGradientQueries, d_out_across_);
    }
    for (int64_t i = 0; i < kGradientQueries; ++i) {  // p of a row past the end is 2^-infinity = 0
      tile_lse_[i] = i < n_rows_ ? lse_[tile + i] : INFINITY;
      tile_delta_[i] = i < n_rows_ ? delta_[tile + i] : 0.0f;
    }
  }

  // A tile of rows as [channel][pair of rows].
  void pack_across(Rows<Element> rows, float* out) {
    constexpr int kPairs = kGradientQueries / 2;
    pack_row_pairs<Dot, kDim>(rows, n_rows_, kGradientQueries, pairs_);
    for (int c = 0; c < kDim; c += kLanes) {
      for (int pair = 0; pair < kPairs; pair += kLanes)
        transpose_block(pairs_ + pair * kDim + c, kDim, out + c * kPairs + pair, kPairs);
    }
  }

  template <bool kDkDv, bool kDq>
  void run_tile(int64_t tile, float* dq) {
    const int64_t end = min_of(tile + kGradientQueries, shape_.q_steps);
    const Range keys = rows_visibility(shape_, tile, end - tile).any;
    if (keys.end <= block_ || keys.begin >= block_ + n_keys_) return;
    start_tile(tile);
    Visibility visible[kGradientQueries / kRowGroup];
    // Rows past the last have p = 0, and complete a product over rows.
    const int64_t n_scored = round_up(n_rows_, Dot::kIsMatrix ? kAtOnce : 1);
    for (int row = 0; row < n_scored; row += kRowGroup) {
      visible[row / kRowGroup] = rows_visibility(shape_, tile + row, kRowGroup);
    }
    const int64_t n_strips_end = round_up(n_keys_, kStrip);
    for (int64_t strip = 0; strip < n_strips_end; strip += kStrip) {
      for (int row = 0; row < n_scored; row += kRowGroup)
        score_group<kDkDv>(strip, row, visible[row / kRowGroup]);
    }
    if constexpr (kDkDv) add_key_gradients();
    if constexpr (kDq) add_query_gradients(visible, dq);
  }

  template <bool kDkDv>
  void score_group(int64_t strip, int row, const Visibility& visible) {
    const int64_t first_key = block_ + strip;
    if (visible.all.begin <= first_key && visible.all.end >= first_key + kStrip) {
      return score_keys<kVectors, false, kDkDv>(strip, 0, row);
    }
    const int begin = static_cast<int>(max_of<int64_t>(0, visible.any.begin - first_key)) / kLanes;
    const int end =
        static_cast<int>(ceil_div(min_of<int64_t>(kStrip, visible.any.end - first_key), kLanes));
    if (end - begin < kVectors) {  // nothing is seen there
      Tile<kRowGroup, kVectors> zeros;
      fill_tile(zeros, 0.0f);
      if constexpr (kDkDv)
        store_rows_across<Dot>(p_across_ + across(strip, row), kGradientKeys, zeros);
      store_score_gradients(strip, row, zeros);
    }
    if (begin >= end) return;
    with_width(end - begin,
               [&](auto width) { score_keys<width.value, true, kDkDv>(strip, begin, row); });
  }

  static int64_t across(int64_t key, int64_t row) { return row / kPer * kGradientKeys + key; }

  // p and ds of a group for kWidth vectors of a strip; masked where some rows do not see all of
  // them.
  template <int kWidth, bool kMasked, bool kDkDv>
  __attribute__((noinline)) void score_keys(int64_t strip, int first, int row) {
    alignas(64) Tile<kRowGroup, kWidth> p, dp;
    alignas(64) float saved[kRowGroup * kWidth * kLanes];
    const int64_t key = strip + first * kLanes, columns = strip * kUnits + first * kLanes;
    multiply_fresh_tile<Dot>(q_ + row * kUnits, kUnits, 1, k_columns_ + columns, kStrip, kUnits, p);
    const Floats scale = splat(static_cast<float>(shape_.scale));
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      const Floats lse = splat(-tile_lse_[row + r]);
      WGPT_UNROLL for (int v = 0; v < kWidth; ++v) p[r][v] =
          exp2_of<Dot::kExact>(fma_unrounded(p[r][v], scale, lse) * splat(kLog2E));
    }
    if constexpr (kMasked) mask_keys(key, row, p);
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      WGPT_UNROLL for (int v = 0; v < kWidth; ++v)
          store(saved + (r * kWidth + v) * kLanes, p[r][v]);
    }
    if constexpr (kDkDv) store_rows_across<Dot>(p_across_ + across(key, row), kGradientKeys, p);
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      WGPT_UNROLL for (int v = 0; v < kWidth; ++v) dp[r][v] = splat(-tile_delta_[row + r]);
    }
    multiply_tile<Dot>(d_out_ + row * kUnits, kUnits, 1, v_columns_ + columns, kStrip, kUnits, dp);
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      WGPT_UNROLL for (int v = 0; v < kWidth; ++v) dp[r][v] =
          dp[r][v] * load(saved + (r * kWidth + v) * kLanes);
    }
    if constexpr (kMasked) mask_keys(key, row, dp);
    store_score_gradients(key, row, dp);
  }

  template <int kWidth>
  WGPT_INLINE void mask_keys(int64_t key, int row, Tile<kRowGroup, kWidth>& x) {
    const int64_t first_key = block_ + key;
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      const Range keys = visible_keys(shape_, min_of(tile_ + row + r, shape_.q_steps - 1));
      const int lo = static_cast<int>(keys.begin - first_key),
                hi = static_cast<int>(keys.end - first_key);
      WGPT_UNROLL for (int v = 0; v < kWidth; ++v) {
        x[r][v] = keep_lanes(x[r][v], splat(0.0f), lo - v * kLanes, hi - v * kLanes);
      }
    }
  }

  template <int kWidth>
  WGPT_INLINE void store_score_gradients(int64_t key, int row, const Tile<kRowGroup, kWidth>& ds) {
    store_rows_across<Dot>(ds_across_ + across(key, row), kGradientKeys, ds);
    if constexpr (kPer == 1) return;
    constexpr int kRow = kGradientKeys / kPer;
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r)
        store_row<Dot>(ds_ + (row + r) * kRow + key / kPer, ds[r]);
  }

  // out[r, :] += sum over n units of a[r, k] b[k, :], kOutRows rows, all channels.
  WGPT_INLINE static void add_product(const float* a, int64_t a_row, int64_t a_step, const float* b,
                                      int64_t n, float* out) {
    for (int column = 0; column < kDim; column += kOutVectors * kLanes) {
      if constexpr (Dot::kIsMatrix) {
        multiply_matrix<kOutVectors, false>(a, a_row, b + column, kDim, n, out + column, kDim);
        continue;
      }
      Tile<kOutRows, kOutVectors> sums;
      fill_tile(sums, 0.0f);
      multiply_tile<Dot>(a, a_row, a_step, b + column, kDim, n, sums);
      add_tile(sums, nullptr, out + column, kDim);
    }
  }

  // dv^T and dk^T: strips of keys by groups of channels.
  void add_key_gradients_by_matrix() {
    constexpr int kPairs = kGradientQueries / 2;
    for (int64_t j = 0; j < n_keys_; j += kStrip) {
      const int64_t last = min_of<int64_t>(j + kStrip, n_keys_) - 1;
      const int64_t seen_begin = seeing_queries(shape_, block_ + j).begin - tile_;
      const int64_t seen_end = seeing_queries(shape_, block_ + last).end - tile_;
      const int64_t begin = max_of<int64_t>(0, seen_begin) / kAtOnce * kAtOnce / kPer;
      const int64_t end = round_up(min_of<int64_t>(n_rows_, seen_end), kAtOnce) / kPer;
      if (begin >= end) continue;
      const int64_t b = begin * kGradientKeys + j;
      for (int c = 0; c < kDim; c += kRowGroup) {
        multiply_matrix<kVectors, false>(d_out_across_ + c * kPairs + begin, kPairs, p_across_ + b,
                                         kGradientKeys, end - begin, dv_ + c * kGradientKeys + j,
                                         kGradientKeys);
        multiply_matrix<kVectors, false>(q_across_ + c * kPairs + begin, kPairs, ds_across_ + b,
                                         kGradientKeys, end - begin, dk_ + c * kGradientKeys + j,
                                         kGradientKeys);
      }
    }
  }

  __attribute__((noinline)) void add_key_gradients() {
    if constexpr (Dot::kIsMatrix) return add_key_gradients_by_matrix();
    for (int64_t j = 0; j < n_keys_; j += kOutRows) {
      const int64_t last = min_of<int64_t>(j + kOutRows, n_keys_) - 1;
      const int64_t seen_begin = seeing_queries(shape_, block_ + j).begin - tile_;
      const int64_t seen_end = seeing_queries(shape_, block_ + last).end - tile_;
      const int64_t begin = max_of<int64_t>(0, seen_begin) / kPer;
      const int64_t end = ceil_div(min_of<int64_t>(n_rows_, seen_end), kPer);
      if (begin >= end) continue;
      const int64_t a = begin * kGradientKeys + j;
      add_product(p_across_ + a, 1, kGradientKeys, d_out_across_ + begin * kDim, end - begin,
                  dv_ + j * kDim);
      add_product(ds_across_ + a, 1, kGradientKeys, q_across_ + begin * kDim, end - begin,
                  dk_ + j * kDim);
    }
  }

  __attribute__((noinline)) void add_query_gradients(const Visibility* visible, float* dq) {
    constexpr int kRow = kGradientKeys / kPer;
    for (int64_t slab = 0; slab < n_keys_; slab += kGradientSlab) {
      for (int row = 0; row < n_rows_; row += kOutRows) {
        const int last = min_of<int>(row + kOutRows, static_cast<int>(n_rows_)) - 1;
        const int64_t seen_begin = visible[row / kRowGroup].any.begin - block_;
        const int64_t seen_end = visible[last / kRowGroup].any.end - block_;
        const int64_t seen_in_slab =
            min_of(min_of<int64_t>(slab + kGradientSlab, n_keys_), seen_end);
        const int64_t begin = max_of<int64_t>(slab, seen_begin) / kAtOnce * kAtOnce / kPer;
        const int64_t end = round_up(seen_in_slab, kAtOnce) / kPer;
        if (begin >= end) continue;
        add_product(ds_ + row * kRow + begin, kRow, 1, k_rows_ + begin * kDim, end - begin,
                    dq + row * kDim);
      }
    }
  }

  const FlashAttentionBackward& args_;
  const FlashAttentionShape& shape_;
  const int64_t b_, h_;
  const float *lse_, *d_lse_;
  float* delta_;
  int64_t block_ = 0, n_keys_ = 0, tile_ = 0, n_rows_ = 0;
  float *k_columns_, *v_columns_, *k_rows_, *dk_, *dv_, *q_, *d_out_, *q_across_, *d_out_across_;
  float *p_across_, *ds_across_, *ds_, *tile_lse_, *tile_delta_;
  float* pairs_ = nullptr;  // MatrixDot only: pairs of rows on their way across
};

}  // namespace wgpt::cpu::WGPT_TARGET
