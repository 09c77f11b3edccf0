// mel_embed by tiles of consecutive steps. Formula and shapes: kernels/mel_embed.h.
//
// A tile's frames are normalised once into one buffer, and the slice of step t is simply the buffer
// from frame t r on: overlapping rows, never unfolded. Both products, z = x weight^T and d_weight =
// g^T x, read them in place through the micro-kernel. FLOPs: 2 K Cm a step forward and as many
// backward, K = (c + r) M; at K = 64 the GELU costs nearly as much as a product.
//
// With bfloat16 products the normalised frames and g are rounded to bfloat16, as torch's are; the
// sums, the bias and the GELU are float32.
#pragma once

#include "kernels/cpu/mel_embed_rows.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/token_concat_body.h"

namespace wgpt::cpu::WGPT_TARGET {

constexpr int kMelSteps = 96;  // steps of a tile: frames, pre-activations and gradients stay in L2
constexpr int kMelTilesPerChunk = 4;  // tiles of one partial d_weight
constexpr int kMelMaxChunks = 64;
constexpr int kMelRows = 48;  // partial sums have rows for a multiple of every Dot's

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

// A tile's normalised frames. The slice of step t starts at x + t x_row, overlapping its neighbours.
template <typename Frame, typename Dot>
class MelSlices {
 public:
  static constexpr int kPer = Dot::kPerUnit;

  explicit MelSlices(const MelEmbedShape& shape) : shape_(shape) {
    k = mel_slice_size(shape);
    row = shape.frames_per_step * shape.mels;
  }

  // Floats that one buffer of slices needs; with pairs a second, rounded, buffer follows.
  int64_t buffer_floats() const { return round_up(kMelSteps * row + k + kStrip, kLanes); }
  int64_t n_floats() const { return (kPer == 1 ? 1 : 2) * buffer_floats(); }
  void place(float* buffer) {
    x_ = buffer;
    units = kPer == 1 ? x_ : x_ + buffer_floats();
  }

  static int64_t tiles_per_sequence(const MelEmbedShape& shape) {
    return ceil_div(shape.steps, kMelSteps);
  }

  template <typename Args>
  void load_tile(const Args& args, int64_t tile) {
    b = tile / tiles_per_sequence(shape_);
    t = tile % tiles_per_sequence(shape_) * kMelSteps;
    n = min_of<int64_t>(kMelSteps, shape_.steps - t);
    const int64_t n_frames = n * shape_.frames_per_step + shape_.context_frames;
    normalise_frames<float, Frame>(shape_, args.frames, args.mean, args.inv_std, b,
                                   t * shape_.frames_per_step - shape_.context_frames, n_frames,
                                   x_);
    if constexpr (kPer == 2) {
      clear_floats(x_ + n_frames * shape_.mels, row);  // the partner of an odd last step
      round_row(x_, n_frames * shape_.mels + row, rounded());
    }
  }

  BFloat16* rounded() { return reinterpret_cast<BFloat16*>(units); }

  int64_t k, row;               // elements of a slice, and between those of neighbouring steps
  int64_t b = 0, t = 0, n = 0;  // the tile: its sequence, first step and steps
  float* units = nullptr;       // the slices as units of Dot

 private:
  const MelEmbedShape& shape_;
  float* x_ = nullptr;
};

template <typename Element, typename Frame, typename Dot>
class MelForwardTile {
 public:
  static constexpr int kRowGroup = Dot::kRows;

  MelForwardTile(const MelEmbedForward& args, PackedMelWeight packed)
      : args_(args), cm_(args.shape.channels), packed_(packed), slices_(args.shape) {
    slices_.place(static_cast<float*>(
        thread_scratch(static_cast<size_t>(slices_.n_floats()) * sizeof(float))));
  }

  void run(int64_t tile) {
    [[maybe_unused]] const typename Dot::Scope scope;
    slices_.load_tile(args_, tile);
    for_each_width(ceil_div(cm_, kLanes), [&](int64_t first_vector, auto width) {
      for (int64_t row = 0; row < slices_.n; row += kRowGroup) {
        project_group(row, first_vector * kLanes, width);
        for (int64_t r = row; r < min_of(row + kRowGroup, slices_.n); ++r) {
          activate(r, z_ + (r - row) * kStrip, first_vector * kLanes, width.value * kLanes);
        }
      }
    });
  }

