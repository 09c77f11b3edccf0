// What the passes of flash_attention share: which pairs are visible, tile loads, the warp GEMMs, the checks.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/cuda/smem_tile.cuh"

namespace wgpt::cuda::flash {

constexpr float kLog2E = 1.44269504088896341f;

// ---- who sees whom ---------------------------------------------------------------------------------------------------

// The keys [lo, hi) that a query sees. Both ends grow with the query, so a tile of queries sees
// [span(first).lo, span(last).hi), and all of it sees [span(last).lo, span(first).hi).
struct Span {
  int lo, hi;
};

// Without first_key: one document, whose tiles begin at key 0 and query 0.
struct Visibility {
  static constexpr bool kPacked = false;
  int q_steps, kv_steps, window;
  bool causal;

  WGPT_HOST_DEVICE Span keys_of(int query) const {
    const int position = query + kv_steps - q_steps;
    const int lo = window > 0 && position - window + 1 > 0 ? position - window + 1 : 0;
    int hi = kv_steps;
    if (causal) {
      hi = position + 1 < kv_steps ? position + 1 : kv_steps;
    } else if (window > 0) {
      hi = position + window < kv_steps ? position + window : kv_steps;
    }
    return {lo, hi};
  }

  // The queries [lo, hi) that see any of the keys [first, last].
  WGPT_HOST_DEVICE Span queries_of(int first, int last) const {
    const int offset = kv_steps - q_steps;
    int lo = causal ? first - offset : window > 0 ? first - window + 1 - offset : 0;
    int hi = window > 0 && last + static_cast<int64_t>(window) - offset < q_steps
                 ? last + window - offset
                 : q_steps;
    lo = lo > 0 ? lo : 0;
    hi = hi > 0 ? hi : 0;
    return {lo, hi};
  }

  WGPT_DEVICE int key_origin(int) const { return 0; }
  WGPT_DEVICE int key_end(int) const { return kv_steps; }
  WGPT_DEVICE int query_origin(int) const { return 0; }
  WGPT_DEVICE int query_end(const Span&) const { return q_steps; }
};

// With first_key. A template argument of the matrix kernels, so that calls without it run code that knows nothing of it.
struct PackedVisibility : Visibility {
  static constexpr bool kPacked = true;
  const int32_t* first_key;  // (B, Tq), or of one item

  // Nobody has checked the values on the device: whatever they are, a query sees a key, and no key that is not there.
  WGPT_DEVICE Span keys_of(int query) const {
    Span keys = Visibility::keys_of(query);
    const int first = first_key[query < q_steps ? query : q_steps - 1];
    if (first > keys.lo) keys.lo = first < keys.hi ? first : keys.hi - 1;
    return keys;
  }

  WGPT_DEVICE Span queries_of(int first, int last) const {
    Span queries = Visibility::queries_of(first, last);
    queries.hi = first_blind(last, queries.lo, queries.hi);
    return queries;
  }

  // Where a grid of key tiles begins for a run of queries that begins with this one: a packed document gets the tiles,
  // and so the bits, that it gets alone.
  WGPT_DEVICE int key_origin(int query) const {
    const int first = first_key[query], last = Visibility::keys_of(query).hi - 1;
    return first < 0 ? 0 : first < last ? first : last;
  }

  // Keys from here on are not loaded for queries that end with this one: those of another document.
  WGPT_DEVICE int key_end(int last_query) const { return keys_of(last_query).hi; }

  // The same for a run of keys: where its grid of query tiles begins, and from where on queries are not loaded.
  WGPT_DEVICE int query_origin(int key) const {
    const int query = key - (kv_steps - q_steps);
    if (!causal || query < 0) return 0;
    const int first = key_origin(query) - (kv_steps - q_steps);
    return first > 0 ? first : 0;
  }
  WGPT_DEVICE int query_end(const Span& queries) const { return queries.hi; }

