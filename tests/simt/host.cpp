// The CUDA launchers and the emulator behind a C interface, for ctypes: the same kernels that nvcc compiles, by g++.
#include "kernels/cuda/launch.h"
#include "machine_api.h"

using namespace wgpt;

extern "C" {

const char* token_concat_forward(const TokenConcatForward* a) {
  return cuda::token_concat_forward(*a, nullptr);
}
const char* token_concat_backward(const TokenConcatBackward* a) {
  return cuda::token_concat_backward(*a, nullptr);
}
size_t token_concat_backward_workspace_bytes(const TokenConcatShape* s) {
  return cuda::token_concat_backward_workspace_bytes(*s);
}

const char* mel_embed_forward(const MelEmbedForward* a) {
  return cuda::mel_embed_forward(*a, nullptr);
}
const char* mel_embed_backward(const MelEmbedBackward* a) {
  return cuda::mel_embed_backward(*a, nullptr);
}
size_t mel_embed_backward_workspace_bytes(const MelEmbedShape* s) {
  return cuda::mel_embed_backward_workspace_bytes(*s);
}

const char* flash_attention_forward(const FlashAttentionForward* a) {
  return cuda::flash_attention_forward(*a, nullptr);
}
size_t flash_attention_forward_workspace_bytes(const FlashAttentionShape* s) {
  return cuda::flash_attention_forward_workspace_bytes(*s);
}
const char* flash_attention_backward(const FlashAttentionBackward* a) {
  return cuda::flash_attention_backward(*a, nullptr);
}
size_t flash_attention_backward_workspace_bytes(const FlashAttentionShape* s) {
  return cuda::flash_attention_backward_workspace_bytes(*s);
}

const char* add_rms_norm_forward(const AddRmsNormForward* a) {
  return cuda::add_rms_norm_forward(*a, nullptr);
}
const char* add_rms_norm_backward(const AddRmsNormBackward* a) {
  return cuda::add_rms_norm_backward(*a, nullptr);
}
size_t add_rms_norm_backward_workspace_bytes(const AddRmsNormShape* s) {
  return cuda::add_rms_norm_backward_workspace_bytes(*s);
}

const char* token_concat_norm_forward(const TokenConcatNormForward* a) {
  return cuda::token_concat_norm_forward(*a, nullptr);
}
const char* token_concat_norm_backward(const TokenConcatNormBackward* a) {
  return cuda::token_concat_norm_backward(*a, nullptr);
}
size_t token_concat_norm_backward_workspace_bytes(const TokenConcatNormShape* s) {
  return cuda::token_concat_norm_backward_workspace_bytes(*s);
}

const char* rotary_qkv_forward(const RotaryForward* a) {
  return cuda::rotary_qkv_forward(*a, nullptr);
}
const char* rotary_qkv_backward(const RotaryBackward* a) {
  return cuda::rotary_qkv_backward(*a, nullptr);
}

const char* gelu_forward(const GeluForward* a) { return cuda::gelu_forward(*a, nullptr); }
const char* gelu_backward(const GeluBackward* a) { return cuda::gelu_backward(*a, nullptr); }

const char* cross_entropy_rows(const CrossEntropyRows* a) {
  return cuda::cross_entropy_rows(*a, nullptr);
}
const char* cross_entropy_sums(const CrossEntropySums* a) {
  return cuda::cross_entropy_sums(*a, nullptr);
}
}
