// flash_attention forward on CUDA. Formulas in kernels/flash_attention.h. Not yet run on hardware.
//
// One block of four warps owns 128 queries of one head (64 at D = 128 and in float32), one warp 32 (16) of them, so that
// each fragment of K and V feeds two mma; key tiles are double-buffered in shared memory with cp.async, so that loading
// the next tile overlaps with the mma of this one:
//
//               keys of a tile ->                    per warp and tile:  S = Q K^T   (mma, float32 accumulators)
//             +-----------------+                                        P = 2^(c S - c max)  in registers, c = scale log2 e
//   32 rows   |  S, then P      | warp 0                                 O = O 2^(c (old max - max)) + P V
//   32 rows   |                 | warp 1             P never leaves the registers: the accumulators of S are the A
//    ...      +-----------------+                    fragments of P V.
//
// Rows of a block that belong to several packed documents (first_key) are taken one document after the other, each with
// its own key tiles. Only tiles with an invisible pair run the code that masks, tiles that a warp does not see at all are
// not computed, and blocks with the longest rows start first. float32 is 3xTF32, which keeps float32 accuracy. O, max and
// sums are float32; deterministic (no atomics, fixed order). FLOPs: 4 D per visible pair; limit: instructions issued, 5.3
// for each mma at D = 64 (docs/performance.md), and for D = 32 the exponentials (16 per clock and multiprocessor on sm_80
// to sm_90).
//
// One to kDecodeSteps queries go to the split-K kernel in flash_attention_decode.cuh instead.
#pragma once

#include "kernels/cuda/flash_attention_common.cuh"
#include "kernels/cuda/flash_attention_decode.cuh"

