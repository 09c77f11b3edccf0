// Every CUDA kernel against float64, without torch and without Python:
//
//   gpu_driver --small    one small call of each kernel template: under compute-sanitizer, and on the emulator
//   gpu_driver --check    also ragged shapes, and those of training and decoding
//   gpu_driver --bench    the training step's calls, unchecked: under ncu
//
// From the repository's root, on a machine with a GPU (benchmarks/gpu.py does it):
//
//   nvcc -std=c++17 -O2 -arch=native -Icsrc --expt-relaxed-constexpr -x cu benchmarks/gpu_driver.cpp
//       csrc/kernels/cuda/*.cu -o build/gpu_driver
//
// A line per result, its error beside its limit: of each row |got - exact| / |exact|, both Euclidean, where |exact| is at
// least the root mean square of all rows; the worst row counts. The last line is JSON. Exit status 1: something is
// wrong; 2: it could not be run.
#include <string>

#include "gpu_driver_memory.h"
#include "gpu_driver_reference.h"
#include "gpu_driver_report.h"
#include "gpu_driver_training.h"
#include "kernels/cuda/launch.h"

namespace wgpt::driver {
namespace {

// Of a row; the emulator's tests hold whole tensors to half of them.
constexpr Limits kForward{4e-6, 8e-3, 1e-3}, kBackward{8e-6, 16e-3, 2e-3};
constexpr Limits kMel{2e-6, 12e-3, 1.6e-3}, kConcat{5e-7, 12e-3, 1.6e-3};
constexpr double kLse = 4e-6;

// ---- flash_attention

struct AttentionCase {
  DType dtype;
  int64_t batch, q_steps, kv_steps, heads, head_dim;
  bool causal = true;
  int64_t window = 0;
  bool aligned = true;   // else rows start at odd elements
  bool backward = true;  // and with it a gradient of lse
  int64_t document =
      0;  // > 0: packed documents of so many steps, in each row of the batch cut elsewhere
};

// The first key of each query (B, Tq); empty where nothing is packed.
std::vector<int32_t> first_keys(const AttentionCase& c) {
  std::vector<int32_t> keys;
  for (int64_t b = 0; c.document > 0 && b < c.batch; ++b) {
    for (int64_t i = 0; i < c.q_steps; ++i) {
      const int64_t position = i + c.kv_steps - c.q_steps;
      const int64_t into = (position + 3 * b) % c.document;
      keys.push_back(static_cast<int32_t>(std::max<int64_t>(0, position - into)));
    }
  }
  return keys;
}

// (B, T, H, D) inside wider rows.
struct HeadsTensor {
  Tensor tensor;
  int64_t steps, heads, head_dim, pitch;

