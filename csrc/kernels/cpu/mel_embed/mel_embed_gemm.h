// mel_embed by step blocks: an implicit GEMM with a fused prologue and epilogue. Formula and shapes:
// kernels/mel_embed.h.
//
// The frames of a step block are normalised once into one buffer, and the slice of step t is simply the
// buffer from frame t r on: overlapping rows, never unfolded. Both GEMMs, z = x weight^T and d_weight = g^T x,
// read them in place through the micro-kernel. FLOPs: 2 K Cm a step forward and as many backward,
// K = (c + r) M; at K = 64 the GELU costs nearly as much as a GEMM.
//
// bfloat16: the normalised frames and g are rounded to bfloat16, as torch's are; accumulation, bias and GELU
// are float32.
#pragma once

#include "kernels/cpu/elementwise/batch_sum.h"
#include "kernels/cpu/mel_embed/mel_embed_weight.h"

namespace wgpt::cpu::WGPT_TARGET {

// Steps of a block: frames, pre-activations and gradients stay in L2. With AMX, reading and writing the
// partial d_weight dominates. Measured, backward of 8 x 750 steps, 128 channels, 0 and 3 frames of context,
// two threads, us: 96 steps 210 and 414, 192 186 and 360, 384 (two blocks a chunk) 192 and 367.
template <typename Dot>
constexpr int kMelSteps = Dot::kIsAmx ? 192 : 96;
constexpr int kMelBlocksPerChunk = 4;  // step blocks of one partial d_weight
constexpr int kMelMaxChunks = 64;

// Rows of a partial d_weight: those of whole row groups, for every Dot.
inline int64_t mel_partial_rows(int64_t channels) { return round_up(channels, 48); }

// Calls body(first, Constant<width>{}) for vectors [0, n_vectors), kVectors at a time.
template <typename Body>
WGPT_INLINE void for_each_width(int64_t n_vectors, Body&& body) {
  for (int64_t first = 0; first < n_vectors; first += kVectors) {
    with_width(static_cast<int>(min_of<int64_t>(kVectors, n_vectors - first)),
               [&](auto width) { body(first, width); });
  }
}

// A step block's normalised frames. The slice of step t starts at x + t x_row, overlapping its neighbours.
template <typename Frame, typename Dot>
class MelSlices {
 public:
  static constexpr int kPer = Dot::kPerUnit;
  using GemmElement = std::conditional_t<kPer == 1, float, BFloat16>;

  explicit MelSlices(const MelEmbedShape& shape) : shape_(shape) {
    k = mel_slice_size(shape);
    row = shape.frames_per_step * shape.mels;
  }

  int64_t n_floats() const {
    return round_up(kMelSteps<Dot> * row + k + kStrip, kPer * kLanes) / kPer;
  }

  static int64_t step_blocks_per_sequence(const MelEmbedShape& shape) {
    return ceil_div(shape.steps, kMelSteps<Dot>);
  }

  template <typename Args>
  void load_step_block(const Args& args, int64_t step_block) {
    b = step_block / step_blocks_per_sequence(shape_);
    t = step_block % step_blocks_per_sequence(shape_) * kMelSteps<Dot>;
    n = min_of<int64_t>(kMelSteps<Dot>, shape_.steps - t);
    const int64_t n_frames = n * shape_.frames_per_step + shape_.context_frames;
    normalise_frames<Frame>(shape_, args.frames, args.mean, args.inv_std, b,
                            t * shape_.frames_per_step - shape_.context_frames, n_frames,
                            elements());
    // Zeros up to a whole row group, and the partner of an odd last step.
    const int64_t n_absent = round_up(n, Dot::kRows) - n;
    clear_floats(units + n_frames * shape_.mels / kPer, n_absent * row / kPer);
  }

  GemmElement* elements() { return reinterpret_cast<GemmElement*>(units); }

  int64_t k, row;               // elements of a slice, and between those of neighbouring steps
  int64_t b = 0, t = 0, n = 0;  // the block: its sequence, first step and steps
  float* units = nullptr;       // n_floats() of the owner's memory: the slices as units of Dot

