// linear_cross_entropy for torch: fused linear + cross-entropy, by blocks of rows. One (block, V) buffer holds
// the logits, then their gradients (all N rows in 16-bit types), where eager torch holds three or four (N, V). On
// CUDA its rows are padded to 16 bytes, for GEMMs and kernel alike.
// The formula of a row: kernels/linear_cross_entropy.h.
#include "kernels/linear_cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "kernels/cpu/dispatch/dispatch.h"
#include "kernels/cuda/launch.h"
#include "ops/gemm.h"

namespace wgpt {
namespace {

constexpr const char* kOp = "linear_cross_entropy";

void check_targets(const Tensor& targets, int64_t vocab, int64_t ignore_index) {
  const int64_t* values = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < targets.numel(); ++i) {
    if ((values[i] < 0 || values[i] >= vocab) && values[i] != ignore_index) {
      fail(kOp, "targets must lie in [0, ", vocab, ") or be ", ignore_index, ", got ", values[i],
           " at [", i, "]");
    }
  }
}

// Memory for logits (rows, V) of the type and device of `like`; on CUDA its rows are padded.
Tensor empty_logits(const Tensor& like, int64_t rows, int64_t vocab) {
#ifdef WGPT_WITH_CUDA
  if (on_cuda(like)) {
    const DType dtype = element_type(kOp, "hidden", like);
    return first_columns(empty(like, {rows, cuda::cross_entropy_row_stride(dtype, vocab)}), vocab);
  }
#endif
  return empty(like, {rows, vocab});
}

void launch(const CrossEntropyRows& call, const Tensor& logits) {
  if (!on_cuda(logits)) return cpu::active().cross_entropy_rows(call, torch_executor());
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kOp, logits);
  check_launch(kOp, cuda::cross_entropy_rows(call, scope.stream()));
#else
  fail_without_cuda(kOp);
#endif
}

// The losses of all rows in their order, summed in double.
template <typename Sum>
double sum_of(const Tensor& losses) {
  const Sum* values = losses.const_data_ptr<Sum>();
  double sum = 0;
  for (int64_t i = 0; i < losses.numel(); ++i) sum += static_cast<double>(values[i]);
  return sum;
}

// The summed loss () and the number of correct rows () int64.
std::tuple<Tensor, Tensor> sums_of(const Tensor& losses, const Tensor& correct) {
  Tensor loss = empty(losses, {}), n_correct = empty(losses, {}, ScalarType::Long);
  const uint8_t* flags = correct.const_data_ptr<uint8_t>();
  if (on_cuda(losses)) {
#ifdef WGPT_WITH_CUDA
    const CudaScope scope(kOp, losses);
    const CrossEntropySums call{losses.const_data_ptr<float>(), flags, losses.numel(),
                                loss.mutable_data_ptr<float>(),
                                n_correct.mutable_data_ptr<int64_t>()};
    check_launch(kOp, cuda::cross_entropy_sums(call, scope.stream()));
    return {loss, n_correct};
#else
    fail_without_cuda(kOp);
#endif
  }
  if (losses.scalar_type() == ScalarType::Double) {
    *loss.mutable_data_ptr<double>() = sum_of<double>(losses);
  } else {
    *loss.mutable_data_ptr<float>() = static_cast<float>(sum_of<float>(losses));
  }
  *n_correct.mutable_data_ptr<int64_t>() = std::count(flags, flags + losses.numel(), uint8_t{1});
  return {loss, n_correct};
}

DType check_inputs(const Tensor& hidden, const Tensor& weight, const Tensor& targets) {
  check_shape(kOp, "hidden", hidden, "(N, C)", {kAny, kAny});
  check_shape(kOp, "weight", weight, "(V, C)", {kAny, hidden.size(1)});
  check_at_least(kOp, "V", weight.size(0), 1);
  check_dtype(kOp, "weight", weight, hidden.scalar_type(), " like hidden");
  check_shape(kOp, "targets", targets, "(N,)", {hidden.size(0)});
  check_dtype(kOp, "targets", targets, ScalarType::Long);
  check_same_device(kOp, "weight", weight, "hidden", hidden);
  check_same_device(kOp, "targets", targets, "hidden", hidden);
  return floating_type(kOp, "hidden", hidden);
}

// Without the values of the targets: torch checks those of its own ops, and on CUDA the answer would cost a
// synchronisation; a target out of range makes the loss NaN there.
void check(const Tensor& hidden, const Tensor& weight, const Tensor& targets) {
  check_inputs(hidden, weight, targets);
}

// hidden (N, C), weight (V, C), targets (N,) -> the summed loss (), the number of correct rows ()
// int64, and the gradients of the summed loss: d_hidden (N, C), d_weight (V, C), each (0,) when not
// asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& hidden_in, const Tensor& weight_in,
                                                   const Tensor& targets_in, int64_t ignore_index,
                                                   bool gradients) {
  const DType dtype = check_inputs(hidden_in, weight_in, targets_in);
  const Tensor hidden = contiguous(hidden_in), weight = contiguous(weight_in),
               targets = contiguous(targets_in);
  const int64_t n = hidden.size(0), channels = hidden.size(1), vocab = weight.size(0);
  element_type(kOp, "hidden", hidden);
  if (on_cpu(targets)) check_targets(targets, vocab, ignore_index);

  const int64_t block_rows = rows_per_block(hidden);
  const bool by_blocks = !gradients || accumulates_by_blocks(dtype);
  const ScalarType sum_dtype = accumulation_type(dtype);
  const Tensor losses = empty(hidden, {n}, sum_dtype),
               correct = empty(hidden, {n}, ScalarType::Byte);
  Tensor d_hidden = gradients ? empty(hidden, {n, channels}) : empty(hidden, {0});
  Tensor d_weight = gradients ? empty(weight, {vocab, channels}) : empty(weight, {0});
  const Tensor logits_memory = empty_logits(hidden, by_blocks ? block_rows : n, vocab);
  ReusedOperand weight_columns{transposed(weight)}, weight_rows{weight};
  for (int64_t begin = 0; begin < n; begin += block_rows) {
    const int64_t n_rows = std::min(block_rows, n - begin);
    const Tensor logits = rows_of(logits_memory, by_blocks ? 0 : begin, n_rows),
                 hidden_rows = rows_of(hidden, begin, n_rows);
    gemm(logits, hidden_rows, weight_columns);
    const CrossEntropyRows call{
        dtype,
        n_rows,
        vocab,
        logits.stride(0),
        ignore_index,
        gradients,
        logits.mutable_data_ptr(),
        targets.const_data_ptr<int64_t>() + begin,
        rows_of(losses, begin, n_rows).mutable_data_ptr(),
        correct.mutable_data_ptr<uint8_t>() + begin,
    };
    launch(call, logits);
    if (!gradients) continue;  // else the logits are their own gradients now
    gemm(rows_of(d_hidden, begin, n_rows), logits, weight_rows);
    if (by_blocks) gemm(d_weight, transposed(logits), hidden_rows, begin > 0);
  }
  if (!by_blocks) gemm(d_weight, transposed(logits_memory), hidden);
  if (gradients && n == 0) zeroed(d_weight);

  const auto [loss, n_correct] = sums_of(losses, correct);
  return {loss, n_correct, d_hidden, d_weight};
}

void register_ops(Library& m) { m.impl("linear_cross_entropy", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace wgpt

WGPT_REGISTER_OPS(CPU)
WGPT_REGISTER_OPS(CUDA)
WGPT_REGISTER_CHECK("linear_cross_entropy")
