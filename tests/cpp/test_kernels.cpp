// Tests of the CPU engine without Python: exp against double, and every instruction set of
// this machine against a direct evaluation in double. Prints what fails; exit status 1 if anything.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/engine.hpp"
#include "cpu/isa.hpp"

#if defined(__AVX512F__)
#include "cpu/isa/vec_avx512.hpp"
using Vec = Vec512;
#elif defined(__AVX2__)
#include "cpu/isa/vec_avx2.hpp"
using Vec = Vec256;
#elif defined(__aarch64__)
#include "cpu/isa/vec_neon.hpp"
using Vec = VecNeon;
#else
#include "cpu/isa/vec_scalar.hpp"
using Vec = VecScalar;
#endif
#include "cpu/isa/convert.hpp"
#include "cpu/isa/math.hpp"
#if defined(__AVX512BF16__)
#include "cpu/isa/amx_emulated.hpp"
#endif

using namespace ito::cpu;

namespace {

int failures = 0;

void check(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

float apply(Vec::F (*f)(Vec::F), float x) {
  float lanes[Vec::kWidth];
  Vec::store(lanes, f(Vec::set(x)));
  return lanes[0];
}

double ulps(float x, double truth) {
  const float nearest = static_cast<float>(truth);
  const float ulp = std::nextafter(nearest, std::numeric_limits<float>::infinity()) - nearest;
  return std::fabs(x - truth) / ulp;
}

void test_exp(uint32_t stride) {
  double worst = 0;
  // floats of [-87.33, 88.3], both signs
  for (uint32_t u = 0; u <= bits(88.3f); u += stride)
    for (const uint32_t sign : {0u, 0x80000000u}) {
      const float x = from_bits(u | sign);
      if (x < -87.33f) continue;
      worst = std::fmax(worst, ulps(apply(Math<Vec>::exp, x), std::exp(static_cast<double>(x))));
    }
  std::printf("exp: %.3f ulp\n", worst);
  check(worst <= 2, "exp within 2 ulp");
  check(apply(Math<Vec>::exp, 0.0f) == 1.0f, "exp(0) is 1");
  check(apply(Math<Vec>::exp, -INFINITY) == 0.0f, "exp(-inf) is 0");
  // the engine's threads flush it to 0
  check(apply(Math<Vec>::exp, -88.0f) < std::numeric_limits<float>::min(), "exp(-88) is subnormal");
  for (const float x : {-200.0f, -1000.0f, -1e6f, -1e25f, -1e30f, -3e38f})
    check(apply(Math<Vec>::exp, x) == 0.0f, "exp(" + std::to_string(x) + ") is 0");
  check(std::isnan(apply(Math<Vec>::exp, NAN)), "exp(NaN) is NaN");
}

Vec::F softplus(Vec::F x) { return Math<Vec>::logistic(x).softplus; }
Vec::F sigmoid(Vec::F x) { return Math<Vec>::logistic(x).sigmoid; }

void test_softplus() {
  double worst = 0, slope = 0;
  for (float x = -80; x < 80; x += 0.0137f) {
    const double l = x, e = std::exp(-std::fabs(l));
    const double truth = std::fmax(l, 0.0) + std::log1p(e);
    worst = std::fmax(worst, std::fabs(apply(softplus, x) - truth) / truth);
    const double sigma = x < 0 ? e / (1 + e) : 1 / (1 + e);
    slope = std::fmax(slope, std::fabs(apply(sigmoid, x) - sigma) / sigma);
  }
  std::printf("softplus: %.2g, sigmoid: %.2g relative\n", worst, slope);
  check(worst < 4e-7 && slope < 4e-7, "softplus and sigmoid to 4e-7");
}

void test_conversions() {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const uint16_t half = static_cast<uint16_t>(h);
    const float x = from_float16(half), y = from_bfloat16(half);
    const bool nan = (h & 0x7fff) > 0x7c00;
    check(nan ? std::isnan(x) : to_float16(x) == half, "fp16 there and back " + std::to_string(h));
    if (!nan && (h & 0x7c00) != 0x7c00) {
      const double fraction = h & 0x3ff, exponent = h >> 10 & 31;
      const double truth = (exponent ? std::ldexp(1024 + fraction, int(exponent) - 25)
                                     : std::ldexp(fraction, -24)) * (h & 0x8000 ? -1 : 1);
      check(x == truth, "fp16 " + std::to_string(h));
    }
    if (!std::isnan(y)) check(to_bfloat16(y) == half, "bf16 there and back " + std::to_string(h));
  }
  // halfway cases go to even, in both directions
  check(to_bfloat16(from_bits(0x3f808000)) == 0x3f80, "bf16 tie to even, down");
  check(to_bfloat16(from_bits(0x3f818000)) == 0x3f82, "bf16 tie to even, up");
  check(to_float16(1 + 0x1p-11f) == 0x3c00, "fp16 tie to even, down");
  check(to_float16(1 + 3 * 0x1p-11f) == 0x3c02, "fp16 tie to even, up");
  check(to_float16(65520.0f) == 0x7c00, "fp16 overflow");
}

#if defined(__AVX512BF16__)
// The emulated product of two tiles has the bits that the loops of Intel's manual give. The
// elements of a and b are up to 2^size: some that are tiny, or their products, are subnormal.
void test_emulated_product(int a_size, int b_size) {
  std::mt19937 random(1);
  const auto numbers = [&](int size) {
    std::vector<uint16_t> x(512);
    for (uint16_t& h : x) {
      const float fraction = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 1000;
      h = to_bfloat16(std::ldexp(fraction, size - static_cast<int>(random() % 8)));
    }
    return x;
  };
  const std::vector<uint16_t> a = numbers(a_size), b = numbers(b_size);
  std::vector<float> c(256);
  for (float& x : c) x = std::ldexp(static_cast<float>(random() % 3), a_size + b_size);
  const auto flushed = [](float x) { return std::fabs(x) < 0x1p-126f ? 0.0f : x; };
  std::vector<float> expected(256);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum[2] = {};
      for (int k = 0; k < 16; ++k)
        for (int half = 0; half < 2; ++half) {
          const float x = flushed(from_bfloat16(a[m * 32 + 2 * k + half]));
          const float y = flushed(from_bfloat16(b[k * 32 + 2 * n + half]));
          sum[half] = flushed(std::fma(x, y, sum[half]));
        }
      expected[m * 16 + n] = flushed(c[m * 16 + n] + flushed(sum[0] + sum[1]));
    }

  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  const unsigned state = _mm_getcsr();
  _mm_setcsr(state | 0x8040);  // as the engine's threads
  _tile_loadconfig(&config);
  _tile_loadd(1, c.data(), 64);
  _tile_loadd(2, a.data(), 64);
  _tile_loadd(3, b.data(), 64);
  _tile_dpbf16ps(1, 2, 3);
  _tile_stored(1, c.data(), 64);
  _tile_release();
  _mm_setcsr(state);
  const bool same = std::memcmp(c.data(), expected.data(), 256 * sizeof(float)) == 0;
  check(same, "emulated product of tiles up to 2^" + std::to_string(a_size) + " and 2^" +
                  std::to_string(b_size));
}
#endif