 private:
  const MelEmbedShape& shape_;
};

// y = gelu(z + bias) + pos for channels [first, first + n) of a step, and its slope; z and bias are
// those of the channels.
template <typename Element>
WGPT_INLINE void activate_mel_step(const MelEmbedForward& args,
                                   const typename GeluOf<Element>::Type& activate, int64_t b,
                                   int64_t step, const float* z, const float* bias, int64_t first,
                                   int64_t n) {
  const int64_t cm = args.shape.channels, at = (b * args.shape.steps + step) * cm + first;
  Element* y = static_cast<Element*>(args.y) + at;
  Element* slope = args.slope == nullptr ? nullptr : static_cast<Element*>(args.slope) + at;
  const Element* pos =
      args.pos == nullptr ? nullptr : static_cast<const Element*>(args.pos) + step * cm + first;
  const int64_t n_vector = n - n % kLanes;
  Floats slopes;
  for (int64_t c = 0; c < n_vector; c += kLanes) {
    const Floats active = activate(load(z + c) + load(bias + c), slopes);
    store(y + c, pos == nullptr ? active : active + load(pos + c));
    if (slope != nullptr) store(slope + c, slopes);
  }
  for (int64_t c = n_vector; c < n; ++c) {
    float slope_of_one;
    const float active = gelu_of_one(activate, z[c] + bias[c], slope_of_one);
    y[c] = narrow<Element>(pos == nullptr ? active : active + widen(pos[c]));
    if (slope != nullptr) slope[c] = narrow<Element>(slope_of_one);
  }
}

template <typename Element, typename Frame, typename Dot>
class MelForwardBlock {
 public:
  static constexpr int kRowGroup = Dot::kRows;
  // Steps projected before the epilogue: with AMX all, so that its stores have completed; with vectors a row
  // group, which is still in L1.
  static constexpr int kRowsAhead = Dot::kIsAmx ? kMelSteps<Dot> : kRowGroup;

  MelForwardBlock(const MelEmbedForward& args, PackedMelWeight packed)
      : args_(args), cm_(args.shape.channels), packed_(packed), slices_(args.shape) {
    const int64_t n_floats = kRowsAhead * kStrip + slices_.n_floats();
    z_ = static_cast<float*>(thread_scratch(static_cast<size_t>(n_floats) * sizeof(float)));
    slices_.units = z_ + kRowsAhead * kStrip;
  }

  void run(int64_t step_block) {
    [[maybe_unused]] const typename Dot::Scope scope;
    slices_.load_step_block(args_, step_block);
    for_each_width(ceil_div(cm_, kLanes), [&](int64_t first_vector, auto width) {
      const int64_t c = first_vector * kLanes,
                    n_here = min_of<int64_t>(width.value * kLanes, cm_ - c);
      for (int64_t first = 0; first < slices_.n; first += kRowsAhead) {
        const int64_t end = min_of(first + kRowsAhead, slices_.n);
        for (int64_t row = first; row < end; row += kRowGroup)
          project_group(row, z_ + (row - first) * kStrip, c, width);
        for (int64_t row = first; row < end; ++row)
          activate_mel_step<Element>(args_, gelu_, slices_.b, slices_.t + row,
                                     z_ + (row - first) * kStrip, packed_.bias + c, c, n_here);
      }
    });
  }

 private:
  // z = weight x, a group of steps by up to kStrip channels.
  template <typename Width>
  WGPT_INLINE void project_group(int64_t row, float* out, int64_t c, Width) {
    const int64_t x_row = slices_.row / Dot::kPerUnit, k = slices_.k / Dot::kPerUnit;
    const float *x = slices_.units + row * x_row, *weight = packed_.weight + c * k;
    if constexpr (Dot::kIsAmx) {
      amx_gemm_16x64<Width::value, true>(x, x_row, weight, kStrip, k, out, kStrip);
    } else {
      RegisterBlock<kRowGroup, Width::value> z;
      gemm_fresh_block<Dot>(x, x_row, 1, weight, kStrip, k, z);
      WGPT_UNROLL for (int r = 0; r < kRowGroup; ++r) {
        WGPT_UNROLL for (int v = 0; v < Width::value; ++v)
            store(out + r * kStrip + v * kLanes, z[r][v]);
      }
    }
  }

  const MelEmbedForward& args_;
  const int64_t cm_;
  const PackedMelWeight packed_;
  const typename GeluOf<Element>::Type& gelu_ = gelu_of<Element>();
  MelSlices<Frame, Dot> slices_;
  float* z_;  // (kRowsAhead, kStrip)
};

template <typename Element, typename Frame, typename Dot>
void mel_embed_forward_blocks(const MelEmbedForward& args, const Executor& executor) {
  const PackedMelWeight packed = pack_mel_weight<Element, Dot>(args.shape, args.weight, args.bias);
  const int64_t n_step_blocks =
      args.shape.batch * MelSlices<Frame, Dot>::step_blocks_per_sequence(args.shape);
  run_tasks(executor, n_step_blocks,
            [&](int64_t task) { MelForwardBlock<Element, Frame, Dot>(args, packed).run(task); });
}

template <typename Element, typename Frame, typename Dot>
class MelBackwardBlock {
 public:
  using GemmElement = typename MelSlices<Frame, Dot>::GemmElement;
  static constexpr int kPer = Dot::kPerUnit;
  static constexpr int kRowGroup = Dot::kRows;

