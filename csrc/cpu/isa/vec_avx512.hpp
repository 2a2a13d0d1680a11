// 16 floats: AVX-512 F, DQ, BW, VL. The same interface as the other vec_*.hpp; see math.hpp.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "cpu/isa/math.hpp"
#include "cpu/isa/transpose.hpp"

namespace {

struct Vec512 {
  static constexpr int kWidth = 16;
  using F = __m512;
  using I = __m512i;    // int32 lanes
  using M = __mmask16;  // one truth value for each lane

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static I set(int32_t x) { return _mm512_set1_epi32(x); }
  static F zero() { return _mm512_setzero_ps(); }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  // Of a number in [1, 4], relative error 1e-7: a division takes three times as long.
  static F reciprocal(F a) {
    const F y = _mm512_rcp14_ps(a);
    return _mm512_fmadd_ps(y, _mm512_fnmadd_ps(a, y, _mm512_set1_ps(1.0f)), y);
  }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a·b + c
  // The same for a number in memory. In assembly, since compilers load it into a register first.
  static F fma(const float* a, F b, F c) {
    __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
    return c;
  }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a·b
  // The larger; b where either is NaN: `max(x, accumulator)` passes over NaN.
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F negate(F a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
  static F round(F a) { return _mm512_roundscale_ps(a, 8); }  // to nearest, ties to even
  // a·2^n for an integral n in [-126, 128)
  static F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }

  static M equal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static M both(M a, M b) { return a & b; }
  static M either(M a, M b) { return a | b; }
  static M without(M a, M b) { return a & static_cast<M>(~b); }
  static M none() { return 0; }
  static bool any(M a) { return a != 0; }
  static F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }

  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float largest(F a) { return _mm512_reduce_max_ps(a); }
};

// 16 × 16 at a time in registers: four rounds of exchanges between vectors at distance 1, 2, 4, 8.
template <>
struct Transpose<Vec512> {
  static void run(const float* in, int64_t in_ld, int rows, int cols, float* out, int64_t out_ld,
                  int wanted = 0) {
    if (wanted < rows) wanted = rows;
    for (int r = 0; r < wanted; r += 16)
      for (int k = 0; k < cols; k += 16) {
        float* const to = out + k * out_ld + r;
        if (r < rows)
          block(in + r * in_ld + k, in_ld, rows - r, cols - k, to, out_ld, wanted - r);
        else
          clear(to, out_ld, cols - k, wanted - r);
      }
  }
  static __mmask16 first(int n) { return n < 16 ? static_cast<__mmask16>((1u << n) - 1) : 0xffff; }
  static void clear(float* out, int64_t out_ld, int cols, int wanted) {
    for (int k = 0; k < 16 && k < cols; ++k)
      _mm512_mask_storeu_ps(out + k * out_ld, first(wanted), _mm512_setzero_ps());
  }
  static void block(const float* in, int64_t in_ld, int rows, int cols, float* out,
                    int64_t out_ld, int wanted) {
    __m512 x[16], y[16];
    const __mmask16 in_row = first(cols), out_row = first(wanted);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r)
      x[r] = r < rows ? _mm512_maskz_loadu_ps(in_row, in + r * in_ld) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
      y[r] = _mm512_unpacklo_ps(x[r], x[r + 1]);
      y[r + 1] = _mm512_unpackhi_ps(x[r], x[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {
      x[r] = _mm512_shuffle_ps(y[r], y[r + 2], 0x44);
      x[r + 1] = _mm512_shuffle_ps(y[r], y[r + 2], 0xee);
      x[r + 2] = _mm512_shuffle_ps(y[r + 1], y[r + 3], 0x44);
      x[r + 3] = _mm512_shuffle_ps(y[r + 1], y[r + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      y[r] = _mm512_shuffle_f32x4(x[r], x[r + 4], 0x88);
      y[r + 4] = _mm512_shuffle_f32x4(x[r], x[r + 4], 0xdd);
      y[r + 8] = _mm512_shuffle_f32x4(x[r + 8], x[r + 12], 0x88);
      y[r + 12] = _mm512_shuffle_f32x4(x[r + 8], x[r + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      x[r] = _mm512_shuffle_f32x4(y[r], y[r + 8], 0x88);
      x[r + 8] = _mm512_shuffle_f32x4(y[r], y[r + 8], 0xdd);
    }
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k)
      if (k < cols) _mm512_mask_storeu_ps(out + k * out_ld, out_row, x[k]);
  }
};

// 12 instructions instead of 15: e^x = 2^(n/16)·e^r with n = 16·x / ln 2 rounded, so |r| ≤ 0.022. The
// fractional powers of 2 come from a register, and three terms of the series are enough.
template <>
inline __m512 Math<Vec512>::exp(__m512 x) {
  alignas(64) static constexpr float kPowers[16] = {  // 2^(k/16)
      1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
      1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
      1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
  constexpr float kMagic = 12582912.0f;  // 1.5·2^23: a sum with it has no fraction bits left
  // below ln(2^-126) the result is subnormal, which is 0 here, and at -104 it is too small for that;
  // max keeps a NaN
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
  const __m512 biased = _mm512_fmadd_ps(x, _mm512_set1_ps(23.0831206542f), _mm512_set1_ps(kMagic));
  const __m512 n = _mm512_sub_ps(biased, _mm512_set1_ps(kMagic));
  // ln 2 / 16 in two parts, the first short enough for its product with n to be exact
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.043334960937500f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-1.3262151e-5f), r);
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.0f / 6), _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_mul_ps(p, r);
  const __m512 power = _mm512_permutexvar_ps(_mm512_castps_si512(biased), _mm512_load_ps(kPowers));
  return _mm512_scalef_ps(_mm512_fmadd_ps(power, p, power),
                          _mm512_mul_ps(n, _mm512_set1_ps(1.0f / 16)));
}

}  // namespace
