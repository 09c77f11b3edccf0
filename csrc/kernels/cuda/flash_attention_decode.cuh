// flash_attention for a few queries against a long KV cache: split-K over the keys, so that one head fills many blocks.
//
// One block of 4 warps owns one query of one head and one split of its keys. A group of D / W lanes reads a key as one
// row of 16-byte vectors (W elements a lane), so a warp reads 32 W / D keys at once; each group keeps its own running
// maximum, sum and output, and the groups, then (second kernel) the splits, are merged in ascending order:
//
//   lanes   [group 0: key j     ][group 1: key j + 1 ] ...      m, l, o[D] per group -> block -> workspace -> out, lse
//
// Memory-bound: reads every visible key and value once per query; float32 arithmetic. Deterministic: the splits depend
// on the shape alone. Not yet run on hardware.
#pragma once

#include "kernels/cuda/flash_attention_common.cuh"

namespace wgpt::cuda::flash {

constexpr int kDecodeSteps = 4;  // at most this many queries come here
constexpr int kDecodeWarps = 4;
constexpr int kKeysPerSplit = 256;
constexpr int kMaxSplits = 64;

struct DecodeSplits {
  int n, keys;  // keys of each
};

// All queries of a call share the splits of [0, Tk), or of the window that they see together.
inline DecodeSplits decode_splits(const FlashAttentionShape& s) {
  const int64_t seen = s.window > 0 ? 2 * s.window + s.q_steps : s.kv_steps;
  const int64_t keys = seen < s.kv_steps ? seen : s.kv_steps;
  int64_t n = ceil_div(keys, int64_t{kKeysPerSplit});
  n = n > kMaxSplits ? kMaxSplits : n;
  return {static_cast<int>(n), static_cast<int>(ceil_div(keys, n))};
}

inline size_t decode_workspace_bytes(const FlashAttentionShape& s) {
  if (s.q_steps > kDecodeSteps || s.q_steps < 1 || s.kv_steps < 1) return 0;
  const int n = decode_splits(s).n;
  return n == 1 ? 0
                : static_cast<size_t>(s.batch * s.heads * s.q_steps * n * (s.head_dim + 2)) *
                      sizeof(float);
}

template <typename T>
struct DecodeParams {
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse;
  // (B, H, Tq, splits, D + 2): output, maximum, sum of each split; nullptr when there is one split.
  float* partial;
  PackedVisibility visible;  // first_key nullptr: not packed
  int n_heads, n_splits, keys_per_split;
  float scale_log2;
  bool aligned;
};

template <typename T, int W>
WGPT_DEVICE void load_floats(const T* p, bool aligned, float (&x)[W]) {
  if (aligned) {
    const Vec<T, W> v = load_vec<W>(p);
    WGPT_UNROLL
    for (int i = 0; i < W; ++i) x[i] = to_float(v.e[i]);
  } else {
    WGPT_UNROLL
    for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
  }
}

// Merges n splits, each D outputs then maximum (of scale log2 e s) then sum, `pitch` floats apart; channel c only.
WGPT_DEVICE void merge_splits(const float* splits, int n, int pitch, int D, int c, float* out,
                              float* top, float* sum) {
  *top = -INFINITY;
  for (int i = 0; i < n; ++i) *top = fmaxf(*top, splits[i * pitch + D]);
  *out = *sum = 0.f;
  for (int i = 0; i < n; ++i) {
    const float split_top = splits[i * pitch + D];
    const float factor = split_top == -INFINITY ? 0.f : exp2_approx(split_top - *top);
    *out += splits[i * pitch + c] * factor;
    *sum += splits[i * pitch + D + 1] * factor;
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kDecodeWarps* kWarp) decode_kernel(DecodeParams<T> p) {
  constexpr int kW = kVecLanes<T>, kGroup = D / kW, kGroups = kDecodeWarps * kWarp / kGroup,
                kPitch = D + 2;
  constexpr int kInFlight = 4;  // keys per group loaded before the first is used
  WGPT_SHARED(float, splits, kGroups* kPitch);
  const int64_t row = blockIdx.x;  // (b H + h) Tq + i
  const int i = static_cast<int>(row % p.visible.q_steps);
  const int64_t batch_head = row / p.visible.q_steps, b = batch_head / p.n_heads,
                h = batch_head % p.n_heads;
  Span all = p.visible.Visibility::keys_of(i);
  int from = p.visible.Visibility::keys_of(0).lo;
  if (p.visible.first_key != nullptr) {  // one kernel for both: the test is little beside the keys
    const PackedVisibility visible = visibility_of_item(p.visible, b);
    all.lo = visible.keys_of(i).lo;
    from = visible.keys_of(0).lo;
  }
  from += static_cast<int>(blockIdx.y) * p.keys_per_split;
  const int begin = from > all.lo ? from : all.lo;
  const int end = from + p.keys_per_split < all.hi ? from + p.keys_per_split : all.hi;
  const int group = threadIdx.x / kGroup, column = threadIdx.x % kGroup * kW;

  float q[kW], out[kW] = {}, top = -INFINITY, sum = 0.f;
  load_floats(p.q.head(b, h).row(i) + column, p.aligned, q);
  WGPT_UNROLL
  for (int c = 0; c < kW; ++c) q[c] *= p.scale_log2;
  const Rows<const T> k = p.k.head(b, h), v = p.v.head(b, h);
  for (int base = begin; base < end; base += kGroups * kInFlight) {
    float key[kInFlight][kW], value[kInFlight][kW], s[kInFlight];
    WGPT_UNROLL
    for (int f = 0; f < kInFlight; ++f) {
      const int j = base + f * kGroups + group, inside = j < end ? j : end - 1;
      load_floats(k.row(inside) + column, p.aligned, key[f]);
      load_floats(v.row(inside) + column, p.aligned, value[f]);
    }
    float new_top = top;
    WGPT_UNROLL
    for (int f = 0; f < kInFlight; ++f) {
      s[f] = 0.f;
      WGPT_UNROLL
      for (int c = 0; c < kW; ++c) s[f] += q[c] * key[f][c];
      WGPT_UNROLL
      for (int d = 1; d < kGroup; d *= 2) s[f] += __shfl_xor_sync(kFullWarp, s[f], d);
      if (base + f * kGroups + group >= end) s[f] = -INFINITY;
      new_top = fmaxf(new_top, s[f]);
    }
    const float shift = new_top == -INFINITY ? 0.f : new_top;
    const float shrink = exp2_approx(top - shift);
    top = new_top;
    sum *= shrink;
    WGPT_UNROLL
    for (int c = 0; c < kW; ++c) out[c] *= shrink;
    WGPT_UNROLL
    for (int f = 0; f < kInFlight; ++f) {
      const float weight = exp2_approx(s[f] - shift);
      sum += weight;
      WGPT_UNROLL
      for (int c = 0; c < kW; ++c) out[c] += weight * value[f][c];
    }
  }
  WGPT_UNROLL
  for (int c = 0; c < kW; ++c) splits[group * kPitch + column + c] = out[c];
  if (column == 0) {
    splits[group * kPitch + D] = top;
    splits[group * kPitch + D + 1] = sum;
  }
  __syncthreads();
  const int c = threadIdx.x;
  if (c >= D) return;
  float merged;
  merge_splits(splits, kGroups, kPitch, D, c, &merged, &top, &sum);
  if (p.partial != nullptr) {
    float* to = p.partial + (row * p.n_splits + blockIdx.y) * kPitch;
    to[c] = merged;
    if (c == 0) {
      to[D] = top;
      to[D + 1] = sum;
    }
    return;
  }
  p.out.head(b, h).row(i)[c] = from_float<T>(merged / sum);
  if (c == 0) p.lse[row] = (top + log2f(sum)) * (1.f / kLog2E);
}

template <typename T, int D>
__global__ void __launch_bounds__(D) merge_splits_kernel(DecodeParams<T> p) {
  const int64_t row = blockIdx.x, batch_head = row / p.visible.q_steps;
  float merged, top, sum;
  merge_splits(p.partial + row * p.n_splits * (D + 2), p.n_splits, D + 2, D, threadIdx.x, &merged,
               &top, &sum);
  p.out.head(batch_head / p.n_heads, batch_head % p.n_heads)
      .row(row % p.visible.q_steps)[threadIdx.x] = from_float<T>(merged / sum);
  if (threadIdx.x == 0) p.lse[row] = (top + log2f(sum)) * (1.f / kLog2E);
}

template <typename T, int D>
const char* decode(const FlashAttentionForward& a, Stream stream) {
  const FlashAttentionShape& s = a.shape;
  const DecodeSplits splits = decode_splits(s);
  DecodeParams<T> p;
  p.q = heads<const T>(a.q);
  p.k = heads<const T>(a.k);
  p.v = heads<const T>(a.v);
  p.out = heads<T>(a.out);
  p.lse = static_cast<float*>(a.lse);
  p.partial = splits.n == 1 ? nullptr : static_cast<float*>(a.workspace);
  p.visible = visibility(s, a.first_key);
  p.n_heads = static_cast<int>(s.heads);
  p.n_splits = splits.n;
  p.keys_per_split = splits.keys;
  p.scale_log2 = static_cast<float>(s.scale * kLog2E);
  p.aligned = rows_aligned<T>(a.q) && rows_aligned<T>(a.k) && rows_aligned<T>(a.v);
  const unsigned n_rows = static_cast<unsigned>(s.batch * s.heads * s.q_steps);
  const char* error =
      launch(decode_kernel<T, D>, dim3(n_rows, splits.n), kDecodeWarps * kWarp, 0, stream, p);
  if (error != nullptr || splits.n == 1) return error;
  return launch(merge_splits_kernel<T, D>, n_rows, D, 0, stream, p);
}

}  // namespace wgpt::cuda::flash
