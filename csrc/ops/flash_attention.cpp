// flash_attention for torch: checks, allocation and launch; the formula stands in
// kernels/flash_attention.h.
#include "kernels/flash_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <iterator>
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

constexpr int64_t kMostHeadDim = std::end(kCpuHeadDims)[-1],
                  kMostCudaHeadDim = std::end(kCudaHeadDims)[-1];

// The channels of the smallest kernel that holds head_dim, where `like` lies.
int64_t kernel_head_dim(const char* op, const Tensor& like, int64_t head_dim) {
  if (!on_cuda(like))
    return *std::lower_bound(std::begin(kCpuHeadDims), std::end(kCpuHeadDims), head_dim);
  if (head_dim > kMostCudaHeadDim) {
    fail(op, "on CUDA the head dimension D must be a multiple of 8 up to ", kMostCudaHeadDim,
         ", got ", head_dim, ". Call wgpt.ops.flash_attention, which runs torch's own there");
  }
  return *std::lower_bound(std::begin(kCudaHeadDims), std::end(kCudaHeadDims), head_dim);
}

// (B, T, H, D) with rows as the kernels read them: dense, and of head_dim channels. Those behind D are zeros, which
// change no score, and of out and the gradients nobody reads them.
Tensor kernel_rows(const Tensor& x, int64_t head_dim) {
  const int64_t own = x.size(3);
  if (own == head_dim) return with_dense_rows(x);
  Tensor wide = empty(x, {x.size(0), x.size(1), x.size(2), head_dim});
  copy_to(narrow(wide, 3, 0, own), x);
  zeroed(narrow(wide, 3, own, head_dim - own));
  return wide;
}

// The first head_dim channels of what a kernel wrote.
Tensor own_channels(const Tensor& x, int64_t head_dim) {
  if (x.size(3) == head_dim) return x;
  Tensor own = empty(x, {x.size(0), x.size(1), x.size(2), head_dim});
  copy_to(own, narrow(x, 3, 0, head_dim));
  return own;
}

// What the CUDA kernels do not compute.
template <typename Call>
[[maybe_unused]] void refuse_transforms(const char* op, const Call& call) {
  if (call.bias.data != nullptr || call.shape.softcap > 0)
    fail(op, "bias and softcap run on the CPU only");
}

void launch(FlashAttentionForward& call, const Tensor& where) {
  if (!on_cuda(where)) {
    const auto& kernels = cpu::active();
    const size_t n_bytes = kernels.flash_attention_forward_workspace_bytes(call.shape);
    const Tensor scratch = workspace(where, n_bytes);
    call.workspace = scratch.mutable_data_ptr();
    return kernels.flash_attention_forward(call, torch_executor());
  }
#ifdef WGPT_WITH_CUDA
  if (call.shape.group > 1) fail(kOp, "fewer key than query heads run on the CPU only");
  refuse_transforms(kOp, call);
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
  if (!on_cuda(where)) {
    const auto& kernels = cpu::active();
    const size_t n_bytes = kernels.flash_attention_backward_workspace_bytes(call.shape);
    const Tensor scratch = workspace(where, n_bytes);
    call.workspace = scratch.mutable_data_ptr();
    return kernels.flash_attention_backward(call, torch_executor());
  }
#ifdef WGPT_WITH_CUDA
  if (call.shape.group > 1) fail(kBackward, "fewer key than query heads run on the CPU only");
  refuse_transforms(kBackward, call);
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
  check_shape(op, "k", k, "(B, Tk, Hk, D)", {q.size(0), kAny, kAny, q.size(3)});
  if (v.dim() == 4 && v.size(3) != q.size(3)) {
    fail(op, "v must have the channels of q and k, D = ", q.size(3), ", got ", v.size(3),
         ". Pad the smaller with zeros (with scale given), or call torch's "
         "scaled_dot_product_attention");
  }
  check_shape(op, "v", v, "(B, Tk, Hk, D)", {q.size(0), k.size(1), k.size(2), q.size(3)});
  const int64_t kv_heads = k.size(2), group = kv_heads == 0 ? 1 : q.size(2) / kv_heads;
  if (group * kv_heads != q.size(2) || group == 0) {
    fail(op, "the heads of q must be a multiple of those of k and v, got H = ", q.size(2),
         " and Hk = ", kv_heads);
  }
  check_dtype(op, "k", k, q.scalar_type(), " like q");
  check_dtype(op, "v", v, q.scalar_type(), " like q");
  check_same_device(op, "k", k, "q", q);
  check_same_device(op, "v", v, "q", q);
  check_at_least(op, "window", window, 0);
  if (!(scale > 0) || std::isinf(scale)) fail(op, "scale must be positive and finite, got ", scale);

  FlashAttentionShape shape{element_type(op, "q", q),
                            q.size(0),
                            q.size(1),
                            k.size(1),
                            q.size(2),
                            q.size(3),
                            scale,
                            causal,
                            window,
                            group};
  // Tk sees all, and a position and it together are a number.
  shape.window = std::min(window, std::max<int64_t>(shape.kv_steps, 1));
  if (shape.head_dim % 8 != 0 || shape.head_dim < 8 || shape.head_dim > kMostHeadDim) {
    fail(op, "the head dimension D must be a multiple of 8 up to ", kMostHeadDim, ", got ",
         shape.head_dim);
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

// The values of first_key (B, Tq) break no rule of kernels/flash_attention.h. On CUDA nothing is read: that would wait
// for the device; the kernels clamp.
void check_first_key_values(const char* op, const int32_t* first_key,
                            const FlashAttentionShape& shape) {
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t i = 0; i < shape.q_steps; ++i) {
      const int32_t key = first_key[b * shape.q_steps + i];
      const int64_t position = i + shape.kv_steps - shape.q_steps;
      int64_t last = shape.causal ? position : shape.kv_steps - 1;
      if (shape.window > 0) last = std::min(last, position + shape.window - 1);
      if (key < 0 || key > last) {
        fail(op, "first_key must lie between 0 and the last key that the query sees, here ", last,
             ", got ", key, " at [", b, ", ", i,
             "]. For packed documents ops.first_key_of makes it");
      }
      if (i > 0 && key < first_key[b * shape.q_steps + i - 1]) {
        fail(op, "first_key must not fall along a row, got ", first_key[b * shape.q_steps + i - 1],
             " and then ", key, " at [", b, ", ", i,
             "]. For packed documents ops.first_key_of makes it");
      }
    }
  }
}

