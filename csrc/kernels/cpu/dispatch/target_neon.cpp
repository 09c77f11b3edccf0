// aarch64 with Advanced SIMD. Empty elsewhere.
#if defined(__aarch64__)
#define WGPT_TARGET neon
#include "kernels/cpu/dispatch/target.h"
#endif
