// flash_attention backward with vector FMAs. The loops over a head: flash_attention_backward.h.
//
// Every block GEMM accumulates in a zeroed register block that is then added to the gradient: half the
// rounding error of one long sum.
#pragma once

#include "kernels/cpu/attention/flash_attention_backward.h"

namespace wgpt::cpu::WGPT_TARGET {

// Measured on one Zen 5 thread, D 32 to 128, both types: key blocks of 96 cost 8 to 13 % (dq is read and
// written twice as often), query blocks of 96 change nothing (2 %).
template <typename Element, int kDim, typename Dot>
class VectorBackward
    : public GradientTask<VectorBackward<Element, kDim, Dot>, Element, kDim, Dot, 192, 48> {
  using Task = GradientTask<VectorBackward, Element, kDim, Dot, 192, 48>;
  friend Task;
  using Task::kRowGroup, Task::kUnits, Task::kPer, Task::kOutVectors;
  static constexpr int kKeys = Task::kGradientKeys, kScoreRow = kKeys / kPer;
  static constexpr int kOutRows = kRowGroup * (kVectors / kOutVectors);
  static constexpr int kSlab = 96;  // keys of a dq GEMM: its rows of k stay in L1

 public:
  using Task::Task;

 private:
  void pack_over_queries(Rows<Element> rows, float* out) {
    pack_row_pairs<Dot, kDim>(rows, this->n_rows_, Task::kGradientQueries, out);
  }

  // Offsets of keys from `key` on of a row in p_over_queries_ and ds_over_queries_, and in ds_.
  static int64_t at_over_queries(int64_t key, int64_t row) { return row / kPer * kKeys + key; }
  static int64_t at_over_keys(int64_t key, int64_t row) { return row * kScoreRow + key / kPer; }

  template <bool kDkDv>
  void clear_scores(int strip, int row) {
    for (int r = row; r < row + kRowGroup; ++r) {
      if constexpr (kDkDv) clear_floats(this->p_over_queries_ + at_over_queries(strip, r), kStrip);
      clear_floats(this->ds_over_queries_ + at_over_queries(strip, r), kStrip);
      if constexpr (kPer > 1) clear_floats(this->ds_ + at_over_keys(strip, r), kStrip / kPer);
    }
  }

  // q k^T or d_out v^T of a group and a strip of keys, to the bits of score_keys().
  void score_strip(const float* rows, const float* columns, int strip, int row, float* out) {
    RegisterBlock<kRowGroup, kVectors> s;
    gemm_fresh_block<Dot>(rows + row * kUnits, kUnits, 1, columns + strip * kUnits, kStrip, kUnits,
                          s);
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      WGPT_UNROLL for (int v = 0; v < kVectors; ++v) store(out + r * kStrip + v * kLanes, s[r][v]);
    }
  }

  template <bool kDkDv>
  void score() {
    this->template for_pieces<kDkDv>([&](const Piece& piece, int row) {
      if (!piece.is_masked) return score_keys<kVectors, false, kDkDv>(piece, row);
      with_width(piece.n_vectors,
                 [&](auto width) { score_keys<width.value, true, kDkDv>(piece, row); });
    });
  }

