// x86-64 with AVX-512 and vdpbf16ps. Flags: isa_flags.txt.
#define WGPT_TARGET avx512_bf16
#include "kernels/cpu/dispatch/target.h"
