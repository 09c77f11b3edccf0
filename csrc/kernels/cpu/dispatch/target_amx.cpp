// x86-64 with AVX-512, vdpbf16ps and AMX. Flags: those of avx512_bf16 and
// -mamx-tile -mamx-bf16.
#define WGPT_TARGET amx
#include "kernels/cpu/dispatch/target.h"
