// mel_embed by tiles of consecutive steps. Formula and shapes: kernels/mel_embed.h.
//
// A tile's frames are normalised once into one buffer, and the slice of step t is simply the buffer
// from frame t r on: overlapping rows, never unfolded. Both products, z = x weight^T and d_weight =
// g^T x, read them in place through the micro-kernel. FLOPs: 2 K Cm a step forward, 4 K Cm backward
// (z again, then d_weight), K = (c + r) M; at K = 64 the GELU costs as much as the product.
//
// With bfloat16 products the normalised frames and g are rounded to bfloat16, as torch's are; the
// sums, the bias, the GELU and its slope stay float32.
#pragma once

#include "kernels/cpu/mel_embed_rows.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/token_concat_body.h"

namespace wgpt::cpu::WGPT_TARGET {

constexpr int kMelSteps = 96;  // steps of a tile: frames, pre-activations and gradients stay in L2
constexpr int kMelTilesPerChunk = 4;  // tiles of one partial d_weight
constexpr int kMelMaxChunks = 64;

// weight^T and bias as the b operand: [strip of kStrip channels][K][channel], then bias; zero past
// the last channel.
struct PackedMelWeight {
  const float *weight, *bias;
};

template <typename Element, typename Dot>
PackedMelWeight pack_mel_weight(const MelEmbedShape& shape, const void* weight, const void* bias) {
  thread_local Scratch scratch;  // of the calling thread; the others only read it
  const int64_t k = mel_slice_size(shape), n = round_up(shape.channels, kStrip);
  auto* out =
      static_cast<float*>(scratch.reserve(static_cast<size_t>((k + 1) * n) * sizeof(float)));
  std::memset(out, 0, static_cast<size_t>((k + 1) * n) * sizeof(float));
  for (int64_t c = 0; c < shape.channels; ++c) {
    const Element* row = static_cast<const Element*>(weight) + c * k;
    float* column = out + c / kStrip * kStrip * (k / Dot::kPerUnit) + c % kStrip;
    for (int64_t i = 0; i < k / Dot::kPerUnit; ++i) {
      if constexpr (Dot::kPerUnit == 1) {
        column[i * kStrip] = widen(row[i]);
      } else {
        std::memcpy(column + i * kStrip, row + 2 * i, sizeof(float));
      }
    }
    out[k * n + c] = widen(static_cast<const Element*>(bias)[c]);
  }
  return {out, out + k * n};
}

// Calls body(first, Constant<width>{}) for vectors [0, n_vectors), kVectors at a time.
template <typename Body>
WGPT_INLINE void for_each_width(int64_t n_vectors, Body&& body) {
  for (int64_t first = 0; first < n_vectors; first += kVectors) {
    with_width(static_cast<int>(min_of<int64_t>(kVectors, n_vectors - first)),
               [&](auto width) { body(first, width); });
  }
}

template <typename Element, typename Frame, typename Dot, typename Args>
class MelTile {
 public:
  static constexpr int kPer = Dot::kPerUnit;

  MelTile(const Args& args, PackedMelWeight packed)
      : args_(args), shape_(args.shape), packed_(packed) {
    k_ = mel_slice_size(shape_);
    x_row_ = shape_.frames_per_step * shape_.mels;
    z_row_ = round_up(shape_.channels, kRowGroup * kLanes);
    across_row_ = k_ + kLanes;  // not a power of two, for the sake of L1's sets
    const int64_t n_x = round_up(kMelSteps * x_row_ + k_ + kStrip, kLanes);
    const int64_t n_across = kPer == 1 ? 0 : kMelSteps / 2 * (across_row_ + z_row_);
    x_ = static_cast<float*>(thread_scratch(
        static_cast<size_t>((kPer == 1 ? 1 : 2) * n_x + kMelSteps * z_row_ + n_across) *
        sizeof(float)));
    z_ = x_ + n_x;
    units_ = kPer == 1 ? x_ : z_ + kMelSteps * z_row_;
    x_across_ = units_ + n_x;
    g_across_ = x_across_ + kMelSteps / 2 * across_row_;
  }

  static int64_t tiles_per_sequence(const MelEmbedShape& shape) {
    return ceil_div(shape.steps, kMelSteps);
  }

