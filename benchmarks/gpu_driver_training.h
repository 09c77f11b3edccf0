// gpu_driver's calls of the ops of the training step: add_rms_norm, rotary_qkv, feed_forward's GELU, the rows of
// linear_cross_entropy.
#pragma once

#include "gpu_driver_report.h"
#include "kernels/cuda/launch.h"

namespace wgpt::driver {

// Of a row, as mel_embed's; of rows that are differences of larger numbers, the second.
constexpr Limits kTraining{2e-6, 12e-3, 1.6e-3}, kDifference{8e-6, 24e-3, 3.2e-3};

template <typename... Numbers>
std::string text_of(const char* format, Numbers... numbers) {
  char text[160];
  std::snprintf(text, sizeof text, format, numbers...);
  return text;
}

struct NormCase {
  DType stream, delta, y;
  int64_t rows, channels;
  bool has_delta = true;
};

inline void add_rms_norm(const NormCase& c, bool checked) {
  const AddRmsNormShape shape{c.stream, c.delta, c.y, c.rows, c.channels};
  const int64_t n = c.rows * c.channels;
  const double eps = 1e-6;
  const Tensor x = input(c.stream, n), delta = input(c.delta, n), d_sum = input(c.stream, n),
               weight = input(DType::kFloat32, c.channels), d_y = input(c.y, n),
               sum = output(c.stream, n), y = output(c.y, n),
               inv_rms = output(DType::kFloat32, c.rows), d_x = output(c.stream, n),
               d_delta = output(c.delta, n), d_weight = output(DType::kFloat32, c.channels);
  const std::string what = text_of("add_rms_norm %s %s N %lld C %lld%s", name_of(c.stream),
                                   name_of(c.y), static_cast<long long>(c.rows),
                                   static_cast<long long>(c.channels), c.has_delta ? "" : " alone");
  const Tensor& total = c.has_delta ? sum : x;
  const AddRmsNormForward forward{shape,
                                  x.data(),
                                  c.has_delta ? delta.data() : nullptr,
                                  weight.data(),
                                  c.has_delta ? sum.data() : nullptr,
                                  y.data(),
                                  inv_rms.data(),
                                  eps};
  check_launch(what, cuda::add_rms_norm_forward(forward, nullptr));
  const AddRmsNormBackward backward{
      shape,           c.has_delta ? d_sum.data() : nullptr,
      d_y.data(),      total.data(),
      inv_rms.data(),  weight.data(),
      d_x.data(),      c.has_delta ? d_delta.data() : nullptr,
      d_weight.data(), workspace(cuda::add_rms_norm_backward_workspace_bytes(shape))};
  check_launch(what, cuda::add_rms_norm_backward(backward, nullptr));
  wait();
  if (!checked) return free_all();

  bool touched = false;
  const Values seen = c.has_delta ? fetch(sum, touched) : x.values;  // with its own rounding
  Values want_sum(n), want_y(n), want_d(n), want_weight(c.channels, 0);
  for (int64_t row = 0; row < c.rows; ++row) {
    const int64_t at = row * c.channels;
    const double r = 1 / std::sqrt(dot(&seen[at], &seen[at], c.channels) / c.channels + eps);
    double mean = 0;
    for (int64_t i = 0; i < c.channels; ++i)
      mean += d_y.values[at + i] * weight.values[i] * seen[at + i] * r / c.channels;
    for (int64_t i = 0; i < c.channels; ++i) {
      const double h = seen[at + i] * r, g = d_y.values[at + i] * weight.values[i];
      want_sum[at + i] = x.values[at + i] + delta.values[at + i];
      want_y[at + i] = h * weight.values[i];
      want_d[at + i] = (c.has_delta ? d_sum.values[at + i] : 0) + r * (g - h * mean);
      want_weight[i] += d_y.values[at + i] * h;
    }
  }
  if (c.has_delta)
    report(what + " sum", worst_row(seen.data(), want_sum, c.channels), kTraining.of(c.stream));
  report(what + " y", worst_row(fetch(y, touched).data(), want_y, c.channels), kTraining.of(c.y));
  if (c.channels > 1) {  // else a difference of equals
    report(what + " d_x", worst_row(fetch(d_x, touched).data(), want_d, c.channels),
           kDifference.of(c.stream));
  }
  if (c.has_delta && c.channels > 1) {
    report(what + " d_delta", worst_row(fetch(d_delta, touched).data(), want_d, c.channels),
           kDifference.of(c.delta));
  }
  report(what + " d_weight", worst_row(fetch(d_weight, touched).data(), want_weight, c.channels),
         kDifference.of(DType::kFloat32));
  if (touched) report(what + " writes outside its tensors", 1, 0);
  free_all();
}

struct ConcatNormCase {
  DType table, delta, y;
  int64_t rows, token_channels, mel_channels;
};

inline void token_concat_norm(const ConcatNormCase& c, bool checked) {
  const int64_t ct = c.token_channels, cm = c.mel_channels, channels = ct + cm, vocab = 11;
  const int64_t n = c.rows * channels, n_mel = c.rows * cm;
  const TokenConcatNormShape shape{c.table, c.table, c.delta, c.y, c.rows, vocab, ct, cm};
  const double mel_eps = 1e-5, eps = 1e-6;
  const Tensor table = input(c.table, vocab * ct), x = input(c.table, n_mel),
               delta = input(c.delta, n_mel), mel_weight = input(DType::kFloat32, cm),
               weight = input(DType::kFloat32, channels), d_cat = input(c.table, n),
               d_y = input(c.y, n), cat = output(c.table, n), y = output(c.y, n),
               mel_root = output(DType::kFloat32, c.rows), root = output(DType::kFloat32, c.rows),
               d_tokens = output(c.table, c.rows * ct), d_x = output(c.table, n_mel),
               d_delta = output(c.delta, n_mel), d_weights = output(DType::kFloat32, channels + cm);
  std::vector<int64_t> tokens(c.rows);
  for (int64_t row = 0; row < c.rows; ++row) tokens[row] = row * 7 % vocab;
  const std::string what = text_of("token_concat_norm %s %s N %lld Ct %lld Cm %lld",
                                   name_of(c.table), name_of(c.y), static_cast<long long>(c.rows),
                                   static_cast<long long>(ct), static_cast<long long>(cm));
  const TokenConcatNormForward forward{shape,
                                       static_cast<const int64_t*>(integers(tokens)),
                                       table.data(),
                                       x.data(),
                                       delta.data(),
                                       mel_weight.data(),
                                       weight.data(),
                                       cat.data(),
                                       y.data(),
                                       mel_root.data(),
                                       root.data(),
                                       mel_eps,
                                       eps};
  check_launch(what, cuda::token_concat_norm_forward(forward, nullptr));
  const TokenConcatNormBackward backward{
      shape,
      d_cat.data(),
      d_y.data(),
      cat.data(),
      x.data(),
      delta.data(),
      mel_root.data(),
      root.data(),
      mel_weight.data(),
      weight.data(),
      d_tokens.data(),
      d_x.data(),
      d_delta.data(),
      d_weights.data(),
      workspace(cuda::token_concat_norm_backward_workspace_bytes(shape))};
  check_launch(what, cuda::token_concat_norm_backward(backward, nullptr));
  wait();
  if (!checked) return free_all();

  bool touched = false;
  const Values seen = fetch(cat, touched);  // with its own rounding
  Values want(n), want_y(n), want_tokens(c.rows * ct), want_x(n_mel), want_weight(channels, 0),
      want_mel_weight(cm, 0);
  for (int64_t row = 0; row < c.rows; ++row) {
    const double* cat_row = &seen[row * channels];
    const double* d_y_row = &d_y.values[row * channels];
    Values h(cm), d(channels);
    for (int64_t i = 0; i < cm; ++i) h[i] = x.values[row * cm + i] + delta.values[row * cm + i];
    const double mel_r = 1 / std::sqrt(dot(h.data(), h.data(), cm) / cm + mel_eps);
    const double r = 1 / std::sqrt(dot(cat_row, cat_row, channels) / channels + eps);
    double mean = 0, mel_mean = 0;
    for (int64_t i = 0; i < channels; ++i)
      mean += d_y_row[i] * weight.values[i] * cat_row[i] * r / channels;
    for (int64_t i = 0; i < channels; ++i) {
      want_y[row * channels + i] = cat_row[i] * r * weight.values[i];
      d[i] = d_cat.values[row * channels + i] +
             r * (d_y_row[i] * weight.values[i] - cat_row[i] * r * mean);
      want_weight[i] += d_y_row[i] * cat_row[i] * r;
      if (i < ct) {
        want[row * channels + i] = table.values[tokens[row] * ct + i];
        want_tokens[row * ct + i] = d[i];
        continue;
      }
      h[i - ct] *= mel_r;
      want[row * channels + i] = h[i - ct] * mel_weight.values[i - ct];
      want_mel_weight[i - ct] += d[i] * h[i - ct];
      mel_mean += d[i] * mel_weight.values[i - ct] * h[i - ct] / cm;
    }
    for (int64_t i = 0; i < cm; ++i)
      want_x[row * cm + i] = mel_r * (d[ct + i] * mel_weight.values[i] - h[i] * mel_mean);
  }
  const Values got_weights = fetch(d_weights, touched);
  // The halves differ in size, so a row of cat is held by the larger one.
  report(what + " cat", worst_row(seen.data(), want, channels), kTraining.of(c.table));
  report(what + " y", worst_row(fetch(y, touched).data(), want_y, channels), kTraining.of(c.y));
  const double limit = kDifference.of(c.table);
  report(what + " d_tokens", worst_row(fetch(d_tokens, touched).data(), want_tokens, ct), limit);
  report(what + " d_x", worst_row(fetch(d_x, touched).data(), want_x, cm), limit);
  report(what + " d_delta", worst_row(fetch(d_delta, touched).data(), want_x, cm),
         kDifference.of(c.delta));
  report(what + " d_weight", worst_row(got_weights.data(), want_weight, channels), limit);
  report(what + " d_mel_weight", worst_row(got_weights.data() + channels, want_mel_weight, cm),
         limit);
  if (touched) report(what + " writes outside its tensors", 1, 0);
  free_all();
}

struct RotaryCase {
  DType dtype;
  int64_t batch, steps, heads, head_dim;
};

inline void rotary(const RotaryCase& c, bool checked) {
  const RotaryShape shape{c.dtype, c.batch, c.steps, c.heads, c.head_dim};
  const int64_t rows = c.batch * c.steps * c.heads, n = rows * c.head_dim, half = c.head_dim / 2;
  const Tensor qkv = input(c.dtype, 3 * n), cos = input(DType::kFloat32, c.steps * half),
               sin = input(DType::kFloat32, c.steps * half), q = output(c.dtype, n),
               k = output(c.dtype, n), v = output(c.dtype, n), d_qkv = output(c.dtype, 3 * n);
  const std::string what =
      text_of("rotary_qkv %s B %lld T %lld H %lld D %lld", name_of(c.dtype),
              static_cast<long long>(c.batch), static_cast<long long>(c.steps),
              static_cast<long long>(c.heads), static_cast<long long>(c.head_dim));
  const RotaryForward forward{shape,    qkv.data(), cos.data(), sin.data(),
                              q.data(), k.data(),   v.data()};
  check_launch(what, cuda::rotary_qkv_forward(forward, nullptr));
  // The gradients are q, k and v themselves: any numbers do.
  const RotaryBackward backward{shape,      q.data(),   k.data(),    v.data(),
                                cos.data(), sin.data(), d_qkv.data()};
  check_launch(what, cuda::rotary_qkv_backward(backward, nullptr));
  wait();
  if (!checked) return free_all();

  bool touched = false;
  const Values got[3] = {fetch(q, touched), fetch(k, touched), fetch(v, touched)};
  Values want[3] = {Values(n), Values(n), Values(n)}, want_back(3 * n);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t step = row / c.heads, head = row % c.heads, angle = step % c.steps * half;
    for (int part = 0; part < 3; ++part) {
      const int64_t packed = ((step * 3 + part) * c.heads + head) * c.head_dim;
      for (int64_t i = 0; i < half; ++i) {
        const double cosine = part < 2 ? cos.values[angle + i] : 1;
        const double sine = part < 2 ? sin.values[angle + i] : 0;
        const double a = qkv.values[packed + i], b = qkv.values[packed + half + i];
        double* to = &want[part][row * c.head_dim + i];
        to[0] = a * cosine - b * sine;
        to[half] = b * cosine + a * sine;
        const double* from = &got[part][row * c.head_dim + i];
        want_back[packed + i] = from[0] * cosine + from[half] * sine;
        want_back[packed + half + i] = from[half] * cosine - from[0] * sine;
      }
    }
  }
  const double limit = kTraining.of(c.dtype);
  const char* const names[] = {" q", " k", " v"};
  for (int part = 0; part < 3; ++part)
    report(what + names[part], worst_row(got[part].data(), want[part], c.head_dim), limit);
  report(what + " d_qkv", worst_row(fetch(d_qkv, touched).data(), want_back, c.head_dim), limit);
  if (touched) report(what + " writes outside its tensors", 1, 0);
  free_all();
}

