// The nvcc unit of feed_forward; the emulator's tests include the same .cuh.
#include "kernels/cuda/feed_forward.cuh"
