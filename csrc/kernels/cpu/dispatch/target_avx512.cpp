// x86-64 with AVX-512 F, BW, DQ, VL. Flags: those of avx2 and -mavx512f -mavx512bw -mavx512dq
// -mavx512vl.
#define WGPT_TARGET avx512
#include "kernels/cpu/dispatch/target.h"