  HeadsView view() const { return {tensor.data(), steps * heads * pitch, heads * pitch, pitch}; }
  Values head(const Values& all, int64_t b, int64_t h) const {
    Values rows(steps * head_dim);
    for (int64_t t = 0; t < steps; ++t) {
      const double* from = &all[((b * steps + t) * heads + h) * pitch];
      std::copy(from, from + head_dim, &rows[t * head_dim]);
    }
    return rows;
  }
};

HeadsTensor heads_tensor(const AttentionCase& c, int64_t steps, bool is_input) {
  const int64_t pad = c.aligned ? 16 / static_cast<int64_t>(bytes_of(c.dtype)) : 1;
  const int64_t pitch = c.head_dim + pad, n = c.batch * steps * c.heads * pitch;
  const int64_t offset = c.aligned ? 0 : 1;
  return {is_input ? input(c.dtype, n, offset) : output(c.dtype, n, offset), steps, c.heads,
          c.head_dim, pitch};
}

void attention(const AttentionCase& c, bool checked) {
  const FlashAttentionShape shape{c.dtype,
                                  c.batch,
                                  c.q_steps,
                                  c.kv_steps,
                                  c.heads,
                                  c.head_dim,
                                  1 / std::sqrt(static_cast<double>(c.head_dim)),
                                  c.causal,
                                  c.window};
  const HeadsTensor q = heads_tensor(c, c.q_steps, true), k = heads_tensor(c, c.kv_steps, true),
                    v = heads_tensor(c, c.kv_steps, true), out = heads_tensor(c, c.q_steps, false);
  const int64_t n_rows = c.batch * c.heads * c.q_steps;
  const Tensor lse = output(DType::kFloat32, n_rows);
  char text[160];
  std::snprintf(
      text, sizeof text, "flash_attention %s D %lld B %lld H %lld Tq %lld Tk %lld%s%s%s%s",
      name_of(c.dtype), static_cast<long long>(c.head_dim), static_cast<long long>(c.batch),
      static_cast<long long>(c.heads), static_cast<long long>(c.q_steps),
      static_cast<long long>(c.kv_steps), c.causal ? "" : " full", c.window > 0 ? " window" : "",
      c.document > 0 ? " packed" : "", c.aligned ? "" : " unaligned");
  const std::string what = text;
  const std::vector<int32_t> keys = first_keys(c);
  const int32_t* first_key = keys.empty() ? nullptr : integers(keys);

  FlashAttentionForward forward{};
  forward.shape = shape;
  forward.q = q.view();
  forward.k = k.view();
  forward.v = v.view();
  forward.first_key = first_key;
  forward.out = out.view();
  forward.lse = lse.data();
  forward.workspace = workspace(cuda::flash_attention_forward_workspace_bytes(shape));
  check_launch(what, cuda::flash_attention_forward(forward, nullptr));

  HeadsTensor d_out{}, dq{}, dk{}, dv{};
  Tensor d_lse{};
  if (c.backward) {
    d_out = heads_tensor(c, c.q_steps, true);
    dq = heads_tensor(c, c.q_steps, false);
    dk = heads_tensor(c, c.kv_steps, false);
    dv = heads_tensor(c, c.kv_steps, false);
    d_lse = input(DType::kFloat32, n_rows);
    FlashAttentionBackward backward{};
    backward.shape = shape;
    backward.q = q.view();
    backward.k = k.view();
    backward.v = v.view();
    backward.first_key = first_key;
    backward.out = out.view();
    backward.d_out = d_out.view();
    backward.lse = lse.data();
    backward.d_lse = d_lse.data();
    backward.dq = dq.view();
    backward.dk = dk.view();
    backward.dv = dv.view();
    backward.workspace = workspace(cuda::flash_attention_backward_workspace_bytes(shape));
    check_launch(what, cuda::flash_attention_backward(backward, nullptr));
  }
  wait();
  if (!checked) return free_all();

  bool touched = false;
  const Values got_out = fetch(out.tensor, touched), got_lse = fetch(lse, touched);
  Values got_dq, got_dk, got_dv;
  if (c.backward) {
    got_dq = fetch(dq.tensor, touched);
    got_dk = fetch(dk.tensor, touched);
    got_dv = fetch(dv.tensor, touched);
  }
  // Of a large problem the first head and the last: float64 takes its time.
  const int64_t n_heads = c.batch * c.heads;
  const bool all = static_cast<double>(n_heads) * c.q_steps * c.kv_steps < 1e6;
  double out_error = 0, lse_error = 0, dq_error = 0, dk_error = 0, dv_error = 0;
  const auto keep_worst = [](double& worst, double error) {
    if (!(error <= worst)) worst = error;
  };
  for (int64_t n = 0; n < n_heads; n += all ? 1 : std::max<int64_t>(1, n_heads - 1)) {
    const int64_t b = n / c.heads, h = n % c.heads;
    Head head;
    head.q = q.head(q.tensor.values, b, h);
    head.k = k.head(k.tensor.values, b, h);
    head.v = v.head(v.tensor.values, b, h);
    head.first_key = keys.empty() ? nullptr : &keys[b * c.q_steps];
    const Values head_out = out.head(got_out, b, h);
    if (c.backward) {
      head.d_out = d_out.head(d_out.tensor.values, b, h);
      const double* row = &d_lse.values[n * c.q_steps];
      head.d_lse.assign(row, row + c.q_steps);
    }
    driver::attention(shape, head, c.backward ? head_out : Values{});
    keep_worst(out_error, worst_row(head_out.data(), head.out, c.head_dim));
    keep_worst(lse_error, worst_row(&got_lse[n * c.q_steps], head.lse, 1));
    if (!c.backward) continue;
    keep_worst(dq_error, worst_row(dq.head(got_dq, b, h).data(), head.dq, c.head_dim));
    keep_worst(dk_error, worst_row(dk.head(got_dk, b, h).data(), head.dk, c.head_dim));
    keep_worst(dv_error, worst_row(dv.head(got_dv, b, h).data(), head.dv, c.head_dim));
  }
  report(what + " out", out_error, kForward.of(c.dtype));
  report(what + " lse", lse_error, kLse);
  if (c.backward) {
    report(what + " dq", dq_error, kBackward.of(c.dtype));
    report(what + " dk", dk_error, kBackward.of(c.dtype));
    report(what + " dv", dv_error, kBackward.of(c.dtype));
  }
  if (touched) report(what + " writes outside its tensors", 1, 0);
  free_all();
}

// ---- mel_embed

struct MelCase {
  DType dtype, frames_dtype;
  int64_t batch, steps, mels, channels, frames_per_step, context_frames;
};

void mel_embed(const MelCase& c, bool checked) {
  const int64_t pitch = c.mels + 4, n_frames = c.steps * c.frames_per_step;
  const int64_t width = (c.context_frames + c.frames_per_step) * c.mels, rows = c.batch * c.steps;
  const MelEmbedShape shape{c.dtype,          c.frames_dtype, c.batch,           c.steps,
                            c.mels,           c.channels,     c.frames_per_step, c.context_frames,
                            n_frames * pitch, pitch};
  const Tensor frames = input(c.frames_dtype, c.batch * n_frames * pitch, 0, 3, -4),
               mean = input(DType::kFloat32, c.mels, 0, 1, -4),
               inv_std = input(DType::kFloat32, c.mels, 0, 0.05, 0.4),
               weight = input(c.dtype, c.channels * width, 0, 1 / std::sqrt(1.0 * width)),
               bias = input(c.dtype, c.channels), pos = input(c.dtype, (c.steps + 2) * c.channels),
               y = output(c.dtype, rows * c.channels), slope = output(c.dtype, rows * c.channels);
  char text[160];
  std::snprintf(text, sizeof text,
                "mel_embed %s frames %s B %lld T %lld M %lld Cm %lld r %lld c %lld",
                name_of(c.dtype), name_of(c.frames_dtype), static_cast<long long>(c.batch),
                static_cast<long long>(c.steps), static_cast<long long>(c.mels),
                static_cast<long long>(c.channels), static_cast<long long>(c.frames_per_step),
                static_cast<long long>(c.context_frames));
  const std::string what = text;
  const MelEmbedForward forward{shape,          frames.data(), mean.data(),
                                inv_std.data(), weight.data(), bias.data(),
                                pos.data(),     y.data(),      slope.data()};
  check_launch(what, cuda::mel_embed_forward(forward, nullptr));
  const Tensor d_y = input(c.dtype, rows * c.channels),
               d_weight = output(c.dtype, c.channels * width), d_bias = output(c.dtype, c.channels),
               d_pos = output(c.dtype, (c.steps + 2) * c.channels);
  const MelEmbedBackward backward{shape,
                                  frames.data(),
                                  mean.data(),
                                  inv_std.data(),
                                  d_y.data(),
                                  slope.data(),
                                  d_weight.data(),
                                  d_bias.data(),
                                  d_pos.data(),
                                  c.steps + 2,
                                  workspace(cuda::mel_embed_backward_workspace_bytes(shape))};
  check_launch(what, cuda::mel_embed_backward(backward, nullptr));
  wait();
  if (!checked) return free_all();

  bool touched = false;
  const Values x = mel_slices(shape, frames.values, mean.values, inv_std.values);
  const Values got_slope = fetch(slope, touched);
  Values want_y(rows * c.channels), want_slope(rows * c.channels);
  Values want_weight(c.channels * width, 0), want_bias(c.channels, 0);
  Values want_pos((c.steps + 2) * c.channels, 0);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < c.channels; ++n) {
      const int64_t at = row * c.channels + n, step_at = row % c.steps * c.channels + n;
      const double z = bias.values[n] + dot(&x[row * width], &weight.values[n * width], width);
      want_y[at] = gelu(z) + pos.values[step_at];
      want_slope[at] = gelu_slope(z);
      const double d_z = d_y.values[at] * got_slope[at];
      add_scaled(&want_weight[n * width], d_z, &x[row * width], width);
      want_bias[n] += d_z;
      want_pos[step_at] += d_y.values[at];
    }
  }
  const double limit = kMel.of(c.dtype);
  report(what + " y", worst_row(fetch(y, touched).data(), want_y, c.channels), limit);
  report(what + " slope", worst_row(got_slope.data(), want_slope, c.channels), limit);
  report(what + " d_weight", worst_row(fetch(d_weight, touched).data(), want_weight, width), limit);
  report(what + " d_bias", worst_row(fetch(d_bias, touched).data(), want_bias, c.channels), limit);
  report(what + " d_pos", worst_row(fetch(d_pos, touched).data(), want_pos, c.channels), limit);
  if (touched) report(what + " writes outside its tensors", 1, 0);
  free_all();
}