// first_key as the kernels read it: contiguous, or nothing where it says nothing.
std::optional<Tensor> checked_first_key(const char* op, const std::optional<Tensor>& first_key,
                                        const Tensor& q, const FlashAttentionShape& shape) {
  if (!first_key.has_value()) return std::nullopt;
  check_shape(op, "first_key", *first_key, "(B, Tq)", {shape.batch, shape.q_steps});
  check_dtype(op, "first_key", *first_key, ScalarType::Int);
  check_same_device(op, "first_key", *first_key, "q", q);
  const Tensor dense = contiguous(*first_key);
  if (!on_cpu(q)) return dense;
  const auto* keys = static_cast<const int32_t*>(dense.const_data_ptr());
  check_first_key_values(op, keys, shape);
  const bool is_zero =
      std::all_of(keys, keys + shape.batch * shape.q_steps, [](int32_t key) { return key == 0; });
  return is_zero ? std::nullopt : std::optional<Tensor>(dense);
}

// bias as the kernels read it, in place; and softcap.
ScoreBias checked_transforms(const char* op, const std::optional<Tensor>& bias, double softcap,
                             const Tensor& q, FlashAttentionShape& shape) {
  if (!(softcap >= 0) || std::isinf(softcap))
    fail(op, "softcap must be at least 0 and finite, got ", softcap);
  shape.softcap = softcap;
  if (!bias.has_value()) return {};
  check_shape(op, "bias", *bias, "(B, H, Tq, Tk)",
              {shape.batch, shape.heads, shape.q_steps, shape.kv_steps});
  check_same_device(op, "bias", *bias, "q", q);
  const bool is_mask = bias->scalar_type() == ScalarType::Bool;
  if (!is_mask && bias->scalar_type() != ScalarType::Float)
    check_dtype(op, "bias", *bias, q.scalar_type(), " like q, or bool or float32");
  return {bias->const_data_ptr(),
          is_mask,
          is_mask ? DType::kFloat32 : element_type(op, "bias", *bias),
          bias->stride(0),
          bias->stride(1),
          bias->stride(2),
          bias->stride(3)};
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal,
           int64_t window, const std::optional<Tensor>& first_key,
           const std::optional<Tensor>& bias, double softcap) {
  FlashAttentionShape shape = check_inputs(kOp, q, k, v, scale, causal, window);
  checked_first_key(kOp, first_key, q, shape);
  checked_transforms(kOp, bias, softcap, q, shape);
}

