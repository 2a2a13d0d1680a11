// The CUDA kernels on the emulator against a direct evaluation in double: one small problem for
// each kernel, with edges and several steps, tiles and groups. tests/kernels/test_simt.py also builds this
// with a fault planted in the kernels' source. Prints what is wrong; exit status 1 if anything.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/problem.hpp"

using namespace ito::emulated;

namespace {

constexpr int kN = 200, kM = 300, kD = 72;  // 9 chunks, 3 steps; a third tile of 44 columns
constexpr float kScale = 5;

int failures = 0;

void expect_close(const char* what, int at, double got, double right, double within) {
  if (std::fabs(got - right) <= within) return;
  if (++failures < 5) std::printf("%s %d: got %g, wanted %g\n", what, at, got, right);
}

// Rows lie 2^24 chunks apart, so that the last ones are beyond 32 bits of chunks: 50 GiB of
// addresses, of which one page for each row is used.
struct Matrix {
  static constexpr int64_t kStride = 1 << 24;
  int rows;
  size_t bytes;
  simt::Chunk* data;
  std::vector<float> value;

  Matrix(int rows, uint32_t seed) : rows(rows), bytes(rows * kStride * 16), value(rows * kD) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (pages == MAP_FAILED) throw std::runtime_error("no address space for a matrix");
#ifdef MADV_NOHUGEPAGE
    madvise(pages, bytes, MADV_NOHUGEPAGE);
#endif
    data = static_cast<simt::Chunk*>(pages);
    std::mt19937 draw(seed);
    std::normal_distribution<float> normal(0, 1 / std::sqrt(float{kD}));
    for (int i = 0; i < rows; ++i) {
      auto* half = reinterpret_cast<uint16_t*>(data + i * kStride);
      for (int d = 0; d < kD; ++d) {
        half[d] = static_cast<uint16_t>(simt::to_bf16(normal(draw)));
        value[i * kD + d] = simt::from_bf16(half[d]);
      }
    }
  }
  ~Matrix() { munmap(data, bytes); }
  Matrix(const Matrix&) = delete;
  Side side() const {
    Side s;
    s.features = {data, static_cast<int64_t>(bytes / 16)};
    s.stride = kStride;
    s.length = rows;
    return s;
  }
};

template <class T>
simt::Global<T> tensor(std::vector<T>& x) {
  return {x.data(), static_cast<int64_t>(x.size())};
}
template <class T>
simt::Global<const T> input(const std::vector<T>& x) {
  return {x.data(), static_cast<int64_t>(x.size())};
}

