// mel_embed's float32 products on tile registers: numbers split into three bfloat16, six products of
// them (formula and error: kernels/matmul.h), over the tiles of steps of mel_embed_vector.h.
//
// FLOPs a cycle and core: 64 of vector multiply-adds, 170 of these.
#pragma once

#include "kernels/cpu/gemm/amx.h"
#include "kernels/cpu/mel_embed/mel_embed_vector.h"

namespace wgpt::cpu::WGPT_TARGET {

#if defined(__AMX_BF16__)

using SplitDot = Amx32x32Dot<3>;
constexpr int kSplitColumns = 32;  // of a product

// A split operand: a plane of pairs of bfloat16 for each part.
struct SplitPlanes {
  const float* data;
  int64_t row, plane;  // floats from row to row and from plane to plane
};

// c (32 x 32) = or += a b over n units. a: rows of units along k, b: rows of units across columns.
template <bool kFromZero>
inline void multiply_split(SplitPlanes a, SplitPlanes b, int64_t n, float* c, int64_t c_row) {
  amx_gemm_32x32<SplitDot, kSplitColumns / kLanes, kFromZero>(a.data, a.row, a.plane, b.data, b.row,
                                                              b.plane, n, c, c_row, [] {});
}

// (x[i], y[i]) as pairs of each part, planes apart.
WGPT_INLINE void store_split_pairs(Floats x, Floats y, float* out, int64_t plane) {
  const __m512i order = _mm512_load_si512(kPairOrder);
  __m512i parts[kBf16x3Terms];
  split_bf16x3(x, y, parts);
  WGPT_UNROLL for (int s = 0; s < kBf16x3Terms; ++s)
      _mm512_storeu_si512(out + s * plane, _mm512_permutexvar_epi16(order, parts[s]));
}

// n values, a multiple of 32, as planes.
inline void store_split_row(const float* row, int64_t n, float* out, int64_t plane) {
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    __m512i parts[kBf16x3Terms];
    split_bf16x3(load(row + i), load(row + i + kLanes), parts);
    WGPT_UNROLL for (int s = 0; s < kBf16x3Terms; ++s)
        _mm512_storeu_si512(out + i / 2 + s * plane, parts[s]);
  }
}

// NaN if one of the numbers is not finite, else 0.
inline Floats check_finite(const float* x, int64_t n, Floats check) {
  const int64_t n_vector = n - n % kLanes;
  for (int64_t i = 0; i < n_vector; i += kLanes) check = fma(load(x + i), splat(0.0f), check);
  const auto rest = static_cast<__mmask16>((1u << (n - n_vector)) - 1);
  return fma(_mm512_maskz_loadu_ps(rest, x + n_vector), splat(0.0f), check);
}

// Units of k whose panels of both operands share L1.
constexpr int64_t kSplitRunUnits = 64;
// Sizes K of a slice that products of split numbers are used for. Above, sums would run too long in tile
// registers, which round at every step: at 1024 the error is 0.9 of torch's. Below, they do not pay in the
// backward, which must also transpose g. Measured, backward of 8 x 750 steps, 128 channels, one thread, ms,
// split and not: K 64 1.26 and 1.23, 128 1.70 and 1.63, 192 1.99 and 2.16, 256 2.21 and 2.79.
constexpr int64_t kSplitMaxDepth = 1024, kSplitMinDepthBackward = 192;

// A tile's normalised frames as planes: plane floats apart, each laid out as slices of bfloat16 are.
template <typename Frame>
class MelSlices<Frame, SplitDot> {
 public:
  explicit MelSlices(const MelEmbedShape& shape) : shape_(shape) {
    k = mel_slice_size(shape);
    row = shape.frames_per_step * shape.mels;
    plane = round_up(kMelSteps<SplitDot> * row + k + kStrip, 2 * kLanes) / 2;
  }

  int64_t n_floats() const { return kBf16x3Terms * plane + round_up(shape_.mels, kLanes); }

