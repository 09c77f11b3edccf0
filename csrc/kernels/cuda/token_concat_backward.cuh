// token_concat's backward on CUDA: the table's gradient by a stable counting sort and owner sums. Not yet run on hardware.
//
// N = B*T steps cut into chunks of whole warps' iterations, five small launches, no atomics:
//   rank     one warp per chunk: how many equal tokens precede step n in its chunk (match + popcount), chunk histograms
//   scan     one block: histograms -> offsets within each bucket, bucket starts, pieces of kPieceRows rows per bucket
//   place    order[start[v] + offset[chunk][v] + rank[n]] = n: every bucket lists its steps in ascending order
//   sum      one block per piece: float32 sums in a fixed order; a bucket of one piece is finished and rounded here
//   combine  buckets of several pieces (a token of silence may own a third of all steps): pieces in ascending order
// The counters of the tiny vocabularies that codecs have (V <= kRankVocab) live in shared memory; a larger one takes
// several passes. The order of additions depends on the shape and the tokens only, so the bits never change.
// Bytes: reads N*Ct elements of d_y and about 30 N bytes of indices. Tokens outside [0, V) are ignored.
#pragma once

#include "kernels/cuda/device/types.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pos_grad.cuh"

namespace wgpt::cuda::token_concat {

constexpr int kThreads = 256;
constexpr int kScanThreads = 1024;
constexpr int kSumThreads = 128;
constexpr int kRankVocab =
    8192;                        // counters of one pass of the rank kernel: 32 KiB of shared memory
constexpr int kPieceRows = 128;  // rows of a bucket that one block sums

// The cut of N steps into chunks and the layout of the workspace (everything 64-byte aligned).
struct Buckets {
  int64_t rows, vocab;
  int chunk_rows, n_chunks;
  int64_t max_pieces;
  int32_t *rank, *order;         // (N,)
  int32_t* offset;               // (chunks, V): histograms, then offsets within the bucket
  int32_t *start, *piece_start;  // (V + 1,)
  int32_t* owner;                // (max_pieces,): the bucket of each piece
  float* partial;                // (max_pieces, Ct)
};

// Fills the plan; base may be nullptr when only the size is wanted. Returns the bytes.
inline size_t plan_buckets(const TokenConcatShape& s, void* base, Buckets* plan) {
  const int64_t rows = s.batch * s.steps;
  int64_t chunks = ceil_div(rows, int64_t{1024});  // at least 32 iterations of a warp
  const int64_t most =
      s.vocab > 16384 ? (int64_t{4} << 20) / s.vocab : 256;  // 16 MiB of histograms at most
  chunks = chunks < most ? chunks : most;
  chunks = chunks < 1 ? 1 : chunks;
  plan->rows = rows;
  plan->vocab = s.vocab;
  plan->chunk_rows = static_cast<int>(ceil_div(ceil_div(rows, chunks), int64_t{kWarp}) * kWarp);
  plan->n_chunks =
      plan->chunk_rows == 0 ? 0 : static_cast<int>(ceil_div(rows, int64_t{plan->chunk_rows}));
  plan->max_pieces = rows / kPieceRows + s.vocab;
  size_t bytes = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    using Element = std::remove_reference_t<decltype(*pointer)>;
    pointer =
        base == nullptr ? nullptr : reinterpret_cast<Element*>(static_cast<char*>(base) + bytes);
    bytes += ceil_div(static_cast<size_t>(count) * sizeof(Element), size_t{64}) * 64;
  };
  take(plan->rank, rows);
  take(plan->order, rows);
  take(plan->offset, plan->n_chunks * s.vocab);
  take(plan->start, s.vocab + 1);
  take(plan->piece_start, s.vocab + 1);
  take(plan->owner, plan->max_pieces);
  take(plan->partial, plan->max_pieces * s.token_channels);
  return bytes;
}

// One warp per chunk, 32 steps an iteration: lanes with equal tokens find each other, the lowest of them moves the counter.
__global__ void __launch_bounds__(kWarp) rank_kernel(const int64_t* tokens, Buckets p) {
  constexpr int kIterations = 8;
  WGPT_SHARED(int32_t, counter, kRankVocab);
  const int lane = threadIdx.x;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * p.chunk_rows;
  const int64_t end = begin + p.chunk_rows < p.rows ? begin + p.chunk_rows : p.rows;
  for (int64_t v0 = 0; v0 < p.vocab; v0 += kRankVocab) {
    const int n_vocab = static_cast<int>(p.vocab - v0 < kRankVocab ? p.vocab - v0 : kRankVocab);
    for (int v = lane; v < n_vocab; v += kWarp) counter[v] = 0;
    __syncwarp();
    for (int64_t base = begin; base < end; base += kWarp * kIterations) {
      int64_t token
          [kIterations];  // loaded together: one iteration is too short to hide the next one's load
      WGPT_UNROLL
      for (int i = 0; i < kIterations; ++i) {
        const int64_t n = base + i * kWarp + lane;
        token[i] = n < end ? tokens[n] - v0 : -1;
      }
      WGPT_UNROLL
      for (int i = 0; i < kIterations; ++i) {
        const bool mine = token[i] >= 0 && token[i] < n_vocab;
        const int v = mine ? static_cast<int>(token[i]) : -1;
        const unsigned peers = __match_any_sync(kFullWarp, v);
        const int before = __popc(peers & ((1u << lane) - 1));
        if (mine) p.rank[base + i * kWarp + lane] = counter[v] + before;
        __syncwarp();
        if (mine && before == 0) counter[v] += __popc(peers);
        __syncwarp();
      }
    }
    int32_t* histogram = p.offset + static_cast<int64_t>(blockIdx.x) * p.vocab + v0;
    for (int v = lane; v < n_vocab; v += kWarp) histogram[v] = counter[v];
    __syncwarp();
  }
}