  // z = weight x + bias for the steps of a tile.
  void project(int64_t tile) {
    b_ = tile / tiles_per_sequence(shape_);
    t_ = tile % tiles_per_sequence(shape_) * kMelSteps;
    n_ = min_of<int64_t>(kMelSteps, shape_.steps - t_);
    const int64_t first = t_ * shape_.frames_per_step - shape_.context_frames;
    const int64_t n_frames = n_ * shape_.frames_per_step + shape_.context_frames;
    normalise_frames<float, Frame>(shape_, args_.frames, args_.mean, args_.inv_std, b_, first,
                                   n_frames, x_);
    if constexpr (kPer == 2) {
      clear_floats(x_ + n_frames * shape_.mels, x_row_);  // the partner of an odd last step
      round_row(x_, n_frames * shape_.mels + x_row_, rounded());
    }
    for_each_width(ceil_div(shape_.channels, kLanes), [&](int64_t first_vector, auto width) {
      const int64_t c = first_vector * kLanes;
      for (int64_t row = 0; row < n_; row += kRowGroup) project_group(row, c, width);
    });
  }

  // y = gelu(z) + pos
  void activate() {
    const int64_t cm = shape_.channels, n_vector = cm - cm % kLanes;
    for (int64_t i = 0; i < n_; ++i) {
      const float* z = z_ + i * z_row_;
      const Element* pos =
          args_.pos == nullptr ? nullptr : static_cast<const Element*>(args_.pos) + (t_ + i) * cm;
      Element* y = static_cast<Element*>(args_.y) + (b_ * shape_.steps + t_ + i) * cm;
      for (int64_t c = 0; c < n_vector; c += kLanes) {
        const Floats active = gelu(load(z + c));
        store(y + c, pos == nullptr ? active : active + load(pos + c));
      }
      for (int64_t c = n_vector; c < cm; ++c) {
        const float active = first_lane(gelu(splat(z[c])));
        y[c] = narrow<Element>(pos == nullptr ? active : active + widen(pos[c]));
      }
    }
  }

  // partial: d_weight (Cm rounded up, K rounded up), then d_bias; z becomes g.
  void add_gradients(float* partial) {
    const int64_t cm = shape_.channels, n_vector = cm - cm % kLanes,
                  row_floats = round_up(k_, kLanes);
    float* d_bias = partial + round_up(cm, kRowGroup) * row_floats;
    for (int64_t i = 0; i < n_; ++i) {
      float* g = z_ + i * z_row_;
      const Element* d_y =
          static_cast<const Element*>(args_.d_y) + (b_ * shape_.steps + t_ + i) * cm;
      for (int64_t c = 0; c < n_vector; c += kLanes) {
        const Floats slope = load(d_y + c) * gelu_slope(load(g + c));
        store(g + c, slope);
        store(d_bias + c, load(d_bias + c) + slope);
      }
      for (int64_t c = n_vector; c < cm; ++c) {
        g[c] = widen(d_y[c]) * first_lane(gelu_slope(splat(g[c])));
        d_bias[c] += g[c];
      }
    }
    if constexpr (kPer == 2) pair_rows();
    const float *g = kPer == 1 ? z_ : g_across_, *x = kPer == 1 ? x_ : x_across_;
    const int64_t x_row = kPer == 1 ? x_row_ : across_row_;
    for_each_width(row_floats / kLanes, [&](int64_t first_vector, auto width) {
      const int64_t column = first_vector * kLanes;
      for (int64_t c = 0; c < cm; c += kRowGroup) {
        Tile<kRowGroup, width.value> sums;
        fill_tile(sums, 0.0f);
        multiply_tile<Dot>(g + c, 1, z_row_, x + column, x_row, ceil_div(n_, kPer), sums);
        add_tile(sums, nullptr, partial + c * row_floats + column, row_floats);
      }
    });
  }

 private:
  Element* rounded() { return reinterpret_cast<Element*>(units_); }

  // Pairs of steps of x and g, for the product over steps; an odd last step has a partner of zeros.
  void pair_rows() {
#if defined(__AVX512BF16__)
    clear_floats(z_ + n_ * z_row_, n_ % 2 * z_row_);
    for (int64_t i = 0; i < n_; i += 2) {
      const Element *first = rounded() + i * x_row_, *second = first + x_row_;
      float *x = x_across_ + i / 2 * across_row_, *g = g_across_ + i / 2 * z_row_;
      for (int64_t k = 0; k < k_; k += 2 * kLanes) interleave(first + k, second + k, x + k);
      for (int64_t c = 0; c < z_row_; c += kLanes) {
        store(g + c, narrow_pairs(load(z_ + i * z_row_ + c), load(z_ + (i + 1) * z_row_ + c)));
      }
    }
#endif
  }

