// flash_attention backward on AMX. The loops over a head: flash_attention_backward.h.
//
// AMX cannot read its left operand transposed, so dv^T += d_out^T p and dk^T += q^T ds. While AMX runs the
// two GEMMs of a group's scores, the vector units turn those of the group before into p and ds, two rows
// at a time (a 2-stage software pipeline). Gradients accumulate in place.
//
// With float32 split into bfloat16 terms an infinity becomes NaN: the task then returns false, and rows
// that are not finite are computed again with float32 FMAs (fp32_fallback in flash_attention.h).
#pragma once

#include "kernels/cpu/attention/flash_attention_backward.h"

namespace wgpt::cpu::WGPT_TARGET {

#if defined(__AMX_BF16__)

// Keys of a block: for each block, every query block is packed again.
template <typename Dot, int kDim>
constexpr int kAmxGradientKeys = Dot::kTerms > 1 && kDim < 128 ? 384 : 192;

template <typename Element, int kDim, typename Dot>
class AmxBackward : public GradientTask<AmxBackward<Element, kDim, Dot>, Element, kDim, Dot,
                                        kAmxGradientKeys<Dot, kDim>, 64> {
  using Task = GradientTask<AmxBackward, Element, kDim, Dot, kAmxGradientKeys<Dot, kDim>, 64>;
  friend Task;
  using Task::kTerms, Task::kRowGroup, Task::kUnits, Task::kOutVectors, Task::kKeyFloats,
      Task::kQueryFloats;
  static constexpr int kKeys = Task::kGradientKeys, kQueries = Task::kGradientQueries;
  static constexpr int kPairs = kQueries / 2;  // of queries
  // All of a strip of keys lies together, to avoid conflict misses in L1: p_over_queries_ and
  // ds_over_queries_ as [strip][term][pair of queries][key], ds_ as [strip][query][term][pair of keys],
  // dk_ and dv_ as [strip][channel][key].
  static constexpr int64_t kTerm = kPairs * kStrip, kStripScores = kTerms * kTerm;
  static constexpr int kStripPairs = kStrip / 2, kScoreRow = kTerms * kStripPairs;

  using Scores = RegisterBlock<kRowGroup, kVectors>;
  // Slots for overlapped work, one per four tdpbf16ps, in the two GEMMs of a group's scores.
  static constexpr int kOverlapSlots =
      2 * Dot::kTermPairs * (kUnits / Dot::kDepth) * (kVectors / 2);
  static constexpr int kRowPairs = kRowGroup / 2;

 public:
  using Task::Task;

 private:
  // The rows of a query block as [channel][term][pair of rows].
  void pack_over_queries(Rows<Element> rows, float* out) {
    float* pairs = this->pairs_;
    pack_row_pairs<Dot, kDim>(rows, this->n_rows_, Task::kGradientQueries, pairs, kQueryFloats);
    for (int s = 0; s < kTerms; ++s) {
      for (int c = 0; c < kDim; c += kLanes) {
        for (int pair = 0; pair < kPairs; pair += kLanes) {
          transpose_block(pairs + s * kQueryFloats + pair * kDim + c, kDim,
                          out + (c * kTerms + s) * kPairs + pair, kTerms * kPairs);
        }
      }
    }
  }

  static int64_t at_over_queries(int64_t key, int64_t row) {
    return key / kStrip * kStripScores + row / 2 * kStrip + key % kStrip;
  }
  static int64_t at_over_keys(int64_t key, int64_t row) {
    return key / kStrip * kStripScores + row * kScoreRow + key % kStrip / 2;
  }

  template <bool kDkDv>
  void clear_scores(int strip, int row) {
    for (int s = 0; s < kTerms; ++s) {
      const int64_t at = s * kTerm + at_over_queries(strip, row);
      if constexpr (kDkDv) clear_floats(this->p_over_queries_ + at, kRowPairs * kStrip);
      if constexpr (kDkDv) clear_floats(this->ds_over_queries_ + at, kRowPairs * kStrip);
    }
    clear_floats(this->ds_ + at_over_keys(strip, row), kRowGroup * kScoreRow);
  }

  // q k^T or d_out v^T of a group and a strip of keys, to the bits of gemm_scores().
  void score_strip(const float* rows, const float* columns, int strip, int row, float* out) {
    constexpr int kRow = kTerms * kUnits;
    amx_gemm_32x32<Dot, kVectors, true>(rows + row * kRow, kRow, kUnits, columns + strip * kUnits,
                                        kStrip, kKeyFloats, kUnits, out, kStrip, [] {});
  }

  template <bool kDkDv>
  void score() {
    this->template for_pieces<kDkDv>([&](const Piece& piece, int row) {
      if (piece.n_vectors == kVectors) return gemm_scores<kVectors, kDkDv>(piece, row);
      gemm_scores<2, kDkDv>(piece, row);
    });
    p_and_ds_until<kDkDv>(kRowPairs);
    pending_ = {};
  }

  template <int kWidth, bool kDkDv>
  __attribute__((noinline)) void gemm_scores(const Piece& piece, int row) {
    constexpr int kRow = kTerms * kUnits;
    const int64_t columns = piece.key / kStrip * (kStrip * kUnits) + piece.key % kStrip;
    const int buffer = pending_.buffer ^ 1;
    const auto overlapped = [&] { p_and_ds_overlapped<kDkDv>(); };
    amx_gemm_32x32<Dot, kWidth, true>(this->q_ + row * kRow, kRow, kUnits,
                                      this->k_columns_ + columns, kStrip, kKeyFloats, kUnits,
                                      reinterpret_cast<float*>(s_ + buffer), kStrip, overlapped);
    amx_gemm_32x32<Dot, kWidth, true>(this->d_out_ + row * kRow, kRow, kUnits,
                                      this->v_columns_ + columns, kStrip, kKeyFloats, kUnits,
                                      reinterpret_cast<float*>(dp_ + buffer), kStrip, overlapped);
    p_and_ds_until<kDkDv>(kRowPairs);
    pending_ = {buffer, piece, row, 0, kRowPairs, 0};
  }

  template <bool kDkDv>
  WGPT_INLINE void p_and_ds_overlapped() {
    const int slot = ++pending_.n_slots;
    p_and_ds_until<kDkDv>(
        min_of(kRowPairs, (slot * kRowPairs + kOverlapSlots - 1) / kOverlapSlots));
  }

  // p and ds of the pending scores, up to pair `end` of their rows.
  template <bool kDkDv>
  WGPT_INLINE void p_and_ds_until(int end) {
    end = min_of(end, pending_.end);
    for (int pair = pending_.pair; pair < end; ++pair) {
      if (__builtin_expect(pending_.piece.is_masked, 0)) {
        p_and_ds_masked_pair<kDkDv>(2 * pair);
      } else {
        p_and_ds_pair<kVectors, false, kDkDv>(2 * pair);
      }
    }
    pending_.pair = max_of(pending_.pair, end);
  }

  template <bool kDkDv>
  __attribute__((noinline)) void p_and_ds_masked_pair(int r) {
    if (pending_.piece.n_vectors == kVectors) return p_and_ds_pair<kVectors, true, kDkDv>(r);
    p_and_ds_pair<2, true, kDkDv>(r);
  }

  template <int kWidth, bool kMasked, bool kDkDv>
  WGPT_INLINE void p_and_ds_pair(int r) {
    const Scores &s = s_[pending_.buffer], &d = dp_[pending_.buffer];
    const int row = pending_.row + r, key = pending_.piece.key;
    Floats p[2][kWidth], ds[2][kWidth];
    WGPT_UNROLL for (int i = 0; i < 2; ++i) {
      [[maybe_unused]] Floats slope[kWidth];
      WGPT_UNROLL for (int v = 0; v < kWidth; ++v) p[i][v] = s[r + i][v];
      if constexpr (kMasked) {
        WGPT_UNROLL for (int v = 0; v < kWidth; ++v) slope[v] = splat(1.0f);
        this->transform(pending_.piece, row + i, p[i], slope);
      }
      this->exp_of_scores(row + i, p[i], p[i]);
      const Floats delta = splat(this->block_.delta[row + i]);
      WGPT_UNROLL for (int v = 0; v < kWidth; ++v) {
        ds[i][v] = (d[r + i][v] - delta) * p[i][v];
        if constexpr (kMasked) ds[i][v] = ds[i][v] * slope[v];
      }
      if constexpr (kMasked) {
        this->mask(pending_.piece, row + i, p[i]);
        this->mask(pending_.piece, row + i, ds[i]);
      }
      store_row_terms<Dot>(this->ds_ + at_over_keys(key, row + i), kStripPairs, ds[i]);
    }
    if constexpr (!kDkDv) return;
    store_pairs_over_rows<Dot>(this->p_over_queries_ + at_over_queries(key, row), kTerm, p[0],
                               p[1]);
    store_pairs_over_rows<Dot>(this->ds_over_queries_ + at_over_queries(key, row), kTerm, ds[0],
                               ds[1]);
  }

  // out[r, :] += sum over n units of a[r, k] b[k, :], kRowGroup rows, kColumns vectors.
  template <int kColumns>
  static WGPT_INLINE void add_gemm(const float* a, int64_t a_row, int64_t a_term, const float* b,
                                   int64_t b_step, int64_t b_term, int64_t n, float* out,
                                   int64_t out_row) {
    amx_gemm_32x32<Dot, kColumns, false>(a, a_row, a_term, b, b_step, b_term, n, out, out_row,
                                         [] {});
  }

  // dv^T and dk^T: strips of keys by groups of channels.
  __attribute__((noinline)) void add_key_gradients() {
    constexpr int kChannel = kTerms * kPairs;
    for (int64_t j = 0; j < this->n_keys_; j += kStrip) {
      const Range units = this->seeing_units(j, kStrip);
      if (units.begin >= units.end) continue;
      const int64_t b = at_over_queries(j, 2 * units.begin), n = units.end - units.begin;
      const auto add = [&](const float* left, const float* scores, float* sums) {
        for (int c = 0; c < kDim; c += kRowGroup) {
          add_gemm<kVectors>(left + c * kChannel + units.begin, kChannel, kPairs, scores + b,
                             kStrip, kTerm, n, sums + (j / kStrip * kDim + c) * kStrip, kStrip);
        }
      };
      add(this->d_out_over_queries_, this->p_over_queries_, this->dv_);
      add(this->q_over_queries_, this->ds_over_queries_, this->dk_);
    }
  }

  __attribute__((noinline)) void add_query_gradients(float* dq) {
    for (int64_t strip = 0; strip < this->n_keys_; strip += kStrip) {
      for (int row = 0; row < this->n_rows_; row += kRowGroup) {
        const Range units = this->seen_units(row, row, strip, kStrip);
        if (units.begin >= units.end) continue;
        for (int column = 0; column < kDim; column += kOutVectors * kLanes) {
          add_gemm<kOutVectors>(this->ds_ + at_over_keys(2 * units.begin, row), kScoreRow,
                                kStripPairs, this->k_rows_ + units.begin * kDim + column, kDim,
                                kKeyFloats, units.end - units.begin, dq + row * kDim + column,
                                kDim);
        }
      }
    }
  }

  void write_key_gradients() {
    write_columns(this->dk_, static_cast<float>(this->shape_.scale), this->args_.dk);
    write_columns(this->dv_, 1.0f, this->args_.dv);
  }

  // Rows of the key block's keys, from sums that lie transposed.
  void write_columns(const float* sums, float factor, const HeadsView& out) {
    alignas(64) float rows[kLanes * kDim];
    for (int64_t j = 0; j < this->n_keys_; j += kLanes) {
      for (int c = 0; c < kDim; c += kLanes)
        transpose_block(sums + (j / kStrip * kDim + c) * kStrip + j % kStrip, kStrip, rows + c,
                        kDim);
      for (int64_t i = j; i < min_of(j + kLanes, this->n_keys_); ++i) {
        this->write_row(rows + (i - j) * kDim, factor,
                        head_row<Element>(out, this->b_, this->kv_h_, this->key_block_ + i));
      }
    }
  }

  struct PendingSoftmax {
    int buffer;  // which of s_ and dp_
    Piece piece;
    int row;        // the first, in the query block
    int pair, end;  // next pair; past the last
    int n_slots;    // overlap slots used
  };
  alignas(64) Scores s_[2];
  alignas(64) Scores dp_[2];
  PendingSoftmax pending_{};
};

#endif

}  // namespace wgpt::cpu::WGPT_TARGET
