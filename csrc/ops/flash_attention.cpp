// flash_attention for torch: checks, allocation and launch; the formula stands in
// kernels/flash_attention.h.
#include "kernels/flash_attention.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "kernels/cpu/dispatch/dispatch.h"
#include "kernels/cuda/launch.h"
#include "ops/runtime.h"

namespace wgpt {
namespace {

constexpr const char* kOp = "flash_attention";
constexpr const char* kBackward = "flash_attention_backward";

void launch(FlashAttentionForward& call, const Tensor& where) {
  if (!where.is_cuda()) {
    const auto& kernels = cpu::active();
    const size_t n_bytes = kernels.flash_attention_forward_workspace_bytes(call.shape);
    const Tensor scratch = workspace(where, n_bytes);
    call.workspace = scratch.mutable_data_ptr();
    return kernels.flash_attention_forward(call, torch_executor());
  }
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kOp, where);
  const Tensor scratch =
      workspace(where, cuda::flash_attention_forward_workspace_bytes(call.shape));
  call.workspace = scratch.mutable_data_ptr();
  check_launch(kOp, cuda::flash_attention_forward(call, scope.stream()));
#else
  fail_without_cuda(kOp);
#endif
}

void launch(FlashAttentionBackward& call, const Tensor& where) {
  if (!where.is_cuda()) {
    const auto& kernels = cpu::active();
    const size_t n_bytes = kernels.flash_attention_backward_workspace_bytes(call.shape);
    const Tensor scratch = workspace(where, n_bytes);
    call.workspace = scratch.mutable_data_ptr();
    return kernels.flash_attention_backward(call, torch_executor());
  }
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kBackward, where);
  const Tensor scratch =
      workspace(where, cuda::flash_attention_backward_workspace_bytes(call.shape));
  call.workspace = scratch.mutable_data_ptr();
  check_launch(kBackward, cuda::flash_attention_backward(call, scope.stream()));
#else
  fail_without_cuda(kBackward);
#endif
}

HeadsView read_view(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

HeadsView write_view(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

FlashAttentionShape check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                 double scale, bool causal, int64_t window) {
  check_shape(op, "q", q, "(B, Tq, H, D)", {kAny, kAny, kAny, kAny});
  check_shape(op, "k", k, "(B, Tk, H, D)", {q.size(0), kAny, q.size(2), q.size(3)});
  check_shape(op, "v", v, "(B, Tk, H, D)", {q.size(0), k.size(1), q.size(2), q.size(3)});
  check_dtype(op, "k", k, q.scalar_type(), " like q");
  check_dtype(op, "v", v, q.scalar_type(), " like q");
  check_same_device(op, "k", k, "q", q);
  check_same_device(op, "v", v, "q", q);
  check_at_least(op, "window", window, 0);

  FlashAttentionShape shape{element_type(op, "q", q),
                            q.size(0),
                            q.size(1),
                            k.size(1),
                            q.size(2),
                            q.size(3),
                            scale,
                            causal,
                            window};
  if (shape.head_dim != 32 && shape.head_dim != 64 && shape.head_dim != 128) {
    fail(op, "the head dimension D must be 32, 64 or 128, got ", shape.head_dim);
  }
  // The last query stands at the last key; an earlier start than key 0 would leave queries blind.
  if ((causal || window > 0) && shape.q_steps > shape.kv_steps) {
    fail(op, causal ? "causal" : "windowed", " attention needs Tq <= Tk, got Tq = ", shape.q_steps,
         " and Tk = ", shape.kv_steps);
  }
  if (shape.q_steps > 0 && shape.kv_steps == 0)
    fail(op, "k must hold at least one step, got Tk = 0");
  return shape;
}

// q (B, Tq, H, D), k and v (B, Tk, H, D) -> out (B, Tq, H, D), lse (B, H, Tq)
std::tuple<Tensor, Tensor> forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                   double scale, bool causal, int64_t window) {
  FlashAttentionForward call{};
  call.shape = check_inputs(kOp, q_in, k_in, v_in, scale, causal, window);
  const FlashAttentionShape& shape = call.shape;
  const Tensor q = with_dense_rows(q_in), k = with_dense_rows(k_in), v = with_dense_rows(v_in);
  Tensor out = empty(q, {shape.batch, shape.q_steps, shape.heads, shape.head_dim});
  Tensor lse = empty(q, {shape.batch, shape.heads, shape.q_steps}, accumulation_type(shape.dtype));
  if (out.numel() == 0) return {out, lse};
  call.q = read_view(q);
  call.k = read_view(k);
  call.v = read_view(v);
  call.out = write_view(out);
  call.lse = lse.mutable_data_ptr();
  launch(call, q);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_out_in,
                                            const std::optional<Tensor>& d_lse_in,
                                            const Tensor& q_in, const Tensor& k_in,
                                            const Tensor& v_in, const Tensor& out_in,
                                            const Tensor& lse_in, double scale, bool causal,
                                            int64_t window) {
  FlashAttentionBackward call{};
  call.shape = check_inputs(kBackward, q_in, k_in, v_in, scale, causal, window);
  const FlashAttentionShape& shape = call.shape;
  const struct {
    const char* name;
    const Tensor& tensor;
  } outputs[] = {{"d_out", d_out_in}, {"out", out_in}};
  for (const auto& output : outputs) {
    check_shape(kBackward, output.name, output.tensor, "(B, Tq, H, D)",
                {shape.batch, shape.q_steps, shape.heads, shape.head_dim});
    check_dtype(kBackward, output.name, output.tensor, q_in.scalar_type(), " like q");
    check_same_device(kBackward, output.name, output.tensor, "q", q_in);
  }
  const auto check_row_statistic = [&](const char* name, const Tensor& tensor) {
    check_shape(kBackward, name, tensor, "(B, H, Tq)", {shape.batch, shape.heads, shape.q_steps});
    check_dtype(kBackward, name, tensor, accumulation_type(shape.dtype));
    check_same_device(kBackward, name, tensor, "q", q_in);
    return contiguous(tensor);
  };
  const Tensor lse = check_row_statistic("lse", lse_in);
  std::optional<Tensor> d_lse;
  if (d_lse_in.has_value()) d_lse = check_row_statistic("d_lse", *d_lse_in);

  const Tensor q = with_dense_rows(q_in), k = with_dense_rows(k_in), v = with_dense_rows(v_in);
  const Tensor out = with_dense_rows(out_in), d_out = with_dense_rows(d_out_in);
  Tensor dq = empty(q, {shape.batch, shape.q_steps, shape.heads, shape.head_dim});
  Tensor dk = empty(q, {shape.batch, shape.kv_steps, shape.heads, shape.head_dim});
  Tensor dv = empty(q, {shape.batch, shape.kv_steps, shape.heads, shape.head_dim});
  if (dq.numel() == 0) return {dq, zeroed(dk), zeroed(dv)};
  call.q = read_view(q);
  call.k = read_view(k);
  call.v = read_view(v);
  call.out = read_view(out);
  call.d_out = read_view(d_out);
  call.lse = lse.const_data_ptr();
  call.d_lse = d_lse.has_value() ? d_lse->const_data_ptr() : nullptr;
  call.dq = write_view(dq);
  call.dk = write_view(dk);
  call.dv = write_view(dv);
  launch(call, q);
  return {dq, dk, dv};
}

void register_ops(Library& m) {
  m.impl("flash_attention", TORCH_BOX(&forward));
  m.impl("flash_attention_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace wgpt

WGPT_REGISTER_OPS(CPU)
WGPT_REGISTER_OPS(CUDA)