// ---- token_concat

struct ConcatCase {
  DType dtype;
  int64_t batch, steps, vocab, token_channels, mel_channels;
};

void token_concat(const ConcatCase& c, bool checked) {
  const int64_t channels = c.token_channels + c.mel_channels, rows = c.batch * c.steps;
  const int64_t pitch = c.mel_channels + 8;
  const TokenConcatShape shape{c.dtype,          c.batch,        c.steps,         c.vocab,
                               c.token_channels, c.mel_channels, c.steps * pitch, pitch};
  std::vector<int64_t> tokens(rows);
  for (int64_t i = 0; i < rows;
       ++i)  // a few tokens are most of the sound: long buckets, and empty ones
    tokens[i] = i % 3 == 0 ? c.vocab - 1 : i * 7919 % c.vocab / 2;
  const Tensor table = input(c.dtype, c.vocab * c.token_channels),
               mel = input(c.dtype, rows * pitch), pos = input(c.dtype, (c.steps + 1) * channels),
               y = output(c.dtype, rows * channels);
  const int64_t* device_tokens = integers(tokens);
  char text[160];
  std::snprintf(text, sizeof text, "token_concat %s B %lld T %lld V %lld Ct %lld Cm %lld",
                name_of(c.dtype), static_cast<long long>(c.batch), static_cast<long long>(c.steps),
                static_cast<long long>(c.vocab), static_cast<long long>(c.token_channels),
                static_cast<long long>(c.mel_channels));
  const std::string what = text;
  const TokenConcatForward forward{shape,        device_tokens,
                                   table.data(), c.mel_channels > 0 ? mel.data() : nullptr,
                                   pos.data(),   y.data()};
  check_launch(what, cuda::token_concat_forward(forward, nullptr));
  const Tensor d_y = input(c.dtype, rows * channels),
               d_table = output(c.dtype, c.vocab * c.token_channels),
               d_pos = output(c.dtype, (c.steps + 1) * channels);
  const TokenConcatBackward backward{shape,
                                     device_tokens,
                                     d_y.data(),
                                     d_table.data(),
                                     d_pos.data(),
                                     c.steps + 1,
                                     workspace(cuda::token_concat_backward_workspace_bytes(shape))};
  check_launch(what, cuda::token_concat_backward(backward, nullptr));
  wait();
  if (!checked) return free_all();

  bool touched = false;
  Values want_y(rows * channels), want_table(c.vocab * c.token_channels, 0);
  Values want_pos((c.steps + 1) * channels, 0);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t step = row % c.steps;
    for (int64_t i = 0; i < channels; ++i) {
      const double value = i < c.token_channels ? table.values[tokens[row] * c.token_channels + i]
                                                : mel.values[row * pitch + i - c.token_channels];
      want_y[row * channels + i] = value + pos.values[step * channels + i];
      want_pos[step * channels + i] += d_y.values[row * channels + i];
    }
    add_scaled(&want_table[tokens[row] * c.token_channels], 1, &d_y.values[row * channels],
               c.token_channels);
  }
  const double limit = kConcat.of(c.dtype);
  report(what + " y", worst_row(fetch(y, touched).data(), want_y, channels), limit);
  report(what + " d_table", worst_row(fetch(d_table, touched).data(), want_table, c.token_channels),
         limit);
  report(what + " d_pos", worst_row(fetch(d_pos, touched).data(), want_pos, channels), limit);
  if (touched) report(what + " writes outside its tensors", 1, 0);
  free_all();
}