  // p and ds of a group for kWidth vectors of a strip; masked where some rows do not see all of
  // them.
  template <int kWidth, bool kMasked, bool kDkDv>
  __attribute__((noinline)) void score_keys(const Piece& piece, int row) {
    RegisterBlock<kRowGroup, kWidth> p, dp;
    alignas(64) float saved[kRowGroup * kWidth * kLanes];
    const int key = piece.key;
    const int64_t columns = key / kStrip * (kStrip * kUnits) + key % kStrip;
    gemm_fresh_block<Dot>(this->q_ + row * kUnits, kUnits, 1, this->k_columns_ + columns, kStrip,
                          kUnits, p);
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      [[maybe_unused]] Floats slope[kWidth];
      if constexpr (kMasked) {
        WGPT_UNROLL for (int v = 0; v < kWidth; ++v) slope[v] = splat(1.0f);
        this->transform(piece, row + r, p[r], slope);
      }
      this->exp_of_scores(row + r, p[r], p[r]);
      if constexpr (kMasked) this->mask(piece, row + r, p[r]);
      WGPT_UNROLL for (int v = 0; v < kWidth; ++v)
          store(saved + (r * kWidth + v) * kLanes, kMasked ? p[r][v] * slope[v] : p[r][v]);
    }
    if constexpr (kDkDv)
      store_over_rows<Dot>(this->p_over_queries_ + at_over_queries(key, row), kKeys, p);
    gemm_fresh_block<Dot>(this->d_out_ + row * kUnits, kUnits, 1, this->v_columns_ + columns,
                          kStrip, kUnits, dp);
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      const Floats delta = splat(this->block_.delta[row + r]);
      WGPT_UNROLL for (int v = 0; v < kWidth; ++v) dp[r][v] =
          (dp[r][v] - delta) * load(saved + (r * kWidth + v) * kLanes);
      if constexpr (kMasked) this->mask(piece, row + r, dp[r]);
    }
    store_over_rows<Dot>(this->ds_over_queries_ + at_over_queries(key, row), kKeys, dp);
    if constexpr (kPer == 1) return;
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r)
        store_row<Dot>(this->ds_ + at_over_keys(key, row + r), dp[r]);
  }

  // out[r, :] += sum over n units of a[r, k] b[k, :], kOutRows rows, all channels.
  WGPT_INLINE static void add_gemm(const float* a, int64_t a_row, int64_t a_step, const float* b,
                                   int64_t n, float* out) {
    for (int column = 0; column < kDim; column += kOutVectors * kLanes) {
      RegisterBlock<kOutRows, kOutVectors> sums;
      gemm_fresh_block<Dot>(a, a_row, a_step, b + column, kDim, n, sums);
      add_block(sums, out + column, kDim);
    }
  }

  __attribute__((noinline)) void add_key_gradients() {
    for (int64_t j = 0; j < this->n_keys_; j += kOutRows) {
      const Range units = this->seeing_units(j, kOutRows);
      if (units.begin >= units.end) continue;
      const int64_t a = units.begin * kKeys + j, b = units.begin * kDim;
      const int64_t n = units.end - units.begin;
      add_gemm(this->p_over_queries_ + a, 1, kKeys, this->d_out_over_queries_ + b, n,
               this->dv_ + j * kDim);
      add_gemm(this->ds_over_queries_ + a, 1, kKeys, this->q_over_queries_ + b, n,
               this->dk_ + j * kDim);
    }
  }

  __attribute__((noinline)) void add_query_gradients(float* dq) {
    const int n_rows = static_cast<int>(this->n_rows_);
    for (int64_t slab = 0; slab < this->n_keys_; slab += kSlab) {
      for (int row = 0; row < n_rows; row += kOutRows) {
        const Range units = this->seen_units(row, min_of(row + kOutRows, n_rows) - 1, slab, kSlab);
        if (units.begin >= units.end) continue;
        add_gemm(this->ds_ + row * kScoreRow + units.begin, kScoreRow, 1,
                 this->k_rows_ + units.begin * kDim, units.end - units.begin, dq + row * kDim);
      }
    }
  }

  void write_key_gradients() {
    const float scale = static_cast<float>(this->shape_.scale);
    for (int64_t j = 0; j < this->n_keys_; ++j) {
      const int64_t key = this->key_block_ + j;
      this->write_row(this->dk_ + j * kDim, scale,
                      head_row<Element>(this->args_.dk, this->b_, this->kv_h_, key));
      this->write_row(this->dv_ + j * kDim, 1.0f,
                      head_row<Element>(this->args_.dv, this->b_, this->kv_h_, key));
    }
  }
};

}  // namespace wgpt::cpu::WGPT_TARGET
