// One target's kernel table; a target_*.cpp names its target and includes this. Everything below
// this line of the include tree lives in the target's own namespace and is compiled with the
// target's flags.
#pragma once

#include "kernels/cpu/attention/flash_attention.h"
#include "kernels/cpu/dispatch/dispatch.h"
#include "kernels/cpu/dispatch/peak.h"
#include "kernels/cpu/elementwise/add_rms_norm.h"
#include "kernels/cpu/elementwise/feed_forward.h"
#include "kernels/cpu/elementwise/linear_cross_entropy.h"
#include "kernels/cpu/elementwise/rotary_qkv.h"
#include "kernels/cpu/elementwise/token_concat.h"
#include "kernels/cpu/gemm/gemm.h"
#include "kernels/cpu/mel_embed/mel_embed.h"

namespace wgpt::cpu::WGPT_TARGET {

#define WGPT_STRING_OF(name) #name
#define WGPT_STRING(name) WGPT_STRING_OF(name)

extern const Kernels kKernels;
const Kernels kKernels{
    WGPT_STRING(WGPT_TARGET),
    flash_attention_forward,
    flash_attention_backward,
    flash_attention_forward_workspace_bytes,
    flash_attention_backward_workspace_bytes,
    mel_embed_forward,
    mel_embed_backward,
    mel_embed_backward_workspace_bytes,
    token_concat_forward,
    token_concat_backward,
    token_concat_backward_workspace_bytes,
    add_rms_norm_forward,
    add_rms_norm_backward,
    rotary_qkv_forward,
    rotary_qkv_backward,
    gelu_forward,
    gelu_backward,
    cross_entropy_rows,
    prefers_own_gemm,
    gemm,
    gemm_workspace_bytes,
    run_fmas,
};

}  // namespace wgpt::cpu::WGPT_TARGET