  explicit MelBackwardBlock(const MelEmbedBackward& args)
      : args_(args), cm_(args.shape.channels), slices_(args.shape) {
    g_row_ = round_up(round_up(cm_, kRowGroup), kLanes);
    pairs_row_ = slices_.k + kLanes;  // not a power of two, to avoid conflict misses in L1
    const int64_t n_g = kMelSteps<Dot> / kPer * g_row_,
                  n_pairs_floats = kPer == 1 ? 0 : kMelSteps<Dot> / 2 * pairs_row_,
                  n_columns = Dot::kIsAmx ? n_g : 0;
    const int64_t n_floats = n_g + n_pairs_floats + n_columns + slices_.n_floats();
    g_ = static_cast<float*>(thread_scratch(static_cast<size_t>(n_floats) * sizeof(float)));
    x_pairs_ = g_ + n_g;
    g_columns_ = x_pairs_ + n_pairs_floats;
    slices_.units = g_columns_ + n_columns;
  }

  // partial: d_weight (Cm rounded up, K rounded up), then d_bias.
  void run(int64_t step_block, float* partial) {
    [[maybe_unused]] const typename Dot::Scope scope;
    slices_.load_step_block(args_, step_block);
    const int64_t row_floats = round_up(slices_.k, kLanes);
    load_gradients(partial + mel_partial_rows(cm_) * row_floats);
    if constexpr (kPer == 2) pair_rows();
    const float* x = kPer == 1 ? slices_.units : x_pairs_;
    const int64_t x_row = kPer == 1 ? slices_.row : pairs_row_;
    for_each_width(row_floats / kLanes, [&](int64_t first_vector, auto width) {
      const int64_t column = first_vector * kLanes;
      for (int64_t c = 0; c < cm_; c += kRowGroup) {
        if constexpr (Dot::kIsAmx) {
          amx_gemm_16x64<width.value, false>(
              g_columns_ + c * kMelSteps<Dot> / 2, kMelSteps<Dot> / 2, x_pairs_ + column,
              pairs_row_, kMelSteps<Dot> / 2, partial + c * row_floats + column, row_floats);
          continue;
        }
        RegisterBlock<kRowGroup, width.value> sums;
        fill_block(sums, 0.0f);
        gemm_block<Dot>(g_ + c, 1, g_row_, x + column, x_row, ceil_div(slices_.n, kPer), sums);
        add_block(sums, partial + c * row_floats + column, row_floats);
      }
    });
  }

 private:
  // g = d_y * slope as units over steps, and its sum over the block's steps. Channels that pad a row group
  // are zero: numbers left in the scratch may be subnormal, 150 cycles each.
  void load_gradients(float* d_bias) {
    const int64_t n_vector = cm_ - cm_ % kLanes;
    for (int64_t i = 0; i < slices_.n; i += kPer) {
      const int64_t at = (slices_.b * args_.shape.steps + slices_.t + i) * cm_;
      const Element* d_y = static_cast<const Element*>(args_.d_y) + at;
      const Element* slope = static_cast<const Element*>(args_.slope) + at;
      const bool has_second = kPer == 2 && i + 1 < slices_.n;
      float* g = g_ + i / kPer * g_row_;
      for (int64_t c = 0; c < n_vector; c += kLanes) {
        const Floats first = load(d_y + c) * load(slope + c);
        Floats sum = load(d_bias + c) + first;
        if constexpr (kPer == 1) {
          store(g + c, first);
        } else {
#if defined(__AVX512BF16__)
          const Floats second =
              has_second ? load(d_y + cm_ + c) * load(slope + cm_ + c) : splat(0.0f);
          store(g + c, narrow_pairs(first, second));
          sum = sum + second;
#endif
        }
        store(d_bias + c, sum);
      }
      clear_floats(g + n_vector, g_row_ - n_vector);
      for (int64_t c = n_vector; c < cm_; ++c) {
        auto* unit = reinterpret_cast<GemmElement*>(g + c);
        for (int64_t j = 0; j < (has_second ? 2 : 1); ++j) {
          const float value = widen(d_y[j * cm_ + c]) * widen(slope[j * cm_ + c]);
          unit[j] = narrow<GemmElement>(value);
          d_bias[c] += value;
        }
      }
    }
  }

