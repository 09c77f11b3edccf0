// flash_attention backward on CUDA: three launches, no atomics, P and dS never leave the registers. Formulas in
// kernels/flash_attention.h. Not yet run on hardware.
//
//   delta    delta[i] = d_out[i] . out[i] - d_lse[i]        a group of lanes per row, memory-bound
//   dK, dV   one block per tile of keys, loop over the tiles of queries that see it:
//              S^T = K Q^T   dP^T = V dO^T   P^T = 2^(c S^T - log2 e lse)   dS^T = P^T (dP^T - delta)
//              dV += P^T dO  dK += dS^T Q    (keys are rows: accumulators of S^T, dS^T are the A fragments)
//   dQ       one block per tile of queries, loop over the tiles of keys that they see:
//              S = Q K^T     dP = dO V^T     dQ += dS K
//
// S and dP are computed in both passes: 7 GEMMs, 14 D FLOPs per visible pair, instead of 5 and an unordered or
// serialised addition into dQ. Every gradient has one owner and a fixed order, so the bits are always the same. float32
// accumulators; P and dS are rounded to the element type for the second GEMMs (float32 keeps them: 3xTF32).
// The limit is the tensor cores. Memory: delta, 4 bytes per row.
#pragma once

#include "kernels/cuda/flash_attention_common.cuh"

