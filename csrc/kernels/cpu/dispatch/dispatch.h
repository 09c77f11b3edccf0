// The CPU kernels of every instruction set behind one table: which targets there are, which one
// runs, how to force it.
#pragma once

#include <cstddef>

#include "kernels/add_rms_norm.h"
#include "kernels/feed_forward.h"
#include "kernels/flash_attention.h"
#include "kernels/gemm.h"
#include "kernels/linear_cross_entropy.h"
#include "kernels/mel_embed.h"
#include "kernels/rotary_qkv.h"
#include "kernels/token_concat.h"

namespace wgpt::cpu {

struct Kernels {
  const char* target;  // "generic", "avx2", "avx512", "avx512_bf16", "amx", "neon"
  void (*flash_attention_forward)(const FlashAttentionForward&, const Executor&);
  void (*flash_attention_backward)(const FlashAttentionBackward&, const Executor&);
  size_t (*flash_attention_forward_workspace_bytes)(const FlashAttentionShape&);
  size_t (*flash_attention_backward_workspace_bytes)(const FlashAttentionShape&);
  void (*mel_embed_forward)(const MelEmbedForward&, const Executor&);
  void (*mel_embed_backward)(const MelEmbedBackward&, const Executor&);
  size_t (*mel_embed_backward_workspace_bytes)(const MelEmbedShape&);
  void (*token_concat_forward)(const TokenConcatForward&, const Executor&);
  void (*token_concat_backward)(const TokenConcatBackward&, const Executor&);
  size_t (*token_concat_backward_workspace_bytes)(const TokenConcatShape&);
  void (*add_rms_norm_forward)(const AddRmsNormForward&, const Executor&);
  void (*add_rms_norm_backward)(const AddRmsNormBackward&, const Executor&);
  void (*rotary_qkv_forward)(const RotaryForward&, const Executor&);
  void (*rotary_qkv_backward)(const RotaryBackward&, const Executor&);
  void (*gelu_forward)(const GeluForward&, const Executor&);
  void (*gelu_backward)(const GeluBackward&, const Executor&);
  void (*cross_entropy_rows)(const CrossEntropyRows&, const Executor&);
  // Whether gemm is at least as fast as torch's; pointers are not looked at.
  bool (*prefers_own_gemm)(const Gemm&);
  bool (*gemm)(const Gemm&, const Executor&);
  size_t (*gemm_workspace_bytes)(const Gemm&);
  double (*run_fmas)(DType, int64_t n);  // n steps of a register block; returns their FLOPs
};

// The targets compiled in that this machine can run, best first; ends with nullptr.
const Kernels* const* available();

// The target in use: $WGPT_CPU_TARGET if set, else the best. An unknown or unsupported name throws
// std::invalid_argument that lists the available ones.
const Kernels& active();

// Forces a target by name from now on (nullptr or "" goes back to the best). Throws like active().
void set_active(const char* target);

// FLOP/s of one thread multiplying and adding in registers as the target in use does for dtype: the
// best of many short runs, some tens of milliseconds in all. float64 kernels use no vectors and
// have no peak of their own.
double peak_flops(DType dtype);

}  // namespace wgpt::cpu