 private:
  // z = weight x + bias, a group of steps by up to kStrip channels.
  template <typename Width>
  WGPT_INLINE void project_group(int64_t row, int64_t c, Width) {
    alignas(64) Tile<kRowGroup, Width::value> z;
    WGPT_UNROLL for (int v = 0; v < Width::value; ++v) {
      const Floats bias = load(packed_.bias + c + v * kLanes);
      WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) z[r][v] = bias;
    }
    const int64_t x_row = slices_.row / Dot::kPerUnit, k = slices_.k / Dot::kPerUnit;
    multiply_tile<Dot>(slices_.units + row * x_row, x_row, 1, packed_.weight + c * k, kStrip, k, z);
    WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
      WGPT_UNROLL for (int v = 0; v < Width::value; ++v)
          store(z_ + r * kStrip + v * kLanes, z[r][v]);
    }
  }

  // y = gelu(z) + pos for channels [first, first + n) of a step.
  WGPT_INLINE void activate(int64_t row, const float* z, int64_t first, int64_t n) {
    const int64_t step = slices_.t + row;
    const int64_t at = (slices_.b * args_.shape.steps + step) * cm_ + first;
    Element* y = static_cast<Element*>(args_.y) + at;
    Element* slope = args_.slope == nullptr ? nullptr : static_cast<Element*>(args_.slope) + at;
    const Element* pos = args_.pos == nullptr
                             ? nullptr
                             : static_cast<const Element*>(args_.pos) + step * cm_ + first;
    const int64_t n_here = min_of(n, cm_ - first), n_vector = n_here - n_here % kLanes;
    Floats slopes;
    for (int64_t c = 0; c < n_vector; c += kLanes) {
      const Floats active = gelu(load(z + c), slopes);
      store(y + c, pos == nullptr ? active : active + load(pos + c));
      if (slope != nullptr) store(slope + c, slopes);
    }
    for (int64_t c = n_vector; c < n_here; ++c) {
      const float active = first_lane(gelu(splat(z[c]), slopes));
      y[c] = narrow<Element>(pos == nullptr ? active : active + widen(pos[c]));
      if (slope != nullptr) slope[c] = narrow<Element>(first_lane(slopes));
    }
  }

  const MelEmbedForward& args_;
  const int64_t cm_;
  const PackedMelWeight packed_;
  MelSlices<Frame, Dot> slices_;
  alignas(64) float z_[kRowGroup * kStrip];
};

template <typename Element, typename Frame, typename Dot>
void mel_embed_forward_by_tiles(const MelEmbedForward& args, const Executor& executor) {
  const PackedMelWeight packed = pack_mel_weight<Element, Dot>(args.shape, args.weight, args.bias);
  const int64_t n_tiles = args.shape.batch * MelSlices<Frame, Dot>::tiles_per_sequence(args.shape);
  run_tasks(executor, n_tiles,
            [&](int64_t task) { MelForwardTile<Element, Frame, Dot>(args, packed).run(task); });
}

template <typename Element, typename Frame, typename Dot>
class MelBackwardTile {
 public:
  static constexpr int kPer = Dot::kPerUnit;
  static constexpr int kRowGroup = Dot::kRows;

  explicit MelBackwardTile(const MelEmbedBackward& args)
      : args_(args), cm_(args.shape.channels), slices_(args.shape) {
    g_row_ = round_up(cm_, Dot::kIsMatrix ? kRowGroup : kRowGroup * kLanes);
    across_row_ = slices_.k + kLanes;  // not a power of two, for the sake of L1's sets
    const int64_t n_across =
        kPer == 1 ? 0 : kMelSteps / 2 * (across_row_ + (Dot::kIsMatrix ? 2 : 1) * g_row_);
    const int64_t n_floats = slices_.n_floats() + kMelSteps * g_row_ + n_across;
    g_ = static_cast<float*>(thread_scratch(static_cast<size_t>(n_floats) * sizeof(float)));
    x_across_ = g_ + kMelSteps * g_row_;
    g_across_ = x_across_ + kMelSteps / 2 * across_row_;
    g_columns_ = g_across_ + kMelSteps / 2 * g_row_;
    slices_.place(x_across_ + n_across);
  }

  // partial: d_weight (Cm rounded up, K rounded up), then d_bias.
  void run(int64_t tile, float* partial) {
    [[maybe_unused]] const typename Dot::Scope scope;
    slices_.load_tile(args_, tile);
    const int64_t row_floats = round_up(slices_.k, kLanes);
    load_gradients(partial + round_up(cm_, kMelRows) * row_floats);
    if constexpr (kPer == 2) pair_rows();
    const float *g = kPer == 1 ? g_ : g_across_, *x = kPer == 1 ? slices_.units : x_across_;
    const int64_t x_row = kPer == 1 ? slices_.row : across_row_;
    for_each_width(row_floats / kLanes, [&](int64_t first_vector, auto width) {
      const int64_t column = first_vector * kLanes;
      for (int64_t c = 0; c < cm_; c += kRowGroup) {
        if constexpr (Dot::kIsMatrix) {
          multiply_matrix<width.value, false>(g_columns_ + c * kMelSteps / 2, kMelSteps / 2,
                                              x_across_ + column, across_row_, kMelSteps / 2,
                                              partial + c * row_floats + column, row_floats);
          continue;
        }
        Tile<kRowGroup, width.value> sums;
        fill_tile(sums, 0.0f);
        multiply_tile<Dot>(g + c, 1, g_row_, x + column, x_row, ceil_div(slices_.n, kPer), sums);
        add_tile(sums, nullptr, partial + c * row_floats + column, row_floats);
      }
    });
  }

