// flash_attention backward on CUDA: three launches, no atomics, P and dS never leave the registers. Formulas in
// kernels/flash_attention.h. Not yet run on hardware.
//
//   delta    delta[i] = d_out[i] . out[i] - d_lse[i]        a group of lanes per row, memory-bound
//   dQ       one block per tile of queries, loop over the tiles of keys that they see:
//              S = Q K^T     dP = dO V^T     P = 2^(c S - log2 e lse)     dS = P (dP - delta)
//              dQ += dS K
//   dK, dV   one block per tile of keys, loop over the tiles of queries that see it:
//              S^T = K Q^T   dP^T = V dO^T   P^T and dS^T like P and dS
//              dV += P^T dO  dK += dS^T Q    (keys are rows: accumulators of S^T, dS^T are the A fragments)
//
// S and dP are computed in both passes: 7 GEMMs, 14 D FLOPs per visible pair, instead of 5 and an unordered or
// serialised addition into dQ. Every gradient has one owner and a fixed order, so the bits are always the same. float32
// accumulators; P and dS are rounded to the element type for the second GEMMs (float32 keeps them: 3xTF32).
// A block's rows that belong to several packed documents (first_key) are taken one document after the other.
//
// Of a row whose |lse| is large (kLargeLse) a float32 lse has lost the logarithm of the sum, and delta carries the rounding
// of out times a key as large. Blocks of dQ with such a row first pass over their keys for the row's maximum score, and
// for the log2 of the sum and a delta relative to it: then P = 2^(c (S - top) - rest). The three passes must then have the
// same bits of S, which is why S^T is mirrored.
//
// The limit is what shared memory delivers to the fragments (docs/performance.md). Memory: 12 bytes per row.
#pragma once

#include "kernels/cuda/flash_attention_common.cuh"