  // The first query in (query, end) whose first key is its own position, else `end`: no query from there on shares a key
  // with one before, so tiles that cross this border are taken apart. 0 times an infinite value of another document
  // would be NaN. The whole warp calls it.
  WGPT_DEVICE int segment_end(int query, int end) const {
    if (!causal) return end;
    for (int from = query + 1 > 0 ? query + 1 : 0; from < end; from += kWarp) {
      const int mine = from + lane_id();
      const unsigned begins =
          __ballot_sync(kFullWarp, mine < end && first_key[mine] >= mine + kv_steps - q_steps);
      if (begins != 0) return from + __ffs(static_cast<int>(begins)) - 1;
    }
    return end;
  }

  // The first query in [lo, hi) whose first key comes after `key`, else hi: each step asks a warp's 32 lanes, which all
  // must call it.
  WGPT_DEVICE int first_blind(int key, int lo, int hi) const {
    while (lo < hi) {
      const int step = ceil_div(hi - lo, kWarp), mine = lo + (lane_id() + 1) * step - 1;
      const unsigned sees = __ballot_sync(kFullWarp, mine < hi && first_key[mine] <= key);
      lo += __popc(sees) * step;
      hi = lo + step - 1 < hi ? lo + step - 1 : hi;
    }
    return hi;
  }
};

// What the queries of item b see.
WGPT_DEVICE PackedVisibility visibility_of_item(PackedVisibility all, int64_t b) {
  all.first_key += b * all.q_steps;
  return all;
}

// What a block works on: a tile of rows of one head; blocks are numbered with the head fastest. Each call computes it again,
// so that a kernel need not keep it in registers while it loops over tiles.
struct BlockWork {
  int head, b, h, tile;

  template <typename Params>
  explicit WGPT_DEVICE BlockWork(const Params& p) {
    const unsigned block = opaque(blockIdx.x), n_heads = static_cast<unsigned>(p.n_batch_heads);
    head = static_cast<int>(block % n_heads);
    b = head / p.n_heads;
    h = head % p.n_heads;
    tile = static_cast<int>(block / n_heads);
  }
};

// What the queries of a block's head see.
template <bool kPacked, typename Params>
WGPT_DEVICE decltype(auto) visibility_of_block(const Params& p) {
  if constexpr (kPacked) {
    return visibility_of_item(p.visible, BlockWork(p).b);
  } else {
    return static_cast<const Visibility&>(p.visible);
  }
}

// Calls f(begin, end) for each run of queries of a block, which owns kRows from first() on: no border of packed documents
// lies within a run. Without packing there is one, whose end is that of all queries.
template <bool kPacked, int kRows, typename Params, typename First, typename F>
WGPT_DEVICE void for_each_run(const Params& p, First&& first, F&& f) {
  const int q_steps = p.visible.q_steps;
  if constexpr (kPacked) {
    const auto end = [&] { return first() + kRows < q_steps ? first() + kRows : q_steps; };
    for (int begin = first(), next; begin < end(); begin = next) {
      if (begin > first()) __syncthreads();  // every warp has done with the tiles of the run before
      next = visibility_of_block<true>(p).segment_end(begin, end());
      f(begin, next);
    }
  } else {
    f(first(), q_steps);
  }
}

// Where the tiles of n keys (or queries) begin that a warp must visit, [begin, end), and those in which it sees every
// pair, [whole_begin, whole_end).
struct TileRange {
  int begin, end, whole_begin, whole_end;

  // Of what the first and the last row of the warp see.
  WGPT_DEVICE TileRange(const Span& first, const Span& last, int n)
      : begin(first.lo - n + 1), end(last.hi), whole_begin(last.lo), whole_end(first.hi - n + 1) {}

  WGPT_DEVICE bool holds(int tile) const { return tile >= begin && tile < end; }
  WGPT_DEVICE bool is_masked(int tile) const { return tile < whole_begin || tile >= whole_end; }
};

template <typename T>
struct Heads {
  T* data;
  int64_t batch_stride, step_stride, head_stride;