namespace wgpt::cuda {
namespace flash {

template <typename T>
struct BackwardParams {
  Heads<const T> q, k, v, out, d_out;
  Heads<T> dq, dk, dv;
  const float *lse, *d_lse;
  float* delta;  // (B, H, Tq)
  Visibility visible;
  int n_heads, n_batch_heads;
  float scale, scale_log2;
  bool aligned;
};

// Warps of a block (16 rows each) and rows of a streamed tile: no spills on any architecture, three blocks a
// multiprocessor at D <= 64 by registers, and at most 99 KiB of shared memory.
template <typename T, int D>
constexpr int kStreamedQueries = sizeof(T) == 4 ? 16 : 2048 / D;
template <typename T, int D>
constexpr int kStreamedKeys = sizeof(T) == 4 ? (D == 128 ? 16 : 32)
                              : D == 128     ? 32
                                             : 2048 / D;

template <typename T, int D, int kStreamedRows>
struct BackwardTiles {
  static constexpr int kWarps = sizeof(T) == 4 && D == 128 ? 2 : 4;
  static constexpr int kOwned = 16 * kWarps;
  static constexpr int kStreamed = kStreamedRows;
  static constexpr int kThreads = kWarps * kWarp;
  // Blocks that a multiprocessor must hold, which bounds the registers; 0: as the compiler likes.
  static constexpr int kMinBlocks = D == 128 ? 8 / kWarps : (sizeof(T) == 4 ? 3 : 0);
  // Whether the fragments of the owned rows stay in registers.
  static constexpr bool kKeep = sizeof(T) == 2 && D == 32;
  // Two owned tiles, two streamed ones in two stages; lse and delta of the streamed queries in two stages.
  static constexpr int kElements = SmemTile<T, D>::elements(2 * kOwned + 4 * kStreamed);
  static constexpr size_t kSharedBytes = sizeof(T) * kElements + sizeof(float) * 4 * kStreamed;
};
template <typename T, int D>
using KeyValueGradTiles = BackwardTiles<T, D, kStreamedQueries<T, D>>;
template <typename T, int D>
using QueryGradTiles = BackwardTiles<T, D, kStreamedKeys<T, D>>;

constexpr int kDeltaThreads = 256;

template <typename T, int D>
__global__ void __launch_bounds__(kDeltaThreads) delta_kernel(BackwardParams<T> p, int64_t n_rows) {
  constexpr int kW = kVecLanes<T>, kGroup = D / kW;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x) /
                      kGroup;  // (b Tq + i) H + h
  const int column = threadIdx.x % kGroup * kW;
  float sum = 0.f;
  int64_t at = 0;
  if (row < n_rows) {
    const int64_t h = row % p.n_heads, step = row / p.n_heads, b = step / p.visible.q_steps,
                  i = step % p.visible.q_steps;
    at = (b * p.n_heads + h) * p.visible.q_steps + i;
    const T* out = p.out.head(b, h).row(i) + column;
    const T* d_out = p.d_out.head(b, h).row(i) + column;
    if (p.aligned) {
      const Vec<T, kW> x = load_vec<kW>(out), y = load_vec<kW>(d_out);
      WGPT_UNROLL
      for (int c = 0; c < kW; ++c) sum += to_float(x.e[c]) * to_float(y.e[c]);
    } else {
      for (int c = 0; c < kW; ++c) sum += to_float(out[c]) * to_float(d_out[c]);
    }
  }
  WGPT_UNROLL
  for (int d = 1; d < kGroup; d *= 2) sum += __shfl_xor_sync(kFullWarp, sum, d);
  if (row < n_rows && column == 0) p.delta[at] = sum - (p.d_lse != nullptr ? p.d_lse[at] : 0.f);
}

template <typename T, int D>
__global__ void __launch_bounds__(KeyValueGradTiles<T, D>::kThreads,
                                  KeyValueGradTiles<T, D>::kMinBlocks)
    key_value_grad_kernel(BackwardParams<T> p) {
  using Sizes = KeyValueGradTiles<T, D>;
  using HeadTile = SmemTile<T, D>;
  constexpr int kKeys = Sizes::kOwned, kQueries = Sizes::kStreamed, kThreads = Sizes::kThreads,
                kN = kQueries / 8;
  WGPT_DYNAMIC_SHARED(shared);
  T* const base = reinterpret_cast<T*>(shared);
  const HeadTile k_tile = {base}, v_tile = {base + HeadTile::elements(kKeys)};
  const auto q_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(2 * kKeys + 2 * stage * kQueries)};
  };
  const auto d_out_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(2 * kKeys + (2 * stage + 1) * kQueries)};
  };
  float* const row_facts =
      reinterpret_cast<float*>(base + Sizes::kElements);  // [stage][log2 e lse | delta][query]

  const int batch_head = blockIdx.x % p.n_batch_heads;
  const int64_t b = batch_head / p.n_heads, h = batch_head % p.n_heads;
  const int key0 =
      static_cast<int>(blockIdx.x / p.n_batch_heads) * kKeys;  // for causal, the longest come first
  const Rows<const T> q = p.q.head(b, h), d_out = p.d_out.head(b, h);
  const int q_steps = p.visible.q_steps, kv_steps = p.visible.kv_steps;
  const int last_key = key0 + kKeys < kv_steps ? key0 + kKeys - 1 : kv_steps - 1;
  const Span queries = p.visible.queries_of(key0, last_key);
  const int tile_begin = queries.lo / kQueries, tile_end = ceil_div(queries.hi, kQueries);

  const auto load_queries = [&](int stage, int tile) {
    q_tile(stage).template load<kQueries, kThreads>(q, tile * kQueries, q_steps, p.aligned);
    d_out_tile(stage).template load<kQueries, kThreads>(d_out, tile * kQueries, q_steps, p.aligned);
    if (threadIdx.x < kQueries) {
      const int query = tile * kQueries + threadIdx.x;
      const int64_t at = static_cast<int64_t>(batch_head) * q_steps + query;
      float* facts = row_facts + 2 * stage * kQueries + threadIdx.x;
      facts[0] = query < q_steps ? p.lse[at] * kLog2E : INFINITY;  // absent rows weigh 2^-inf = 0
      facts[kQueries] = query < q_steps ? p.delta[at] : 0.f;
    }
    copy_async_commit();
  };

  const int warp = threadIdx.x / kWarp, g = lane_id() / 4, t = lane_id() % 4;
  const int warp_first = key0 + 16 * warp,
            warp_last = warp_first + 15 < kv_steps ? warp_first + 15 : kv_steps - 1;
  LeftRows<T, D, Sizes::kKeep> k_rows = {k_tile, 16 * warp, {}}, v_rows = {v_tile, 16 * warp, {}};
  float dk[D / 8][4], dv[D / 8][4];
  clear(dk);
  clear(dv);

  k_tile.template load<kKeys, kThreads>(p.k.head(b, h), key0, kv_steps, p.aligned);
  v_tile.template load<kKeys, kThreads>(p.v.head(b, h), key0, kv_steps, p.aligned);
  if (tile_begin < tile_end) {
    load_queries(0, tile_begin);
  } else {
    copy_async_commit();  // keys that no query sees: their gradients are zero
    copy_async_wait<0>();
    __syncthreads();
  }
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    const int stage = (tile - tile_begin) % 2;
    copy_async_wait<0>();
    __syncthreads();  // this tile is here, and everyone has done with the stage that is loaded next
    if (tile + 1 < tile_end) load_queries(1 - stage, tile + 1);
    if (tile == tile_begin) {
      k_rows.prepare();
      v_rows.prepare();
    }
    const int query0 = tile * kQueries;
    const int last_query = query0 + kQueries < q_steps ? query0 + kQueries - 1 : q_steps - 1;
    const Span first_span = p.visible.keys_of(query0), last_span = p.visible.keys_of(last_query);
    if (warp_first >= kv_steps || warp_first >= last_span.hi || warp_last < first_span.lo) continue;
    const bool masked = warp_first < last_span.lo || warp_last >= first_span.hi;

    float s[kN][4], ds[kN][4];  // rows: keys, columns: queries
    gemm_by_rows<T, D>(s, k_rows, q_tile(stage));
    gemm_by_rows<T, D>(ds, v_rows, d_out_tile(stage));
    const float* facts = row_facts + 2 * stage * kQueries;
    WGPT_UNROLL
    for (int n = 0; n < kN; ++n) {
      const int column = 8 * n + 2 * t;
      WGPT_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float lse_log2 = facts[column + c], delta = facts[kQueries + column + c];
        WGPT_UNROLL
        for (int half = 0; half < 2; ++half) {
          float weight = exp2_approx(s[n][2 * half + c] * p.scale_log2 - lse_log2);
          if (masked) {
            const Span span = p.visible.keys_of(query0 + column + c);
            const int key = warp_first + g + 8 * half;
            if (key < span.lo || key >= span.hi) weight = 0.f;
          }
          s[n][2 * half + c] = weight;
          ds[n][2 * half + c] = weight * (ds[n][2 * half + c] - delta);
        }
      }
    }
    add_weighted_rows<T, D>(dv, s, d_out_tile(stage));
    add_weighted_rows<T, D>(dk, ds, q_tile(stage));
  }
  // Only this warp reads these rows of K and V, so it may write their gradients through them.
  store_rows<T, D>(dk, {p.scale, p.scale}, k_tile, 16 * warp, p.dk.head(b, h), warp_first, kv_steps,
                   p.aligned);
  store_rows<T, D>(dv, {1.f, 1.f}, v_tile, 16 * warp, p.dv.head(b, h), warp_first, kv_steps,
                   p.aligned);
}