  // Pairs of steps of x, for the GEMM over steps; an odd last step has a partner of zeros.
  void pair_rows() {
#if defined(__AVX512BF16__)
    for (int64_t i = 0; i < slices_.n; i += 2) {
      const BFloat16 *first = slices_.elements() + i * slices_.row, *second = first + slices_.row;
      float* x = x_pairs_ + i / 2 * pairs_row_;
      for (int64_t k = 0; k < slices_.k; k += 2 * kLanes) interleave(first + k, second + k, x + k);
    }
    if constexpr (Dot::kIsAmx) {  // padded to a whole step block, g transposed
      const int64_t n_pairs = ceil_div(slices_.n, 2), n_absent = kMelSteps<Dot> / 2 - n_pairs;
      clear_floats(x_pairs_ + n_pairs * pairs_row_, n_absent * pairs_row_);
      clear_floats(g_ + n_pairs * g_row_, n_absent * g_row_);
      for (int64_t c = 0; c < g_row_; c += kLanes) {
        for (int64_t pair = 0; pair < kMelSteps<Dot> / 2; pair += kLanes) {
          transpose_block(g_ + pair * g_row_ + c, g_row_,
                          g_columns_ + c * kMelSteps<Dot> / 2 + pair, kMelSteps<Dot> / 2);
        }
      }
    }
#endif
  }

  const MelEmbedBackward& args_;
  const int64_t cm_;
  MelSlices<Frame, Dot> slices_;
  int64_t g_row_, pairs_row_;
  float *g_, *x_pairs_;  // x_pairs_: pairs of steps
  float* g_columns_;     // Amx16x64Dot only: [channel][pair of steps]
};

// How the step blocks are split for d_weight: a function of the shape alone.
struct MelChunks {
  int64_t n_step_blocks, blocks_per_chunk, n_chunks, partial_floats;
};

template <typename Dot>
MelChunks mel_chunks(const MelEmbedShape& shape) {
  const int64_t n_step_blocks = shape.batch * ceil_div(shape.steps, kMelSteps<Dot>);
  const int64_t per_chunk =
      max_of<int64_t>(kMelBlocksPerChunk, ceil_div(n_step_blocks, kMelMaxChunks));
  const int64_t channels = mel_partial_rows(shape.channels),
                row = round_up(mel_slice_size(shape), kLanes);
  return {n_step_blocks, per_chunk, ceil_div(n_step_blocks, per_chunk),
          round_up(channels * row + shape.channels, kLanes)};
}

// Task of sum_over_batch_tasks(pos_rows).
template <typename Element>
inline void sum_mel_pos(const MelEmbedBackward& args, int64_t task) {
  sum_over_batch(task, static_cast<const Element*>(args.d_y), args.shape.batch, args.shape.steps,
                 args.shape.channels, args.pos_rows, static_cast<Element*>(args.d_pos));
}

template <typename Element, typename Frame, typename Dot>
void mel_embed_backward_blocks(const MelEmbedBackward& args, const Executor& executor) {
  const MelEmbedShape& shape = args.shape;
  const MelChunks chunks = mel_chunks<Dot>(shape);
  auto* partials = static_cast<float*>(args.workspace);
  const int64_t n_pos = args.d_pos == nullptr ? 0 : sum_over_batch_tasks(args.pos_rows);
  run_tasks(executor, chunks.n_chunks + n_pos, [&](int64_t chunk) {
    if (chunk >= chunks.n_chunks) return sum_mel_pos<Element>(args, chunk - chunks.n_chunks);
    float* partial = partials + chunk * chunks.partial_floats;
    clear_floats(partial, chunks.partial_floats);
    MelBackwardBlock<Element, Frame, Dot> step_block(args);
    const int64_t first = chunk * chunks.blocks_per_chunk;
    for (int64_t i = first; i < min_of(first + chunks.blocks_per_chunk, chunks.n_step_blocks); ++i)
      step_block.run(i, partial);
  });
  const int64_t k = mel_slice_size(shape), row = round_up(k, kLanes), cm = shape.channels;
  const auto sum_partials = [&](int64_t offset, int64_t n, Element* out) {
    sum_rows(
        chunks.n_chunks, [&](int64_t i) { return partials + i * chunks.partial_floats + offset; },
        n, out);
  };
  constexpr int64_t kRowsPerTask = 16;
  run_tasks(executor, ceil_div(cm, kRowsPerTask), [&](int64_t task) {
    const int64_t begin = task * kRowsPerTask, end = min_of(begin + kRowsPerTask, cm);
    for (int64_t c = begin; c < end; ++c)
      sum_partials(c * row, k, static_cast<Element*>(args.d_weight) + c * k);
    sum_partials(mel_partial_rows(cm) * row + begin, end - begin,
                 static_cast<Element*>(args.d_bias) + begin);
  });
}

}  // namespace wgpt::cpu::WGPT_TARGET
