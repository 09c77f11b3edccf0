// x86-64 with AVX2, FMA and F16C. Flags: isa_flags.txt.
#define WGPT_TARGET avx2
#include "kernels/cpu/dispatch/target.h"
