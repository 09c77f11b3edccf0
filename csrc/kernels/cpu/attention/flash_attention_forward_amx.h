// flash_attention forward on AMX. The loops over a chunk: flash_attention_forward.h.
//
// The softmax, on the vector units, overlaps with the AMX GEMMs, a row at a time: a 3-stage software
// pipeline over groups of 32 queries.
//
//   q k^T of group i              overlapped: softmax of group i - 1
//   out += p v of group i - 2     overlapped: the rest of it
//
// With float32 split into bfloat16 terms an infinity becomes NaN: run() then returns false, and rows that
// are not finite are computed again with float32 FMAs (fp32_fallback in flash_attention.h).
#pragma once

#include "kernels/cpu/attention/flash_attention_forward.h"

namespace wgpt::cpu::WGPT_TARGET {

#if defined(__AMX_BF16__)

// Keys of a block. Three terms should fit L1; bfloat16 would pay for adding to out more often (blocks of 64
// keys take a fifth longer).
template <typename Dot>
constexpr int kAmxKeys = Dot::kTerms > 1 ? kStrip : 3 * kStrip;

template <typename Element, int kDim, typename Dot>
class AmxForward
    : public ForwardChunk<AmxForward<Element, kDim, Dot>, Element, kDim, Dot, kAmxKeys<Dot>, 3> {
  using Chunk = ForwardChunk<AmxForward, Element, kDim, Dot, kAmxKeys<Dot>, 3>;
  friend Chunk;
  using Chunk::kRowGroup, Chunk::kUnits, Chunk::kPRow, Chunk::kPUnits, Chunk::kOutVectors,
      Chunk::kKTerm, Chunk::kVTerm;
  using typename Chunk::Group;

  using Scores = RegisterBlock<kRowGroup, kVectors>;
  // Slots for overlapped work, one per four tdpbf16ps: of a strip's scores and its share of p v.
  static constexpr int kOverlapSlots =
      Dot::kTermPairs *
      (kUnits / Dot::kDepth * (kVectors / 2) + kStrip / 2 / Dot::kDepth * (kDim / kLanes / 2));

 public:
  using Chunk::Chunk;

 private:
  void attend_block() {
    int n = 0;
    for (int64_t row = 0; row < this->n_rows_; row += kRowGroup) {
      Group& group = this->start_group(n % 3, row);
      if (!group.is_seen()) continue;
      int strip = static_cast<int>(group.keys.begin) & -kStrip;
      for (;;) {
        const Piece piece = this->piece_of_group(group, strip);
        const Scores* scores = piece.n_vectors == kVectors ? gemm_scores<kVectors>(group, piece)
                                                           : gemm_scores<2>(group, piece);
        strip += kStrip;
        const bool is_last = strip >= group.keys.end;
        if (is_last && n >= 2) gemm_values(this->groups_[(n - 2) % 3]);
        exp_and_sum_until(kRowGroup);
        pending_ = {scores, &group, piece, 0, 0};
        if (is_last) break;
      }
      ++n;
    }
    if (n >= 2) gemm_values(this->groups_[(n - 2) % 3]);
    exp_and_sum_until(kRowGroup);
    if (n >= 1) gemm_values(this->groups_[(n - 1) % 3]);
    pending_ = {};
  }

  template <int kWidth>
  __attribute__((noinline)) const Scores* gemm_scores(const Group& group, const Piece& piece) {
    Scores* scores = scores_ + (pending_.scores == scores_ ? 1 : 0);
    amx_gemm_32x32<Dot, kWidth, true>(
        this->q_of(group), Dot::kTerms * kUnits, kUnits, this->k_of(piece.key), kStrip, kKTerm,
        kUnits, reinterpret_cast<float*>(scores), kStrip, [&] { exp_and_sum_overlapped(); });
    return scores;
  }

  WGPT_INLINE void exp_and_sum_overlapped() {
    const int slot = ++pending_.n_slots;
    exp_and_sum_until(min_of(kRowGroup, (slot * kRowGroup + kOverlapSlots - 1) / kOverlapSlots));
  }

  // Softmax of the pending scores, up to row `end`.
  WGPT_INLINE void exp_and_sum_until(int end) {
    if (pending_.scores == nullptr) return;
    for (int r = pending_.row; r < end; ++r) {
      if (__builtin_expect(pending_.piece.is_masked, 0)) {
        exp_and_sum_masked_row(r);
      } else {
        exp_and_sum_row<kVectors, false>(r);
      }
    }
    pending_.row = max_of(pending_.row, end);
  }

  __attribute__((noinline)) void exp_and_sum_masked_row(int r) {
    if (pending_.piece.n_vectors == kVectors) return exp_and_sum_row<kVectors, true>(r);
    exp_and_sum_row<2, true>(r);
  }

  template <int kWidth, bool kMasked>
  WGPT_INLINE void exp_and_sum_row(int r) {
    Group& group = *pending_.group;
    const int key = pending_.piece.key;
    Floats s[kWidth];
    load_scores<kMasked>(r, s);
    const Floats largest = Chunk::largest_of(s);
    if (__builtin_expect(any_above(largest, splat(this->limit_[group.row + r])), 0))
      update_group_max<kWidth, kMasked>();
    this->exp_and_sum(group, key, r, s);
  }

  // Updates the maxima of all rows of the group, which tend to rise together. Only a row with a NaN, which
  // hides its largest score, may ask again.
  template <int kWidth, bool kMasked>
  __attribute__((noinline)) void update_group_max() {
    if (this->is_max_updated(*pending_.group, pending_.piece.key)) return;
    Floats largest[kRowGroup];
    for (int r = 0; r < kRowGroup; ++r) {
      Floats s[kWidth];
      load_scores<kMasked>(r, s);
      largest[r] = Chunk::largest_of(s);
    }
    this->update_row_max(*pending_.group, pending_.piece.key, largest);
  }

  template <bool kMasked, int kWidth>
  WGPT_INLINE void load_scores(int r, Floats (&s)[kWidth]) {
    WGPT_UNROLL for (int v = 0; v < kWidth; ++v) s[v] = (*pending_.scores)[r][v];
    if constexpr (kMasked) this->mask_scores(*pending_.group, pending_.piece.key, r, s);
  }

  // out += p v of a group.
  __attribute__((noinline)) void gemm_values(const Group& group) {
    this->rescale(group);
    const int64_t first = group.keys.begin / Dot::kPerUnit;
    for (int column = 0; column < kDim; column += kOutVectors * kLanes) {
      amx_gemm_32x32<Dot, kOutVectors, false>(
          this->p_of(group, 0, group.keys.begin), kPRow, kPUnits, this->v_ + first * kDim + column,
          kDim, kVTerm, group.keys.end / Dot::kPerUnit - first,
          this->out_ + group.row * kDim + column, kDim, [&] { exp_and_sum_overlapped(); });
    }
  }

  struct PendingSoftmax {
    const Scores* scores;
    Group* group;
    Piece piece;
    int row, n_slots;  // next row; overlap slots used
  };
  alignas(64) Scores scores_[2];
  PendingSoftmax pending_{};
};

#endif

}  // namespace wgpt::cpu::WGPT_TARGET