const int32_t* first_key_data(const std::optional<Tensor>& first_key) {
  return first_key.has_value() ? static_cast<const int32_t*>(first_key->const_data_ptr()) : nullptr;
}

// q (B, Tq, H, D), k and v (B, Tk, Hk, D) -> out (B, Tq, H, D), lse (B, H, Tq)
std::tuple<Tensor, Tensor> forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                   double scale, bool causal, int64_t window,
                                   const std::optional<Tensor>& first_key_in,
                                   const std::optional<Tensor>& bias, double softcap) {
  FlashAttentionForward call{};
  call.shape = check_inputs(kOp, q_in, k_in, v_in, scale, causal, window);
  call.bias = checked_transforms(kOp, bias, softcap, q_in, call.shape);
  FlashAttentionShape& shape = call.shape;
  const std::optional<Tensor> first_key = checked_first_key(kOp, first_key_in, q_in, shape);
  const int64_t head_dim = shape.head_dim;
  Tensor lse =
      empty(q_in, {shape.batch, shape.heads, shape.q_steps}, accumulation_type(shape.dtype));
  if (q_in.numel() == 0) return {empty_shaped_like(q_in, q_in.scalar_type()), lse};
  shape.head_dim = kernel_head_dim(kOp, q_in, head_dim);
  const Tensor q = kernel_rows(q_in, shape.head_dim), k = kernel_rows(k_in, shape.head_dim),
               v = kernel_rows(v_in, shape.head_dim);
  Tensor out = empty(q, {shape.batch, shape.q_steps, shape.heads, shape.head_dim});
  call.q = read_view(q);
  call.k = read_view(k);
  call.v = read_view(v);
  call.first_key = first_key_data(first_key);
  call.out = write_view(out);
  call.lse = lse.mutable_data_ptr();
  launch(call, q);
  return {own_channels(out, head_dim), lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& d_out_in, const std::optional<Tensor>& d_lse_in, const Tensor& q_in,
    const Tensor& k_in, const Tensor& v_in, const Tensor& out_in, const Tensor& lse_in,
    double scale, bool causal, int64_t window, const std::optional<Tensor>& first_key_in,
    const std::optional<Tensor>& bias, double softcap) {
  FlashAttentionBackward call{};
  call.shape = check_inputs(kBackward, q_in, k_in, v_in, scale, causal, window);
  call.bias = checked_transforms(kBackward, bias, softcap, q_in, call.shape);
  FlashAttentionShape& shape = call.shape;
  const std::optional<Tensor> first_key = checked_first_key(kBackward, first_key_in, q_in, shape);
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

  const int64_t head_dim = shape.head_dim;
  if (q_in.numel() == 0) {
    return {empty_shaped_like(q_in, q_in.scalar_type()),
            zeroed(empty_shaped_like(k_in, k_in.scalar_type())),
            zeroed(empty_shaped_like(v_in, v_in.scalar_type()))};
  }
  shape.head_dim = kernel_head_dim(kBackward, q_in, head_dim);
  const auto rows = [&](const Tensor& x) { return kernel_rows(x, shape.head_dim); };
  const Tensor q = rows(q_in), k = rows(k_in), v = rows(v_in), out = rows(out_in),
               d_out = rows(d_out_in);
  Tensor dq = empty(q, {shape.batch, shape.q_steps, shape.heads, shape.head_dim});
  Tensor dk = empty(q, {shape.batch, shape.kv_steps, shape.kv_heads(), shape.head_dim});
  Tensor dv = empty(q, {shape.batch, shape.kv_steps, shape.kv_heads(), shape.head_dim});
  call.q = read_view(q);
  call.k = read_view(k);
  call.v = read_view(v);
  call.first_key = first_key_data(first_key);
  call.out = read_view(out);
  call.d_out = read_view(d_out);
  call.lse = lse.const_data_ptr();
  call.d_lse = d_lse.has_value() ? d_lse->const_data_ptr() : nullptr;
  call.dq = write_view(dq);
  call.dk = write_view(dk);
  call.dv = write_view(dv);
  launch(call, q);
  return {own_channels(dq, head_dim), own_channels(dk, head_dim), own_channels(dv, head_dim)};
}

void register_ops(Library& m) {
  m.impl("flash_attention", TORCH_BOX(&forward));
  m.impl("flash_attention_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace wgpt

WGPT_REGISTER_OPS(CPU)
WGPT_REGISTER_OPS(CUDA)
WGPT_REGISTER_CHECK("flash_attention")
