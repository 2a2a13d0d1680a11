// The CUDA kernels as they are, on the emulator.
#include "cuda/forward.cu"
#include "cuda/gradient.cu"
#include "cuda/panel.cu"