namespace wgpt::cuda {
namespace flash {

template <typename T>
struct BackwardParams {
  Heads<const T> q, k, v, out, d_out;
  Heads<T> dq, dk, dv;
  const float *lse, *d_lse;
  // (B, H, Tq) each; top and rest only of rows with a large lse.
  float *top, *rest, *delta;
  PackedVisibility visible;  // first_key nullptr: not packed
  int n_heads, n_batch_heads;
  float scale, scale_log2;
  bool aligned;
};

// A warp owns 32 rows where the registers allow, so that each fragment of the streamed tile feeds two mma, else 16; at
// D <= 64 dK and dV's own fragments then stay in registers.

// Rows of a streamed tile: no spills on any architecture, two blocks a multiprocessor, at most 99 KiB of shared memory.
template <typename T, int D>
constexpr int kStreamedQueries = sizeof(T) == 4 || D == 128 ? 16 : 32;
template <typename T, int D>
constexpr int kStreamedKeys = sizeof(T) == 4 && D == 128 ? 16 : 32;

// Above it a float32 log2 e lse loses digits that P would show: 2^-17 of P at 128. An infinite one is of a row that is not
// there, or overflowed.
constexpr float kLargeLse = 128.f;

WGPT_DEVICE bool is_large(float lse_log2) {
  return fabsf(lse_log2) > kLargeLse && fabsf(lse_log2) < INFINITY;
}

template <typename T, int D, int kBlocksOfRows, int kStreamedRows, int kFactsPerRow>
struct BackwardTiles {
  static constexpr int kM = kBlocksOfRows;  // blocks of 16 rows that a warp owns
  static constexpr int kWarps = sizeof(T) == 4 && D == 128 ? 2 : kMatrixWarps;
  static constexpr int kOwned = 16 * kM * kWarps;
  static constexpr int kStreamed = kStreamedRows;
  static constexpr int kThreads = kWarps * kWarp;
  // Blocks that a multiprocessor must hold, which bounds the registers.
  static constexpr int kMinBlocks = 2 * kMatrixWarps / kWarps;
  // Steps of k of which the fragments of the owned rows stay in registers.
  static constexpr int kKept = sizeof(T) == 2 && 16 * kM * D <= 1024 ? D / 16 : 0;
  // Numbers of 4 bytes that go with each streamed row.
  static constexpr int kFacts = kFactsPerRow;
  // Two owned tiles; two streamed ones, the facts and a flag in two stages.
  static constexpr int kElements = SmemTile<T, D>::elements(2 * kOwned + 4 * kStreamed);
  static constexpr size_t kSharedBytes =
      sizeof(T) * kElements + (kFacts > 0 ? 4 * 2 * (kFacts * kStreamed + 1) : 0);
};
// dK and dV take twice the accumulators of dQ: 32 rows a warp spill at D = 64.
template <typename T, int D, bool kPacked>
using KeyValueGradTiles =
    BackwardTiles<T, D, sizeof(T) == 2 && D == 32 ? 2 : 1, kStreamedQueries<T, D>, kPacked ? 4 : 3>;
template <typename T, int D>
using QueryGradTiles = BackwardTiles<T, D, kRowBlocks<T, D>, kStreamedKeys<T, D>, 0>;

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
template <typename T, int D, bool kPacked>
WGPT_DEVICE void key_value_grad_rows(const BackwardParams<T>& p, T* base, int key0, int key_end) {
  using Sizes = KeyValueGradTiles<T, D, kPacked>;
  using HeadTile = SmemTile<T, D>;
  constexpr int kKeys = Sizes::kOwned, kQueries = Sizes::kStreamed, kThreads = Sizes::kThreads,
                kM = Sizes::kM, kN = kQueries / 8;
  const HeadTile k_tile = {base}, v_tile = {base + HeadTile::elements(kKeys)};
  const auto q_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(2 * kKeys + 2 * stage * kQueries)};
  };
  const auto d_out_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(2 * kKeys + (2 * stage + 1) * kQueries)};
  };
  // [stage][log2 e lse or rest | delta | top or 0 | first key, where packed][query], then [stage] whether a top is not 0.
  float* const row_facts = reinterpret_cast<float*>(base + Sizes::kElements);
  int* const has_large = reinterpret_cast<int*>(row_facts + 2 * Sizes::kFacts * kQueries);

  const BlockWork work(p);
  const auto& visible = visibility_of_block<kPacked>(p);
  const int last_key = key0 + kKeys < key_end ? key0 + kKeys - 1 : key_end - 1;
  const Span queries = visible.queries_of(key0, last_key);
  const int query_origin = visible.query_origin(key0);
  const int first_tile = query_origin + (queries.lo - query_origin) / kQueries * kQueries;
  const int tile_end = queries.hi, q_end = visible.query_end(queries);

  TileStream<T, D, kQueries, kThreads> q_stream(p.q, work, first_tile, p.aligned),
      d_out_stream(p.d_out, work, first_tile, p.aligned);
  // A thread's facts of the next tile wait in registers until this one is done.
  float lse_log2 = 0.f, delta = 0.f, top = 0.f;
  int first_key = 0;
  int64_t at = static_cast<int64_t>(work.head) * visible.q_steps + first_tile + threadIdx.x;
  const auto load_queries = [&](int stage, int query0) {
    q_stream.load(q_tile(stage), query0, q_end);
    d_out_stream.load(d_out_tile(stage), query0, q_end);
    copy_async_commit();
    if (threadIdx.x < kQueries) {
      const int query = query0 + threadIdx.x;
      lse_log2 = query < q_end ? p.lse[at] * kLog2E : INFINITY;  // absent rows weigh 2^-inf = 0
      delta = query < q_end ? p.delta[at] : 0.f;
      top = 0.f;
      if (is_large(lse_log2)) top = p.top[at], lse_log2 = p.rest[at];
      if constexpr (kPacked) first_key = visible.keys_of(query).lo;
      at += kQueries;
    }
  };
  const auto store_facts = [&](int stage) {
    if (threadIdx.x < kQueries) {
      float* facts = row_facts + Sizes::kFacts * stage * kQueries + threadIdx.x;
      facts[0] = lse_log2;
      facts[kQueries] = delta;
      facts[2 * kQueries] = top;
      if constexpr (kPacked) reinterpret_cast<int*>(facts)[3 * kQueries] = first_key;
      const int any = __any_sync(kFullWarp >> (kWarp - kQueries), top != 0.f);
      if (threadIdx.x == 0) has_large[stage] = any;
    }
  };

  const int warp = threadIdx.x / kWarp, g = lane_id() / 4, t = lane_id() % 4;
  const int warp_first = key0 + 16 * kM * warp,
            warp_last = warp_first + 16 * kM < key_end ? warp_first + 16 * kM - 1 : key_end - 1;
  TileRange tiles(visible.queries_of(warp_first, warp_first),
                  visible.queries_of(warp_last, warp_last), kQueries);
  if (warp_first >= key_end) tiles.end = tiles.begin;
  LeftRows<T, D, kM, Sizes::kKept> k_rows = {k_tile, 16 * kM * warp, {}},
                                   v_rows = {v_tile, 16 * kM * warp, {}};
  float dk[kM][D / 8][4], dv[kM][D / 8][4];
  clear(dk);
  clear(dv);

  load_tile<kKeys, kThreads>(k_tile, p.k, work, key0, key_end, p.aligned);
  load_tile<kKeys, kThreads>(v_tile, p.v, work, key0, key_end, p.aligned);
  if (first_tile < tile_end) {
    load_queries(0, first_tile);
    store_facts(0);
  } else {
    copy_async_commit();  // keys that no query sees: their gradients are zero
    copy_async_wait<0>();
    __syncthreads();
  }
  if constexpr (Sizes::kKept > 0) {
    copy_async_wait<0>();
    __syncthreads();
    k_rows.prepare();
    v_rows.prepare();
  }
  for (int tile = first_tile, stage = 0; tile < tile_end; tile += kQueries, stage = 1 - stage) {
    copy_async_wait<0>();
    __syncthreads();  // this tile is here, and everyone has done with the stage that is loaded next
    if (tile + kQueries < tile_end) load_queries(1 - stage, tile + kQueries);
    const auto add_tile = [&](auto masked) {
      const float* facts = row_facts + Sizes::kFacts * stage * kQueries;
      int key = warp_first + g, query = tile + 2 * t;        // the lane's first
      if (masked) key = opaque(key), query = opaque(query);  // masks are made where they are used
      const auto is_hidden = [&](int m, int n, int i) {
        Span span = p.visible.Visibility::keys_of(query + 8 * n + i % 2);
        if constexpr (kPacked) {  // the first key of each query is in shared memory
          span.lo = reinterpret_cast<const int*>(facts)[3 * kQueries + 8 * n + 2 * t + i % 2];
        }
        const int row = key + 16 * m + i / 2 * 8;
        return row < span.lo || row >= span.hi;
      };
      float s[kM][kN][4], ds[kM][kN][4];  // rows: keys, columns: queries
      gemm_by_rows<T, D, true>(s, k_rows, q_tile(stage));
      if (has_large[stage]) {
        WGPT_UNROLL
        for (int n = 0; n < kN; ++n) {
          const Vec<float, 2> top = load_vec<2>(facts + 2 * kQueries + 8 * n + 2 * t);
          WGPT_UNROLL
          for (int m = 0; m < kM; ++m) {
            WGPT_UNROLL
            for (int i = 0; i < 4; ++i) s[m][n][i] -= top.e[i % 2];
          }
        }
      }
      WGPT_UNROLL
      for (int n = 0; n < kN; ++n) {
        const Vec<float, 2> lse = load_vec<2>(facts + 8 * n + 2 * t);
        WGPT_UNROLL
        for (int m = 0; m < kM; ++m) {
          WGPT_UNROLL
          for (int i = 0; i < 4; ++i) {
            s[m][n][i] = exp2_approx(s[m][n][i] * p.scale_log2 - lse.e[i % 2]);
            if (masked && is_hidden(m, n, i)) s[m][n][i] = 0.f;
          }
        }
      }
      add_weighted_rows<T, D>(dv, s, d_out_tile(stage));  // before dP: fewer registers at once
      gemm_by_rows<T, D, true>(ds, v_rows, d_out_tile(stage));
      WGPT_UNROLL
      for (int n = 0; n < kN; ++n) {
        const Vec<float, 2> row_delta = load_vec<2>(facts + kQueries + 8 * n + 2 * t);
        WGPT_UNROLL
        for (int m = 0; m < kM; ++m) {
          WGPT_UNROLL
          for (int i = 0; i < 4; ++i) {
            ds[m][n][i] = s[m][n][i] * (ds[m][n][i] - row_delta.e[i % 2]);
            // 0 times NaN is not 0.
            if (masked && is_hidden(m, n, i)) ds[m][n][i] = 0.f;
          }
        }
      }
      add_weighted_rows<T, D>(dk, ds, q_tile(stage));
    };
    if (tiles.holds(tile)) with_mask<T>(tiles.is_masked(tile), add_tile);
    if (tile + kQueries < tile_end) store_facts(1 - stage);
  }
  const BlockWork end(p);
  // Only this warp reads these rows of K and V, so it may write their gradients through them.
  WGPT_UNROLL
  for (int m = 0; m < kM; ++m) {
    const int row0 = 16 * (kM * warp + m), first = warp_first + 16 * m;
    store_rows<T, D>(dk[m], {p.scale, p.scale}, k_tile, row0, p.dk.head(end), first, key_end,
                     p.aligned);
    store_rows<T, D>(dv[m], {1.f, 1.f}, v_tile, row0, p.dv.head(end), first, key_end, p.aligned);
  }
}