struct Features {
  int64_t rows, width;
  std::vector<float> exact;     // what the stored elements are
  std::vector<uint16_t> half;
  Matrix matrix;
  Features(int64_t n, int64_t d, DType dtype, std::mt19937& random)
      : rows(n), width(d), exact(n * d), half(n * d) {
    std::normal_distribution<float> normal(0, 1 / std::sqrt(static_cast<float>(d)));
    for (int64_t i = 0; i < n * d; ++i) {
      exact[i] = normal(random);
      if (dtype == DType::kBFloat16) exact[i] = from_bfloat16(half[i] = to_bfloat16(exact[i]));
      if (dtype == DType::kFloat16) exact[i] = from_float16(half[i] = to_float16(exact[i]));
    }
    const void* data = dtype == DType::kFloat32 ? static_cast<void*>(exact.data()) : half.data();
    matrix = {data, n, d, d, dtype};
  }
};

void close(const std::vector<float>& ours, const std::vector<double>& truth, double tolerance,
           const std::string& what) {
  double size = 0, error = 0;
  for (size_t i = 0; i < ours.size(); ++i) {
    size = std::fmax(size, std::fabs(truth[i]));
    error = std::isnan(ours[i]) ? INFINITY : std::fmax(error, std::fabs(ours[i] - truth[i]));
  }
  check(error <= tolerance * size + 1e-6, what + ": error " + std::to_string(error));
}