// ---- what is run

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

void small() {
  for (const DType dtype : kDTypes) {
    for (const int64_t d : {32, 64, 128}) {
      attention({dtype, 1, 66, 66, 1, d}, true);
      attention({dtype, 1, 19, 33, 2, d, false, 7, false}, true);
      attention({dtype, 1, 3, 300, 1, d, true, 0, true, false}, true);  // split-K and its merge
      attention({dtype, 2, 66, 66, 1, d, true, 0, true, true, 23}, true);
      attention({dtype, 1, 3, 300, 1, d, true, 0, true, false, 280}, true);
    }
    for (const DType frames : {DType::kFloat32, DType::kFloat16})
      mel_embed({dtype, frames, 2, 37, 16, 72, 1, 0}, true);
    mel_embed({dtype, dtype, 1, 20, 5, 13, 2, 1}, true);
    token_concat({dtype, 2, 37, 11, 16, 16}, true);
    token_concat({dtype, 2, 37, 11, 5, 3}, true);
    token_concat({dtype, 2, 150, 2, 8, 0}, true);  // buckets of several pieces
    for (const int64_t channels : {13, 64, 300})
      add_rms_norm({dtype, dtype, dtype, 37, channels}, true);
    add_rms_norm({DType::kFloat32, dtype, dtype, 9, 72}, true);
    token_concat_norm({dtype, dtype, dtype, 37, 24, 40}, true);
    token_concat_norm({dtype, dtype, dtype, 9, 128, 172}, true);
    token_concat_norm({DType::kFloat32, dtype, dtype, 9, 5, 7}, true);
    rotary({dtype, 2, 19, 2, 32}, true);
    rotary({dtype, 1, 5, 1, 6}, true);
    gelu(dtype, 1003, 0, true);
    gelu(dtype, 37, 1, true);
    cross_entropy({dtype, 11, 129}, true);
    cross_entropy({dtype, 3, 37, false}, true);
    cross_entropy({dtype, 3, 129, true, true}, true);
  }
}