  template <typename Width>
  WGPT_INLINE void project_group(int64_t row, int64_t c, Width) {
    Tile<kRowGroup, Width::value> z;
    WGPT_UNROLL for (int v = 0; v < Width::value; ++v) {
      const Floats bias = load(packed_.bias + c + v * kLanes);
      WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) z[r][v] = bias;
    }
    const int64_t x_row = x_row_ / kPer, k = k_ / kPer;
    multiply_tile<Dot>(units_ + row * x_row, x_row, 1, packed_.weight + c * k, kStrip, k, z);
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      WGPT_UNROLL for (int v = 0; v < Width::value; ++v)
          store(z_ + (row + r) * z_row_ + c + v * kLanes, z[r][v]);
    }
  }

  const Args& args_;
  const MelEmbedShape& shape_;
  const PackedMelWeight packed_;
  int64_t k_, x_row_, z_row_, across_row_, b_ = 0, t_ = 0, n_ = 0;
  float *x_, *z_;  // frames (steps lie x_row_ apart), pre-activations or their gradients
  float *units_, *x_across_, *g_across_;  // the same as units of Dot: along a row, over two rows
};

template <typename Element, typename Frame, typename Dot>
void mel_embed_forward_by_tiles(const MelEmbedForward& args, const Executor& executor) {
  using Tiles = MelTile<Element, Frame, Dot, MelEmbedForward>;
  const PackedMelWeight packed = pack_mel_weight<Element, Dot>(args.shape, args.weight, args.bias);
  run_tasks(executor, args.shape.batch * Tiles::tiles_per_sequence(args.shape), [&](int64_t task) {
    Tiles tile(args, packed);
    tile.project(task);
    tile.activate();
  });
}

// How the tiles are cut for d_weight: a function of the shape alone.
struct MelChunks {
  int64_t n_tiles, tiles_per_chunk, n_chunks, partial_floats;
};

inline MelChunks mel_chunks(const MelEmbedShape& shape) {
  const int64_t n_tiles = shape.batch * ceil_div(shape.steps, kMelSteps);
  const int64_t per_chunk = max_of<int64_t>(kMelTilesPerChunk, ceil_div(n_tiles, kMelMaxChunks));
  const int64_t channels = round_up(shape.channels, kRowGroup),
                row = round_up(mel_slice_size(shape), kLanes);
  return {n_tiles, per_chunk, ceil_div(n_tiles, per_chunk),
          round_up(channels * row + shape.channels, kLanes)};
}

template <typename Element, typename Frame, typename Dot>
void mel_embed_backward_by_tiles(const MelEmbedBackward& args, const Executor& executor) {
  using Tiles = MelTile<Element, Frame, Dot, MelEmbedBackward>;
  const MelEmbedShape& shape = args.shape;
  const MelChunks chunks = mel_chunks(shape);
  const PackedMelWeight packed = pack_mel_weight<Element, Dot>(shape, args.weight, args.bias);
  auto* partials = static_cast<float*>(args.workspace);
  run_tasks(executor, chunks.n_chunks, [&](int64_t chunk) {
    float* partial = partials + chunk * chunks.partial_floats;
    clear_floats(partial, chunks.partial_floats);
    Tiles tile(args, packed);
    for (int64_t i = 0; i < chunks.tiles_per_chunk; ++i) {
      const int64_t index = chunk * chunks.tiles_per_chunk + i;
      if (index >= chunks.n_tiles) break;
      tile.project(index);
      tile.add_gradients(partial);
    }
  });
  const int64_t k = mel_slice_size(shape), row = round_up(k, kLanes), cm = shape.channels;
  run_tasks(executor, cm + 1, [&](int64_t c) {  // a row of d_weight each, and d_bias
    const int64_t n = c < cm ? k : cm, offset = c < cm ? c * row : round_up(cm, kRowGroup) * row;
    auto* sum = static_cast<float*>(thread_scratch(static_cast<size_t>(n) * sizeof(float)));
    clear_floats(sum, n);
    for (int64_t i = 0; i < chunks.n_chunks; ++i)
      accumulate_row(partials + i * chunks.partial_floats + offset, n, sum);
    round_row(
        sum, n,
        c < cm ? static_cast<Element*>(args.d_weight) + c * k : static_cast<Element*>(args.d_bias));
  });
}

}  // namespace wgpt::cpu::WGPT_TARGET
