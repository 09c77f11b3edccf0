// flash_attention in float64, row by row: for gradient checks, not for speed. Formula and shapes:
// kernels/flash_attention.h.
//
// A row of out is an online softmax over blocks of keys; a row of dq loops over its keys, a row of dk
// and dv over its queries, each in ascending order. 14 D FLOPs per pair, no scratch but a few rows.
#pragma once

#include <math.h>

#include "kernels/cpu/attention/scores.h"

namespace wgpt::cpu::WGPT_TARGET {

inline double exp_of(double x) { return exp(x); }
inline double log_of(double x) { return log(x); }

template <typename Sum, typename Element>
inline Sum dot(const Sum* a, const Element* b, int64_t n) {
  Sum lanes[16] = {};
  for (int64_t i = 0; i < n; i += 16) {
    for (int64_t j = 0; j < 16; ++j) lanes[j] += a[i + j] * widen(b[i + j]);
  }
  for (int64_t step = 8; step > 0; step /= 2) {
    for (int64_t j = 0; j < step; ++j) lanes[j] += lanes[j + step];
  }
  return lanes[0];
}

template <typename Sum, typename Element>
inline void add_scaled(Sum factor, const Element* __restrict b, int64_t n, Sum* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] += factor * widen(b[i]);
}

constexpr int64_t kKeysPerBlock = 64, kMaxHeadDim = 256;

template <typename Element>
void attend_row(const FlashAttentionForward& args, int64_t b, int64_t h, int64_t i) {
  using Sum = Arithmetic<Element>;
  const FlashAttentionShape& shape = args.shape;
  const int64_t d = shape.head_dim, kv_h = h / shape.group;
  const Element* q = head_row<Element>(args.q, b, h, i);
  Sum scaled_q[kMaxHeadDim], out[kMaxHeadDim] = {}, p[kKeysPerBlock], sum = 0, maximum = -INFINITY;
  for (int64_t c = 0; c < d; ++c) scaled_q[c] = widen(q[c]) * static_cast<Sum>(shape.scale);
  const ScoreTransform transform(shape, args.bias, b, h);
  double slope;
  const Range keys = visible_keys(Mask(shape, args.first_key, b), i);
  for (int64_t j0 = keys.begin; j0 < keys.end; j0 += kKeysPerBlock) {
    const int64_t n = min_of(kKeysPerBlock, keys.end - j0);
    Sum new_maximum = maximum;
    for (int64_t j = 0; j < n; ++j) {
      p[j] = transform.apply(i, j0 + j,
                             dot(scaled_q, head_row<Element>(args.k, b, kv_h, j0 + j), d), &slope);
      new_maximum = max_of(new_maximum, p[j]);
    }
    const Sum base = new_maximum == -INFINITY ? Sum(0) : new_maximum;
    const Sum shrink = exp_of(maximum - base);
    sum *= shrink;
    for (int64_t c = 0; c < d; ++c) out[c] *= shrink;
    for (int64_t j = 0; j < n; ++j) {
      p[j] = exp_of(p[j] - base);
      sum += p[j];
      add_scaled(p[j], head_row<Element>(args.v, b, kv_h, j0 + j), d, out);
    }
    maximum = new_maximum;
  }
  Element* result = head_row<Element>(args.out, b, h, i);
  const bool is_blind = transform.is_active() && sum == 0;
  for (int64_t c = 0; c < d; ++c) result[c] = narrow<Element>(is_blind ? Sum(0) : out[c] / sum);
  static_cast<Sum*>(args.lse)[(b * shape.heads + h) * shape.q_steps + i] = maximum + log_of(sum);
}

constexpr int64_t kRowsPerTask = 16;

// Calls body(b, h, row) for every row of every head, the last rows (the longest when causal) first.
template <typename Body>
void for_each_row(int64_t batch, int64_t heads, int64_t n_rows, const Executor& executor,
                  Body&& body) {
  const int64_t n_heads = batch * heads, n_blocks = ceil_div(n_rows, kRowsPerTask);
  run_tasks(executor, n_blocks * n_heads, [&](int64_t task) {
    const int64_t block = n_blocks - 1 - task / n_heads, head = task % n_heads;
    for (int64_t row = block * kRowsPerTask; row < min_of((block + 1) * kRowsPerTask, n_rows);
         ++row) {
      body(head / heads, head % heads, row);
    }
  });
}

template <typename Element>
void attend_float64(const FlashAttentionForward& args, const Executor& executor) {
  const FlashAttentionShape& shape = args.shape;
  for_each_row(shape.batch, shape.heads, shape.q_steps, executor,
               [&](int64_t b, int64_t h, int64_t i) { attend_row<Element>(args, b, h, i); });
}

template <typename Element>
struct BackwardRow {
  using Sum = Arithmetic<Element>;
  const FlashAttentionBackward& args;
  Sum* delta;  // (B, H, Tq), in the workspace
  int64_t b, h;
  int64_t kv_h = h / args.shape.group;
  Mask mask{args.shape, args.first_key, b};
  ScoreTransform transform{args.shape, args.bias, b, h};

