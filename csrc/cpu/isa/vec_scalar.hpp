// One float at a time, in plain C++: for processors without a vector unit that we know, and for
// tests. The same interface as the other vec_*.hpp; see math.hpp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct VecScalar {
  static constexpr int kWidth = 1;
  using F = float;
  using I = int32_t;
  using M = bool;

  static F load(const float* p) { return *p; }
  static void store(float* p, F x) { *p = x; }
  static I load(const int32_t* p) { return *p; }
  static F set(float x) { return x; }
  static I set(int32_t x) { return x; }
  static F zero() { return 0; }

  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F reciprocal(F a) { return 1.0f / a; }
  static F fma(F a, F b, F c) { return a * b + c; }   // rounded twice where there is no FMA
  static F fma(const float* a, F b, F c) { return fma(set(*a), b, c); }
  static F fnma(F a, F b, F c) { return c - a * b; }
  // The larger; b where either is NaN: `max(x, accumulator)` passes over NaN.
  static F max(F a, F b) { return a > b ? a : b; }
  static F abs(F a) { return std::fabs(a); }
  static F negate(F a) { return -a; }
  static F round(F a) {  // to nearest, ties to even, for |a| < 2^22
    constexpr float kMagic = 12582912.0f;  // 1.5·2^23: the sum has no fraction bits left
    return (a + kMagic) - kMagic;
  }
  // a·2^n for an integral n in [-126, 128)
  static F scale2(F a, F n) {
    const bool valid = n >= -126.0f && n < 128.0f;  // not so for NaN: it is in `a` as well
    const int32_t bits = ((valid ? static_cast<int32_t>(n) : 0) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return a * power;
  }

  static M equal(I a, I b) { return a == b; }
  static M less(F a, F b) { return a < b; }
  static M both(M a, M b) { return a && b; }
  static M either(M a, M b) { return a || b; }
  static M without(M a, M b) { return a && !b; }
  static M none() { return false; }
  static bool any(M a) { return a; }
  static F select(M m, F yes, F no) { return m ? yes : no; }

  static float sum(F a) { return a; }
  static float largest(F a) { return a; }
};

}  // namespace
