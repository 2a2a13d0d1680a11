// Tensors as kernel arguments, for the kernels and for what launches them.
#pragma once
#include "base.hpp"
#ifdef ITO_SIMT
#include "simt/device.hpp"
#define ITO_GPU emulated  // the namespace of the kernels
#else
#include <cstdint>
#define ITO_GPU cuda

namespace gpu {

struct alignas(16) Chunk {
  uint32_t word[4];
};

// The size, in elements, is for the emulator, which checks it.
template <class T>
struct Global {
  T* data = nullptr;

  Global() = default;
  Global(T* data, int64_t /*size*/) : data(data) {}
#ifdef __CUDACC__
  __device__ explicit operator bool() const { return data != nullptr; }
  __device__ T load(int64_t i) const { return data[i]; }
  __device__ void store(int64_t i, T value) const { data[i] = value; }
#endif
};

struct Stream {
  void* address = nullptr;
  int device = 0;
};

}  // namespace gpu
#endif
