// x86-64 with AVX-512, vdpbf16ps and AMX.
// Flags: isa_flags.txt.
#define WGPT_TARGET amx
#include "kernels/cpu/dispatch/target.h"
