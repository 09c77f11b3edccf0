// Plain C++ at the compiler's baseline: runs anywhere.
#define WGPT_TARGET generic
#include "kernels/cpu/dispatch/target.h"