template <typename T, int D, bool kPacked>
__global__ void __launch_bounds__(KeyValueGradTiles<T, D, kPacked>::kThreads,
                                  KeyValueGradTiles<T, D, kPacked>::kMinBlocks)
    key_value_grad_kernel(BackwardParams<T> p) {
  constexpr int kKeys = KeyValueGradTiles<T, D, kPacked>::kOwned;
  WGPT_DYNAMIC_SHARED(shared);
  // The queries at the block's keys; for causal, the longest come first.
  const int offset = p.visible.kv_steps - p.visible.q_steps;
  const auto first = [&] { return BlockWork(p).tile * kKeys - offset; };
  for_each_run<kPacked, kKeys>(p, first, [&](int begin, int end) {
    key_value_grad_rows<T, D, kPacked>(p, reinterpret_cast<T*>(shared), begin + offset,
                                       end + offset);
  });
}

// The queries of a block in [row0, q_end), which have no border of documents between them.
template <typename T, int D, bool kPacked>
WGPT_DEVICE void query_grad_rows(const BackwardParams<T>& p, T* base, int row0, int q_end) {
  using Sizes = QueryGradTiles<T, D>;
  using HeadTile = SmemTile<T, D>;
  constexpr int kRows = Sizes::kOwned, kKeys = Sizes::kStreamed, kThreads = Sizes::kThreads,
                kM = Sizes::kM, kN = kKeys / 8;
  const HeadTile q_tile = {base}, d_out_tile = {base + HeadTile::elements(kRows)};
  const auto k_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(2 * kRows + 2 * stage * kKeys)};
  };
  const auto v_tile = [&](int stage) {
    return HeadTile{base + HeadTile::elements(2 * kRows + (2 * stage + 1) * kKeys)};
  };

  const BlockWork work(p);
  const auto& visible = visibility_of_block<kPacked>(p);
  const int last_row = row0 + kRows < q_end ? row0 + kRows - 1 : q_end - 1;
  const int key_origin = visible.key_origin(row0);
  const int key_end = visible.key_end(last_row);
  const int first_tile = key_origin + (visible.keys_of(row0).lo - key_origin) / kKeys * kKeys;
  const int tile_end = visible.keys_of(last_row).hi;

  const int warp = threadIdx.x / kWarp, g = lane_id() / 4, t = lane_id() % 4;
  const int warp_row0 = row0 + 16 * kM * warp,
            warp_last = warp_row0 + 16 * kM < q_end ? warp_row0 + 16 * kM - 1 : q_end - 1;
  TileRange tiles(visible.keys_of(warp_row0), visible.keys_of(warp_last), kKeys);
  if (warp_row0 >= q_end) tiles.end = tiles.begin;
  float lse_log2[kM][2], delta[kM][2];
  bool has_large = false;
  WGPT_UNROLL
  for (int m = 0; m < kM; ++m) {
    WGPT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row0 + 16 * m + g + 8 * half;
      const int64_t at = static_cast<int64_t>(work.head) * visible.q_steps + row;
      lse_log2[m][half] = row < q_end ? p.lse[at] * kLog2E : INFINITY;
      delta[m][half] = row < q_end ? p.delta[at] : 0.f;
      has_large = has_large || is_large(lse_log2[m][half]);
    }
  }
  LeftRows<T, D, kM, Sizes::kKept> q_rows = {q_tile, 16 * kM * warp, {}},
                                   d_out_rows = {d_out_tile, 16 * kM * warp, {}};
  load_tile<kRows, kThreads>(q_tile, p.q, work, row0, q_end, p.aligned);
  load_tile<kRows, kThreads>(d_out_tile, p.d_out, work, row0, q_end, p.aligned);
  // Calls f(tile, stage, masked, S, dP) for the tiles of keys that the warp sees.
  const auto for_each_tile = [&](auto&& f) {
    TileStream<T, D, kKeys, kThreads> k_stream(p.k, work, first_tile, p.aligned),
        v_stream(p.v, work, first_tile, p.aligned);
    const auto load_keys = [&](int stage, int key0) {
      k_stream.load(k_tile(stage), key0, key_end);
      v_stream.load(v_tile(stage), key0, key_end);
      copy_async_commit();
    };
    load_keys(0, first_tile);
    if constexpr (Sizes::kKept > 0) {
      copy_async_wait<0>();
      __syncthreads();
      q_rows.prepare();
      d_out_rows.prepare();
    }
    for (int tile = first_tile, stage = 0; tile < tile_end; tile += kKeys, stage = 1 - stage) {
      copy_async_wait<0>();
      __syncthreads();  // this tile is here, and everyone has done with the stage that is loaded next
      if (tile + kKeys < tile_end) load_keys(1 - stage, tile + kKeys);
      if (!tiles.holds(tile)) continue;

      with_mask<T>(tiles.is_masked(tile), [&](auto masked) {
        float s[kM][kN][4], dp[kM][kN][4];
        gemm_by_rows<T, D>(s, q_rows, k_tile(stage));
        gemm_by_rows<T, D>(dp, d_out_rows, v_tile(stage));
        f(tile, stage, masked, s, dp);
      });
    }
  };

  has_large = __syncthreads_or(has_large);
  if (has_large) {
    // What the lane has seen: maximum of S, sums of P and of P dP relative to it.
    float top[kM][2], sum[kM][2], weighted[kM][2];
    WGPT_UNROLL
    for (int m = 0; m < kM; ++m) {
      WGPT_UNROLL
      for (int half = 0; half < 2; ++half) {
        top[m][half] = -INFINITY, sum[m][half] = weighted[m][half] = 0.f;
      }
    }
    for_each_tile([&](int tile, int, bool masked, auto& s, auto& dp) {
      const auto& seen = visibility_of_block<kPacked>(p);
      WGPT_UNROLL
      for (int m = 0; m < kM; ++m) {
        WGPT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Span span = seen.keys_of(warp_row0 + g + 16 * m + 8 * half);
          WGPT_UNROLL
          for (int n = 0; n < kN; ++n) {
            WGPT_UNROLL
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
              const int key = tile + 2 * t + 8 * n + i % 2;
              if (s[m][n][i] == -INFINITY) continue;  // overflowed
              if (masked && (key < span.lo || key >= span.hi)) continue;
              const float old = top[m][half], now = fmaxf(old, s[m][n][i]);
              const float shrink = exp2_approx((old - now) * p.scale_log2),
                          weight = exp2_approx((s[m][n][i] - now) * p.scale_log2);
              top[m][half] = now;
              sum[m][half] = sum[m][half] * shrink + weight;
              weighted[m][half] = weighted[m][half] * shrink + weight * dp[m][n][i];
            }
          }
        }
      }
    });
    WGPT_UNROLL
    for (int m = 0; m < kM; ++m) {
      WGPT_UNROLL
      for (int half = 0; half < 2; ++half) {
        // Over the four lanes that share the row; one that saw no key has sums of 0.
        float row_top = top[m][half];
        row_top = fmaxf(row_top, __shfl_xor_sync(kFullWarp, row_top, 1));
        row_top = fmaxf(row_top, __shfl_xor_sync(kFullWarp, row_top, 2));
        const float shrink = exp2_approx((top[m][half] - row_top) * p.scale_log2);
        float row_sum = sum[m][half] * shrink, row_weighted = weighted[m][half] * shrink;
        WGPT_UNROLL
        for (int lane = 1; lane < 4; lane *= 2) {
          row_sum += __shfl_xor_sync(kFullWarp, row_sum, lane);
          row_weighted += __shfl_xor_sync(kFullWarp, row_weighted, lane);
        }
        if (!is_large(lse_log2[m][half])) continue;
        const int64_t at = static_cast<int64_t>(BlockWork(p).head) * visible.q_steps + warp_row0 +
                           16 * m + g + 8 * half;
        lse_log2[m][half] = log2f(row_sum);
        delta[m][half] = row_weighted / row_sum - (p.d_lse != nullptr ? p.d_lse[at] : 0.f);
        if (t == 0) {
          p.top[at] = row_top;
          p.rest[at] = lse_log2[m][half];
          p.delta[at] = delta[m][half];
        }
      }
    }
    __syncthreads();  // the tops are written, and everyone has done with the tiles of keys
  }

  float dq[kM][D / 8][4];
  clear(dq);
  for_each_tile([&](int tile, int stage, auto masked, auto& s, auto& ds) {
    int row = warp_row0 + g, key0 = tile + 2 * t;        // the lane's first
    if (masked) row = opaque(row), key0 = opaque(key0);  // masks are made where they are used
    const auto& seen = visibility_of_block<kPacked>(p);
    if (has_large) {
      WGPT_UNROLL
      for (int m = 0; m < kM; ++m) {
        WGPT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int i = row + 16 * m + 8 * half;
          const int64_t at = static_cast<int64_t>(BlockWork(p).head) * visible.q_steps + i;
          if (i >= q_end || !is_large(p.lse[at] * kLog2E)) continue;
          const float top = p.top[at];
          WGPT_UNROLL
          for (int n = 0; n < kN; ++n) {
            s[m][n][2 * half] -= top;
            s[m][n][2 * half + 1] -= top;
          }
        }
      }
    }
    WGPT_UNROLL
    for (int m = 0; m < kM; ++m) {
      WGPT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Span span = seen.keys_of(row + 16 * m + 8 * half);
        WGPT_UNROLL
        for (int n = 0; n < kN; ++n) {
          WGPT_UNROLL
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            const float weight = exp2_approx(s[m][n][i] * p.scale_log2 - lse_log2[m][half]);
            ds[m][n][i] = weight * (ds[m][n][i] - delta[m][half]);
            const int key = key0 + 8 * n + i % 2;
            if (masked && (key < span.lo || key >= span.hi)) ds[m][n][i] = 0.f;
          }
        }
      }
    }
    add_weighted_rows<T, D>(dq, ds, k_tile(stage));
  });
  const BlockWork end(p);
  WGPT_UNROLL
  for (int m = 0; m < kM; ++m) {
    store_rows<T, D>(dq[m], {p.scale, p.scale}, q_tile, 16 * (kM * warp + m), p.dq.head(end),
                     warp_row0 + 16 * m, q_end, p.aligned);
  }
}