template <typename T, int D>
__global__ void __launch_bounds__(QueryGradTiles<T, D>::kThreads, QueryGradTiles<T, D>::kMinBlocks)
    query_grad_kernel(BackwardParams<T> p, int n_tiles) {
  using Sizes = QueryGradTiles<T, D>;
  using HeadTile = SmemTile<T, D>;
  constexpr int kRows = Sizes::kOwned, kKeys = Sizes::kStreamed, kThreads = Sizes::kThreads,
                kN = kKeys / 8;
  WGPT_DYNAMIC_SHARED(shared);
  T* const base = reinterpret_cast<T*>(shared);
  const HeadTile q_tile = {base}, d_out_tile = {base + HeadTile::elements(kRows)};
  const auto k_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(2 * kRows + 2 * stage * kKeys)};
  };
  const auto v_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(2 * kRows + (2 * stage + 1) * kKeys)};
  };

  const int batch_head = blockIdx.x % p.n_batch_heads;
  const int64_t b = batch_head / p.n_heads, h = batch_head % p.n_heads;
  const int row0 = (n_tiles - 1 - static_cast<int>(blockIdx.x / p.n_batch_heads)) * kRows;
  const Rows<const T> k = p.k.head(b, h), v = p.v.head(b, h);
  const int q_steps = p.visible.q_steps, kv_steps = p.visible.kv_steps;
  const int last_row = row0 + kRows < q_steps ? row0 + kRows - 1 : q_steps - 1;
  const int tile_begin = p.visible.keys_of(row0).lo / kKeys;
  const int tile_end = ceil_div(p.visible.keys_of(last_row).hi, kKeys);

  const int warp = threadIdx.x / kWarp, g = lane_id() / 4, t = lane_id() % 4;
  const int warp_row0 = row0 + 16 * warp,
            warp_last = warp_row0 + 16 < q_steps ? warp_row0 + 15 : q_steps - 1;
  const Span first_span = p.visible.keys_of(warp_row0), last_span = p.visible.keys_of(warp_last);
  Span row_span[2];
  float lse_log2[2], delta[2];
  WGPT_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row0 + g + 8 * half;
    const int64_t at = static_cast<int64_t>(batch_head) * q_steps + row;
    row_span[half] = p.visible.keys_of(row);
    lse_log2[half] = row < q_steps ? p.lse[at] * kLog2E : INFINITY;
    delta[half] = row < q_steps ? p.delta[at] : 0.f;
  }
  LeftRows<T, D, Sizes::kKeep> q_rows = {q_tile, 16 * warp, {}},
                               d_out_rows = {d_out_tile, 16 * warp, {}};
  float dq[D / 8][4];
  clear(dq);

  q_tile.template load<kRows, kThreads>(p.q.head(b, h), row0, q_steps, p.aligned);
  d_out_tile.template load<kRows, kThreads>(p.d_out.head(b, h), row0, q_steps, p.aligned);
  k_tile(0).template load<kKeys, kThreads>(k, tile_begin * kKeys, kv_steps, p.aligned);
  v_tile(0).template load<kKeys, kThreads>(v, tile_begin * kKeys, kv_steps, p.aligned);
  copy_async_commit();
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    const int stage = (tile - tile_begin) % 2;
    copy_async_wait<0>();
    __syncthreads();  // this tile is here, and everyone has done with the stage that is loaded next
    if (tile + 1 < tile_end) {
      k_tile(1 - stage).template load<kKeys, kThreads>(k, (tile + 1) * kKeys, kv_steps, p.aligned);
      v_tile(1 - stage).template load<kKeys, kThreads>(v, (tile + 1) * kKeys, kv_steps, p.aligned);
      copy_async_commit();
    }
    if (tile == tile_begin) {
      q_rows.prepare();
      d_out_rows.prepare();
    }
    const int key0 = tile * kKeys;
    if (warp_row0 >= q_steps || key0 >= last_span.hi || key0 + kKeys <= first_span.lo) continue;
    const bool masked = key0 < last_span.lo || key0 + kKeys > first_span.hi;

    float s[kN][4], ds[kN][4];
    gemm_by_rows<T, D>(s, q_rows, k_tile(stage));
    gemm_by_rows<T, D>(ds, d_out_rows, v_tile(stage));
    WGPT_UNROLL
    for (int n = 0; n < kN; ++n) {
      WGPT_UNROLL
      for (int i = 0; i < 4; ++i) {
        float weight = exp2_approx(s[n][i] * p.scale_log2 - lse_log2[i / 2]);
        if (masked) {
          const int key = key0 + 8 * n + 2 * t + i % 2;
          if (key < row_span[i / 2].lo || key >= row_span[i / 2].hi) weight = 0.f;
        }
        ds[n][i] = weight * (ds[n][i] - delta[i / 2]);
      }
    }
    add_weighted_rows<T, D>(dq, ds, k_tile(stage));
  }
  store_rows<T, D>(dq, {p.scale, p.scale}, q_tile, 16 * warp, p.dq.head(b, h), warp_row0, q_steps,
                   p.aligned);
}

