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
// A block's rows that belong to several packed documents (first_key) are taken one document after the other; not in
// float32 at D = 128, where the registers do not suffice.
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
  float* delta;              // (B, H, Tq)
  PackedVisibility visible;  // first_key nullptr: not packed
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

template <typename T, int D, int kStreamedRows, int kFactsPerRow, bool kPacked>
struct BackwardTiles {
  static constexpr int kWarps = sizeof(T) == 4 && D == 128 ? 2 : 4;
  static constexpr int kOwned = 16 * kWarps;
  static constexpr int kStreamed = kStreamedRows;
  static constexpr int kThreads = kWarps * kWarp;
  // Blocks that a multiprocessor must hold, which bounds the registers; 0: as the compiler likes. The borders of
  // documents take registers: three blocks then spill.
  static constexpr int kMinBlocks = D == 128 ? 8 / kWarps : kPacked ? 2 : sizeof(T) == 4 ? 3 : 0;
  // Whether the fragments of the owned rows stay in registers.
  static constexpr bool kKeep = sizeof(T) == 2 && D == 32;
  // Numbers of 4 bytes that go with each streamed row.
  static constexpr int kFacts = kFactsPerRow;
  // Two owned tiles; two streamed ones and the facts in two stages.
  static constexpr int kElements = SmemTile<T, D>::elements(2 * kOwned + 4 * kStreamed);
  static constexpr size_t kSharedBytes = sizeof(T) * kElements + 4 * 2 * kFacts * kStreamed;
};
template <typename T, int D, bool kPacked>
using KeyValueGradTiles = BackwardTiles<T, D, kStreamedQueries<T, D>, kPacked ? 3 : 2, kPacked>;
template <typename T, int D, bool kPacked>
using QueryGradTiles = BackwardTiles<T, D, kStreamedKeys<T, D>, 0, kPacked>;

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

// The keys of a block in [key0, key_end), which have no border of documents between them.
template <typename T, int D, typename V>
WGPT_DEVICE void key_value_grad_rows(const BackwardParams<T>& p, const V& visible, T* base,
                                     int batch_head, int key0, int key_end) {
  using Sizes = KeyValueGradTiles<T, D, V::kPacked>;
  using HeadTile = SmemTile<T, D>;
  constexpr int kKeys = Sizes::kOwned, kQueries = Sizes::kStreamed, kThreads = Sizes::kThreads,
                kN = kQueries / 8;
  const HeadTile k_tile = {base}, v_tile = {base + HeadTile::elements(kKeys)};
  const auto q_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(2 * kKeys + 2 * stage * kQueries)};
  };
  const auto d_out_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(2 * kKeys + (2 * stage + 1) * kQueries)};
  };
  // [stage][log2 e lse | delta | first key, where packed][query]
  float* const row_facts = reinterpret_cast<float*>(base + Sizes::kElements);

  const int64_t b = batch_head / p.n_heads, h = batch_head % p.n_heads;
  const Rows<const T> q = p.q.head(b, h), d_out = p.d_out.head(b, h);
  const int last_key = key0 + kKeys < key_end ? key0 + kKeys - 1 : key_end - 1;
  const Span queries = visible.queries_of(key0, last_key);
  const int query_origin = visible.query_origin(key0);
  const int tile_begin = (queries.lo - query_origin) / kQueries,
            tile_end = ceil_div(queries.hi - query_origin, kQueries);
  const int q_end = visible.query_end(queries);

  const auto load_queries = [&](int stage, int tile) {
    const int query0 = query_origin + tile * kQueries;
    q_tile(stage).template load<kQueries, kThreads>(q, query0, q_end, p.aligned);
    d_out_tile(stage).template load<kQueries, kThreads>(d_out, query0, q_end, p.aligned);
    if (threadIdx.x < kQueries) {
      const int query = query0 + threadIdx.x;
      const int64_t at = static_cast<int64_t>(batch_head) * visible.q_steps + query;
      float* facts = row_facts + Sizes::kFacts * stage * kQueries + threadIdx.x;
      facts[0] = query < q_end ? p.lse[at] * kLog2E : INFINITY;  // absent rows weigh 2^-inf = 0
      facts[kQueries] = query < q_end ? p.delta[at] : 0.f;
      if constexpr (V::kPacked) {
        reinterpret_cast<int*>(facts)[2 * kQueries] = visible.keys_of(query).lo;
      }
    }
    copy_async_commit();
  };

  const int warp = threadIdx.x / kWarp, g = lane_id() / 4, t = lane_id() % 4;
  const int warp_first = key0 + 16 * warp,
            warp_last = warp_first + 15 < key_end ? warp_first + 15 : key_end - 1;
  LeftRows<T, D, Sizes::kKeep> k_rows = {k_tile, 16 * warp, {}}, v_rows = {v_tile, 16 * warp, {}};
  float dk[D / 8][4], dv[D / 8][4];
  clear(dk);
  clear(dv);

  k_tile.template load<kKeys, kThreads>(p.k.head(b, h), key0, key_end, p.aligned);
  v_tile.template load<kKeys, kThreads>(p.v.head(b, h), key0, key_end, p.aligned);
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
    const int query0 = query_origin + tile * kQueries;
    const int last_query = query0 + kQueries < q_end ? query0 + kQueries - 1 : q_end - 1;
    // What a query of this tile sees; its first key is in shared memory where packed.
    const auto keys_of = [=](int query) {
      Span keys = visible.Visibility::keys_of(query);
      if constexpr (V::kPacked) {
        keys.lo = reinterpret_cast<const int*>(
            row_facts)[(Sizes::kFacts * stage + 2) * kQueries + query - query0];
      }
      return keys;
    };
    const Span first_span = keys_of(query0), last_span = keys_of(last_query);
    if (warp_first >= key_end || warp_first >= last_span.hi || warp_last < first_span.lo) continue;
    const bool masked = warp_first < last_span.lo || warp_last >= first_span.hi;

    float s[kN][4], ds[kN][4];  // rows: keys, columns: queries
    gemm_by_rows<T, D>(s, k_rows, q_tile(stage));
    gemm_by_rows<T, D>(ds, v_rows, d_out_tile(stage));
    const float* facts = row_facts + Sizes::kFacts * stage * kQueries;
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
            const Span span = keys_of(query0 + column + c);
            const int key = warp_first + g + 8 * half;
            if (key < span.lo || key >= span.hi) {
              weight = 0.f;
              if constexpr (V::kPacked) ds[n][2 * half + c] = delta;  // 0 times NaN is not 0
            }
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
  store_rows<T, D>(dk, {p.scale, p.scale}, k_tile, 16 * warp, p.dk.head(b, h), warp_first, key_end,
                   p.aligned);
  store_rows<T, D>(dv, {1.f, 1.f}, v_tile, 16 * warp, p.dv.head(b, h), warp_first, key_end,
                   p.aligned);
}