std::vector<float> widened(const std::vector<float>& fp32, const std::vector<uint16_t>& half,
                           DType dtype) {
  if (dtype == DType::kFloat32) return fp32;
  std::vector<float> out(half.size());
  for (size_t i = 0; i < half.size(); ++i)
    out[i] = dtype == DType::kBFloat16 ? from_bfloat16(half[i]) : from_float16(half[i]);
  return out;
}

// A two-sided problem with ids, or a self-similarity without its own pairs, on `threads` threads.
void test_engine(const std::string& isa, DType dtype, int64_t n, int64_t m, int64_t d, bool self,
                 int threads, int64_t cache_bytes) {
  std::mt19937 random(n * 31 + m * 7 + d);
  if (self) m = n;
  const Features a(n, d, dtype, random), other(m, d, dtype, random);
  const Features& b = self ? a : other;
  std::vector<int64_t> row_ids(n), col_ids(m);
  for (auto& id : row_ids) id = static_cast<int64_t>(random() % 9) - 1;  // some padding
  for (auto& id : col_ids) id = static_cast<int64_t>(random() % 9) - 1;
  const float scale = 12;
  Problem p;
  p.a = a.matrix;
  p.b = b.matrix;
  p.self = self;
  p.scale = &scale;
  p.row_ids = row_ids.data();
  p.col_ids = self ? row_ids.data() : col_ids.data();
  p.positives = Positives::kLinear;
  p.exclude_self = self;
  p.cols = !self;

  const auto uniform = [&](int64_t k) {
    std::vector<float> v(k);
    for (float& x : v) x = std::uniform_real_distribution<float>(-1, 1)(random);
    return v;
  };
  const std::vector<float> u = uniform(n), v = uniform(m), alpha = uniform(n), beta = uniform(m);

  // the same in double
  std::vector<double> S(n * m), W(n * m, 0), top(n, -INFINITY), sum(n, 0), pos(n, 0);
  std::vector<double> ctop(m, -INFINITY), csum(m, 0), da(n * d, 0), db(m * d, 0);
  const auto allowed = [&](int64_t i, int64_t j) {
    return p.row_ids[i] >= 0 && p.col_ids[j] >= 0 && !(self && i == j);
  };
  const auto positive = [&](int64_t i, int64_t j) {
    return allowed(i, j) && p.row_ids[i] == p.col_ids[j];
  };
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      double dot = 0;
      for (int64_t k = 0; k < d; ++k) dot += double(a.exact[i * d + k]) * b.exact[j * d + k];
      S[i * m + j] = scale * dot;
      if (!allowed(i, j)) continue;
      top[i] = std::fmax(top[i], S[i * m + j]);
      ctop[j] = std::fmax(ctop[j], S[i * m + j]);
    }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      if (!allowed(i, j)) continue;
      sum[i] += std::exp(S[i * m + j] - top[i]);
      csum[j] += std::exp(S[i * m + j] - ctop[j]);
      if (positive(i, j)) pos[i] += S[i * m + j] - top[i];
    }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      if (!allowed(i, j)) continue;
      double w = u[i] * std::exp(S[i * m + j] - top[i]) / sum[i];
      if (!self) w += v[j] * std::exp(S[i * m + j] - ctop[j]) / csum[j];
      if (positive(i, j)) w += alpha[i] + (self ? 0 : beta[j]);
      for (int64_t k = 0; k < d; ++k) {
        da[i * d + k] += scale * w * b.exact[j * d + k];
        (self ? da : db)[j * d + k] += scale * w * a.exact[i * d + k];
      }
    }

  // ours; padded rows hold NaN
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < d && p.row_ids[i] < 0; ++k) {
      if (dtype == DType::kFloat32)
        const_cast<float&>(a.exact[i * d + k]) = NAN;
      else
        const_cast<uint16_t&>(a.half[i * d + k]) = 0x7fff;
    }
  std::vector<float> max(n), logsum(n), linear(n), cmax(m), clogsum(m), clinear(m);
  const Stats stats = {{max.data(), logsum.data(), linear.data(), nullptr},
                       {cmax.data(), clogsum.data(), clinear.data(), nullptr}};
  std::vector<char> memory(cache_bytes + 1);
  const TileCache cache = {cache_bytes ? memory.data() : nullptr, cache_bytes};
  const Run run = {&kernels(isa, dtype), threads};
  logsumexp_forward(p, stats, cache, run);
  std::vector<float> ga(n * d), gb(m * d);
  std::vector<uint16_t> ha(n * d), hb(m * d);
  Grads grads;
  grads.a = dtype == DType::kFloat32 ? static_cast<void*>(ga.data()) : ha.data();
  if (!self) grads.b = dtype == DType::kFloat32 ? static_cast<void*>(gb.data()) : hb.data();
  const Upstream up = {{u.data(), alpha.data()},
                       {self ? nullptr : v.data(), self ? nullptr : beta.data()}};
  logsumexp_backward(p, stats, up, grads, cache, run);

  const std::string what = isa + " " + std::to_string(static_cast<int>(dtype)) + " " +
                           std::to_string(n) + "x" + std::to_string(m) + "x" + std::to_string(d) +
                           (self ? " self" : "") + " threads " + std::to_string(threads);
  std::vector<float> lse(n), clse(m);
  std::vector<double> lse_truth(n), clse_truth(m);
  for (int64_t i = 0; i < n; ++i) {
    if (std::isinf(top[i])) {
      check(max[i] == -INFINITY && logsum[i] == -INFINITY, what + " empty row");
      continue;
    }
    lse[i] = max[i] + logsum[i];
    lse_truth[i] = top[i] + std::log(sum[i]);
  }
  for (int64_t j = 0; j < m && !self; ++j) {
    if (std::isinf(ctop[j])) continue;
    clse[j] = cmax[j] + clogsum[j];
    clse_truth[j] = ctop[j] + std::log(csum[j]);
  }
  for (int64_t i = 0; i < n; ++i)
    if (std::isinf(top[i])) pos[i] = linear[i] = 0;
  const double tolerance = dtype == DType::kFloat32 ? 1e-5 : 1e-2;
  close(lse, lse_truth, 2e-6, what + " lse");
  close(clse, clse_truth, 2e-6, what + " column lse");
  close(linear, pos, 1e-5, what + " positives");
  close(widened(ga, ha, dtype), da, tolerance, what + " gradient of a");
  if (!self) close(widened(gb, hb, dtype), db, tolerance, what + " gradient of b");
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  test_exp(quick ? 1009 : 61);
  test_softplus();
  test_conversions();
#if defined(__AVX512BF16__)
  test_emulated_product(0, 3);
  test_emulated_product(-121, 3);
  test_emulated_product(-60, -64);
#endif
  const int64_t shapes[][3] = {{1, 1, 1},    {1, 7, 3},      {7, 1, 70},   {33, 257, 70},
                               {257, 33, 1}, {300, 150, 129}, {513, 70, 33}, {64, 64, 600}};
  for (const std::string& isa : instruction_sets())
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
      for (const auto& s : shapes)
        for (const int threads : {1, 3}) {
          if (quick && s[0] * s[1] > 20000) continue;
          for (const bool self : {false, true})
            test_engine(isa, dtype, s[0], s[1], s[2], self, threads, threads == 1 ? 0 : 300000);
        }
  if (failures) std::printf("%d failures\n", failures);
  else std::printf("all right\n");
  return failures != 0;
}