// offset: elements in front of the first, so that an odd one takes the alignment away.
inline void gelu(DType dtype, int64_t n, int64_t offset, bool checked) {
  const Tensor z = input(dtype, n, offset, 2.5), d_active = input(dtype, n, offset),
               active = output(dtype, n, offset), d_z = output(dtype, n, offset);
  const std::string what = text_of("gelu %s n %lld%s", name_of(dtype), static_cast<long long>(n),
                                   offset == 0 ? "" : " unaligned");
  check_launch(what, cuda::gelu_forward({dtype, n, z.data(), active.data()}, nullptr));
  bool touched = false;
  const Values first = checked ? fetch(active, touched) : Values{};
  const GeluBackward backward{dtype, n, z.data(), d_active.data(), active.data(), d_z.data()};
  check_launch(what, cuda::gelu_backward(backward, nullptr));
  wait();
  if (!checked) return free_all();

  Values want(n), want_d(n);
  for (int64_t i = 0; i < n; ++i) {
    want[i] = driver::gelu(z.values[i]);
    want_d[i] = d_active.values[i] * gelu_slope(z.values[i]);
  }
  const double limit = kTraining.of(dtype);
  report(what + " active", worst_row(first.data(), want, n), limit);
  report(what + " active again", worst_row(fetch(active, touched).data(), want, n), limit);
  report(what + " d_z", worst_row(fetch(d_z, touched).data(), want_d, n), limit);
  if (touched) report(what + " writes outside its tensors", 1, 0);
  free_all();
}

