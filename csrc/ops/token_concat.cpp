// token_concat for torch: checks, allocation and launch; the formula stands in
// kernels/token_concat.h.
#include "kernels/token_concat.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>

#include "checks.h"
#include "kernels/cpu/dispatch/dispatch.h"
#include "kernels/cuda/launch.h"
#include "ops/runtime.h"

namespace wgpt {
namespace {

constexpr const char* kOp = "token_concat";
constexpr const char* kBackward = "token_concat_backward";

// On the CPU only: on CUDA the answer would cost a synchronisation, so there a token out of range
// makes its step's token channels NaN and adds nothing to the table's gradient.
void check_tokens_in_range(const char* op, const Tensor& tokens, int64_t vocab) {
  const int64_t* values = tokens.const_data_ptr<int64_t>();
  const int64_t n = tokens.numel();
  uint64_t outside = 0;  // one pass without a branch: negative tokens are huge when unsigned
  for (int64_t i = 0; i < n; ++i)
    outside |= static_cast<uint64_t>(values[i]) >= static_cast<uint64_t>(vocab);
  if (outside == 0) return;
  int64_t at = 0;
  while (values[at] >= 0 && values[at] < vocab) ++at;
  fail(op, "tokens must lie in [0, ", vocab, "), got ", values[at], " at [", at / tokens.size(1),
       ", ", at % tokens.size(1), "]");
}

void launch(const TokenConcatForward& call, const Tensor& where) {
  if (!on_cuda(where)) return cpu::active().token_concat_forward(call, torch_executor());
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kOp, where);
  check_launch(kOp, cuda::token_concat_forward(call, scope.stream()));
#else
  fail_without_cuda(kOp);
#endif
}

void launch(TokenConcatBackward& call, const Tensor& where) {
  if (!on_cuda(where)) {
    const auto& kernels = cpu::active();
    const Tensor scratch =
        workspace(where, kernels.token_concat_backward_workspace_bytes(call.shape));
    call.workspace = scratch.mutable_data_ptr();
    return kernels.token_concat_backward(call, torch_executor());
  }
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kBackward, where);
  const Tensor scratch = workspace(where, cuda::token_concat_backward_workspace_bytes(call.shape));
  call.workspace = scratch.mutable_data_ptr();
  check_launch(kBackward, cuda::token_concat_backward(call, scope.stream()));
#else
  fail_without_cuda(kBackward);
#endif
}

// All but the strides, which the caller's copies decide, and the values of the tokens.
TokenConcatShape check_inputs(const Tensor& tokens, const Tensor& table,
                              const std::optional<Tensor>& mel, const std::optional<Tensor>& pos) {
  check_shape(kOp, "tokens", tokens, "(B, T)", {kAny, kAny});
  check_dtype(kOp, "tokens", tokens, ScalarType::Long);
  check_shape(kOp, "table", table, "(V, Ct)", {kAny, kAny});
  check_same_device(kOp, "tokens", tokens, "table", table);
  TokenConcatShape shape{};
  shape.dtype = element_type(kOp, "table", table);
  shape.batch = tokens.size(0);
  shape.steps = tokens.size(1);
  shape.vocab = table.size(0);
  shape.token_channels = table.size(1);
  if (mel.has_value()) {
    check_shape(kOp, "mel_hidden", *mel, "(B, T, Cm)", {shape.batch, shape.steps, kAny});
    check_dtype(kOp, "mel_hidden", *mel, table.scalar_type(), " like table");
    check_same_device(kOp, "mel_hidden", *mel, "table", table);
    shape.mel_channels = mel->size(2);
  }
  if (pos.has_value()) {
    check_shape(kOp, "pos", *pos, "(>= T, Ct + Cm)",
                {kAny, shape.token_channels + shape.mel_channels});
    check_at_least(kOp, "the number of rows of pos", pos->size(0), shape.steps);
    check_dtype(kOp, "pos", *pos, table.scalar_type(), " like table");
    check_same_device(kOp, "pos", *pos, "table", table);
  }
  return shape;
}

