// 16 floats: AVX-512 F, DQ, BW, VL. The same interface as the other vec_*.hpp; see math.hpp.
#pragma once
#include <immintrin.h>

#include <cstdint>

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
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a·b + c
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

}  // namespace