template <typename T, int D, bool kPacked>
__global__ void __launch_bounds__(KeyValueGradTiles<T, D, kPacked>::kThreads,
                                  KeyValueGradTiles<T, D, kPacked>::kMinBlocks)
    key_value_grad_kernel(BackwardParams<T> p) {
  constexpr int kKeys = KeyValueGradTiles<T, D, kPacked>::kOwned;
  WGPT_DYNAMIC_SHARED(shared);
  const int batch_head = blockIdx.x % p.n_batch_heads;
  const auto& visible = visibility_of_item<kPacked>(p.visible, batch_head / p.n_heads);
  const int key0 =
      static_cast<int>(blockIdx.x / p.n_batch_heads) * kKeys;  // for causal, the longest come first
  const int offset = visible.kv_steps - visible.q_steps;  // from a query to the key at its position
  for_each_run<kKeys>(visible, key0 - offset, [&](int begin, int end) {
    key_value_grad_rows<T, D>(p, visible, reinterpret_cast<T*>(shared), batch_head, begin + offset,
                              end + offset);
  });
}

// The queries of a block in [row0, q_end), which have no border of documents between them.
template <typename T, int D, typename V>
WGPT_DEVICE void query_grad_rows(const BackwardParams<T>& p, const V& visible, T* base,
                                 int batch_head, int row0, int q_end) {
  using Sizes = QueryGradTiles<T, D, V::kPacked>;
  using HeadTile = SmemTile<T, D>;
  constexpr int kRows = Sizes::kOwned, kKeys = Sizes::kStreamed, kThreads = Sizes::kThreads,
                kN = kKeys / 8;
  const HeadTile q_tile = {base}, d_out_tile = {base + HeadTile::elements(kRows)};
  const auto k_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(2 * kRows + 2 * stage * kKeys)};
  };
  const auto v_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(2 * kRows + (2 * stage + 1) * kKeys)};
  };

  const int64_t b = batch_head / p.n_heads, h = batch_head % p.n_heads;
  const Rows<const T> k = p.k.head(b, h), v = p.v.head(b, h);
  const int last_row = row0 + kRows < q_end ? row0 + kRows - 1 : q_end - 1;
  const int key_origin = visible.key_origin(row0);
  const int key_end = visible.key_end(last_row);
  const int tile_begin = (visible.keys_of(row0).lo - key_origin) / kKeys;
  const int tile_end = ceil_div(visible.keys_of(last_row).hi - key_origin, kKeys);

  const int warp = threadIdx.x / kWarp, g = lane_id() / 4, t = lane_id() % 4;
  const int warp_row0 = row0 + 16 * warp,
            warp_last = warp_row0 + 16 < q_end ? warp_row0 + 15 : q_end - 1;
  const Span first_span = visible.keys_of(warp_row0), last_span = visible.keys_of(warp_last);
  Span row_span[2];
  float lse_log2[2], delta[2];
  WGPT_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row0 + g + 8 * half;
    const int64_t at = static_cast<int64_t>(batch_head) * visible.q_steps + row;
    row_span[half] = visible.keys_of(row);
    lse_log2[half] = row < q_end ? p.lse[at] * kLog2E : INFINITY;
    delta[half] = row < q_end ? p.delta[at] : 0.f;
  }
  LeftRows<T, D, Sizes::kKeep> q_rows = {q_tile, 16 * warp, {}},
                               d_out_rows = {d_out_tile, 16 * warp, {}};
  float dq[D / 8][4];
  clear(dq);

  const auto load_keys = [&](int stage, int tile) {
    const int key0 = key_origin + tile * kKeys;
    k_tile(stage).template load<kKeys, kThreads>(k, key0, key_end, p.aligned);
    v_tile(stage).template load<kKeys, kThreads>(v, key0, key_end, p.aligned);
    copy_async_commit();
  };
  q_tile.template load<kRows, kThreads>(p.q.head(b, h), row0, q_end, p.aligned);
  d_out_tile.template load<kRows, kThreads>(p.d_out.head(b, h), row0, q_end, p.aligned);
  load_keys(0, tile_begin);
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    const int stage = (tile - tile_begin) % 2;
    copy_async_wait<0>();
    __syncthreads();  // this tile is here, and everyone has done with the stage that is loaded next
    if (tile + 1 < tile_end) load_keys(1 - stage, tile + 1);
    if (tile == tile_begin) {
      q_rows.prepare();
      d_out_rows.prepare();
    }
    const int key0 = key_origin + tile * kKeys;
    if (warp_row0 >= q_end || key0 >= last_span.hi || key0 + kKeys <= first_span.lo) continue;
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
          if (key < row_span[i / 2].lo || key >= row_span[i / 2].hi) {
            weight = 0.f;
            if constexpr (V::kPacked) ds[n][i] = delta[i / 2];
          }
        }
        ds[n][i] = weight * (ds[n][i] - delta[i / 2]);
      }
    }
    add_weighted_rows<T, D>(dq, ds, k_tile(stage));
  }
  store_rows<T, D>(dq, {p.scale, p.scale}, q_tile, 16 * warp, p.dq.head(b, h), warp_row0, q_end,
                   p.aligned);
}