void run() {
  const Matrix a(kN, 1), b(kM, 2);
  std::vector<double> s(kN * kM);
  for (int i = 0; i < kN; ++i)
    for (int j = 0; j < kM; ++j)
      for (int d = 0; d < kD; ++d)
        s[i * kM + j] += double{kScale} * a.value[i * kD + d] * b.value[j * kD + d];
  const std::vector<float> scale{kScale};

  Scores scores;
  scores.row = a.side();
  scores.col = b.side();
  scores.row_bytes = 2 * kD;
  scores.scale = input(scale);
  scores.positives = Positives::kLinear;
  scores.positives_matter = true;
  const Split split{2, 2, 1, 2, false};

  const std::vector<float> shift{3.5};
  std::vector<float> row_slots(kFields * 2 * kSlots * kN), col_slots(kFields * kSlots * kM);
  Forward f;
  f.scores = scores;
  f.scores.shift = input(shift);
  f.split = split;
  f.row_slots = tensor(row_slots);
  f.col_slots = tensor(col_slots);
  forward(f, {});

  const auto check_side = [&](const char* name, const std::vector<float>& slots, int length,
                              int count, int stride, int other, int other_stride) {
    std::vector<float> max(length), logsum(length), pos(length);
    std::vector<int32_t> underflowed(length, -1);
    const SideStats out{tensor(max), tensor(logsum), tensor(pos), {}};
    const auto check = [&] {
      for (int i = 0; i < length; ++i) {
        double sum = 0;
        for (int j = 0; j < other; ++j) sum += std::exp(s[i * stride + j * other_stride]);
        expect_close(name, i, max[i] + logsum[i], std::log(sum), 1e-4);
        if (i < std::min(kN, kM)) expect_close(name, i, pos[i] + max[i], s[i * kM + i], 1e-4);
      }
    };
    Merge m;
    m.slots = input(slots);
    m.length = length;
    m.count = count;
    m.positives = Positives::kLinear;
    m.shift = input(shift);
    m.out = out;
    m.underflowed = tensor(underflowed);
    merge(m, {});
    check();
    for (const int32_t x : underflowed) expect_close("underflowed", 0, x, 0, 0);

    // the last row again, with its maximum
    max[length - 1] = logsum[length - 1] = NAN;
    underflowed[length - 1] = 1;
    std::vector<float> memory(kFallbackFields * kSlots * length, NAN);
    Fallback again;
    again.scores = scores;
    if (stride == 1) std::swap(again.scores.row, again.scores.col);
    again.underflowed = input(underflowed);
    again.slots = tensor(memory);
    again.out = out;
    fallback(again, {});
    check();
  };
  check_side("row", row_slots, kN, 2 * kSlots, kM, kM, 1);
  check_side("column", col_slots, kM, kSlots, 1, kN, kM);

  // W of Σ_i row_i: softmax of rows, without a shift
  std::vector<Pair> weights(kN);
  std::vector<double> w(kN * kM);
  for (int i = 0; i < kN; ++i) {
    double sum = 0;
    for (int j = 0; j < kM; ++j) sum += std::exp(s[i * kM + j]);
    weights[i] = {static_cast<float>(1 / sum), 0};
    for (int j = 0; j < kM; ++j) w[i * kM + j] = std::exp(s[i * kM + j]) / sum;
  }
  scores.row.weights = input(weights);
  scores.positives = Positives::kNone;
  scores.positives_matter = false;

  const int stride = 96;  // two words, 4 halves each: 384 columns
  std::vector<TwoWords> words(256 * stride);
  std::vector<float> sums(3 * kWarpCols * kN, NAN);
  Panel p;
  p.scores = scores;
  p.split = {2, 1, 1, 3, false};
  p.last_row = kN;
  p.last_col = kM;
  p.panel = tensor(words);
  p.stride = stride;
  p.row_sums = tensor(sums);
  panel(p, {});
  const auto* half = reinterpret_cast<const uint16_t*>(words.data());
  for (int i = 0; i < kN; ++i) {
    for (int j = 0; j < kM; ++j) {
      const double right = w[i * kM + j];
      expect_close("W, row", i, simt::from_bf16(half[i * 384 + j]), right, 0.005 * right);
    }
    double sum = 0;
    for (int slot = 0; slot < 3 * kWarpCols; ++slot) sum += sums[slot * kN + i];
    expect_close("sum of W, row", i, sum, 1, 1e-4);
  }

  std::vector<Pair> grad(kN * kD / 2);
  Gradient g;
  g.scores = scores;
  g.grad = tensor(grad);
  g.stride = kD / 2;
  gradient(g, {});
  const float* value = &grad[0].x;
  for (int i = 0; i < kN; ++i)
    for (int d = 0; d < kD; ++d) {
      double right = 0;
      for (int j = 0; j < kM; ++j) right += w[i * kM + j] * b.value[j * kD + d];
      expect_close("gradient, row", i, value[i * kD + d], right, 0.005);
    }
}

}  // namespace

int main() {
  try {
    for (uint64_t seed = 0; seed < 2; ++seed) {
      simt::settings().seed = seed;
      run();
    }
  } catch (const std::exception& e) {
    std::puts(e.what());
    return 1;
  }
  if (failures == 0) std::puts("all right");
  return failures != 0;
}