  template <typename Args>
  void load_tile(const Args& args, int64_t tile) {
    const int64_t n_tiles = ceil_div(shape_.steps, kMelSteps<SplitDot>);
    b = tile / n_tiles;
    t = tile % n_tiles * kMelSteps<SplitDot>;
    n = min_of<int64_t>(kMelSteps<SplitDot>, shape_.steps - t);
    const int64_t first = t * shape_.frames_per_step - shape_.context_frames,
                  n_frames = n * shape_.frames_per_step + shape_.context_frames;
    float* frame = units + kBf16x3Terms * plane;
    for (int64_t i = 0; i < n_frames; ++i) {
      normalise_frames<Frame>(shape_, args.frames, args.mean, args.inv_std, b, first + i, 1, frame);
      store_split_row(frame, shape_.mels, units + i * shape_.mels / 2, plane);
    }
    const int64_t n_absent = round_up(n, SplitDot::kRows) - n;  // what fills up a row group
    for (int s = 0; s < kBf16x3Terms; ++s)
      clear_floats(units + s * plane + n_frames * shape_.mels / 2, n_absent * row / 2);
  }

  int64_t k, row, plane;
  int64_t b = 0, t = 0, n = 0;
  float* units = nullptr;

 private:
  const MelEmbedShape& shape_;
};

// weight^T as planes of [panel of kSplitColumns channels][pair along K][channel]; then bias; zero past
// the last channel.
inline PackedMelWeight pack_split_weight(const MelEmbedShape& shape, const void* weight,
                                         const void* bias) {
  thread_local Scratch scratch;  // of the calling thread; the others only read it
  const int64_t k = mel_slice_size(shape), cm = shape.channels, n = round_up(cm, kStrip);
  const int64_t plane = k / 2 * n;
  auto* out = static_cast<float*>(
      scratch.reserve(static_cast<size_t>(kBf16x3Terms * plane + n) * sizeof(float)));
  alignas(64) float rows[kBf16x3Terms * kLanes * kLanes];
  for (int64_t c = 0; c < n; c += kLanes) {
    float* column = out + c / kSplitColumns * kSplitColumns * (k / 2) + c % kSplitColumns;
    const int64_t n_here = max_of<int64_t>(0, min_of<int64_t>(kLanes, cm - c));
    clear_floats(rows, kBf16x3Terms * kLanes * kLanes);
    for (int64_t i = 0; i < k; i += 2 * kLanes) {
      for (int64_t r = 0; r < n_here; ++r) {
        store_split_row(static_cast<const float*>(weight) + (c + r) * k + i, 2 * kLanes,
                        rows + r * kLanes, kLanes * kLanes);
      }
      for (int s = 0; s < kBf16x3Terms; ++s) {
        transpose_block(rows + s * kLanes * kLanes, kLanes,
                        column + s * plane + i / 2 * kSplitColumns, kSplitColumns);
      }
    }
  }
  float* bias_out = out + kBf16x3Terms * plane;
  clear_floats(bias_out, n);
  std::memcpy(bias_out, bias, static_cast<size_t>(cm) * sizeof(float));
  return {out, bias_out};
}

inline bool mel_may_split(const MelEmbedShape& shape) {
  const int64_t k = mel_slice_size(shape);
  return shape.mels % (2 * kLanes) == 0 && 0 < k && k <= kSplitMaxDepth;
}

