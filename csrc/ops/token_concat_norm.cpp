// token_concat_norm for torch, on CUDA alone: checks, allocation and launch; the formula stands in
// kernels/token_concat_norm.h. The table's gradient is token_concat's.
#include "kernels/token_concat_norm.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "kernels/cuda/launch.h"
#include "ops/runtime.h"

namespace wgpt {
namespace {

constexpr const char* kOp = "token_concat_norm";
constexpr const char* kBackward = "token_concat_norm_backward";

// `tensor`, or a copy of it, with contiguous memory that 16 bytes divide.
Tensor aligned(const Tensor& tensor) {
  const Tensor dense = wgpt::contiguous(tensor);
  if (reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0) return dense;
  Tensor copy = empty_shaped_like(dense, dense.scalar_type());
  copy_to(copy, dense);
  return copy;
}

std::optional<Tensor> aligned(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return aligned(*tensor);
}

const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

TokenConcatNormShape shape_of(const char* op, const Tensor& tokens, const Tensor& table,
                              int64_t vocab, int64_t token_channels, const Tensor& x,
                              const std::optional<Tensor>& delta, const Tensor& mel_weight,
                              const Tensor& weight) {
  if (!on_cuda(x)) fail(op, "there is a CUDA kernel alone, got tensors on ", device_text(x));
  check_shape(op, "tokens", tokens, "(B, T)", {kAny, kAny});
  check_dtype(op, "tokens", tokens, ScalarType::Long);
  check_same_device(op, "tokens", tokens, "x", x);
  check_shape(op, "x", x, "(B, T, Cm)", {tokens.size(0), tokens.size(1), kAny});
  TokenConcatNormShape shape{};
  shape.table = element_type(op, "table", table);
  shape.x = shape.delta = element_type(op, "x", x);
  shape.rows = tokens.numel();
  shape.vocab = vocab;
  shape.token_channels = token_channels;
  shape.mel_channels = x.size(2);
  if (delta.has_value()) {
    check_shape(op, "delta", *delta, "(B, T, Cm)", {x.size(0), x.size(1), x.size(2)});
    check_same_device(op, "delta", *delta, "x", x);
    shape.delta = element_type(op, "delta", *delta);
  }
  check_shape(op, "mel_weight", mel_weight, "(Cm,)", {shape.mel_channels});
  check_shape(op, "weight", weight, "(Ct + Cm,)", {token_channels + shape.mel_channels});
  check_dtype(op, "mel_weight", mel_weight, ScalarType::Float);
  check_dtype(op, "weight", weight, ScalarType::Float);
  check_same_device(op, "mel_weight", mel_weight, "x", x);
  check_same_device(op, "weight", weight, "x", x);
  return shape;
}

// tokens (B, T), table (V, Ct), x and delta (B, T, Cm) -> cat and y (B, T, Ct + Cm), and (B T,) float32 twice
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& tokens_in, const Tensor& table_in,
                                                   const Tensor& x_in,
                                                   const std::optional<Tensor>& delta_in,
                                                   const Tensor& mel_weight_in,
                                                   const Tensor& weight_in, double mel_eps,
                                                   double eps, ScalarType dtype) {
  check_shape(kOp, "table", table_in, "(V, Ct)", {kAny, kAny});
  check_same_device(kOp, "table", table_in, "x", x_in);
  TokenConcatNormForward call{};
  call.shape = shape_of(kOp, tokens_in, table_in, table_in.size(0), table_in.size(1), x_in,
                        delta_in, mel_weight_in, weight_in);
  const Tensor tokens = wgpt::contiguous(tokens_in), table = aligned(table_in), x = aligned(x_in),
               mel_weight = aligned(mel_weight_in), weight = aligned(weight_in);
  const std::optional<Tensor> delta = aligned(delta_in);
  const int64_t rows = call.shape.rows, channels = weight.size(0);
  Tensor cat = empty(table, {x.size(0), x.size(1), channels}),
         y = empty(table, {x.size(0), x.size(1), channels}, dtype),
         mel_inv_rms = empty(weight, {rows}), inv_rms = empty(weight, {rows});
  call.shape.y = element_type(kOp, "dtype", y);
  call.tokens = tokens.const_data_ptr<int64_t>();
  call.table = table.const_data_ptr();
  call.x = x.const_data_ptr();
  call.delta = pointer(delta);
  call.mel_weight = mel_weight.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.cat = cat.mutable_data_ptr();
  call.y = y.mutable_data_ptr();
  call.mel_inv_rms = mel_inv_rms.mutable_data_ptr();
  call.inv_rms = inv_rms.mutable_data_ptr();
  call.mel_eps = mel_eps;
  call.eps = eps;
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kOp, x);
  check_launch(kOp, cuda::token_concat_norm_forward(call, scope.stream()));
#else
  fail_without_cuda(kOp);
#endif
  return {cat, y, mel_inv_rms, inv_rms};
}

