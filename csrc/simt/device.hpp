// What csrc/cuda/ptx.cuh offers to the kernels, on the emulator.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/emulator.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// The caller's place, as hidden last arguments.
#define SIMT_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_HERE \
  ::simt::Where { file, line }

namespace simt {

struct Index {
  unsigned x;
};
inline Index thread_index() { return {static_cast<unsigned>(block->thread().index)}; }
inline Index block_index() { return {block->index()}; }

struct Chunk {
  uint32_t word[4];
};

// A tensor: element `i` of `size`.
template <class T>
struct Global {
  T* data = nullptr;
  int64_t size = 0;

  explicit operator bool() const { return data != nullptr; }
  T load(int64_t i, SIMT_WHERE) const {
    block->check(i >= 0 && i < size, "a tensor", i, size, SIMT_HERE);
    return data[i];
  }
  void store(int64_t i, T value, SIMT_WHERE) const {
    block->check(i >= 0 && i < size, "a tensor", i, size, SIMT_HERE);
    data[i] = value;
  }
};

// Shared memory, by chunks of 16 bytes.
struct Shared {
  int first = 0;
  Shared operator+(int chunks) const { return {first + chunks}; }
};
inline Shared shared_memory() { return {}; }

inline void barrier(SIMT_WHERE) { block->barrier(SIMT_HERE); }

inline void cp_async(Shared to, int i, Global<const Chunk> from, int64_t j, int bytes,
                     SIMT_WHERE) {
  if (bytes) block->check(j >= 0 && j < from.size, "a tensor", j, from.size, SIMT_HERE);
  block->copy(to.first + i, from.data + j, bytes, SIMT_HERE);
}
inline void cp_async_commit() { block->commit(); }
template <int kGroupsLeft>
void cp_async_wait(SIMT_WHERE) {
  block->wait(kGroupsLeft, SIMT_HERE);
}

template <class T>
T shuffle_xor(T value, int mask, SIMT_WHERE) {
  struct Lane {
    T given, got;
  } mine{value, value};
  block->collective(&mine, SIMT_HERE, [mask](void** lanes) {
    for (int i = 0; i < kWarp; ++i)
      static_cast<Lane*>(lanes[i])->got = static_cast<Lane*>(lanes[i ^ mask])->given;
  });
  return mine.got;
}

inline bool any(bool value, SIMT_WHERE) {
  block->collective(&value, SIMT_HERE, [](void** lanes) {
    bool result = false;
    for (int i = 0; i < kWarp; ++i) result |= *static_cast<bool*>(lanes[i]);
    for (int i = 0; i < kWarp; ++i) *static_cast<bool*>(lanes[i]) = result;
  });
  return value;
}

// Register j of lane l is word l % 4 of the row that lane 8·j + l / 4 points to; transposed, where
// rows are 8 halves: halves (l / 4) of the rows that lanes 8·j + 2·(l % 4) and the next point to.
template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], Shared from, int i, Where where) {
  struct Lane {
    uint32_t* to;
    int chunk;
    const void* row;
  } mine{to, from.first + i, block->read(from.first + i, where)};
  block->collective(&mine, where, [where](void** pointers) {
    Lane* lane[kWarp];
    int chunks[kWarp];
    for (int l = 0; l < kWarp; ++l) {
      lane[l] = static_cast<Lane*>(pointers[l]);
      chunks[l] = lane[l]->chunk;
    }
    block->record(kTransposed ? "ldmatrix.trans" : "ldmatrix", chunks, kWarp, where);
    for (int l = 0; l < kWarp; ++l)
      for (int j = 0; j < 4; ++j)
        if (kTransposed) {
          const auto half = [&](int row) {
            return uint32_t{static_cast<const uint16_t*>(lane[8 * j + row]->row)[l / 4]};
          };
          lane[l]->to[j] = half(l % 4 * 2) | half(l % 4 * 2 + 1) << 16;
        } else {
          lane[l]->to[j] = static_cast<const uint32_t*>(lane[8 * j + l / 4]->row)[l % 4];
        }
  });
}
inline void ldmatrix(uint32_t (&to)[4], Shared from, int i, SIMT_WHERE) {
  load_matrices<false>(to, from, i, SIMT_HERE);
}
inline void ldmatrix_transposed(uint32_t (&to)[4], Shared from, int i, SIMT_WHERE) {
  load_matrices<true>(to, from, i, SIMT_HERE);
}

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float from_bf16(uint32_t half) { return as_float(half << 16); }
inline float from_f16(uint32_t half) {
  // the exponent field moved, then its bias corrected by a product, which is right for denormals
  const uint32_t sign = (half & 0x8000) << 16, rest = (half & 0x7fff) << 13;
  if (rest >= 0x0f800000) return as_float(sign | rest | 0x7f800000);
  return as_float(sign | as_bits(as_float(rest) * 0x1p112f));
}
inline uint32_t to_bf16(float x) {
  const uint32_t bits = as_bits(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t to_f16(float x) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f)  // denormal: adding 1/2 leaves its multiples of 2^-24, rounded to even
    return sign | (as_bits(size + 0.5f) - as_bits(0.5f));
  const uint32_t bits = as_bits(size) - (112u << 23);
  return sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13;
}

