// 8 floats: AVX2 and FMA. The same interface as the other vec_*.hpp; see math.hpp.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct Vec256 {
  static constexpr int kWidth = 8;
  using F = __m256;
  using I = __m256i;  // int32 lanes
  using M = __m256;   // all bits of a lane, or none

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static I set(int32_t x) { return _mm256_set1_epi32(x); }
  static F zero() { return _mm256_setzero_ps(); }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F reciprocal(F a) { return _mm256_div_ps(_mm256_set1_ps(1.0f), a); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }    // a·b + c
  static F fma(const float* a, F b, F c) { return fma(set(*a), b, c); }
  static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a·b
  // The larger; b where either is NaN: `max(x, accumulator)` passes over NaN.
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F negate(F a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // a·2^n for an integral n in [-126, 128)
  static F scale2(F a, F n) {
    const I bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23)));
  }

  static M equal(I a, I b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
  static M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static M both(M a, M b) { return _mm256_and_ps(a, b); }
  static M either(M a, M b) { return _mm256_or_ps(a, b); }
  static M without(M a, M b) { return _mm256_andnot_ps(b, a); }
  static M none() { return _mm256_setzero_ps(); }
  static bool any(M a) { return _mm256_movemask_ps(a) != 0; }
  static F select(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }

  static float sum(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  static float largest(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
};

}  // namespace
