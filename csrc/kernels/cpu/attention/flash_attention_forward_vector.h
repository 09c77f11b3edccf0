// flash_attention forward with vector FMAs. The loops over a chunk: flash_attention_forward.h.
//
// Query blocks of four groups of six; the softmax never leaves the register block that holds the scores.
// On the diagonal single vectors of keys are skipped.
#pragma once

#include "kernels/cpu/attention/flash_attention_forward.h"

namespace wgpt::cpu::WGPT_TARGET {

// Measured on one Zen 5 thread, D 32 to 128, both types: key blocks of 128 to 256 and query blocks of 24
// or 48 differ by no more than the noise (3 %).
template <typename Element, int kDim, typename Dot>
class VectorForward
    : public ForwardChunk<VectorForward<Element, kDim, Dot>, Element, kDim, Dot, 192, 4> {
  using Chunk = ForwardChunk<VectorForward, Element, kDim, Dot, 192, 4>;
  friend Chunk;
  using Chunk::kRowGroup, Chunk::kUnits, Chunk::kPRow, Chunk::kOutVectors;
  using typename Chunk::Group;
  static constexpr int kGroups = 4, kKeys = 192;
  static constexpr int kJoined =
      kVectors / kOutVectors;  // groups that fill the register block of p v

 public:
  using Chunk::Chunk;

 private:
  void attend_block() {
    for (int64_t row = 0; row < this->n_rows_; row += kGroups * kRowGroup) {
      for (int g = 0; g < kGroups; ++g) this->start_group(g, row + g * kRowGroup);
      for (int strip = 0; strip < kKeys; strip += kStrip) {
        for (Group& group : this->groups_) {
          if (group.keys.begin < strip + kStrip && strip < group.keys.end)
            attend_piece(group, this->piece_of_group(group, strip));
        }
      }
      for (const Group& group : this->groups_) this->rescale(group);
      for (int column = 0; column < kDim; column += kOutVectors * kLanes) {
        for (int g = 0; g < kGroups; g += kJoined) add_values_of(g, column);
      }
    }
  }

  void attend_piece(Group& group, const Piece& piece) {
    if (!piece.is_masked) return attend_keys<kVectors, false>(group, piece.key);
    with_width(piece.n_vectors,
               [&](auto width) { attend_keys<width.value, true>(group, piece.key); });
  }

  // p = 2^(scale s - m) for kWidth vectors of keys; masked where some rows do not see all of them.
  template <int kWidth, bool kMasked>
  __attribute__((noinline)) void attend_keys(Group& group, int key) {
    RegisterBlock<kRowGroup, kWidth> s;
    gemm_fresh_block<Dot>(this->q_of(group), kUnits, 1, this->k_of(key), kStrip, kUnits, s);
    if constexpr (kMasked) {
      WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) this->mask_scores(group, key, r, s[r]);
    }
    const float* limit = this->limit_ + group.row;
    Floats worst = splat(-1.0f);
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      worst = max_or_second(Chunk::largest_of(s[r]) - splat(limit[r]), worst);
    }
    if (__builtin_expect(any_above(worst, splat(0.0f)), 0)) {
      Floats largest[kRowGroup];
      WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) largest[r] = Chunk::largest_of(s[r]);
      this->update_row_max(group, key, largest);
    }
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) this->exp_and_sum(group, key, r, s[r]);
  }

  // kJoined groups from g on, in one register block where they see the same keys.
  WGPT_INLINE void add_values_of(int g, int column) {
    const Group* group = this->groups_ + g;
    bool is_same = true;
    for (int j = 1; j < kJoined; ++j) {
      is_same = is_same && group[j].keys.begin == group[0].keys.begin &&
                group[j].keys.end == group[0].keys.end;
    }
    if (is_same) {
      if (group->is_seen()) add_values<kJoined>(*group, column);
      return;
    }
    for (int j = 0; j < kJoined; ++j) {
      if (group[j].is_seen()) add_values<1>(group[j], column);
    }
  }

  // out += p v for n groups and one strip of channels.
  template <int n>
  WGPT_INLINE void add_values(const Group& group, int column) {
    RegisterBlock<n * kRowGroup, kOutVectors> sums;
    const int64_t first = group.keys.begin / Dot::kPerUnit;
    gemm_fresh_block<Dot>(this->p_of(group, 0, group.keys.begin), kPRow, 1,
                          this->v_ + first * kDim + column, kDim,
                          group.keys.end / Dot::kPerUnit - first, sums);
    add_block(sums, this->out_ + group.row * kDim + column, kDim);
  }
};

}  // namespace wgpt::cpu::WGPT_TARGET