template <typename T, int D>
const char* backward(const FlashAttentionBackward& a, Stream stream) {
  const FlashAttentionShape& s = a.shape;
  using KeyTiles = KeyValueGradTiles<T, D>;
  using QueryTiles = QueryGradTiles<T, D>;
  static_assert(KeyTiles::kSharedBytes <= kSharedLimit && QueryTiles::kSharedBytes <= kSharedLimit);
  BackwardParams<T> p;
  p.q = heads<const T>(a.q);
  p.k = heads<const T>(a.k);
  p.v = heads<const T>(a.v);
  p.out = heads<const T>(a.out);
  p.d_out = heads<const T>(a.d_out);
  p.dq = heads<T>(a.dq);
  p.dk = heads<T>(a.dk);
  p.dv = heads<T>(a.dv);
  p.lse = static_cast<const float*>(a.lse);
  p.d_lse = static_cast<const float*>(a.d_lse);
  p.delta = static_cast<float*>(a.workspace);
  p.visible = visibility(s);
  p.n_heads = static_cast<int>(s.heads);
  p.n_batch_heads = static_cast<int>(s.batch * s.heads);
  p.scale = static_cast<float>(s.scale);
  p.scale_log2 = static_cast<float>(s.scale * kLog2E);
  p.aligned = true;
  for (const HeadsView* view : {&a.q, &a.k, &a.v, &a.out, &a.d_out, &a.dq, &a.dk, &a.dv}) {
    p.aligned = p.aligned && rows_aligned<T>(*view);
  }
  const int64_t n_rows = s.batch * s.heads * s.q_steps;
  constexpr int kRowsPerBlock = kDeltaThreads / (D / kVecLanes<T>);
  const char* error =
      launch(delta_kernel<T, D>, static_cast<unsigned>(ceil_div(n_rows, int64_t{kRowsPerBlock})),
             kDeltaThreads, 0, stream, p, n_rows);
  if (error != nullptr) return error;
  const int key_tiles = static_cast<int>(ceil_div(s.kv_steps, int64_t{KeyTiles::kOwned}));
  error = launch(key_value_grad_kernel<T, D>, static_cast<unsigned>(p.n_batch_heads) * key_tiles,
                 KeyTiles::kThreads, KeyTiles::kSharedBytes, stream, p);
  if (error != nullptr) return error;
  const int query_tiles = static_cast<int>(ceil_div(s.q_steps, int64_t{QueryTiles::kOwned}));
  return launch(query_grad_kernel<T, D>, static_cast<unsigned>(p.n_batch_heads) * query_tiles,
                QueryTiles::kThreads, QueryTiles::kSharedBytes, stream, p, query_tiles);
}

}  // namespace flash

const char* flash_attention_backward(const FlashAttentionBackward& a, Stream stream) {
  const char* error = flash::check(a.shape);
  if (error != nullptr || a.shape.batch * a.shape.heads == 0) return error;
  with_element_type(a.shape.dtype, [&](auto element) {
    flash::with_head_dim(a.shape.head_dim, [&](auto head_dim) {
      error = flash::backward<decltype(element), decltype(head_dim)::value>(a, stream);
    });
  });
  return error;
}

size_t flash_attention_backward_workspace_bytes(const FlashAttentionShape& s) {
  return static_cast<size_t>(s.batch * s.heads * s.q_steps) * sizeof(float);
}

}  // namespace wgpt::cuda
