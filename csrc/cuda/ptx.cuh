// Everything that the kernels ask of the machine: memory, copies, matrix instructions, launches.
// Under ITO_SIMT csrc/simt provides the same names on the CPU, and checks their use.
#pragma once
#ifdef ITO_SIMT
#include "simt/device.hpp"
#else
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/global.hpp"

namespace gpu {

// Shared memory, by chunks of 16 bytes: an address in its own space.
struct Shared {
  uint32_t address;
  __device__ Shared operator+(int chunks) const { return {address + chunks * 16}; }
};
__device__ __forceinline__ Shared shared_memory() {
  extern __shared__ Chunk memory[];
  return {static_cast<uint32_t>(__cvta_generic_to_shared(memory))};
}

__device__ __forceinline__ void barrier() { __syncthreads(); }

// Copies `bytes` bytes and fills up to 16 with 0. Not through L1: no other warp of the
// multiprocessor reads them.
__device__ __forceinline__ void cp_async(Shared to, int i, Global<const Chunk> from, int64_t j,
                                         int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address + i * 16),
               "l"(from.data + j), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups of this thread's copies but the last `kGroupsLeft`.
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
__device__ __forceinline__ bool any(bool value) { return __any_sync(~0u, value); }

// Four 8 × 8 matrices of halves (or 8 × 4 of words), a row of one from each lane's address.
__device__ __forceinline__ void ldmatrix(uint32_t (&to)[4], Shared from, int i) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from.address + i * 16)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&to)[4], Shared from, int i) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from.address + i * 16)
               : "memory");
}

// d += a·b with fp32 accumulation, 16 × 8 results of depth 16 (halves) or 8 (tf32).
#define ITO_MMA(name, shape)                                                                  \
  __device__ __forceinline__ void name(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,    \
                                       uint32_t b1) {                                         \
    asm volatile("mma.sync.aligned." shape                                                    \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));             \
  }
ITO_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
ITO_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
ITO_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef ITO_MMA

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
// Two units in the last place; denormals become 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Waits for nothing. Only one thread adds to a place, so that the order of additions is its own.
__device__ __forceinline__ void add(Global<float> to, int64_t i, float x) {
  asm volatile("red.relaxed.cta.global.add.f32 [%0], %1;" ::"l"(to.data + i), "f"(x) : "memory");
}

inline std::string unavailable() {
  int version = 0, devices = 0;
  cudaDriverGetVersion(&version);
  if (version == 0) return "no CUDA driver";
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// Throws with the kernel's name. The runtime keeps an error until it is asked: the next launch must
// not report this one.
inline void check(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// Queues the kernel.
template <class Parameters>
void launch(const char* name, void (*kernel)(Parameters), int64_t blocks, int threads,
            int shared_bytes, Stream stream, const Parameters& parameters) {
  check(name, cudaSetDevice(stream.device));  // of this copy of the runtime: PyTorch has its own
  check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   shared_bytes));
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
           static_cast<cudaStream_t>(stream.address)>>>(parameters);
  check(name, cudaGetLastError());
}

}  // namespace gpu
#endif
