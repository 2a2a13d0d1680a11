// 4 floats: AArch64 NEON. The same interface as the other vec_*.hpp; see math.hpp.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace {

struct VecNeon {
  static constexpr int kWidth = 4;
  using F = float32x4_t;
  using I = int32x4_t;
  using M = uint32x4_t;  // all bits of a lane, or none

  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static I load(const int32_t* p) { return vld1q_s32(p); }
  static F set(float x) { return vdupq_n_f32(x); }
  static I set(int32_t x) { return vdupq_n_s32(x); }
  static F zero() { return vdupq_n_f32(0); }

  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F reciprocal(F a) { return vdivq_f32(vdupq_n_f32(1.0f), a); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }   // a·b + c
  static F fma(const float* a, F b, F c) { return fma(set(*a), b, c); }
  static F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }  // c - a·b
  // The larger; the other one where one is NaN: `max(x, accumulator)` passes over NaN.
  static F max(F a, F b) { return vmaxnmq_f32(a, b); }
  static F abs(F a) { return vabsq_f32(a); }
  static F negate(F a) { return vnegq_f32(a); }
  static F round(F a) { return vrndnq_f32(a); }  // to nearest, ties to even
  // a·2^n for an integral n in [-126, 128)
  static F scale2(F a, F n) {
    // Unsigned, since it may overflow: merging statistics computes an exp(+inf) and discards it.
    const uint32x4_t bits = vaddq_u32(vreinterpretq_u32_s32(vcvtq_s32_f32(n)), vdupq_n_u32(127));
    return vmulq_f32(a, vreinterpretq_f32_u32(vshlq_n_u32(bits, 23)));
  }

  static M equal(I a, I b) { return vceqq_s32(a, b); }
  static M less(F a, F b) { return vcltq_f32(a, b); }
  static M both(M a, M b) { return vandq_u32(a, b); }
  static M either(M a, M b) { return vorrq_u32(a, b); }
  static M without(M a, M b) { return vbicq_u32(a, b); }
  static M none() { return vdupq_n_u32(0); }
  static bool any(M a) { return vmaxvq_u32(a) != 0; }
  static F select(M m, F yes, F no) { return vbslq_f32(m, yes, no); }

  static float sum(F a) { return vaddvq_f32(a); }
  static float largest(F a) { return vmaxnmvq_f32(a); }
};

}  // namespace
