// x86-64 with AVX-512 F, BW, DQ and VL, of a CPU where vdpbf16ps is missing or slow.
// Flags: isa_flags.txt.
#define WGPT_TARGET avx512
#include "kernels/cpu/dispatch/target.h"
