// Reading features of any dtype as fp32, and writing fp32 as any dtype. Plain loops: the compiler
// vectorises them for the instruction set of the file that includes this.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/problem.hpp"

namespace {

using ito::cpu::DType;
using ito::cpu::Matrix;

inline uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
inline float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline float from_bfloat16(uint16_t h) { return from_bits(uint32_t(h) << 16); }

// To nearest, ties to even; a NaN stays one.
inline uint16_t to_bfloat16(float x) {
  const uint32_t u = bits(x);
  const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 0x40 : rounded);
}

// No step makes a subnormal fp32 number: the engine flushes those to 0.
inline float from_float16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu, sign = uint32_t(h & 0x8000u) << 16;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t out = (magnitude << 13) + 0x38000000u;
  if (magnitude < 0x400u) out = bits(subnormal);
  if (magnitude >= 0x7c00u) out = 0x7f800000u | magnitude << 13;  // inf and NaN
  return from_bits(out | sign);
}

inline uint16_t to_float16(float x) {
  const uint32_t u = bits(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t out;
  if (magnitude > 0x7f800000u) {
    out = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    out = 0x7c00;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // subnormal: adding 0.5 leaves the fraction, rounded by the processor, in the low bits
    out = bits(from_bits(magnitude) + 0.5f) - bits(0.5f);
  } else {
    out = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(out | sign);
}

// `count` elements of row `row` from column `first` on, as fp32.
inline void read_row(const Matrix& m, int64_t row, int64_t first, int count, float* out) {
  const int64_t at = row * m.stride + first;
  if (m.dtype == DType::kFloat32) {
    std::memcpy(out, static_cast<const float*>(m.data) + at, sizeof(float) * count);
  } else if (m.dtype == DType::kBFloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(m.data) + at;
    for (int i = 0; i < count; ++i) out[i] = from_bfloat16(p[i]);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(m.data) + at;
    for (int i = 0; i < count; ++i) out[i] = from_float16(p[i]);
  }
}

// Elements [first, first + count) of `wanted` rows from row `row` on, `ld` floats apart. Rows from
// `available` on and rows where `skip` is set become 0: padding may hold anything, NaN too.
inline void read_rows(const Matrix& m, const uint8_t* skip, int64_t row, int64_t available,
                      int wanted, int64_t first, int count, float* out, int ld) {
  for (int r = 0; r < wanted; ++r, out += ld) {
    if (r < available && !(skip && skip[row + r]))
      read_row(m, row + r, first, count, out);
    else
      std::memset(out, 0, sizeof(float) * count);
  }
}

// The reverse of read_row, into a dense matrix of `dtype` and `width`.
inline void write_row(void* data, DType dtype, int64_t width, int64_t row, int64_t first,
                      int count, const float* in) {
  const int64_t at = row * width + first;
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(data) + at, in, sizeof(float) * count);
  } else if (dtype == DType::kBFloat16) {
    uint16_t* p = static_cast<uint16_t*>(data) + at;
    for (int i = 0; i < count; ++i) p[i] = to_bfloat16(in[i]);
  } else {
    uint16_t* p = static_cast<uint16_t*>(data) + at;
    for (int i = 0; i < count; ++i) p[i] = to_float16(in[i]);
  }
}

}  // namespace
