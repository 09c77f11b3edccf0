// The nvcc unit of mel_embed; the emulator's tests include the same .cuh.
#include "kernels/cuda/mel_embed.cuh"