  WGPT_DEVICE Rows<T> head(const BlockWork& at) const { return head(at.b, at.h); }
  WGPT_DEVICE Rows<T> head(int64_t b, int64_t h) const {
    return {data + b * batch_stride + h * head_stride, step_stride};
  }
};

template <typename T>
Heads<T> heads(const HeadsView& view) {
  return {static_cast<T*>(view.data), view.batch_stride, view.step_stride, view.head_stride};
}

// Whether every row starts at a 16-byte boundary.
template <typename T>
bool rows_aligned(const HeadsView& v) {
  constexpr int64_t kW = kVecLanes<T>;
  return aligned16(v.data) && v.batch_stride % kW == 0 && v.step_stride % kW == 0 &&
         v.head_stride % kW == 0;
}

// ---- loads -----------------------------------------------------------------------------------------------------------

// Tiles of kRows rows of one head, one after the other, into shared memory. A whole and aligned tile costs an addition
// to the thread's pointer for each of its copies.
template <typename T, int D, int kRows, int kThreads>
struct TileStream {
  static constexpr int kW = kVecLanes<T>, kChunks = D / kW;
  static constexpr int kStep = kThreads / kChunks;  // a thread's column stays, its row moves
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0,
                "every thread loads equally many chunks");

  const T* next;      // this thread's chunk of the next tile's first row that is its own
  const T* readable;  // any address of the tensor
  int64_t stride;
  bool aligned;

  WGPT_DEVICE TileStream(const Heads<const T>& heads, const BlockWork& work, int first,
                         bool aligned)
      : next(heads.head(work).row(first + row0()) + column()),
        readable(heads.data),
        stride(heads.step_stride),
        aligned(aligned) {}

  static WGPT_DEVICE int row0() { return threadIdx.x / kChunks; }
  static WGPT_DEVICE int column() { return threadIdx.x % kChunks * kW; }

  // Issues the loads of the next tile, whose first row is `first`, with zeros from n_rows on; they arrive with the
  // thread's next group, or at once where rows are not 16-byte aligned.
  WGPT_DEVICE void load(const SmemTile<T, D>& to, int first, int n_rows) {
    T* const chunk = to.chunk(row0(), column());  // kStep rows on, the swizzle is the same
    constexpr int kPitch = kStep * SmemTile<T, D>::kPitch;
    if (aligned && first + kRows <= n_rows) {
      WGPT_UNROLL
      for (int i = 0; i < kRows / kStep; ++i) {
        copy_async16(chunk + i * kPitch, next + i * kStep * stride, true);
      }
    } else if (aligned) {
      WGPT_UNROLL
      for (int i = 0; i < kRows / kStep; ++i) {
        const bool valid = first + row0() + i * kStep < n_rows;
        copy_async16(chunk + i * kPitch, valid ? next + i * kStep * stride : readable, valid);
      }
    } else {
      const T* source = opaque(next);
      WGPT_UNROLL_BY(1)
      for (int i = 0; i < kRows / kStep; ++i, source += kStep * stride) {
        const bool valid = first + row0() + i * kStep < n_rows;
        Vec<T, kW> v;
        WGPT_UNROLL
        for (int c = 0; c < kW; ++c) v.e[c] = valid ? source[c] : T{};
        store_vec<kW>(chunk + i * kPitch, v);
      }
    }
    next += kRows * stride;
  }
};

// The same for one tile.
template <int kRows, int kThreads, typename T, int D>
WGPT_DEVICE void load_tile(const SmemTile<T, D>& to, const Heads<const T>& heads,
                           const BlockWork& work, int first, int n_rows, bool aligned) {
  TileStream<T, D, kRows, kThreads>(heads, work, first, aligned).load(to, first, n_rows);
}

