// x86-64 with AVX-512 and vdpbf16ps. Flags: those of avx512 and -mavx512bf16.
#define WGPT_TARGET avx512_bf16
#include "kernels/cpu/dispatch/target.h"