void ragged_and_real() {
  for (const DType dtype : kDTypes) {
    for (const int64_t d : {32, 64, 128}) {
      // Of one key the gradients are differences that cancel: nothing to hold a row to.
      for (const int64_t t : {1, 5, 31, 34, 64, 65, 127, 129, 258})
        attention({dtype, 2, t, t, 2, d, true, 0, true, t > 1}, true);
      attention({dtype, 2, 65, 131, 2, d, true, 50}, true);
      attention({dtype, 1, 131, 45, 2, d, false}, true);
      attention({dtype, 1, 150, 150, 2, d, false, 40, false}, true);
      attention({dtype, 1, 100, 227, 2, d, true, 0, false}, true);
      attention({dtype, 8, 750, 750, 4, d}, true);
      for (const int64_t document : {1, 40, 64, 100, 129})
        attention({dtype, 2, 258, 258, 2, d, true, 0, true, document > 1, document}, true);
      attention({dtype, 2, 150, 150, 2, d, true, 30, false, true, 70}, true);
      attention({dtype, 1, 100, 227, 2, d, true, 0, false, true, 90}, true);
      attention({dtype, 8, 750, 750, 4, d, true, 0, true, true, 210}, true);
      attention({dtype, 1, 1, 20000, 2, d, true, 0, true, false, 17000}, true);
      if (d == 64) attention({dtype, 1, 3000, 3000, 1, d}, true);
      for (const int64_t keys :
           {256, 257, 16384, 16385, 20000})  // both sides of the splits' limits
        attention({dtype, 1, 1, keys, 2, d, true, 0, true, false}, true);
    }
    mel_embed({dtype, DType::kFloat16, 8, 750, 64, 128, 1, 0}, true);
    mel_embed({dtype, DType::kFloat32, 3, 4000, 80, 96, 1, 2}, true);
    mel_embed({dtype, dtype, 5, 67, 13, 65, 3, 2}, true);
    token_concat({dtype, 8, 750, 1024, 128, 128}, true);
    token_concat({dtype, 4, 3000, 9000, 64, 0}, true);  // 12 chunks of rows, two ranges of tokens
    token_concat({dtype, 3, 129, 1, 7, 2}, true);
    for (const int64_t channels : {1, 128, 256, 257, 640, 768, 772, 2100})
      add_rms_norm({dtype, dtype, dtype, 131, channels, channels % 2 == 0}, true);
    add_rms_norm({DType::kFloat32, dtype, dtype, 6000, 256}, true);
    token_concat_norm({DType::kFloat32, dtype, dtype, 6000, 128, 128}, true);
    token_concat_norm({dtype, dtype, dtype, 131, 384, 384}, true);
    for (const int64_t d : {32, 64, 128}) rotary({dtype, 8, 750, 512 / d, d}, true);
    gelu(dtype, 6000 * 1024, 0, true);
    for (const int64_t vocab : {1, 1152, 1153, 1280, 1281, 5000})
      cross_entropy({dtype, 67, vocab}, true);
    cross_entropy({dtype, 6000, 1025}, true);
  }
}