struct CrossEntropyCase {
  DType dtype;
  int64_t rows, vocab;
  bool aligned = true;
  bool outside = false;  // every target lies in the padding of the rows
};

inline void cross_entropy(const CrossEntropyCase& c, bool checked) {
  const int64_t stride =
      c.aligned ? cuda::cross_entropy_row_stride(c.dtype, c.vocab) : c.vocab + 1 - c.vocab % 2;
  const Tensor logits = input(c.dtype, c.rows * stride, 0, 3),
               loss = output(DType::kFloat32, c.rows), total = output(DType::kFloat32, 1);
  std::vector<int64_t> targets(c.rows);
  for (int64_t row = 0; row < c.rows; ++row)
    targets[row] = c.outside      ? c.vocab + row % (stride - c.vocab)
                   : row % 5 == 4 ? -1
                                  : row * 7919 % c.vocab;
  const std::string what = text_of("cross_entropy %s N %lld V %lld%s%s", name_of(c.dtype),
                                   static_cast<long long>(c.rows), static_cast<long long>(c.vocab),
                                   c.aligned ? "" : " unaligned", c.outside ? " outside" : "");
  auto* correct = static_cast<uint8_t*>(device_allocate(c.rows));
  auto* n_correct = static_cast<int64_t*>(device_allocate(8));
  const CrossEntropyRows rows{
      c.dtype,     c.rows, c.vocab,       stride,
      -1,          true,   logits.data(), static_cast<const int64_t*>(integers(targets)),
      loss.data(), correct};
  check_launch(what, cuda::cross_entropy_rows(rows, nullptr));
  const CrossEntropySums sums{static_cast<const float*>(loss.data()), correct, c.rows,
                              static_cast<float*>(total.data()), n_correct};
  check_launch(what, cuda::cross_entropy_sums(sums, nullptr));
  wait();
  if (!checked) return free_all();

  bool touched = false;
  const Values got = fetch(logits, touched), got_loss = fetch(loss, touched);
  if (c.outside) {  // loss and gradient of every row are NaN
    int64_t n_numbers = 0;
    for (int64_t row = 0; row < c.rows; ++row) {
      n_numbers += !std::isnan(got_loss[row]);
      for (int64_t i = 0; i < c.vocab; ++i) n_numbers += !std::isnan(got[row * stride + i]);
    }
    report(what + " numbers that should be NaN", static_cast<double>(n_numbers), 0);
    return free_all();
  }
  Values want(c.rows * c.vocab, 0), got_rows(c.rows * c.vocab), want_loss(c.rows, 0);
  int64_t hits = 0;
  for (int64_t row = 0; row < c.rows; ++row) {
    std::copy_n(&got[row * stride], c.vocab, &got_rows[row * c.vocab]);
    if (targets[row] < 0) continue;
    const double* x = &logits.values[row * stride];
    const int64_t first = std::max_element(x, x + c.vocab) - x;
    double sum = 0;
    for (int64_t i = 0; i < c.vocab; ++i) sum += std::exp(x[i] - x[first]);
    for (int64_t i = 0; i < c.vocab; ++i)
      want[row * c.vocab + i] = std::exp(x[i] - x[first]) / sum - (i == targets[row] ? 1 : 0);
    want_loss[row] = std::log(sum) + x[first] - x[targets[row]];
    hits += first == targets[row];
  }
  double want_total = 0;
  for (const double each : want_loss) want_total += each;
  if (c.vocab > 1) {  // else every gradient is zero
    report(what + " gradient", worst_row(got_rows.data(), want, c.vocab), kTraining.of(c.dtype));
    report(what + " loss", worst_row(got_loss.data(), want_loss, c.rows), kTraining.float32);
    report(what + " sum", worst_row(fetch(total, touched).data(), {want_total}, 1),
           kTraining.float32);
  }
  int64_t got_hits = 0;
  to_host(&got_hits, n_correct, 8);
  report(what + " hits", std::abs(static_cast<double>(got_hits - hits)), 0);
  if (touched) report(what + " writes outside its tensors", 1, 0);
  free_all();
}

}  // namespace wgpt::driver