// ---- warp GEMMs ------------------------------------------------------------------------------------------------------

constexpr int kMatrixWarps = 4;  // of a block of the matrix kernels

// Blocks of 16 rows that a warp owns: each fragment of the streamed tiles feeds so many mma. At D = 128, and in float32,
// the registers suffice for one.
template <typename T, int D>
constexpr int kRowBlocks = sizeof(T) == 2 && D <= 64 ? 2 : 1;

// 16 kM rows of the left tile: the fragments of the first kKept steps of k stay in registers, the others are loaded at every
// use.
template <typename T, int D, int kM, int kKept>
struct LeftRows {
  SmemTile<T, D> tile;
  int row0;
  FragmentA<T> kept[kKept > 0 ? kKept : 1][kM];

  WGPT_DEVICE void prepare() {
    WGPT_UNROLL
    for (int k = 0; k < kKept; ++k) load(kept[k], k);
  }

  WGPT_DEVICE void fragments(FragmentA<T> (&a)[kM], int k) const {
    if (k < kKept) {
      WGPT_UNROLL
      for (int m = 0; m < kM; ++m) a[m] = kept[k][m];
    } else {
      load(a, k);
    }
  }

 private:
  WGPT_DEVICE void load(FragmentA<T> (&a)[kM], int k) const {
    WGPT_UNROLL
    for (int m = 0; m < kM; ++m) load_a(a[m], tile, row0 + 16 * m, 16 * k);
  }
};