void bench() {
  mel_embed({DType::kBFloat16, DType::kFloat16, 8, 750, 64, 128, 1, 0}, false);
  token_concat({DType::kBFloat16, 8, 750, 1024, 128, 128}, false);
  add_rms_norm({DType::kFloat32, DType::kBFloat16, DType::kBFloat16, 6000, 256}, false);
  token_concat_norm({DType::kFloat32, DType::kBFloat16, DType::kBFloat16, 6000, 128, 128}, false);
  rotary({DType::kBFloat16, 8, 750, 4, 64}, false);
  gelu(DType::kBFloat16, 6000 * 1024, 0, false);
  cross_entropy({DType::kBFloat16, 6000, 1025}, false);
  for (const int64_t d : {64, 32, 128}) {
    for (const int64_t t : {750, 2048}) attention({DType::kBFloat16, 8, t, t, 512 / d, d}, false);
    attention({DType::kBFloat16, 8, 750, 750, 512 / d, d, true, 0, true, true, 210}, false);
    attention({DType::kBFloat16, 1, 1, 20000, 512 / d, d, true, 0, true, false}, false);
  }
}

int run(const std::string& mode) {
  if (mode == "--small" || mode == "--check") {
    small();
    if (mode == "--check") ragged_and_real();
    std::printf("{\"results\": %d, \"wrong\": %d}\n", n_results, n_wrong);
    return n_wrong == 0 ? 0 : 1;
  }
  if (mode == "--bench") {
    bench();
    return n_wrong == 0 ? 0 : 1;
  }
  stop("must be given one of --small, --check and --bench");
}

}  // namespace
}  // namespace wgpt::driver

int main(int n, char** arguments) { return wgpt::driver::run(n == 2 ? arguments[1] : ""); }
