// The formulas of kernels/*.h in float64 on the host, for gpu_driver.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/flash_attention.h"
#include "kernels/mel_embed.h"

namespace wgpt::driver {

using Values = std::vector<double>;

// One head's rows: steps x D, in the order of q, k, v, d_out. All of its gradients and its log-sum-exp.
struct Head {
  Values q, k, v, d_out, d_lse;  // d_lse may be empty
  const int32_t* first_key;      // of each query, or nullptr
  Values out, lse, dq, dk, dv;
};

inline double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

inline void add_scaled(double* to, double factor, const double* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
}

// rounded_out: what the backward reads as out, its own rounding included; empty without a backward.
inline void attention(const FlashAttentionShape& s, Head& head, const Values& rounded_out = {}) {
  const int64_t d = s.head_dim;
  head.out.assign(s.q_steps * d, 0);
  head.lse.assign(s.q_steps, 0);
  head.dq.assign(s.q_steps * d, 0);
  head.dk.assign(s.kv_steps * d, 0);
  head.dv.assign(s.kv_steps * d, 0);
  Values weight(s.kv_steps);
  for (int64_t i = 0; i < s.q_steps; ++i) {
    const int64_t position = i + s.kv_steps - s.q_steps;
    int64_t lo = s.window > 0 ? std::max<int64_t>(0, position - s.window + 1) : 0;
    int64_t hi = s.causal ? position + 1 : s.kv_steps;
    if (s.window > 0) hi = std::min(hi, position + s.window);
    if (head.first_key != nullptr) lo = std::max<int64_t>(lo, head.first_key[i]);
    const double* q = &head.q[i * d];
    double top = -INFINITY, sum = 0;
    for (int64_t j = lo; j < hi; ++j) {
      weight[j] = s.scale * dot(q, &head.k[j * d], d);
      top = std::max(top, weight[j]);
    }
    for (int64_t j = lo; j < hi; ++j) sum += weight[j] = std::exp(weight[j] - top);
    head.lse[i] = top + std::log(sum);
    for (int64_t j = lo; j < hi; ++j) {
      weight[j] /= sum;
      add_scaled(&head.out[i * d], weight[j], &head.v[j * d], d);
    }
    if (rounded_out.empty()) continue;
    const double* d_out = &head.d_out[i * d];
    const double delta =
        dot(d_out, &rounded_out[i * d], d) - (head.d_lse.empty() ? 0 : head.d_lse[i]);
    for (int64_t j = lo; j < hi; ++j) {
      const double d_score = s.scale * weight[j] * (dot(d_out, &head.v[j * d], d) - delta);
      add_scaled(&head.dq[i * d], d_score, &head.k[j * d], d);
      add_scaled(&head.dk[j * d], d_score, q, d);
      add_scaled(&head.dv[j * d], weight[j], d_out, d);
    }
  }
}

// x of all steps, (B T, (c + r) M); frames (B, T r) rows of `pitch` values.
inline Values mel_slices(const MelEmbedShape& s, const Values& frames, const Values& mean,
                         const Values& inv_std) {
  const int64_t length = s.context_frames + s.frames_per_step;
  Values x(s.batch * s.steps * length * s.mels, 0);
  double* to = x.data();
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t t = 0; t < s.steps; ++t) {
      for (int64_t f = 0; f < length; ++f, to += s.mels) {
        const int64_t frame = t * s.frames_per_step - s.context_frames + f;
        if (frame < 0) continue;
        const double* from = &frames[b * s.frames_batch_stride + frame * s.frames_frame_stride];
        for (int64_t m = 0; m < s.mels; ++m) to[m] = (from[m] - mean[m]) * inv_std[m];
      }
    }
  }
  return x;
}

inline double gelu(double x) { return 0.5 * x * (1 + std::erf(x * 0.7071067811865476)); }
inline double gelu_slope(double x) {
  return 0.5 * (1 + std::erf(x * 0.7071067811865476)) +
         x * std::exp(-0.5 * x * x) * 0.3989422804014327;
}

}  // namespace wgpt::driver
