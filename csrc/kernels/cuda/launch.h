// The CUDA launchers: contracts in, kernels on a stream out. They allocate nothing and never synchronise, so every op
// can be captured in a CUDA graph. Each returns nullptr, or a static text that says what failed.
#pragma once

#include <cstddef>

#include "kernels/add_rms_norm.h"
#include "kernels/feed_forward.h"
#include "kernels/flash_attention.h"
#include "kernels/linear_cross_entropy.h"
#include "kernels/mel_embed.h"
#include "kernels/rotary_qkv.h"
#include "kernels/token_concat.h"
#include "kernels/token_concat_norm.h"

namespace wgpt::cuda {

using Stream = void*;  // cudaStream_t

const char* flash_attention_forward(const FlashAttentionForward&, Stream);
const char* flash_attention_backward(const FlashAttentionBackward&, Stream);
size_t flash_attention_forward_workspace_bytes(const FlashAttentionShape&);
size_t flash_attention_backward_workspace_bytes(const FlashAttentionShape&);
const char* mel_embed_forward(const MelEmbedForward&, Stream);
const char* mel_embed_backward(const MelEmbedBackward&, Stream);
size_t mel_embed_backward_workspace_bytes(const MelEmbedShape&);
const char* token_concat_forward(const TokenConcatForward&, Stream);
const char* token_concat_backward(const TokenConcatBackward&, Stream);
size_t token_concat_backward_workspace_bytes(const TokenConcatShape&);
const char* token_concat_norm_forward(const TokenConcatNormForward&, Stream);
const char* token_concat_norm_backward(const TokenConcatNormBackward&, Stream);
size_t token_concat_norm_backward_workspace_bytes(const TokenConcatNormShape&);
const char* add_rms_norm_forward(const AddRmsNormForward&, Stream);
const char* add_rms_norm_backward(const AddRmsNormBackward&, Stream);
size_t add_rms_norm_backward_workspace_bytes(const AddRmsNormShape&);
const char* rotary_qkv_forward(const RotaryForward&, Stream);
const char* rotary_qkv_backward(const RotaryBackward&, Stream);
const char* gelu_forward(const GeluForward&, Stream);
const char* gelu_backward(const GeluBackward&, Stream);
const char* cross_entropy_rows(const CrossEntropyRows&, Stream);
const char* cross_entropy_sums(const CrossEntropySums&, Stream);
int64_t cross_entropy_row_stride(DType dtype, int64_t vocab);  // V in whole 16-byte vectors

}  // namespace wgpt::cuda
