// flash_attention forward on CUDA. Formulas in kernels/flash_attention.h. Not yet run on hardware.
//
// One block owns 16 kWarps queries of one head, one warp 16 of them; key tiles are double-buffered in shared memory with
// cp.async, so that loading the next tile overlaps with the mma of this one:
//
//               keys of a tile ->                    per warp and tile:  S = Q K^T   (mma, float32 accumulators)
//             +-----------------+                                        P = 2^(c S - c max)  in registers, c = scale log2 e
//   16 rows   |  S, then P      | warp 0                                 O = O 2^(c (old max - max)) + P V
//   16 rows   |                 | warp 1             P never leaves the registers: the accumulators of S are the A
//    ...      +-----------------+                    fragments of P V.
//
// Rows of a block that belong to several packed documents (first_key) are taken one document after the other, each with
// its own key tiles. Only tiles with an invisible pair are masked, tiles that a warp does not see at all are not computed, and blocks with
// the longest rows start first. float32 is 3xTF32, which keeps float32 accuracy. O, max and sums are float32;
// deterministic (no atomics, fixed order). FLOPs: 4 D per visible pair; limit: the tensor cores, and for D = 32 the
// exponentials (16 per clock and multiprocessor on sm_80 to sm_90).
//
// One to kDecodeSteps queries go to the split-K kernel in flash_attention_decode.cuh instead.
#pragma once

#include "kernels/cuda/flash_attention_common.cuh"
#include "kernels/cuda/flash_attention_decode.cuh"

namespace wgpt::cuda {
namespace flash {

template <typename T>
struct ForwardParams {
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse;
  PackedVisibility visible;  // first_key nullptr: not packed
  int n_heads, n_batch_heads, n_tiles;
  float scale, scale_log2;
  bool aligned;
};

// Keys per tile: as many as registers (16-bit) and 99 KiB of shared memory (float32, sm_86) allow.
template <typename T, int D>
constexpr int kForwardKeys = sizeof(T) == 2 ? 64
                             : D == 128     ? 16
                                            : 32;

template <typename T, int D, int kWarps>
constexpr size_t forward_shared_bytes() {
  return sizeof(T) * SmemTile<T, D>::elements(16 * kWarps + 4 * kForwardKeys<T, D>);
}

// The queries of a block in [row0, q_end), which have no border of documents between them.
template <typename T, int D, int kWarps, typename V>
WGPT_DEVICE void forward_rows(const ForwardParams<T>& p, const V& visible, T* base, int batch_head,
                              int row0, int q_end) {
  constexpr int kRows = 16 * kWarps, kKeys = kForwardKeys<T, D>, kThreads = kWarps * kWarp,
                kN = kKeys / 8;
  using HeadTile = SmemTile<T, D>;
  const HeadTile q_tile = {base};
  const auto k_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(kRows + 2 * stage * kKeys)};
  };
  const auto v_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(kRows + (2 * stage + 1) * kKeys)};
  };

  const int64_t b = batch_head / p.n_heads, h = batch_head % p.n_heads;
  const Rows<const T> q = p.q.head(b, h), k = p.k.head(b, h), v = p.v.head(b, h);
  const int last_row = row0 + kRows < q_end ? row0 + kRows - 1 : q_end - 1;
  const int q_steps = visible.q_steps;
  const int key_origin = visible.key_origin(row0);
  const int key_end = visible.key_end(last_row);
  const int tile_begin = (visible.keys_of(row0).lo - key_origin) / kKeys;
  const int tile_end = ceil_div(visible.keys_of(last_row).hi - key_origin, kKeys);

  // This warp's rows, and what each lane must know of its two.
  const int warp = threadIdx.x / kWarp, g = lane_id() / 4, t = lane_id() % 4;
  const int warp_row0 = row0 + 16 * warp;
  const int warp_last = warp_row0 + 16 < q_end ? warp_row0 + 15 : q_end - 1;
  const Span first_span = visible.keys_of(warp_row0), last_span = visible.keys_of(warp_last);
  const Span row_span[2] = {visible.keys_of(warp_row0 + g), visible.keys_of(warp_row0 + g + 8)};

  const auto load_keys = [=](int stage, int tile) {
    const int key0 = key_origin + tile * kKeys;
    k_tile(stage).template load<kKeys, kThreads>(k, key0, key_end, p.aligned);
    v_tile(stage).template load<kKeys, kThreads>(v, key0, key_end, p.aligned);
    copy_async_commit();
  };
  q_tile.template load<kRows, kThreads>(q, row0, q_end, p.aligned);
  load_keys(0, tile_begin);

  // In registers, but not beside the borders of documents where D > 32: sm_100 and sm_120 spill.
  LeftRows<T, D, sizeof(T) == 2 && (!V::kPacked || D == 32)> q_rows = {q_tile, 16 * warp, {}};
  float out[D / 8][4], row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.f, 0.f};
  clear(out);

  for (int tile = tile_begin; tile < tile_end; ++tile) {
    const int stage = (tile - tile_begin) % 2;
    copy_async_wait<0>();
    __syncthreads();  // this tile is here, and everyone has done with the stage that is loaded next
    if (tile + 1 < tile_end) load_keys(1 - stage, tile + 1);
    if (tile == tile_begin) q_rows.prepare();
    const int key0 = key_origin + tile * kKeys;
    if (warp_row0 >= q_end || key0 >= last_span.hi || key0 + kKeys <= first_span.lo) continue;

    float s[kN][4];
    gemm_by_rows<T, D>(s, q_rows, k_tile(stage));
    if (key0 < last_span.lo || key0 + kKeys > first_span.hi) {
      WGPT_UNROLL
      for (int n = 0; n < kN; ++n) {
        WGPT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int key = key0 + 8 * n + 2 * t + i % 2;
          if (key < row_span[i / 2].lo || key >= row_span[i / 2].hi) s[n][i] = -INFINITY;
        }
      }
    }

    // The running maximum of both rows, over the four lanes that share them; then the old sums at the new scale.
    WGPT_UNROLL
    for (int half = 0; half < 2; ++half) {
      float top = row_max[half];
      WGPT_UNROLL
      for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
      // A row that has seen no key yet keeps -inf; 0 in its place makes all its powers 2^-inf = 0.
      const float shift = top == -INFINITY ? 0.f : top * p.scale_log2;
      const float shrink = exp2_approx(row_max[half] * p.scale_log2 - shift);
      row_max[half] = top;
      row_sum[half] *= shrink;
      WGPT_UNROLL
      for (int n = 0; n < D / 8; ++n) {
        out[n][2 * half] *= shrink;
        out[n][2 * half + 1] *= shrink;
      }
      WGPT_UNROLL
      for (int n = 0; n < kN; ++n) {
        WGPT_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = exp2_approx(s[n][i] * p.scale_log2 - shift);
          row_sum[half] += s[n][i];
        }
      }
    }
    add_weighted_rows<T, D>(out, s, v_tile(stage));
  }

  float inverse[2];
  WGPT_UNROLL
  for (int half = 0; half < 2; ++half) {
    float sum = row_sum[half];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    inverse[half] = sum > 0.f ? 1.f / sum : 0.f;
    const int row = warp_row0 + g + 8 * half;
    if (t == 0 && row < q_end) {
      p.lse[static_cast<int64_t>(batch_head) * q_steps + row] = row_max[half] * p.scale + logf(sum);
    }
  }
  // The warp's own rows of Q are read no more, and carry its output.
  store_rows<T, D>(out, inverse, q_tile, 16 * warp, p.out.head(b, h), warp_row0, q_end, p.aligned);
}

