// flash_attention forward on the tile registers of AMX. The way through a chunk: flash_attention_forward.h.
//
// Products leave the vector units idle, so the rest of the work is done in their shadow, a row at a
// time, and three groups of 32 queries are on their way at once:
//
//   scores of group i            meanwhile scores of group i - 1 become p
//   out += p v of group i - 2    the same
//
// Of float32 in planes, infinities and what they meet become NaN: a chunk says so, and rows that are
// not finite are made again on vectors (flash_attention.h).
#pragma once

#include "kernels/cpu/attention/flash_attention_forward.h"

namespace wgpt::cpu::WGPT_TARGET {

#if defined(__AMX_BF16__)

// What lies in planes should stay in L1; bfloat16 would pay for adding to out more often: with blocks of
// 64 keys a fifth of its time.
template <typename Dot>
constexpr int kTileKeys = Dot::kPlanes > 1 ? kStrip : 3 * kStrip;

template <typename Element, int kDim, typename Dot>
class TileForward
    : public ForwardChunk<TileForward<Element, kDim, Dot>, Element, kDim, Dot, kTileKeys<Dot>, 3> {
  using Chunk = ForwardChunk<TileForward, Element, kDim, Dot, kTileKeys<Dot>, 3>;
  friend Chunk;
  using Chunk::kRowGroup, Chunk::kUnits, Chunk::kPRow, Chunk::kPUnits, Chunk::kOutVectors,
      Chunk::kKPlane, Chunk::kVPlane;
  using typename Chunk::Group;

  using Scores = Tile<kRowGroup, kVectors>;
  // Shadows, of four tile products each: of a strip's scores and its part of p v.
  static constexpr int kShadows = Dot::kRounds * (kUnits / Dot::kDepth * (kVectors / 2) +
                                                  kStrip / 2 / Dot::kDepth * (kDim / kLanes / 2));

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
        const Piece piece = piece_of<Chunk::kStep>(group.visible, this->block_, strip);
        const Scores* scores = piece.n_vectors == kVectors ? multiply_scores<kVectors>(group, piece)
                                                           : multiply_scores<2>(group, piece);
        strip += kStrip;
        const bool is_last = strip >= group.keys.end;
        if (is_last && n >= 2) multiply_values(this->groups_[(n - 2) % 3]);
        soften_until(kRowGroup);
        softening_ = {scores, &group, piece, 0, 0};
        if (is_last) break;
      }
      ++n;
    }
    if (n >= 2) multiply_values(this->groups_[(n - 2) % 3]);
    soften_until(kRowGroup);
    if (n >= 1) multiply_values(this->groups_[(n - 1) % 3]);
    softening_ = {};
  }

  template <int kWidth>
  __attribute__((noinline)) const Scores* multiply_scores(const Group& group, const Piece& piece) {
    Scores* scores = scores_ + (softening_.scores == scores_ ? 1 : 0);
    multiply_tiles<Dot, kWidth, true>(
        this->q_of(group), Dot::kPlanes * kUnits, kUnits, this->k_of(piece.key), kStrip, kKPlane,
        kUnits, reinterpret_cast<float*>(scores), kStrip, [&] { soften_in_shadow(); });
    return scores;
  }

  WGPT_INLINE void soften_in_shadow() {
    const int shadow = ++softening_.n_shadows;
    soften_until(min_of(kRowGroup, (shadow * kRowGroup + kShadows - 1) / kShadows));
  }

  // The scores made before the last become p, up to row `end`.
  WGPT_INLINE void soften_until(int end) {
    if (softening_.scores == nullptr) return;
    const Floats scale = splat(this->scale_);
    for (int r = softening_.row; r < end; ++r) {
      if (__builtin_expect(softening_.piece.is_masked, 0)) {
        soften_masked_row(r, scale);
      } else {
        soften_row<kVectors, false>(r, scale);
      }
    }
    softening_.row = max_of(softening_.row, end);
  }

  __attribute__((noinline)) void soften_masked_row(int r, Floats scale) {
    if (softening_.piece.n_vectors == kVectors) return soften_row<kVectors, true>(r, scale);
    soften_row<2, true>(r, scale);
  }

  template <int kWidth, bool kMasked>
  WGPT_INLINE void soften_row(int r, Floats scale) {
    Group& group = *softening_.group;
    const int key = softening_.piece.key;
    Floats s[kWidth];
    load_scores<kMasked>(r, s);
    const Floats largest = Chunk::largest_of(s);
    if (__builtin_expect(any_above(largest, splat(this->limit_[group.row + r])), 0))
      raise_group<kWidth, kMasked>();
    this->soften(group, key, r, scale, s);
  }

  // The maxima of all rows of the group, which tend to rise at once: later rows find theirs raised. Only
  // one with a NaN, which hides its largest score, may ask again.
  template <int kWidth, bool kMasked>
  __attribute__((noinline)) void raise_group() {
    if (this->is_raised(*softening_.group, softening_.piece.key)) return;
    Floats largest[kRowGroup];
    for (int r = 0; r < kRowGroup; ++r) {
      Floats s[kWidth];
      load_scores<kMasked>(r, s);
      largest[r] = Chunk::largest_of(s);
    }
    this->raise_maxima(*softening_.group, softening_.piece.key, largest);
  }

  template <bool kMasked, int kWidth>
  WGPT_INLINE void load_scores(int r, Floats (&s)[kWidth]) {
    WGPT_UNROLL for (int v = 0; v < kWidth; ++v) s[v] = (*softening_.scores)[r][v];
    if constexpr (kMasked) this->mask_scores(*softening_.group, softening_.piece.key, r, s);
  }

  // out += p v of a group.
  __attribute__((noinline)) void multiply_values(const Group& group) {
    this->rescale(group);
    const int64_t first = group.keys.begin / Dot::kPerUnit;
    for (int column = 0; column < kDim; column += kOutVectors * kLanes) {
      multiply_tiles<Dot, kOutVectors, false>(
          this->p_of(group, 0, group.keys.begin), kPRow, kPUnits, this->v_ + first * kDim + column,
          kDim, kVPlane, group.keys.end / Dot::kPerUnit - first,
          this->out_ + group.row * kDim + column, kDim, [&] { soften_in_shadow(); });
    }
  }

  struct Softening {
    const Scores* scores;
    Group* group;
    Piece piece;
    int row, n_shadows;  // the next, and products that it had for that
  };
  alignas(64) Scores scores_[2];
  Softening softening_{};
};

#endif

}  // namespace wgpt::cpu::WGPT_TARGET