void check(const Tensor& tokens, const Tensor& table, const std::optional<Tensor>& mel,
           const std::optional<Tensor>& pos) {
  const TokenConcatShape shape = check_inputs(tokens, table, mel, pos);
  if (on_cpu(tokens)) check_tokens_in_range(kOp, contiguous(tokens), shape.vocab);
}

// tokens (B, T) int64; table (V, Ct); mel_hidden (B, T, Cm) or none; pos (>= T, Ct + Cm) or none ->
// (B, T, Ct + Cm)
Tensor forward(const Tensor& tokens_in, const Tensor& table_in, const std::optional<Tensor>& mel_in,
               const std::optional<Tensor>& pos_in) {
  TokenConcatForward call{};
  call.shape = check_inputs(tokens_in, table_in, mel_in, pos_in);
  TokenConcatShape& shape = call.shape;
  std::optional<Tensor> mel, pos;
  if (mel_in.has_value()) {
    mel = with_dense_rows(*mel_in);
    shape.mel_batch_stride = mel->stride(0);
    shape.mel_step_stride = mel->stride(1);
    call.mel_hidden = mel->const_data_ptr();
  }
  if (pos_in.has_value()) {
    pos = contiguous(*pos_in);
    call.pos = pos->const_data_ptr();
  }
  const Tensor tokens = contiguous(tokens_in), table = contiguous(table_in);
  if (on_cpu(tokens)) check_tokens_in_range(kOp, tokens, shape.vocab);

  Tensor y = empty(table, {shape.batch, shape.steps, shape.token_channels + shape.mel_channels});
  if (y.numel() == 0) return y;
  call.tokens = tokens.const_data_ptr<int64_t>();
  call.table = table.const_data_ptr();
  call.y = y.mutable_data_ptr();
  launch(call, table);
  return y;
}

// pos_rows < 0: there was no pos, and d_pos comes back as (0, C).
std::tuple<Tensor, Tensor> backward(const Tensor& d_y_in, const Tensor& tokens_in, int64_t vocab,
                                    int64_t token_channels, int64_t pos_rows) {
  check_shape(kBackward, "tokens", tokens_in, "(B, T)", {kAny, kAny});
  check_dtype(kBackward, "tokens", tokens_in, ScalarType::Long);
  check_shape(kBackward, "d_y", d_y_in, "(B, T, C)", {tokens_in.size(0), tokens_in.size(1), kAny});
  check_same_device(kBackward, "tokens", tokens_in, "d_y", d_y_in);
  const Tensor d_y = contiguous(d_y_in), tokens = contiguous(tokens_in);
  const int64_t channels = d_y.size(2);
  check_vocab(kBackward, vocab);
  check_at_least(kBackward, "token_channels", token_channels, 0);
  check_at_least(kBackward, "the number of channels of d_y", channels, token_channels);
  if (pos_rows >= 0) check_at_least(kBackward, "pos_rows", pos_rows, tokens.size(1));
  if (on_cpu(tokens)) check_tokens_in_range(kBackward, tokens, vocab);

  TokenConcatBackward call{};
  call.shape.dtype = element_type(kBackward, "d_y", d_y);
  call.shape.batch = tokens.size(0);
  call.shape.steps = tokens.size(1);
  call.shape.vocab = vocab;
  call.shape.token_channels = token_channels;
  call.shape.mel_channels = channels - token_channels;
  Tensor d_table = empty(d_y, {vocab, token_channels});
  Tensor d_pos = empty(d_y, {std::max<int64_t>(pos_rows, 0), channels});
  if (d_y.numel() == 0) return {zeroed(d_table), zeroed(d_pos)};
  call.tokens = tokens.const_data_ptr<int64_t>();
  call.d_y = d_y.const_data_ptr();
  call.d_table = d_table.mutable_data_ptr();
  call.d_pos = pos_rows < 0 ? nullptr : d_pos.mutable_data_ptr();
  call.pos_rows = std::max<int64_t>(pos_rows, 0);
  launch(call, d_y);
  return {d_table, d_pos};
}

void register_ops(Library& m) {
  m.impl("token_concat", TORCH_BOX(&forward));
  m.impl("token_concat_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace wgpt

WGPT_REGISTER_OPS(CPU)
WGPT_REGISTER_OPS(CUDA)
WGPT_REGISTER_CHECK("token_concat")