namespace wgpt::cuda {
namespace flash {

// 2^(c S - c max) as an FMA keeps of c S what c max lost to rounding: 2^9 at scores of 1e10. But where c S is above this, scores
// that differ at all differ by 2^6 (16 bits: 2^4), and any larger c gives the same softmax: tiles with such a maximum take a
// power of two, so that nothing rounds; then other scores of the row lie far below. Under it P is at most 2^(2^5)
// (16 bits: 2^(2^3)), and so is the sum.
template <typename T>
constexpr float kHugeScore = sizeof(T) == 4 ? 0x1p30f : 0x1p28f;

template <typename T>
struct ForwardParams {
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse;
  PackedVisibility visible;  // first_key nullptr: not packed
  int n_heads, n_batch_heads, n_tiles;
  float scale, scale_log2;
  float huge, scale_of_huge;  // kHugeScore as a score; the power of two in [2, 4) of scale_log2
  bool aligned;
};

// Keys per tile: as many as registers (16-bit) and 99 KiB of shared memory (float32, sm_86) allow.
template <typename T, int D>
constexpr int kForwardKeys = sizeof(T) == 2 ? 64
                             : D == 128     ? 16
                                            : 32;

// Steps of k of which Q's fragments stay in registers: as many as fit, at D = 128 none beside the borders of documents.
template <typename T, int D, bool kPacked>
constexpr int kKeptQueries = sizeof(T) == 4        ? 0
                             : kPacked && D == 128 ? 0
                             : D == 64             ? 3
                                                   : D / 16;

template <typename T, int D>
struct ForwardTiles {
  static constexpr int kRows = 16 * kRowBlocks<T, D> * kMatrixWarps;
  static constexpr int kKeys = kForwardKeys<T, D>;
  static constexpr int kThreads = kMatrixWarps * kWarp;
  static constexpr size_t kSharedBytes = sizeof(T) * SmemTile<T, D>::elements(kRows + 4 * kKeys);
};

// The queries of a block in [row0, q_end), which have no border of documents between them.
template <typename T, int D, bool kPacked>
WGPT_DEVICE void forward_rows(const ForwardParams<T>& p, T* base, int row0, int q_end) {
  using Sizes = ForwardTiles<T, D>;
  using HeadTile = SmemTile<T, D>;
  constexpr int kRows = Sizes::kRows, kKeys = Sizes::kKeys, kThreads = Sizes::kThreads,
                kM = kRowBlocks<T, D>, kN = kKeys / 8, kKept = kKeptQueries<T, D, kPacked>;
  const HeadTile q_tile = {base};
  const auto k_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(kRows + 2 * stage * kKeys)};
  };
  const auto v_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(kRows + (2 * stage + 1) * kKeys)};
  };

  const BlockWork work(p);
  const auto& visible = visibility_of_block<kPacked>(p);
  const int last_row = row0 + kRows < q_end ? row0 + kRows - 1 : q_end - 1;
  const int key_origin = visible.key_origin(row0);
  const int key_end = visible.key_end(last_row);
  const int first_tile = key_origin + (visible.keys_of(row0).lo - key_origin) / kKeys * kKeys;
  const int tile_end = visible.keys_of(last_row).hi;

  // This warp's rows, and what each lane must know of its own.
  const int warp = threadIdx.x / kWarp, g = lane_id() / 4, t = lane_id() % 4;
  const int warp_row0 = row0 + 16 * kM * warp;
  const int warp_last = warp_row0 + 16 * kM < q_end ? warp_row0 + 16 * kM - 1 : q_end - 1;
  TileRange tiles(visible.keys_of(warp_row0), visible.keys_of(warp_last), kKeys);
  if (warp_row0 >= q_end) tiles.end = tiles.begin;

  TileStream<T, D, kKeys, kThreads> k_stream(p.k, work, first_tile, p.aligned),
      v_stream(p.v, work, first_tile, p.aligned);
  const auto load_keys = [&](int stage, int key0) {
    k_stream.load(k_tile(stage), key0, key_end);
    v_stream.load(v_tile(stage), key0, key_end);
    copy_async_commit();
  };
  load_tile<kRows, kThreads>(q_tile, p.q, work, row0, q_end, p.aligned);
  load_keys(0, first_tile);

  LeftRows<T, D, kM, kKept> q_rows = {q_tile, 16 * kM * warp, {}};
  // c max of each of the lane's rows, so that P = 2^(c S - c max), and the sum of what the lane holds of P.
  float out[kM][D / 8][4], top_log2[kM][2], row_sum[kM][2];
  clear(out);
  WGPT_UNROLL
  for (int m = 0; m < kM; ++m) {
    WGPT_UNROLL
    for (int half = 0; half < 2; ++half) top_log2[m][half] = -INFINITY, row_sum[m][half] = 0.f;
  }

  if constexpr (kKept > 0) {
    copy_async_wait<0>();
    __syncthreads();
    q_rows.prepare();
  }
  for (int tile = first_tile, stage = 0; tile < tile_end; tile += kKeys, stage = 1 - stage) {
    copy_async_wait<0>();
    __syncthreads();  // this tile is here, and everyone has done with the stage that is loaded next
    if (tile + kKeys < tile_end) load_keys(1 - stage, tile + kKeys);
    if (!tiles.holds(tile)) continue;

    with_mask<T>(tiles.is_masked(tile), [&](auto masked) {
      int row = warp_row0 + g, key0 = tile + 2 * t;        // the lane's first
      if (masked) row = opaque(row), key0 = opaque(key0);  // masks are made where they are used
      const auto& seen = visibility_of_block<kPacked>(p);
      float s[kM][kN][4];
      gemm_by_rows<T, D>(s, q_rows, k_tile(stage));
      WGPT_UNROLL
      for (int m = 0; m < kM; ++m) {
        WGPT_UNROLL
        for (int half = 0; half < 2; ++half) {
          if (masked) {
            const Span span = seen.keys_of(row + 16 * m + 8 * half);
            WGPT_UNROLL
            for (int n = 0; n < kN; ++n) {
              WGPT_UNROLL
              for (int c = 0; c < 2; ++c) {
                const int key = key0 + 8 * n + c;
                if (key < span.lo || key >= span.hi) s[m][n][2 * half + c] = -INFINITY;
              }
            }
          }
          // The maximum over the four lanes that share the row; then the old sums at the new scale.
          float top = s[m][0][2 * half];
          WGPT_UNROLL
          for (int n = 0; n < kN; ++n) {
            top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
          }
          top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
          top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
          const float scale = fabsf(top) > p.huge ? p.scale_of_huge : p.scale_log2;
          const float new_top = fmaxf(top * scale, top_log2[m][half]);
          // A row that has seen no key yet keeps -inf; 0 in its place makes all its powers 2^-inf = 0.
          const float shift = masked && new_top == -INFINITY ? 0.f : new_top;
          const float shrink = exp2_approx(top_log2[m][half] - shift);
          top_log2[m][half] = new_top;
          row_sum[m][half] *= shrink;
          WGPT_UNROLL
          for (int n = 0; n < D / 8; ++n) {
            out[m][n][2 * half] *= shrink;
            out[m][n][2 * half + 1] *= shrink;
          }
          WGPT_UNROLL
          for (int n = 0; n < kN; ++n) {
            WGPT_UNROLL
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
              s[m][n][i] = exp2_approx(s[m][n][i] * scale - shift);
              row_sum[m][half] += s[m][n][i];
            }
          }
        }
      }
      add_weighted_rows<T, D>(out, s, v_tile(stage));
    });
  }

  const BlockWork end(p);
  WGPT_UNROLL
  for (int m = 0; m < kM; ++m) {
    float inverse[2];
    WGPT_UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum = row_sum[m][half];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      inverse[half] = sum > 0.f ? 1.f / sum : 0.f;
      const int row = warp_row0 + 16 * m + g + 8 * half;
      if (t == 0 && row < q_end) {
        const bool is_huge = fabsf(top_log2[m][half]) > 1.5f * kHugeScore<T>;
        const float unscale = is_huge ? p.scale / p.scale_of_huge : 1.f / kLog2E;
        p.lse[static_cast<int64_t>(end.head) * p.visible.q_steps + row] =
            top_log2[m][half] * unscale + log2f(sum) * (1.f / kLog2E);
      }
    }
    // The warp's own rows of Q are read no more, and carry its output.
    store_rows<T, D>(out[m], inverse, q_tile, 16 * (kM * warp + m), p.out.head(end),
                     warp_row0 + 16 * m, q_end, p.aligned);
  }
}