// d_weights: (Ct + 2 Cm,), of weight and then of mel_weight. d_delta: (0,) where it would equal d_x.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const std::optional<Tensor>& d_cat_in, const Tensor& d_y_in, const Tensor& cat_in,
    const Tensor& tokens_in, const Tensor& x_in, const std::optional<Tensor>& delta_in,
    const Tensor& mel_inv_rms_in, const Tensor& inv_rms_in, const Tensor& mel_weight_in,
    const Tensor& weight_in, int64_t vocab) {
  check_vocab(kBackward, vocab);
  TokenConcatNormBackward call{};
  const int64_t token_channels = weight_in.size(0) - mel_weight_in.size(0);
  call.shape = shape_of(kBackward, tokens_in, cat_in, vocab, token_channels, x_in, delta_in,
                        mel_weight_in, weight_in);
  const TokenConcatNormShape& shape = call.shape;
  const int64_t rows = shape.rows, channels = weight_in.size(0);
  check_shape(kBackward, "d_y", d_y_in, "(B, T, C)", {x_in.size(0), x_in.size(1), channels});
  check_shape(kBackward, "cat", cat_in, "(B, T, C)", {x_in.size(0), x_in.size(1), channels});
  check_shape(kBackward, "inv_rms", inv_rms_in, "(B T,)", {rows});
  check_shape(kBackward, "mel_inv_rms", mel_inv_rms_in, "(B T,)", {rows});
  check_dtype(kBackward, "inv_rms", inv_rms_in, ScalarType::Float);
  check_dtype(kBackward, "mel_inv_rms", mel_inv_rms_in, ScalarType::Float);
  check_same_device(kBackward, "d_y", d_y_in, "x", x_in);
  check_same_device(kBackward, "cat", cat_in, "x", x_in);
  check_same_device(kBackward, "inv_rms", inv_rms_in, "x", x_in);
  check_same_device(kBackward, "mel_inv_rms", mel_inv_rms_in, "x", x_in);
  if (d_cat_in.has_value()) {
    check_shape(kBackward, "d_cat", *d_cat_in, "(B, T, C)", {x_in.size(0), x_in.size(1), channels});
    check_dtype(kBackward, "d_cat", *d_cat_in, cat_in.scalar_type(), " like cat");
    check_same_device(kBackward, "d_cat", *d_cat_in, "x", x_in);
  }
  const Tensor tokens = wgpt::contiguous(tokens_in), x = aligned(x_in), d_y = aligned(d_y_in),
               cat = aligned(cat_in), inv_rms = wgpt::contiguous(inv_rms_in),
               mel_inv_rms = wgpt::contiguous(mel_inv_rms_in), mel_weight = aligned(mel_weight_in),
               weight = aligned(weight_in);
  const std::optional<Tensor> delta = aligned(delta_in), d_cat = aligned(d_cat_in);
  call.shape.y = element_type(kBackward, "d_y", d_y);
  const Tensor d_tokens = empty(cat, {rows, token_channels});
  Tensor d_table = empty(cat, {vocab, token_channels}), d_x = empty_shaped_like(x, x.scalar_type()),
         d_weights = empty(weight, {channels + shape.mel_channels});
  const bool has_d_delta = delta.has_value() && delta->scalar_type() != x.scalar_type();
  Tensor d_delta = has_d_delta ? empty_shaped_like(x, delta->scalar_type()) : empty(x, {0});
  if (rows == 0) return {zeroed(d_table), d_x, d_delta, zeroed(d_weights)};
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kBackward, x);
  const Tensor scratch = workspace(x, cuda::token_concat_norm_backward_workspace_bytes(shape));
  call.d_cat = pointer(d_cat);
  call.d_y = d_y.const_data_ptr();
  call.cat = cat.const_data_ptr();
  call.x = x.const_data_ptr();
  call.delta = pointer(delta);
  call.mel_inv_rms = mel_inv_rms.const_data_ptr();
  call.inv_rms = inv_rms.const_data_ptr();
  call.mel_weight = mel_weight.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.d_tokens = d_tokens.mutable_data_ptr();
  call.d_x = d_x.mutable_data_ptr();
  call.d_delta = has_d_delta ? d_delta.mutable_data_ptr() : nullptr;
  call.d_weights = d_weights.mutable_data_ptr();
  call.workspace = scratch.mutable_data_ptr();
  check_launch(kBackward, cuda::token_concat_norm_backward(call, scope.stream()));
  TokenConcatBackward sums{};
  sums.shape.dtype = shape.table;
  sums.shape.batch = tokens.size(0);
  sums.shape.steps = tokens.size(1);
  sums.shape.vocab = vocab;
  sums.shape.token_channels = token_channels;
  const Tensor sums_scratch = workspace(x, cuda::token_concat_backward_workspace_bytes(sums.shape));
  sums.tokens = tokens.const_data_ptr<int64_t>();
  sums.d_y = d_tokens.const_data_ptr();
  sums.d_table = d_table.mutable_data_ptr();
  sums.workspace = sums_scratch.mutable_data_ptr();
  check_launch(kBackward, cuda::token_concat_backward(sums, scope.stream()));
#else
  fail_without_cuda(kBackward);
#endif
  return {d_table, d_x, d_delta, d_weights};
}

void register_kernels(Library& m) {
  m.impl("token_concat_norm", TORCH_BOX(&forward));
  m.impl("token_concat_norm_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace wgpt

// On the CPU for where the emulator stands for a GPU.
STABLE_TORCH_LIBRARY_IMPL(wgpt_kernels, CPU, m) { wgpt::register_kernels(m); }
STABLE_TORCH_LIBRARY_IMPL(wgpt_kernels, CUDA, m) { wgpt::register_kernels(m); }