template <typename T, int D, bool kPacked>
__global__ void __launch_bounds__(QueryGradTiles<T, D>::kThreads, QueryGradTiles<T, D>::kMinBlocks)
    query_grad_kernel(BackwardParams<T> p, int n_tiles) {
  constexpr int kRows = QueryGradTiles<T, D>::kOwned;
  WGPT_DYNAMIC_SHARED(shared);
  const auto row0 = [&] { return (n_tiles - 1 - BlockWork(p).tile) * kRows; };
  for_each_run<kPacked, kRows>(p, row0, [&](int begin, int end) {
    query_grad_rows<T, D, kPacked>(p, reinterpret_cast<T*>(shared), begin, end);
  });
}

template <typename T, int D, bool kPacked>
const char* backward(const FlashAttentionBackward& a, Stream stream) {
  const FlashAttentionShape& s = a.shape;
  using KeyTiles = KeyValueGradTiles<T, D, kPacked>;
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
  p.top = static_cast<float*>(a.workspace);
  p.rest = p.top + s.batch * s.heads * s.q_steps;
  p.delta = p.rest + s.batch * s.heads * s.q_steps;
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
  const int query_tiles = static_cast<int>(ceil_div(s.q_steps, int64_t{QueryTiles::kOwned}));
  error =
      launch(query_grad_kernel<T, D, kPacked>, static_cast<unsigned>(p.n_batch_heads) * query_tiles,
             QueryTiles::kThreads, QueryTiles::kSharedBytes, stream, p, query_tiles);
  if (error != nullptr) return error;
  const int key_tiles = static_cast<int>(ceil_div(s.kv_steps, int64_t{KeyTiles::kOwned}));
  return launch(key_value_grad_kernel<T, D, kPacked>,
                static_cast<unsigned>(p.n_batch_heads) * key_tiles, KeyTiles::kThreads,
                KeyTiles::kSharedBytes, stream, p);
}

}  // namespace flash

const char* flash_attention_backward(const FlashAttentionBackward& a, Stream stream) {
  const char* error = flash::check(a.shape);
  if (error != nullptr || a.shape.batch * a.shape.heads == 0) return error;
  with_element_type(a.shape.dtype, [&](auto element) {
    flash::with_head_dim(a.shape.head_dim, [&](auto head_dim) {
      using T = decltype(element);
      constexpr int D = decltype(head_dim)::value;
      error = a.first_key == nullptr ? flash::backward<T, D, false>(a, stream)
                                     : flash::backward<T, D, true>(a, stream);
    });
  });
  return error;
}

size_t flash_attention_backward_workspace_bytes(const FlashAttentionShape& s) {
  return static_cast<size_t>(s.batch * s.heads * s.q_steps) * 3 * sizeof(float);
}

}  // namespace wgpt::cuda