// Products of one instruction are summed exactly enough in double, then added to the accumulator
// with the bits below its last cut off, as tensor cores do: a test of a kernel's fp32 accuracy must
// not profit from rounding that the hardware does not do.
inline float add_truncated(float c, double sum) {
  const double exact = c + sum;
  float x = static_cast<float>(exact);
  if (std::fabs(x) > std::fabs(exact) && std::isfinite(x)) x = as_float(as_bits(x) - 1);
  return x;
}

// D[16 × 8] += A[16 × K]·B[K × 8]. Lane l holds, of A, rows l / 4 (registers 0, 2) and l / 4 + 8
// (1, 3), words l % 4 (0, 1) and l % 4 + 4 (2, 3); of B column l / 4, words l % 4 and l % 4 + 4; of
// D rows l / 4 and l / 4 + 8, columns 2·(l % 4) and the next. A word is one tf32 or two halves.
template <int kPerWord, class Convert>
void matrix_multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     Where where, Convert convert) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  block->collective(&mine, where, [convert](void** lanes) {
    constexpr int kDepth = 8 * kPerWord;
    using Sum = std::conditional_t<kPerWord == 1, double, float>;
    Sum x[16][kDepth], y[kDepth][8], sum[16][8] = {};
    for (int l = 0; l < kWarp; ++l) {
      const Lane& lane = *static_cast<Lane*>(lanes[l]);
      for (int e = 0; e < kPerWord; ++e) {
        const int k = l % 4 * kPerWord + e, shift = 16 * e;
        for (int i = 0; i < 4; ++i)
          x[l / 4 + i % 2 * 8][k + i / 2 * 4 * kPerWord] = convert(lane.a[i] >> shift);
        for (int i = 0; i < 2; ++i) y[k + i * 4 * kPerWord][l / 4] = convert(lane.b[i] >> shift);
      }
    }
    for (int r = 0; r < 16; ++r)
      for (int k = 0; k < kDepth; ++k)
        for (int c = 0; c < 8; ++c) sum[r][c] += x[r][k] * y[k][c];
    for (int l = 0; l < kWarp; ++l) {
      float* d = static_cast<Lane*>(lanes[l])->d;
      for (int i = 0; i < 4; ++i)
        d[i] = add_truncated(d[i], sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
    }
  });
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_WHERE) {
  matrix_multiply<2>(d, a, b0, b1, SIMT_HERE, [](uint32_t x) { return from_bf16(x & 0xffff); });
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_WHERE) {
  matrix_multiply<2>(d, a, b0, b1, SIMT_HERE, [](uint32_t x) { return from_f16(x & 0xffff); });
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_WHERE) {
  // the low 13 bits do not reach the multiplier
  matrix_multiply<1>(d, a, b0, b1, SIMT_HERE,
                     [](uint32_t x) { return double{as_float(x & 0xffffe000)}; });
}

inline uint32_t to_tf32(float x) {  // to nearest, ties away from zero
  const uint32_t bits = as_bits(x);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}
inline uint32_t pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
inline uint32_t pack_f16(float low, float high) { return to_f16(low) | to_f16(high) << 16; }
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;  // as there: no denormals
}
inline float reciprocal(float x) { return 1 / x; }

inline void add(Global<float> to, int64_t i, float x, SIMT_WHERE) {
  block->check(i >= 0 && i < to.size, "a tensor", i, to.size, SIMT_HERE);
  to.data[i] += x;
}

struct Stream {  // there is one
  void* address = nullptr;
  int device = 0;
};

inline std::string unavailable() { return ""; }

template <class Parameters>
void launch(const char* name, void (*kernel)(Parameters), int64_t blocks, int threads,
            int shared_bytes, Stream /*stream*/, const Parameters& parameters) {
  launch(name, blocks, threads, shared_bytes, [&] { kernel(parameters); });
}

}  // namespace simt

namespace gpu = simt;
using std::max;
using std::min;
#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
