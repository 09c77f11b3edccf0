// The CUDA launchers: contracts in, kernels on a stream out. They allocate nothing and never synchronise, so every op
// can be captured in a CUDA graph. Each returns nullptr, or a static text that says what failed.
#pragma once

#include <cstddef>

#include "kernels/flash_attention.h"
#include "kernels/mel_embed.h"
#include "kernels/token_concat.h"

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

}  // namespace wgpt::cuda