 private:
  // g = d_y * slope, and its sum over the tile's steps.
  void load_gradients(float* d_bias) {
    const int64_t n_vector = cm_ - cm_ % kLanes;
    for (int64_t i = 0; i < slices_.n; ++i) {
      const int64_t at = (slices_.b * args_.shape.steps + slices_.t + i) * cm_;
      const Element* d_y = static_cast<const Element*>(args_.d_y) + at;
      const Element* slope = static_cast<const Element*>(args_.slope) + at;
      float* g = g_ + i * g_row_;
      for (int64_t c = 0; c < n_vector; c += kLanes) {
        const Floats product = load(d_y + c) * load(slope + c);
        store(g + c, product);
        store(d_bias + c, load(d_bias + c) + product);
      }
      for (int64_t c = n_vector; c < cm_; ++c) {
        g[c] = widen(d_y[c]) * widen(slope[c]);
        d_bias[c] += g[c];
      }
    }
  }

  // Pairs of steps of x and g, for the product over steps; an odd last step has a partner of zeros.
  void pair_rows() {
#if defined(__AVX512BF16__)
    clear_floats(g_ + slices_.n * g_row_, slices_.n % 2 * g_row_);
    for (int64_t i = 0; i < slices_.n; i += 2) {
      const BFloat16 *first = slices_.rounded() + i * slices_.row, *second = first + slices_.row;
      float *x = x_across_ + i / 2 * across_row_, *g = g_across_ + i / 2 * g_row_;
      for (int64_t k = 0; k < slices_.k; k += 2 * kLanes) interleave(first + k, second + k, x + k);
      for (int64_t c = 0; c < g_row_; c += kLanes) {
        store(g + c, narrow_pairs(load(g_ + i * g_row_ + c), load(g_ + (i + 1) * g_row_ + c)));
      }
    }
    if constexpr (Dot::kIsMatrix) {  // a whole tile of steps, g by columns
      const int64_t n_pairs = ceil_div(slices_.n, 2), n_absent = kMelSteps / 2 - n_pairs;
      clear_floats(x_across_ + n_pairs * across_row_, n_absent * across_row_);
      clear_floats(g_across_ + n_pairs * g_row_, n_absent * g_row_);
      for (int64_t c = 0; c < g_row_; c += kLanes) {
        for (int64_t pair = 0; pair < kMelSteps / 2; pair += kLanes) {
          transpose_block(g_across_ + pair * g_row_ + c, g_row_,
                          g_columns_ + c * kMelSteps / 2 + pair, kMelSteps / 2);
        }
      }
    }
#endif
  }

  const MelEmbedBackward& args_;
  const int64_t cm_;
  MelSlices<Frame, Dot> slices_;
  int64_t g_row_, across_row_;
  float *g_, *x_across_, *g_across_;  // pairs of two steps lie across
  float* g_columns_;                  // MatrixDot only: [channel][pair of steps]
};

// How the tiles are cut for d_weight: a function of the shape alone.
struct MelChunks {
  int64_t n_tiles, tiles_per_chunk, n_chunks, partial_floats;
};

inline MelChunks mel_chunks(const MelEmbedShape& shape) {
  const int64_t n_tiles = shape.batch * ceil_div(shape.steps, kMelSteps);
  const int64_t per_chunk = max_of<int64_t>(kMelTilesPerChunk, ceil_div(n_tiles, kMelMaxChunks));
  const int64_t channels = round_up(shape.channels, kMelRows),
                row = round_up(mel_slice_size(shape), kLanes);
  return {n_tiles, per_chunk, ceil_div(n_tiles, per_chunk),
          round_up(channels * row + shape.channels, kLanes)};
}

template <typename Element, typename Frame, typename Dot>
void mel_embed_backward_by_tiles(const MelEmbedBackward& args, const Executor& executor) {
  const MelEmbedShape& shape = args.shape;
  const MelChunks chunks = mel_chunks(shape);
  auto* partials = static_cast<float*>(args.workspace);
  run_tasks(executor, chunks.n_chunks, [&](int64_t chunk) {
    float* partial = partials + chunk * chunks.partial_floats;
    clear_floats(partial, chunks.partial_floats);
    MelBackwardTile<Element, Frame, Dot> tile(args);
    const int64_t first = chunk * chunks.tiles_per_chunk;
    for (int64_t i = first; i < min_of(first + chunks.tiles_per_chunk, chunks.n_tiles); ++i)
      tile.run(i, partial);
  });
  const int64_t k = mel_slice_size(shape), row = round_up(k, kLanes), cm = shape.channels;
  run_tasks(executor, cm + 1, [&](int64_t c) {  // a row of d_weight each, and d_bias
    const int64_t n = c < cm ? k : cm, offset = c < cm ? c * row : round_up(cm, kMelRows) * row;
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