// Answers false where the slice is not for it or a pre-activation is not finite: infinities split into
// NaN, so vectors have to say what it should be.
template <typename Frame>
bool mel_embed_by_splits(const MelEmbedForward& args, const Executor& executor) {
  const MelEmbedShape& shape = args.shape;
  if (!mel_may_split(shape)) return false;
  const PackedMelWeight packed = pack_split_weight(shape, args.weight, args.bias);
  const int64_t n_tiles = shape.batch * ceil_div(shape.steps, kMelSteps<SplitDot>);
  bool all_finite = true;
  run_tasks(executor, n_tiles, [&](int64_t tile) {
    const SplitDot::Scope scope;
    MelSlices<Frame, SplitDot> x(shape);
    const int64_t n_z = kMelSteps<SplitDot> * kStrip, k = x.k / 2, cm = shape.channels;
    auto* z = static_cast<float*>(
        thread_scratch(static_cast<size_t>(n_z + x.n_floats()) * sizeof(float)));
    x.units = z + n_z;
    x.load_tile(args, tile);
    Floats check = splat(0.0f);
    for (int64_t c = 0; c < cm; c += kStrip) {
      for (int64_t panel = c; panel < min_of(c + kStrip, cm); panel += kSplitColumns) {
        for (int64_t first = 0; first < k; first += kSplitRunUnits) {
          const int64_t n_units = min_of(kSplitRunUnits, k - first);
          const SplitPlanes weight{packed.weight + panel * k + first * kSplitColumns, kSplitColumns,
                                   k * round_up(cm, kStrip)};
          for (int64_t row = 0; row < x.n; row += SplitDot::kRows) {
            const SplitPlanes slices{x.units + row * x.row / 2 + first, x.row / 2, x.plane};
            float* out = z + row * kStrip + (panel - c);
            if (first == 0) {
              multiply_split<true>(slices, weight, n_units, out, kStrip);
            } else {
              multiply_split<false>(slices, weight, n_units, out, kStrip);
            }
          }
        }
      }
      const int64_t n_here = min_of<int64_t>(kStrip, cm - c);
      for (int64_t row = 0; row < x.n; ++row) {
        check = check_finite(z + row * kStrip, n_here, check);
        activate_mel_step<float>(args, {}, x.b, x.t + row, z + row * kStrip, packed.bias + c, c,
                                 n_here);
      }
    }
    if (reduce_add(check) != 0.0f) __atomic_store_n(&all_finite, false, __ATOMIC_RELAXED);
  });
  return all_finite;
}

template <typename Frame>
class MelBackwardTile<float, Frame, SplitDot> {
 public:
  explicit MelBackwardTile(const MelEmbedBackward& args)
      : args_(args), cm_(args.shape.channels), slices_(args.shape) {
    g_row_ = round_up(cm_, SplitDot::kRows);
    const MelEmbedShape& shape = args.shape;
    stride_ = 2 * shape.frames_per_step;
    n_offsets_ = shape.frames_per_step + shape.context_frames;
    x_row_ = shape.mels + kLanes;  // not a power of two, for the sake of L1's sets
    x_plane_ = (kPairs + (n_offsets_ - 1) / stride_) * x_row_;
    const int64_t n_g = kBf16x3Terms * kPairs * g_row_,
                  n_x = min_of(stride_, n_offsets_) * kBf16x3Terms * x_plane_,
                  n_floats = 2 * n_g + n_x + slices_.n_floats();
    g_ = static_cast<float*>(thread_scratch(static_cast<size_t>(n_floats) * sizeof(float)));
    g_columns_ = g_ + n_g;
    x_ = g_columns_ + n_g;
    slices_.units = x_ + n_x;
  }

  // partial: d_weight (Cm rounded up, K), then d_bias.
  void run(int64_t tile, float* partial) {
    const SplitDot::Scope scope;
    slices_.load_tile(args_, tile);
    const int64_t k = slices_.k, mels = args_.shape.mels;
    load_gradients(partial + mel_partial_rows(cm_) * k);
    pair_frames();
    for (int64_t column = 0; column < k; column += kSplitColumns) {
      const int64_t offset = column / mels;
      const SplitPlanes x{x_ + offset % stride_ * kBf16x3Terms * x_plane_ +
                              offset / stride_ * x_row_ + column % mels,
                          x_row_, x_plane_};
      for (int64_t c = 0; c < cm_; c += SplitDot::kRows) {
        const SplitPlanes g{g_columns_ + c * kPairs, kPairs, kPairs * g_row_};
        multiply_split<false>(g, x, kPairs, partial + c * k + column, k);
      }
    }
  }

 private:
  static constexpr int64_t kPairs = kMelSteps<SplitDot> / 2;