  // slope: of the score after scale q k^T.
  Sum p(int64_t i, int64_t j, Sum* slope) const {
    Sum q[kMaxHeadDim];
    const Element* row = head_row<Element>(args.q, b, h, i);
    for (int64_t c = 0; c < args.shape.head_dim; ++c)
      q[c] = widen(row[c]) * static_cast<Sum>(args.shape.scale);
    const Sum scaled = dot(q, head_row<Element>(args.k, b, kv_h, j), args.shape.head_dim);
    const Sum s = transform.apply(i, j, scaled, slope);
    const bool is_blind = transform.is_active() && lse()[i] == -INFINITY;
    return is_blind ? Sum(0) : exp_of(s - lse()[i]);
  }
  Sum ds(int64_t i, int64_t j, Sum p_ij) const {
    Sum d_out[kMaxHeadDim];
    const Element* row = head_row<Element>(args.d_out, b, h, i);
    for (int64_t c = 0; c < args.shape.head_dim; ++c) d_out[c] = widen(row[c]);
    return p_ij *
           (dot(d_out, head_row<Element>(args.v, b, kv_h, j), args.shape.head_dim) -
            head_delta()[i]) *
           static_cast<Sum>(args.shape.scale);
  }
  const Sum* lse() const { return static_cast<const Sum*>(args.lse) + head_offset(); }
  Sum* head_delta() const { return delta + head_offset(); }
  int64_t head_offset() const { return (b * args.shape.heads + h) * args.shape.q_steps; }

  void write_delta(int64_t i) const {
    const Element *out = head_row<Element>(args.out, b, h, i),
                  *d_out = head_row<Element>(args.d_out, b, h, i);
    Sum sum =
        args.d_lse == nullptr ? Sum(0) : -static_cast<const Sum*>(args.d_lse)[head_offset() + i];
    for (int64_t c = 0; c < args.shape.head_dim; ++c)
      sum += Sum(widen(out[c])) * Sum(widen(d_out[c]));
    head_delta()[i] = sum;
  }
  void write_dq(int64_t i) const {
    Sum dq[kMaxHeadDim] = {};
    const int64_t d = args.shape.head_dim;
    const Range keys = visible_keys(mask, i);
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      Sum slope;
      const Sum p_ij = p(i, j, &slope);
      add_scaled(ds(i, j, p_ij * slope), head_row<Element>(args.k, b, kv_h, j), d, dq);
    }
    Element* out = head_row<Element>(args.dq, b, h, i);
    for (int64_t c = 0; c < d; ++c) out[c] = narrow<Element>(dq[c]);
  }
  // Adds this head's share of key j's gradients.
  void add_dk_dv(int64_t j, Sum* dk, Sum* dv) const {
    const int64_t d = args.shape.head_dim;
    const Range queries = seeing_queries(mask, j, 0, args.shape.q_steps);
    for (int64_t i = queries.begin; i < queries.end; ++i) {
      Sum slope;
      const Sum p_ij = p(i, j, &slope);
      add_scaled(p_ij, head_row<Element>(args.d_out, b, h, i), d, dv);
      add_scaled(ds(i, j, p_ij * slope), head_row<Element>(args.q, b, h, i), d, dk);
    }
  }
};

template <typename Element>
void attend_backward_float64(const FlashAttentionBackward& args, const Executor& executor) {
  using Row = BackwardRow<Element>;
  const FlashAttentionShape& shape = args.shape;
  auto* delta = static_cast<typename Row::Sum*>(args.workspace);
  const auto row_of = [&](int64_t b, int64_t h) { return Row{args, delta, b, h}; };
  for_each_row(shape.batch, shape.heads, shape.q_steps, executor,
               [&](int64_t b, int64_t h, int64_t i) { row_of(b, h).write_delta(i); });
  for_each_row(shape.batch, shape.heads, shape.q_steps, executor,
               [&](int64_t b, int64_t h, int64_t i) { row_of(b, h).write_dq(i); });
  for_each_row(shape.batch, shape.kv_heads(), shape.kv_steps, executor,
               [&](int64_t b, int64_t kv_h, int64_t j) {
                 typename Row::Sum dk[kMaxHeadDim] = {}, dv[kMaxHeadDim] = {};
                 for (int64_t g = 0; g < shape.group; ++g)
                   row_of(b, kv_h * shape.group + g).add_dk_dv(j, dk, dv);
                 Element *dk_row = head_row<Element>(args.dk, b, kv_h, j),
                         *dv_row = head_row<Element>(args.dv, b, kv_h, j);
                 for (int64_t c = 0; c < shape.head_dim; ++c) {
                   dk_row[c] = narrow<Element>(dk[c]);
                   dv_row[c] = narrow<Element>(dv[c]);
                 }
               });
}

}  // namespace wgpt::cpu::WGPT_TARGET