// The sum over a warp's lanes below this one; *total is the whole warp's.
WGPT_DEVICE int warp_exclusive_sum(int x, int lane, int* total) {
  int sum = x;
  WGPT_UNROLL
  for (int d = 1; d < kWarp; d *= 2) {
    const int below = __shfl_up_sync(kFullWarp, sum, d);
    if (lane >= d) sum += below;
  }
  *total = __shfl_sync(kFullWarp, sum, kWarp - 1);
  return sum - x;
}

// One block loops over the vocabulary, a thread per bucket and iteration.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(Buckets p) {
  constexpr int kWarps = kScanThreads / kWarp;
  constexpr int kBatch = 8;  // histogram rows loaded together
  WGPT_SHARED(int, warp_rows, kWarps);
  WGPT_SHARED(int, warp_pieces, kWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int carry_rows = 0, carry_pieces = 0;
  for (int64_t v0 = 0; v0 < p.vocab; v0 += kScanThreads) {
    const int64_t v = v0 + threadIdx.x;
    const bool mine = v < p.vocab;
    int rows = 0;
    for (int g0 = 0; mine && g0 < p.n_chunks; g0 += kBatch) {
      int count[kBatch];
      WGPT_UNROLL
      for (int i = 0; i < kBatch; ++i)
        count[i] = g0 + i < p.n_chunks ? p.offset[(g0 + i) * p.vocab + v] : 0;
      WGPT_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (g0 + i < p.n_chunks) p.offset[(g0 + i) * p.vocab + v] = rows;
        rows += count[i];
      }
    }
    const int pieces = !mine ? 0 : rows <= kPieceRows ? 1 : ceil_div(rows, kPieceRows);
    int rows_of_warp, pieces_of_warp;
    int rows_before = warp_exclusive_sum(rows, lane, &rows_of_warp);
    int pieces_before = warp_exclusive_sum(pieces, lane, &pieces_of_warp);
    if (lane == 0) {
      warp_rows[warp] = rows_of_warp;
      warp_pieces[warp] = pieces_of_warp;
    }
    __syncthreads();
    int rows_of_block, pieces_of_block;
    const int rows_of_warps_before = warp_exclusive_sum(warp_rows[lane], lane, &rows_of_block);
    const int pieces_of_warps_before =
        warp_exclusive_sum(warp_pieces[lane], lane, &pieces_of_block);
    rows_before += carry_rows + __shfl_sync(kFullWarp, rows_of_warps_before, warp);
    pieces_before += carry_pieces + __shfl_sync(kFullWarp, pieces_of_warps_before, warp);
    if (mine) {
      p.start[v] = rows_before;
      p.piece_start[v] = pieces_before;
      p.owner[pieces_before] = static_cast<int32_t>(v);
    }
    carry_rows += rows_of_block;
    carry_pieces += pieces_of_block;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    p.start[p.vocab] = carry_rows;
    p.piece_start[p.vocab] = carry_pieces;
  }
}

__global__ void __launch_bounds__(kThreads) place_kernel(const int64_t* tokens, Buckets p) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= p.rows) return;
  const int64_t v = tokens[n];
  if (v < 0 || v >= p.vocab) return;
  const int at = p.offset[n / p.chunk_rows * p.vocab + v] + p.rank[n];
  p.order[p.start[v] + at] = static_cast<int32_t>(n);
  if (at > 0 && at % kPieceRows == 0)
    p.owner[p.piece_start[v] + at / kPieceRows] = static_cast<int32_t>(v);
}

// Sums rows [begin, end) of one channel tile: thread (x, y) adds rows begin + y, + rows_y, ...; then y = 0 adds the
// partial sums in ascending y.
//
//            x: one vector of W channels each          lanes_x a power of two, lanes_x * rows_y = kSumThreads
//   y = 0    row begin + 0, begin + rows_y, ...
//   y = 1    row begin + 1, ...
//
// row(i) gives the pointer to channel 0 of row i. On return, threads with y = 0 hold the sums.
template <typename T, int W, typename Row>
WGPT_DEVICE void sum_rows(float (&sum)[W], int begin, int end, int c, bool inside, int x, int y,
                          int lanes_x, int rows_y, float* scratch, const Row& row) {
  WGPT_UNROLL
  for (int k = 0; k < W; ++k) sum[k] = 0.f;
  if (inside) {
    WGPT_UNROLL_BY(4)
    for (int i = begin + y; i < end; i += rows_y) {
      const Vec<T, W> v = load_vec<W>(row(i) + c);
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) sum[k] += to_float(v.e[k]);
    }
  }
  WGPT_UNROLL
  for (int k = 0; k < W; ++k) scratch[k * kSumThreads + y * lanes_x + x] = sum[k];
  __syncthreads();
  if (y == 0) {
    for (int other = 1; other < rows_y; ++other) {
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) sum[k] += scratch[k * kSumThreads + other * lanes_x + x];
    }
  }
  __syncthreads();
}

