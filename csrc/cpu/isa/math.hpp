// exp, softplus and the sigmoid on vectors: V is one of the vec_*.hpp.
#pragma once

namespace {

template <class V>
struct Math {
  using F = typename V::F;

  // exp(x) to 2 ulp; 0 below ln(2^-126) = -87.34 (no denormal results), so exp(-inf) = 0;
  // NaN for NaN. For x ≤ 88.37, the last x whose 2^n has an exponent.
  static F exp(F x) {
    // A NaN compares false and is computed; what a -inf computes is thrown away.
    const typename V::M tiny = V::less(x, V::set(-87.336544f));
    const F n = V::round(V::mul(x, V::set(1.44269504088896341f)));
    // ln 2 in two parts, the first short enough for n·ln2 to be exact (Cody and Waite)
    F r = V::fnma(n, V::set(0.693359375f), x);
    r = V::fnma(n, V::set(-2.12194440e-4f), r);
    F p = V::set(1.9875691500e-4f);  // Cephes' polynomial for (e^r - 1 - r) / r²
    p = V::fma(p, r, V::set(1.3981999507e-3f));
    p = V::fma(p, r, V::set(8.3334519073e-3f));
    p = V::fma(p, r, V::set(4.1665795894e-2f));
    p = V::fma(p, r, V::set(1.6666665459e-1f));
    p = V::fma(p, r, V::set(5.0000001201e-1f));
    p = V::fma(p, V::mul(r, r), V::add(r, V::set(1.0f)));
    return V::select(tiny, V::zero(), V::scale2(p, n));
  }

  // ln(1 + e) for e in [0, 1], relative error 2e-7: 2·atanh(y) with y = e / (2 + e) ≤ 1/3.
  // A series in e itself would need more terms; ln of the rounded 1 + e would lose small e.
  static F log1p(F e) {
    const F y = V::mul(e, V::reciprocal(V::add(e, V::set(2.0f))));
    const F z = V::mul(y, y);
    F p = V::set(0.134337738f);  // (atanh(y) / y - 1) / y² as a polynomial in y², error 1.4e-7
    p = V::fma(p, z, V::set(0.141169786f));
    p = V::fma(p, z, V::set(0.200038359f));
    p = V::fma(p, z, V::set(0.333333194f));
    const F y2 = V::add(y, y);
    return V::fma(V::mul(p, z), y2, y2);
  }

  struct Logistic {
    F softplus;  // ln(1 + e^x); 0 at -inf
    F sigmoid;   // 1 / (1 + e^-x); 0 at -inf
  };
  static Logistic logistic(F x) {
    const F one = V::set(1.0f), e = exp(V::negate(V::abs(x)));
    F log, inverse;  // ln(1 + e), 1 / (1 + e)
    if (V::any(V::less(V::set(0x1p-8f), e))) {
      log = log1p(e);
      inverse = V::reciprocal(V::add(e, one));
    } else {  // three terms of the series leave 6e-8; most pairs of SigLIP come here
      log = V::mul(V::fma(V::fma(V::set(1.0f / 3), e, V::set(-0.5f)), e, one), e);
      inverse = V::fma(V::sub(e, one), e, one);
    }
    // max(0, NaN) is NaN
    return {V::add(V::max(V::zero(), x), log),
            V::mul(V::select(V::less(x, V::zero()), e, one), inverse)};
  }
};

}  // namespace
