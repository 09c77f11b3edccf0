// mel_embed for torch: checks, allocation and launch; the formula stands in kernels/mel_embed.h.
#include "kernels/mel_embed.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"
#include "kernels/cpu/dispatch/dispatch.h"
#include "kernels/cuda/launch.h"
#include "ops/runtime.h"

namespace wgpt {
namespace {

constexpr const char* kOp = "mel_embed";
constexpr const char* kBackward = "mel_embed_backward";
constexpr int64_t kMostFrames = int64_t{1} << 24;  // of a step and its context: days of sound

void launch(const MelEmbedForward& call, const Tensor& where) {
  if (!on_cuda(where)) return cpu::active().mel_embed_forward(call, torch_executor());
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kOp, where);
  check_launch(kOp, cuda::mel_embed_forward(call, scope.stream()));
#else
  fail_without_cuda(kOp);
#endif
}

void launch(MelEmbedBackward& call, const Tensor& where) {
  if (!on_cuda(where)) {
    const auto& kernels = cpu::active();
    const Tensor scratch = workspace(where, kernels.mel_embed_backward_workspace_bytes(call.shape));
    call.workspace = scratch.mutable_data_ptr();
    return kernels.mel_embed_backward(call, torch_executor());
  }
#ifdef WGPT_WITH_CUDA
  const CudaScope scope(kBackward, where);
  const Tensor scratch = workspace(where, cuda::mel_embed_backward_workspace_bytes(call.shape));
  call.workspace = scratch.mutable_data_ptr();
  check_launch(kBackward, cuda::mel_embed_backward(call, scope.stream()));
#else
  fail_without_cuda(kBackward);
#endif
}

DType frames_type(const char* op, const Tensor& frames, const char* like_name, const Tensor& like) {
  const ScalarType dtype = frames.scalar_type();
  if (dtype == ScalarType::Float) return DType::kFloat32;
  if (dtype == ScalarType::Half) return DType::kFloat16;
  if (dtype == like.scalar_type()) return element_type(op, "frames", frames);
  fail(op, "frames must be float32, float16 or, like ", like_name, ", ",
       dtype_text(like.scalar_type()), ", got ", dtype_text(dtype));
}

// like: weight or d_y, whose type and device the data must fit. All but channels and strides.
MelEmbedShape check_slices(const char* op, const Tensor& frames, const Tensor& mean,
                           const Tensor& inv_std, const char* like_name, const Tensor& like,
                           int64_t frames_per_step, int64_t context_frames) {
  check_at_least(op, "frames_per_step", frames_per_step, 1);
  check_at_least(op, "context_frames", context_frames, 0);
  check_shape(op, "frames", frames, "(B, F, M)", {kAny, kAny, kAny});
  MelEmbedShape shape{};
  const int64_t n_frames = frames.size(1), mels = frames.size(2);
  if (n_frames % frames_per_step != 0) {
    fail(op, "the number of frames F must be a multiple of frames_per_step = ", frames_per_step,
         ", got ", n_frames);
  }
  // A row of weight, their sum times M, is a number; and without M nothing else bounds a loop over them.
  const int64_t most =
      std::min(kMostFrames, std::numeric_limits<int64_t>::max() / std::max<int64_t>(mels, 1) / 2);
  if (frames_per_step > most || context_frames > most) {
    fail(op, "frames_per_step and context_frames must be at most ", most, " for M = ", mels,
         ", got ", frames_per_step, " and ", context_frames);
  }
  shape.dtype = element_type(op, like_name, like);
  shape.frames_dtype = frames_type(op, frames, like_name, like);
  const ScalarType statistics = accumulation_type(shape.dtype);
  const struct {
    const char* name;
    const Tensor& tensor;
  } constants[] = {{"mean", mean}, {"inv_std", inv_std}};
  for (const auto& constant : constants) {
    check_shape(op, constant.name, constant.tensor, "(M,)", {mels});
    check_dtype(op, constant.name, constant.tensor, statistics);
    check_same_device(op, constant.name, constant.tensor, like_name, like);
  }
  check_same_device(op, "frames", frames, like_name, like);

  shape.batch = frames.size(0);
  shape.steps = n_frames / frames_per_step;
  shape.mels = mels;
  shape.frames_per_step = frames_per_step;
  shape.context_frames = context_frames;
  return shape;
}

// The data that forward and backward share, in the form that kernels read.
struct Slices {
  MelEmbedShape shape;
  Tensor frames, mean, inv_std;
};

Slices read_slices(const MelEmbedShape& shape, const Tensor& frames, const Tensor& mean,
                   const Tensor& inv_std) {
  Slices in{shape, with_dense_rows(frames), contiguous(mean), contiguous(inv_std)};
  in.shape.frames_batch_stride = in.frames.stride(0);
  in.shape.frames_frame_stride = in.frames.stride(1);
  return in;
}

MelEmbedShape check_inputs(const Tensor& frames, const Tensor& mean, const Tensor& inv_std,
                           const Tensor& weight, const Tensor& bias,
                           const std::optional<Tensor>& pos, int64_t frames_per_step,
                           int64_t context_frames) {
  MelEmbedShape shape =
      check_slices(kOp, frames, mean, inv_std, "weight", weight, frames_per_step, context_frames);
  check_shape(kOp, "weight", weight, "(Cm, (context_frames + frames_per_step) * M)",
              {kAny, (context_frames + frames_per_step) * shape.mels});
  shape.channels = weight.size(0);
  check_shape(kOp, "bias", bias, "(Cm,)", {shape.channels});
  check_dtype(kOp, "bias", bias, weight.scalar_type(), " like weight");
  check_same_device(kOp, "bias", bias, "weight", weight);
  if (pos.has_value()) {
    check_shape(kOp, "pos", *pos, "(>= T, Cm)", {kAny, shape.channels});
    check_at_least(kOp, "the number of rows of pos", pos->size(0), shape.steps);
    check_dtype(kOp, "pos", *pos, weight.scalar_type(), " like weight");
    check_same_device(kOp, "pos", *pos, "weight", weight);
  }
  return shape;
}

void check(const Tensor& frames, const Tensor& mean, const Tensor& inv_std, const Tensor& weight,
           const Tensor& bias, const std::optional<Tensor>& pos, int64_t frames_per_step,
           int64_t context_frames) {
  check_inputs(frames, mean, inv_std, weight, bias, pos, frames_per_step, context_frames);
}

// frames (B, T r, M), weight (Cm, (c + r) M), pos (>= T, Cm) or none -> y (B, T, Cm), and slope
// alike, or (0,) without save_slope.
std::tuple<Tensor, Tensor> forward(const Tensor& frames, const Tensor& mean, const Tensor& inv_std,
                                   const Tensor& weight_in, const Tensor& bias_in,
                                   const std::optional<Tensor>& pos_in, int64_t frames_per_step,
                                   int64_t context_frames, bool save_slope) {
  const Slices in = read_slices(check_inputs(frames, mean, inv_std, weight_in, bias_in, pos_in,
                                             frames_per_step, context_frames),
                                frames, mean, inv_std);
  MelEmbedForward call{};
  call.shape = in.shape;
  std::optional<Tensor> pos;
  if (pos_in.has_value()) {
    pos = contiguous(*pos_in);
    call.pos = pos->const_data_ptr();
  }
  const Tensor weight = contiguous(weight_in), bias = contiguous(bias_in);
  Tensor y = empty(weight, {in.shape.batch, in.shape.steps, in.shape.channels});
  Tensor slope = save_slope ? empty(weight, {in.shape.batch, in.shape.steps, in.shape.channels})
                            : empty(weight, {0});
  if (y.numel() == 0) return {y, slope};
  call.frames = in.frames.const_data_ptr();
  call.mean = in.mean.const_data_ptr();
  call.inv_std = in.inv_std.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.bias = bias.const_data_ptr();
  call.y = y.mutable_data_ptr();
  call.slope = save_slope ? slope.mutable_data_ptr() : nullptr;
  launch(call, weight);
  return {y, slope};
}

// pos_rows < 0: there was no pos, and d_pos comes back as (0, Cm).
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_y_in, const Tensor& slope_in,
                                            const Tensor& frames, const Tensor& mean,
                                            const Tensor& inv_std, int64_t pos_rows,
                                            int64_t frames_per_step, int64_t context_frames) {
  Slices in = read_slices(check_slices(kBackward, frames, mean, inv_std, "d_y", d_y_in,
                                       frames_per_step, context_frames),
                          frames, mean, inv_std);
  check_shape(kBackward, "d_y", d_y_in, "(B, T, Cm)", {in.shape.batch, in.shape.steps, kAny});
  in.shape.channels = d_y_in.size(2);
  check_shape(kBackward, "slope", slope_in, "(B, T, Cm) of a forward with save_slope",
              {in.shape.batch, in.shape.steps, in.shape.channels});
  check_dtype(kBackward, "slope", slope_in, d_y_in.scalar_type(), " like d_y");
  check_same_device(kBackward, "slope", slope_in, "d_y", d_y_in);
  if (pos_rows >= 0) check_at_least(kBackward, "pos_rows", pos_rows, in.shape.steps);
  const Tensor d_y = contiguous(d_y_in), slope = contiguous(slope_in);

  MelEmbedBackward call{};
  call.shape = in.shape;
  call.pos_rows = std::max<int64_t>(pos_rows, 0);
  Tensor d_weight =
      empty(d_y, {in.shape.channels, (context_frames + frames_per_step) * in.shape.mels});
  Tensor d_bias = empty(d_y, {in.shape.channels});
  Tensor d_pos = empty(d_y, {call.pos_rows, in.shape.channels});
  if (d_y.numel() == 0) return {zeroed(d_weight), zeroed(d_bias), zeroed(d_pos)};
  call.frames = in.frames.const_data_ptr();
  call.mean = in.mean.const_data_ptr();
  call.inv_std = in.inv_std.const_data_ptr();
  call.d_y = d_y.const_data_ptr();
  call.slope = slope.const_data_ptr();
  call.d_weight = d_weight.mutable_data_ptr();
  call.d_bias = d_bias.mutable_data_ptr();
  call.d_pos = pos_rows < 0 ? nullptr : d_pos.mutable_data_ptr();
  launch(call, d_y);
  return {d_weight, d_bias, d_pos};
}

void register_ops(Library& m) {
  m.impl("mel_embed", TORCH_BOX(&forward));
  m.impl("mel_embed_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace wgpt

WGPT_REGISTER_OPS(CPU)
WGPT_REGISTER_OPS(CUDA)
WGPT_REGISTER_CHECK("mel_embed")