  // g = d_y * slope in pairs of steps, by columns, and its sum over the tile's steps. Steps and channels
  // that fill up a tile are zero.
  void load_gradients(float* d_bias) {
    const int64_t plane = kPairs * g_row_;
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      const int64_t step = 2 * pair;
      float* g = g_ + pair * g_row_;
      if (step >= slices_.n) {
        for (int s = 0; s < kBf16x3Terms; ++s) clear_floats(g + s * plane, g_row_);
        continue;
      }
      const int64_t at = (slices_.b * args_.shape.steps + slices_.t + step) * cm_;
      const float* d_y = static_cast<const float*>(args_.d_y) + at;
      const float* slope = static_cast<const float*>(args_.slope) + at;
      const bool has_second = step + 1 < slices_.n;
      for (int64_t c = 0; c < g_row_; c += kLanes) {
        const int64_t n_lanes = max_of<int64_t>(0, min_of<int64_t>(kLanes, cm_ - c));
        const auto lanes = static_cast<__mmask16>((1u << n_lanes) - 1);
        const __mmask16 second_lanes = has_second ? lanes : __mmask16{0};
        const Floats first =
            _mm512_maskz_loadu_ps(lanes, d_y + c) * _mm512_maskz_loadu_ps(lanes, slope + c);
        const Floats second = _mm512_maskz_loadu_ps(second_lanes, d_y + cm_ + c) *
                              _mm512_maskz_loadu_ps(second_lanes, slope + cm_ + c);
        store_split_pairs(first, second, g + c, plane);
        _mm512_mask_storeu_ps(d_bias + c, lanes,
                              _mm512_maskz_loadu_ps(lanes, d_bias + c) + first + second);
      }
    }
    for (int s = 0; s < kBf16x3Terms; ++s) {
      for (int64_t c = 0; c < g_row_; c += kLanes) {
        for (int64_t pair = 0; pair < kPairs; pair += kLanes) {
          transpose_block(g_ + s * plane + pair * g_row_ + c, g_row_,
                          g_columns_ + s * plane + c * kPairs + pair, kPairs);
        }
      }
    }
  }

  // For each offset in a slice, the frames there of a step and of the next, for the product over steps.
  // Two steps further on they are what they are at an offset of two steps more: only so many differ.
  void pair_frames() {
    const int64_t mels = args_.shape.mels, n_pairs = ceil_div(slices_.n, 2);
    for (int64_t offset = 0; offset < min_of(stride_, n_offsets_); ++offset) {
      const int64_t n_more = (n_offsets_ - 1 - offset) / stride_;
      for (int s = 0; s < kBf16x3Terms; ++s) {
        const auto* frames = reinterpret_cast<const BFloat16*>(slices_.units + s * slices_.plane);
        float* x = x_ + (offset * kBf16x3Terms + s) * x_plane_;
        for (int64_t pair = 0; pair < n_pairs + n_more; ++pair) {
          const BFloat16 *first = frames + (pair * stride_ + offset) * mels,
                         *second = first + stride_ / 2 * mels;
          for (int64_t m = 0; m < mels; m += 2 * kLanes)
            interleave(first + m, second + m, x + pair * x_row_ + m);
        }
        clear_floats(x + (n_pairs + n_more) * x_row_, (kPairs - n_pairs) * x_row_);
      }
    }
  }

  const MelEmbedBackward& args_;
  const int64_t cm_;
  MelSlices<Frame, SplitDot> slices_;
  int64_t stride_, n_offsets_;  // frames of two steps; frames of a slice
  int64_t g_row_, x_row_, x_plane_;
  float *g_, *g_columns_;  // planes of [pair of steps][channel] and [channel][pair of steps]
  float* x_;               // [offset] planes of [pair of steps][mel]
};

// Answers false where the slice is not for it or an element of d_weight is not finite.
template <typename Frame>
bool mel_embed_by_splits(const MelEmbedBackward& args, const Executor& executor) {
  const int64_t k = mel_slice_size(args.shape), n = args.shape.channels * k;
  if (!mel_may_split(args.shape) || k < kSplitMinDepthBackward) return false;
  mel_embed_backward_by_tiles<float, Frame, SplitDot>(args, executor);
  return reduce_add(check_finite(static_cast<const float*>(args.d_weight), n, splat(0.0f))) == 0.0f;
}

#endif

}  // namespace wgpt::cpu::WGPT_TARGET
