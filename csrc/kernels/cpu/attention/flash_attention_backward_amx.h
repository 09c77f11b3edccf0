// flash_attention backward on the tile registers of AMX. The way through a head:
// flash_attention_backward.h.
//
// The left operand of a tile product cannot be read across, so dv^T += d_out^T p and dk^T += q^T ds.
// Products leave the vector units idle: while the two of a group's scores are made, those of the
// group before become p and ds, two rows at a time. Gradients are summed where they lie.
//
// Of float32 in planes, infinities and what they meet become NaN: a task says so, and rows that are
// not finite are made again on vectors (flash_attention.h).
#pragma once

#include "kernels/cpu/attention/flash_attention_backward.h"

namespace wgpt::cpu::WGPT_TARGET {

#if defined(__AMX_BF16__)

// Keys of a block: for each, every tile of queries is packed again.
template <typename Dot, int kDim>
constexpr int kTileGradientKeys = Dot::kPlanes > 1 && kDim < 128 ? 384 : 192;

template <typename Element, int kDim, typename Dot>
class TileBackward : public GradientTask<TileBackward<Element, kDim, Dot>, Element, kDim, Dot,
                                         kTileGradientKeys<Dot, kDim>, 64> {
  using Task = GradientTask<TileBackward, Element, kDim, Dot, kTileGradientKeys<Dot, kDim>, 64>;
  friend Task;
  using Task::kPlanes, Task::kRowGroup, Task::kUnits, Task::kOutVectors, Task::kKeyFloats,
      Task::kTileFloats;
  static constexpr int kKeys = Task::kGradientKeys, kQueries = Task::kGradientQueries;
  static constexpr int kPairs = kQueries / 2;  // of queries
  // What belongs to a strip of keys lies together, so that it does not compete for the same sets of
  // L1: p_across_, ds_across_ as [strip][plane][pair of queries][key], ds_ as [strip][query][plane]
  // [pair of keys], dk_ and dv_ as [strip][channel][key].
  static constexpr int64_t kPlane = kPairs * kStrip, kStripScores = kPlanes * kPlane;
  static constexpr int kStripPairs = kStrip / 2, kScoreRow = kPlanes * kStripPairs;

  using Scores = Tile<kRowGroup, kVectors>;
  // Shadows, of four tile products each, of the two products of a group's scores.
  static constexpr int kShadows = 2 * Dot::kRounds * (kUnits / Dot::kDepth) * (kVectors / 2);
  static constexpr int kRowPairs = kRowGroup / 2;

 public:
  using Task::Task;

 private:
  // A tile of rows as [channel][plane][pair of rows].
  void pack_across(Rows<Element> rows, float* out) {
    float* pairs = this->pairs_;
    pack_row_pairs<Dot, kDim>(rows, this->n_rows_, Task::kGradientQueries, pairs, kTileFloats);
    for (int s = 0; s < kPlanes; ++s) {
      for (int c = 0; c < kDim; c += kLanes) {
        for (int pair = 0; pair < kPairs; pair += kLanes) {
          transpose_block(pairs + s * kTileFloats + pair * kDim + c, kDim,
                          out + (c * kPlanes + s) * kPairs + pair, kPlanes * kPairs);
        }
      }
    }
  }

  static int64_t across(int64_t key, int64_t row) {
    return key / kStrip * kStripScores + row / 2 * kStrip + key % kStrip;
  }
  static int64_t along(int64_t key, int64_t row) {
    return key / kStrip * kStripScores + row * kScoreRow + key % kStrip / 2;
  }

  template <bool kDkDv>
  void clear_scores(int strip, int row) {
    for (int s = 0; s < kPlanes; ++s) {
      const int64_t at = s * kPlane + across(strip, row);
      if constexpr (kDkDv) clear_floats(this->p_across_ + at, kRowPairs * kStrip);
      if constexpr (kDkDv) clear_floats(this->ds_across_ + at, kRowPairs * kStrip);
    }
    clear_floats(this->ds_ + along(strip, row), kRowGroup * kScoreRow);
  }

  template <bool kDkDv>
  void score() {
    this->template for_pieces<kDkDv>([&](const Piece& piece, int row) {
      if (piece.n_vectors == kVectors) return multiply_scores<kVectors, kDkDv>(piece, row);
      multiply_scores<2, kDkDv>(piece, row);
    });
    soften_until<kDkDv>(kRowPairs);
    softening_ = {};
  }

  template <int kWidth, bool kDkDv>
  __attribute__((noinline)) void multiply_scores(const Piece& piece, int row) {
    constexpr int kRow = kPlanes * kUnits;
    const int64_t columns = piece.key / kStrip * (kStrip * kUnits) + piece.key % kStrip;
    const int turn = softening_.turn ^ 1;
    const auto shadow = [&] { soften_in_shadow<kDkDv>(); };
    multiply_tiles<Dot, kWidth, true>(this->q_ + row * kRow, kRow, kUnits,
                                      this->k_columns_ + columns, kStrip, kKeyFloats, kUnits,
                                      reinterpret_cast<float*>(s_ + turn), kStrip, shadow);
    multiply_tiles<Dot, kWidth, true>(this->d_out_ + row * kRow, kRow, kUnits,
                                      this->v_columns_ + columns, kStrip, kKeyFloats, kUnits,
                                      reinterpret_cast<float*>(dp_ + turn), kStrip, shadow);
    soften_until<kDkDv>(kRowPairs);
    softening_ = {turn, piece, row, 0, kRowPairs, 0};
  }

  template <bool kDkDv>
  WGPT_INLINE void soften_in_shadow() {
    const int shadow = ++softening_.n_shadows;
    soften_until<kDkDv>(min_of(kRowPairs, (shadow * kRowPairs + kShadows - 1) / kShadows));
  }

  // The scores made last become p and ds, up to pair `end` of their rows.
  template <bool kDkDv>
  WGPT_INLINE void soften_until(int end) {
    end = min_of(end, softening_.end);
    for (int pair = softening_.pair; pair < end; ++pair) {
      if (__builtin_expect(softening_.piece.is_masked, 0)) {
        soften_masked_pair<kDkDv>(2 * pair);
      } else {
        soften_pair<kVectors, false, kDkDv>(2 * pair);
      }
    }
    softening_.pair = max_of(softening_.pair, end);
  }

  template <bool kDkDv>
  __attribute__((noinline)) void soften_masked_pair(int r) {
    if (softening_.piece.n_vectors == kVectors) return soften_pair<kVectors, true, kDkDv>(r);
    soften_pair<2, true, kDkDv>(r);
  }

  template <int kWidth, bool kMasked, bool kDkDv>
  WGPT_INLINE void soften_pair(int r) {
    const Scores &s = s_[softening_.turn], &d = dp_[softening_.turn];
    const int row = softening_.row + r, key = softening_.piece.key;
    const Floats scale = splat(static_cast<float>(this->shape_.scale));
    Floats p[2][kWidth], ds[2][kWidth];
    WGPT_UNROLL for (int i = 0; i < 2; ++i) {
      const Floats lse = splat(-this->tile_lse_[row + i]);
      const Floats delta = splat(this->tile_delta_[row + i]);
      WGPT_UNROLL for (int v = 0; v < kWidth; ++v) {
        p[i][v] = exp2_of<Dot::kExact>(fma(s[r + i][v], scale, lse) * splat(kLog2E));
        ds[i][v] = (d[r + i][v] - delta) * p[i][v];
      }
      if constexpr (kMasked) {
        this->mask(softening_.piece, row + i, p[i]);
        this->mask(softening_.piece, row + i, ds[i]);
      }
      store_planes<Dot>(this->ds_ + along(key, row + i), kStripPairs, ds[i]);
    }
    if constexpr (!kDkDv) return;
    store_pairs_across<Dot>(this->p_across_ + across(key, row), kPlane, p[0], p[1]);
    store_pairs_across<Dot>(this->ds_across_ + across(key, row), kPlane, ds[0], ds[1]);
  }

  // out[r, :] += sum over n units of a[r, k] b[k, :], kRowGroup rows, kColumns vectors.
  template <int kColumns>
  static WGPT_INLINE void add_product(const float* a, int64_t a_row, int64_t a_plane,
                                      const float* b, int64_t b_step, int64_t b_plane, int64_t n,
                                      float* out, int64_t out_row) {
    multiply_tiles<Dot, kColumns, false>(a, a_row, a_plane, b, b_step, b_plane, n, out, out_row,
                                         [] {});
  }

  // dv^T and dk^T: strips of keys by groups of channels.
  __attribute__((noinline)) void add_key_gradients() {
    constexpr int kChannel = kPlanes * kPairs;
    for (int64_t j = 0; j < this->n_keys_; j += kStrip) {
      const Range units = this->seeing_units(j, kStrip);
      if (units.begin >= units.end) continue;
      const int64_t b = across(j, 2 * units.begin), n = units.end - units.begin;
      const auto add = [&](const float* across, const float* scores, float* sums) {
        for (int c = 0; c < kDim; c += kRowGroup) {
          add_product<kVectors>(across + c * kChannel + units.begin, kChannel, kPairs, scores + b,
                                kStrip, kPlane, n, sums + (j / kStrip * kDim + c) * kStrip, kStrip);
        }
      };
      add(this->d_out_across_, this->p_across_, this->dv_);
      add(this->q_across_, this->ds_across_, this->dk_);
    }
  }

  __attribute__((noinline)) void add_query_gradients(float* dq) {
    for (int64_t strip = 0; strip < this->n_keys_; strip += kStrip) {
      for (int row = 0; row < this->n_rows_; row += kRowGroup) {
        const Range units = this->seen_units(row, row, strip, kStrip);
        if (units.begin >= units.end) continue;
        for (int column = 0; column < kDim; column += kOutVectors * kLanes) {
          add_product<kOutVectors>(this->ds_ + along(2 * units.begin, row), kScoreRow, kStripPairs,
                                   this->k_rows_ + units.begin * kDim + column, kDim, kKeyFloats,
                                   units.end - units.begin, dq + row * kDim + column, kDim);
        }
      }
    }
  }

  void write_key_gradients() {
    write_columns(this->dk_, static_cast<float>(this->shape_.scale), this->args_.dk);
    write_columns(this->dv_, 1.0f, this->args_.dv);
  }

  // The block's keys from sums that lie by channels.
  void write_columns(const float* sums, float factor, const HeadsView& out) {
    alignas(64) float rows[kLanes * kDim];
    for (int64_t j = 0; j < this->n_keys_; j += kLanes) {
      for (int c = 0; c < kDim; c += kLanes)
        transpose_block(sums + (j / kStrip * kDim + c) * kStrip + j % kStrip, kStrip, rows + c,
                        kDim);
      for (int64_t i = j; i < min_of(j + kLanes, this->n_keys_); ++i) {
        this->write_row(rows + (i - j) * kDim, factor,
                        head_row<Element>(out, this->b_, this->h_, this->block_ + i));
      }
    }
  }

  struct Softening {
    int turn;  // which of s_ and dp_
    Piece piece;
    int row;        // the first, in the tile
    int pair, end;  // the next, and behind the last
    int n_shadows;  // that it had
  };
  alignas(64) Scores s_[2];
  alignas(64) Scores dp_[2];
  Softening softening_{};
};

#endif

}  // namespace wgpt::cpu::WGPT_TARGET