template <typename T, int D, int kWarps, bool kPacked>
WGPT_DEVICE void forward_block(const ForwardParams<T>& p) {
  constexpr int kRows = 16 * kWarps;
  WGPT_DYNAMIC_SHARED(shared);
  // Blocks are numbered with the head fastest, so that the last (for causal: longest) rows of all heads start first.
  const int batch_head = blockIdx.x % p.n_batch_heads;
  const auto& visible = visibility_of_item<kPacked>(p.visible, batch_head / p.n_heads);
  const int row0 = (p.n_tiles - 1 - static_cast<int>(blockIdx.x / p.n_batch_heads)) * kRows;
  for_each_run<kRows>(visible, row0, [&](int begin, int end) {
    forward_rows<T, D, kWarps>(p, visible, reinterpret_cast<T*>(shared), batch_head, begin, end);
  });
}

template <typename T, int D, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp) forward_kernel(ForwardParams<T> p) {
  forward_block<T, D, kWarps, false>(p);
}

// With packed documents, whose borders seldom leave 128 rows together. Bounds on the registers of their own: the
// compiler's choice spills on some architectures.
constexpr int kPackedWarps = 4;
template <typename T, int D>
constexpr int kPackedMinBlocks = sizeof(T) == 4 || D == 128 ? 2
                                 : D == 64                  ? 3
                                                            : 4;
template <typename T, int D>
__global__ void __launch_bounds__(kPackedWarps* kWarp, kPackedMinBlocks<T, D>)
    packed_forward_kernel(ForwardParams<T> p) {
  forward_block<T, D, kPackedWarps, true>(p);
}

// Warps of a block: 8 (128 rows share each tile of keys) once that still gives every multiprocessor kWavesFor8 blocks,
// else 4, which balances better. Pure, for the tests; the threshold is a guess until it is measured.
constexpr int kWavesFor8 = 4;
inline int forward_warps(int64_t batch_heads, int64_t q_steps, int multiprocessors) {
  return batch_heads * ceil_div(q_steps, int64_t{128}) >= int64_t{kWavesFor8} * multiprocessors ? 8
                                                                                                : 4;
}

template <typename T, int D>
const char* forward(const FlashAttentionForward& a, Stream stream) {
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
  p.scale = static_cast<float>(s.scale);
  p.scale_log2 = static_cast<float>(s.scale * kLog2E);
  p.aligned = rows_aligned<T>(a.q) && rows_aligned<T>(a.k) && rows_aligned<T>(a.v) &&
              rows_aligned<T>(a.out);
  const auto start = [&](auto kernel, auto warps) {
    constexpr int kWarps = decltype(warps)::value;
    static_assert(forward_shared_bytes<T, D, kWarps>() <= kSharedLimit);
    p.n_tiles = static_cast<int>(ceil_div(s.q_steps, int64_t{16 * kWarps}));
    return launch(kernel, static_cast<unsigned>(p.n_batch_heads) * p.n_tiles, kWarps * kWarp,
                  forward_shared_bytes<T, D, kWarps>(), stream, p);
  };
  if (a.first_key != nullptr) {
    return start(packed_forward_kernel<T, D>, std::integral_constant<int, kPackedWarps>{});
  }
  if constexpr (sizeof(T) == 2) {
    if (forward_warps(p.n_batch_heads, s.q_steps, multiprocessor_count()) == 8) {
      return start(forward_kernel<T, D, 8>, std::integral_constant<int, 8>{});
    }
  }
  return start(forward_kernel<T, D, 4>, std::integral_constant<int, 4>{});
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