// Bounded so that a multiprocessor holds two blocks.
template <typename T, int D, bool kPacked>
__global__ void __launch_bounds__(ForwardTiles<T, D>::kThreads, 2)
    forward_kernel(ForwardParams<T> p) {
  constexpr int kRows = ForwardTiles<T, D>::kRows;
  WGPT_DYNAMIC_SHARED(shared);
  // The last (for causal: longest) rows of all heads start first.
  const auto row0 = [&] { return (p.n_tiles - 1 - BlockWork(p).tile) * kRows; };
  for_each_run<kPacked, kRows>(p, row0, [&](int begin, int end) {
    forward_rows<T, D, kPacked>(p, reinterpret_cast<T*>(shared), begin, end);
  });
}

template <typename T, int D>
const char* forward(const FlashAttentionForward& a, Stream stream) {
  using Sizes = ForwardTiles<T, D>;
  static_assert(Sizes::kSharedBytes <= kSharedLimit);
  const FlashAttentionShape& s = a.shape;
  if (s.q_steps <= kDecodeSteps) return decode<T, D>(a, stream);
  ForwardParams<T> p;
  p.q = heads<const T>(a.q);
  p.k = heads<const T>(a.k);
  p.v = heads<const T>(a.v);
  p.out = heads<T>(a.out);
  p.lse = static_cast<float*>(a.lse);
  p.visible = visibility(s, a.first_key);
  p.n_heads = static_cast<int>(s.heads);
  p.n_batch_heads = static_cast<int>(s.batch * s.heads);
  p.n_tiles = static_cast<int>(ceil_div(s.q_steps, int64_t{Sizes::kRows}));
  p.scale = static_cast<float>(s.scale);
  p.scale_log2 = static_cast<float>(s.scale * kLog2E);
  p.huge = kHugeScore<T> / p.scale_log2;
  p.scale_of_huge = exp2f(ceilf(log2f(p.scale_log2)) + 1.f);
  p.aligned = rows_aligned<T>(a.q) && rows_aligned<T>(a.k) && rows_aligned<T>(a.v) &&
              rows_aligned<T>(a.out);
  const auto start = [&](auto kernel) {
    return launch(kernel, static_cast<unsigned>(p.n_batch_heads) * p.n_tiles, Sizes::kThreads,
                  Sizes::kSharedBytes, stream, p);
  };
  return a.first_key == nullptr ? start(forward_kernel<T, D, false>)
                                : start(forward_kernel<T, D, true>);
}

}  // namespace flash

const char* flash_attention_forward(const FlashAttentionForward& a, Stream stream) {
  const char* error = flash::check(a.shape);
  if (error != nullptr || a.shape.batch * a.shape.heads == 0) return error;
  with_element_type(a.shape.dtype, [&](auto element) {
    flash::with_head_dim(a.shape.head_dim, [&](auto head_dim) {
      error = flash::forward<decltype(element), decltype(head_dim)::value>(a, stream);
    });
  });
  return error;
}

size_t flash_attention_forward_workspace_bytes(const FlashAttentionShape& s) {
  return flash::decode_workspace_bytes(s);
}

}  // namespace wgpt::cuda