template <typename T, int D, bool kPacked>
__global__ void __launch_bounds__(QueryGradTiles<T, D, kPacked>::kThreads,
                                  QueryGradTiles<T, D, kPacked>::kMinBlocks)
    query_grad_kernel(BackwardParams<T> p, int n_tiles) {
  constexpr int kRows = QueryGradTiles<T, D, kPacked>::kOwned;
  WGPT_DYNAMIC_SHARED(shared);
  const int batch_head = blockIdx.x % p.n_batch_heads;
  const auto& visible = visibility_of_item<kPacked>(p.visible, batch_head / p.n_heads);
  const int row0 = (n_tiles - 1 - static_cast<int>(blockIdx.x / p.n_batch_heads)) * kRows;
  for_each_run<kRows>(visible, row0, [&](int begin, int end) {
    query_grad_rows<T, D>(p, visible, reinterpret_cast<T*>(shared), batch_head, begin, end);
  });
}

template <typename T, int D, bool kPacked>
const char* backward(const FlashAttentionBackward& a, Stream stream) {
  const FlashAttentionShape& s = a.shape;
  using KeyTiles = KeyValueGradTiles<T, D, kPacked>;
  using QueryTiles = QueryGradTiles<T, D, kPacked>;
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
  p.visible = visibility(s, a.first_key);
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
  error = launch(key_value_grad_kernel<T, D, kPacked>,
                 static_cast<unsigned>(p.n_batch_heads) * key_tiles, KeyTiles::kThreads,
                 KeyTiles::kSharedBytes, stream, p);
  if (error != nullptr) return error;
  const int query_tiles = static_cast<int>(ceil_div(s.q_steps, int64_t{QueryTiles::kOwned}));
  return launch(query_grad_kernel<T, D, kPacked>,
                static_cast<unsigned>(p.n_batch_heads) * query_tiles, QueryTiles::kThreads,
                QueryTiles::kSharedBytes, stream, p, query_tiles);
}

}  // namespace flash

const char* flash_attention_backward(const FlashAttentionBackward& a, Stream stream) {
  const char* error = flash::check(a.shape);
  if (error != nullptr || a.shape.batch * a.shape.heads == 0) return error;
  with_element_type(a.shape.dtype, [&](auto element) {
    flash::with_head_dim(a.shape.head_dim, [&](auto head_dim) {
      using T = decltype(element);
      constexpr int D = decltype(head_dim)::value;
      if (a.first_key == nullptr) {
        error = flash::backward<T, D, false>(a, stream);
      } else if constexpr (sizeof(T) == 4 && D == 128) {  // dK, dV would spill
        error = "flash_attention: CUDA knows no first_key in float32 at head_dim 128";
      } else {
        error = flash::backward<T, D, true>(a, stream);
      }
    });
  });
  return error;
}

size_t flash_attention_backward_workspace_bytes(const FlashAttentionShape& s) {
  return static_cast<size_t>(s.batch * s.heads * s.q_steps) * sizeof(float);
}

}  // namespace wgpt::cuda