template <typename T, int W>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const T* d_y, T* d_table, int token_channels, int channels, int lanes_x, Buckets p) {
  WGPT_SHARED(float, scratch, kSumThreads* W);
  const int piece = blockIdx.x;
  if (piece >= p.piece_start[p.vocab]) return;
  const int64_t v = p.owner[piece];
  const int first = p.piece_start[v];
  const bool whole = p.piece_start[v + 1] == first + 1;
  const int begin = p.start[v] + (piece - first) * kPieceRows;
  const int bucket_end = p.start[v + 1];
  const int end = bucket_end - begin < kPieceRows ? bucket_end : begin + kPieceRows;
  const int x = threadIdx.x % lanes_x, y = threadIdx.x / lanes_x;
  for (int c0 = 0; c0 < token_channels; c0 += lanes_x * W) {
    const int c = c0 + x * W;
    const bool inside = c < token_channels;
    float sum[W];
    sum_rows<T, W>(sum, begin, end, c, inside, x, y, lanes_x, kSumThreads / lanes_x, scratch,
                   [&](int i) { return d_y + static_cast<int64_t>(p.order[i]) * channels; });
    if (y != 0 || !inside) continue;
    if (whole) {
      Vec<T, W> out;
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) out.e[k] = from_float<T>(sum[k]);
      store_vec<W>(d_table + v * token_channels + c, out);
    } else {
      float* partial = p.partial + static_cast<int64_t>(piece) * token_channels + c;
      WGPT_UNROLL
      for (int k = 0; k < W; ++k) partial[k] = sum[k];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    combine_kernel(T* d_table, int token_channels, int lanes_x, Buckets p) {
  WGPT_SHARED(float, scratch, kSumThreads);
  const int64_t v = blockIdx.x;
  const int begin = p.piece_start[v], end = p.piece_start[v + 1];
  if (end == begin + 1) return;
  const int x = threadIdx.x % lanes_x, y = threadIdx.x / lanes_x;
  for (int c0 = 0; c0 < token_channels; c0 += lanes_x) {
    const int c = c0 + x;
    const bool inside = c < token_channels;
    float sum[1];
    sum_rows<float, 1>(sum, begin, end, c, inside, x, y, lanes_x, kSumThreads / lanes_x, scratch,
                       [&](int i) { return p.partial + static_cast<int64_t>(i) * token_channels; });
    if (y == 0 && inside) d_table[v * token_channels + c] = from_float<T>(sum[0]);
  }
}

// The power of two that covers n lanes, at most kSumThreads.
inline int lanes_for(int n) {
  int lanes = 1;
  while (lanes < n && lanes < kSumThreads) lanes *= 2;
  return lanes;
}

template <typename T, int W>
const char* backward(const TokenConcatBackward& a, Stream stream) {
  const TokenConcatShape& s = a.shape;
  const T* d_y = static_cast<const T*>(a.d_y);
  T* d_table = static_cast<T*>(a.d_table);
  const int channels = static_cast<int>(s.token_channels + s.mel_channels);
  const int token_channels = static_cast<int>(s.token_channels);
  const char* error =
      pos_grad<T, W>(d_y, static_cast<T*>(a.d_pos), s.batch, s.steps, a.pos_rows, channels, stream);
  if (error != nullptr || token_channels == 0 || s.vocab == 0) return error;
  Buckets p;
  plan_buckets(s, a.workspace, &p);
  if (p.n_chunks > 0) error = launch(rank_kernel, p.n_chunks, kWarp, 0, stream, a.tokens, p);
  if (error == nullptr) error = launch(scan_kernel, 1, kScanThreads, 0, stream, p);
  if (error == nullptr && p.rows > 0) {
    error = launch(place_kernel, static_cast<unsigned>(ceil_div(p.rows, int64_t{kThreads})),
                   kThreads, 0, stream, a.tokens, p);
  }
  if (error == nullptr) {
    error = launch(sum_kernel<T, W>, static_cast<unsigned>(p.max_pieces), kSumThreads, 0, stream,
                   d_y, d_table, token_channels, channels, lanes_for(token_channels / W), p);
  }
  if (error == nullptr && p.rows > kPieceRows) {
    error = launch(combine_kernel<T>, static_cast<unsigned>(s.vocab), kSumThreads, 0, stream,
                   d_table, token_channels, lanes_for(token_channels), p);
  }
  return error;
}

}  // namespace wgpt::cuda::token_concat