// c[m][n] = left rows 16m to 16m + 15 times right[8n .. 8n + 7]^T, summed over D. kMirrored: with the bits of the transpose of
// what the GEMM of right and left gives.
template <typename T, int D, bool kMirrored = false, int kM, int kKept, int kN>
WGPT_DEVICE void gemm_by_rows(float (&c)[kM][kN][4], const LeftRows<T, D, kM, kKept>& left,
                              const SmemTile<T, D>& right) {
  clear(c);
  WGPT_UNROLL_BY(sizeof(T) == 4 ? 1 : D / 16)  // float32 unrolled needs 20 to 50 registers more
  for (int k = 0; k < D / 16; ++k) {
    FragmentA<T> a[kM];
    left.fragments(a, k);
    WGPT_UNROLL
    for (int n = 0; n < kN; n += 2) {
      FragmentB<T> b[2];
      load_b_rows(b, right, 8 * n, 16 * k);
      WGPT_UNROLL
      for (int m = 0; m < kM; ++m) {
        mma<T, kMirrored>(c[m][n], a[m], b[0]);
        mma<T, kMirrored>(c[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// c += weights right: weights are 16 kM x 8 kN accumulators, rounded to T; k runs along the rows of right.
template <typename T, int D, int kM, int kN>
WGPT_DEVICE void add_weighted_rows(float (&c)[kM][D / 8][4], const float (&weights)[kM][kN][4],
                                   const SmemTile<T, D>& right) {
  WGPT_UNROLL
  for (int k = 0; k < kN; k += 2) {
    FragmentA<T> a[kM];
    WGPT_UNROLL
    for (int m = 0; m < kM; ++m) a_from_accumulators(a[m], weights[m][k], weights[m][k + 1]);
    WGPT_UNROLL
    for (int n = 0; n < D / 8; n += 2) {
      FragmentB<T> b[2];
      load_b_columns(b, right, 8 * k, 8 * n);
      WGPT_UNROLL
      for (int m = 0; m < kM; ++m) {
        mma<T>(c[m][n], a[m], b[0]);
        mma<T>(c[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// A bool that is known to the compiler.
template <bool kValue>
struct Known {
  WGPT_DEVICE constexpr operator bool() const { return kValue; }
};

// Calls f(masked) for a tile: 16-bit tiles without hidden pairs get code of their own, which knows nothing of masks;
// float32, short of registers, has one code for both.
template <typename T, typename F>
WGPT_DEVICE void with_mask(bool masked, F&& f) {
  if constexpr (sizeof(T) == 4) {
    f(masked);
  } else if (masked) {
    f(Known<true>{});
  } else {
    f(Known<false>{});
  }
}

// Writes a warp's 16 x D accumulators, times factor[0] (rows g) and factor[1] (rows g + 8), to rows [first, first + 16) of `to`
// that lie below n_rows: through 16 rows of shared memory that the warp owns, for 16-byte stores.
template <typename T, int D>
WGPT_DEVICE void store_rows(const float (&c)[D / 8][4], const float (&factor)[2],
                            const SmemTile<T, D>& tile, int row0, const Rows<T>& to, int first,
                            int n_rows, bool aligned) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  __syncwarp();  // the warp has read what the rows held before
  WGPT_UNROLL
  for (int n = 0; n < D / 8; ++n) {
    WGPT_UNROLL
    for (int half = 0; half < 2; ++half) {
      Vec<T, 2> pair;
      pair.e[0] = from_float<T>(c[n][2 * half] * factor[half]);
      pair.e[1] = from_float<T>(c[n][2 * half + 1] * factor[half]);
      constexpr int kW = kVecLanes<T>;
      const int column = 8 * n + 2 * t;
      store_vec<2>(tile.chunk(row0 + g + 8 * half, column / kW * kW) + column % kW, pair);
    }
  }
  __syncwarp();
  constexpr int kW = kVecLanes<T>, kChunks = D / kW;
  WGPT_UNROLL
  for (int i = 0; i < 16 * kChunks / kWarp; ++i) {
    const int at = lane + i * kWarp, r = at / kChunks, column = at % kChunks * kW;
    if (first + r >= n_rows) continue;
    const Vec<T, kW> v = load_vec<kW>(tile.chunk(row0 + r, column));
    T* out = to.row(first + r) + column;
    if (aligned) {
      store_vec<kW>(out, v);
    } else {
      WGPT_UNROLL
      for (int k = 0; k < kW; ++k) out[k] = v.e[k];
    }
  }
}

// ---- what the launchers share ----------------------------------------------------------------------------------------

inline const char* check(const FlashAttentionShape& s) {
  if (s.dtype == DType::kFloat64)
    return "flash_attention: CUDA knows float32, bfloat16 and float16";
  if (s.head_dim != 32 && s.head_dim != 64 && s.head_dim != 128)
    return "flash_attention: head_dim must be 32, 64 or 128";
  if (!(s.scale > 0)) return "flash_attention: CUDA needs scale > 0";
  if (s.q_steps < 1 || s.kv_steps < 1)
    return "flash_attention: needs at least one query and one key";
  if (s.causal && s.q_steps > s.kv_steps)
    return "flash_attention: causal needs at most as many queries as keys";
  if (s.q_steps > (1 << 30) || s.kv_steps > (1 << 30) || s.window > (1 << 30)) {
    return "flash_attention: more than 2^30 steps";
  }
  if (s.batch * s.heads * ceil_div(s.q_steps > s.kv_steps ? s.q_steps : s.kv_steps, int64_t{32}) >
      INT32_MAX) {
    return "flash_attention: too many heads and steps for one grid";
  }
  return nullptr;
}

inline PackedVisibility visibility(const FlashAttentionShape& s, const int32_t* first_key) {
  return {{static_cast<int>(s.q_steps), static_cast<int>(s.kv_steps), static_cast<int>(s.window),
           s.causal},
          first_key};
}

// Calls f(integral_constant<int, D>).
template <typename F>
void with_head_dim(int64_t head_dim, F&& f) {
  if (head_dim == 32) f(std::integral_constant<int, 32>{});
  if (head_dim == 64) f(std::integral_constant<int, 64>{});
  if (head_dim == 128) f(std::integral_constant<int, 128>{});
}

}  // namespace wgpt::cuda::flash
