// The emulator by itself: its instructions against direct evaluation, and kernels with one planted
// fault each, which it must report on every seed. Prints what fails; exit status 1 if anything.
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "simt/device.hpp"

namespace {

int failures = 0;

void expect(bool right, const std::string& what) {
  if (right) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

// What the emulator says of a kernel: empty if nothing.
std::string report(int threads, int shared_bytes, const std::function<void()>& kernel) {
  try {
    simt::launch("kernel", 2, threads, shared_bytes, kernel);
    return "";
  } catch (const simt::Error& e) {
    return e.what();
  }
}

void expect_report(const std::string& said, const char* expected, const char* kernel) {
  const auto has = [&](const char* part) { return said.find(part) != std::string::npos; };
  expect(has(expected) && has("test_simt.cpp:"),
         std::string(kernel) + ": wanted \"" + expected + "\", got \"" + said + "\"");
}

// ---- a pipeline like that of the kernels: two stages of 64 rows, read by other threads

enum class Fault {
  kNone,
  kNoBarrierBeforeReading,
  kNoBarrierBeforeOverwriting,
  kWaitsForTooFew,
  kOneRowTooMany,
  kStoresOneTooMany,
  kSharedOneTooMany,
  kNeverLoaded,
  kSwizzle,
};

constexpr int kRowCount = 64, kSteps = 5;

void pipeline(Fault fault, simt::Global<const simt::Chunk> in, simt::Global<float> out) {
  const int thread = threadIdx.x, rows = static_cast<int>(in.size) / kSteps;
  const auto place = [](int row) { return row % 8 ^ row / 8 % 8; };  // within 8 rows
  const auto load = [&](int step) {
    if (step < kSteps && !(fault == Fault::kNeverLoaded && thread == 40)) {
      const bool inside = thread < rows + (fault == Fault::kOneRowTooMany);
      const int to = step % 2 * kRowCount + thread / 8 * 8 + place(thread);
      simt::cp_async(simt::shared_memory(), to + (fault == Fault::kSharedOneTooMany ? 8 : 0), in,
                     step == kSteps - 1 ? step * rows + thread : step * rows + thread % rows,
                     inside ? 16 : 0);
    }
    simt::cp_async_commit();
  };
  load(0);
  float sum = 0;
  for (int step = 0; step < kSteps; ++step) {
    load(step + 1);
    if (fault == Fault::kWaitsForTooFew)
      simt::cp_async_wait<2>();
    else
      simt::cp_async_wait<1>();
    if (fault != Fault::kNoBarrierBeforeReading) simt::barrier();
    const int row = (thread + 32) % kRowCount;  // another warp's
    const int from = row / 8 * 8 + (fault == Fault::kSwizzle ? row % 8 : place(row));
    uint32_t words[4];
    simt::ldmatrix(words, simt::shared_memory() + step % 2 * kRowCount, from);
    for (const uint32_t word : words) sum += simt::as_float(word);
    if (fault != Fault::kNoBarrierBeforeOverwriting) simt::barrier();
  }
  if (thread < rows + (fault == Fault::kStoresOneTooMany)) out.store(thread, sum);
}

void test_pipeline() {
  const int rows = 61;
  std::vector<simt::Chunk> in(kSteps * rows);
  std::mt19937 draw(0);
  for (auto& chunk : in)
    for (uint32_t& word : chunk.word) word = simt::as_bits(static_cast<float>(draw() % 1000));
  std::vector<float> right, out(rows);
  const auto run = [&](Fault fault) {
    return report(kRowCount, 2 * kRowCount * 16, [&] {
      pipeline(fault, {in.data(), static_cast<int64_t>(in.size())},
               {out.data(), static_cast<int64_t>(out.size())});
    });
  };
  const std::vector<std::tuple<Fault, const char*, const char*>> faults = {
      // which of the two threads is first decides what the report is
      {Fault::kNoBarrierBeforeReading, "reads shared chunk", "no barrier before reading"},
      {Fault::kNoBarrierBeforeOverwriting, "reads shared chunk", "no barrier before overwriting"},
      {Fault::kWaitsForTooFew, "has not been waited for", "waits for too few"},
      {Fault::kOneRowTooMany, "outside of a tensor", "one row too many"},
      {Fault::kStoresOneTooMany, "outside of a tensor", "stores one too many"},
      {Fault::kSharedOneTooMany, "outside of shared memory", "shared, one row too many"},
      {Fault::kNeverLoaded, "never written", "a row that is not loaded"},
  };
  for (uint64_t seed = 0; seed < 20; ++seed) {
    simt::settings().seed = seed;
    const std::string said = run(Fault::kNone);
    expect(said.empty(), "a kernel without faults: " + said);
    if (right.empty()) right = out;
    expect(out == right, "the order of warps changes the result");
    for (const auto& [fault, expected, name] : faults) expect_report(run(fault), expected, name);
    expect(run(Fault::kSwizzle).empty() && out != right, "a wrong swizzle gives the right result");
  }
}

void test_races() {
  const std::vector<simt::Chunk> in(64);
  const auto said = [&](bool barrier, bool writes_again) {
    return report(32, 64 * 16, [&, barrier, writes_again] {
      const int lane = threadIdx.x;
      const auto copy = [&](int chunk) {
        simt::cp_async(simt::shared_memory(), chunk, {in.data(), 64}, chunk, 16);
        simt::cp_async_commit();
        simt::cp_async_wait<0>();
      };
      copy(lane);
      if (barrier) simt::barrier();
      uint32_t words[4];
      simt::ldmatrix(words, simt::shared_memory(), max(lane - 1, 0));
      if (writes_again) copy(lane);
    });
  };
  expect_report(said(false, false), "race: shared chunk 0 was written by thread 0", "no barrier");
  expect_report(said(true, true), "race: shared chunk 0 was read by other threads", "no second");
  expect(said(true, false).empty(), "a barrier, and no race");
}

// ---- control flow

void test_divergence() {
  simt::settings().seed = 1;
  const auto said = [](const std::function<void(int)>& kernel) {
    return report(64, 0, [&] { kernel(threadIdx.x); });
  };
  expect_report(said([](int i) { if (i != 5) simt::barrier(); }), "same barrier", "one lane skips");
  expect_report(said([](int i) { if (i < 32) simt::barrier(); }), "same barrier", "a warp skips");
  expect_report(said([](int i) {
                  if (i < 32)
                    simt::barrier();
                  else
                    simt::barrier();
                }),
                "same barrier", "two barriers");
  expect_report(said([](int i) { if (i % 2) simt::any(true); }), "same instruction",
                "half a warp votes");
  expect_report(said([](int i) {
                  if (i % 2)
                    simt::any(true);
                  else
                    simt::any(true);
                }),
                "same instruction", "two votes");
  expect_report(said([](int i) {
                  if (i % 2)
                    simt::any(true);
                  else
                    simt::barrier();
                }),
                "same instruction", "a vote and a barrier");
  expect(said([](int i) {
           if (i < 32) simt::any(true);
         }).empty(),
         "warps may take different ways");
}

// ---- instructions

void test_shuffle_and_vote() {
  const std::string said = report(64, 0, [] {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int mask = 1; mask < 32; mask *= 2)
      expect(simt::shuffle_xor(threadIdx.x, mask) == unsigned(warp * 32 + (lane ^ mask)),
             "shuffle_xor");
    expect(simt::any(threadIdx.x == 40) == (warp == 1), "any");
  });
  expect(said.empty(), said);
}

// A[16 × K]·B[K × 8] by ldmatrix and mma; `b` is [8][K], or [K][8] where it is read transposed.
template <int kDepth, class Convert, class Multiply>
void test_product(const char* name, bool transposed, Convert to_bits, Multiply multiply) {
  constexpr int kBytes = kDepth == 8 ? 4 : 2;
  std::mt19937 draw(1);
  std::vector<float> a(16 * kDepth), b(16 * kDepth), c(16 * 16);
  std::vector<simt::Chunk> in(64);  // A, then B: 32 bytes in a row, or 16 columns in a row
  const auto put = [&](int chunk, int at, float x) {
    const uint32_t bits = to_bits(x);
    std::memcpy(reinterpret_cast<char*>(&in[chunk]) + at * kBytes, &bits, kBytes);
  };
  constexpr int kPerChunk = 16 / kBytes;
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < kDepth; ++k) {
      a[r * kDepth + k] = static_cast<float>(static_cast<int>(draw() % 64) - 32) / 8;
      b[r * kDepth + k] = static_cast<float>(static_cast<int>(draw() % 64) - 32) / 8;  // [n][k]
      put(r * 2 + k / kPerChunk, k % kPerChunk, a[r * kDepth + k]);
      if (transposed)
        put(32 + k * 2 + r / kPerChunk, r % kPerChunk, b[r * kDepth + k]);
      else
        put(32 + r * 2 + k / kPerChunk, k % kPerChunk, b[r * kDepth + k]);
    }
  const std::string said = report(32, 64 * 16, [&] {
    const int lane = threadIdx.x;
    const simt::Global<const simt::Chunk> from{in.data(), 64};
    for (int i = lane; i < 64; i += 32) simt::cp_async(simt::shared_memory(), i, from, i, 16);
    simt::cp_async_commit();
    simt::cp_async_wait<0>();
    simt::barrier();
    uint32_t x[4], y[4];
    simt::ldmatrix(x, simt::shared_memory(), lane % 16 * 2 + lane / 16);
    if (transposed)
      simt::ldmatrix_transposed(y, simt::shared_memory(), 32 + lane % 16 * 2 + lane / 16);
    else
      simt::ldmatrix(y, simt::shared_memory(),
                     32 + (lane % 8 + lane / 16 * 8) * 2 + lane / 8 % 2);
    for (int tile = 0; tile < 2; ++tile) {
      float d[4] = {1, 1, 1, 1};
      multiply(d, x, y[tile * 2], y[tile * 2 + 1]);
      for (int i = 0; i < 4; ++i)
        c[(lane / 4 + i / 2 * 8) * 16 + tile * 8 + lane % 4 * 2 + i % 2] = d[i];
    }
  });
  expect(said.empty(), said);
  for (int r = 0; r < 16; ++r)
    for (int n = 0; n < 16; ++n) {
      float right = 1;
      for (int k = 0; k < kDepth; ++k) right += a[r * kDepth + k] * b[n * kDepth + k];
      expect(c[r * 16 + n] == right, std::string(name) + (transposed ? ", transposed" : ""));
    }
}

void test_products() {
  const auto bf16 = [](float(&d)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {
    simt::mma_bf16(d, a, b0, b1);
  };
  const auto f16 = [](float(&d)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {
    simt::mma_f16(d, a, b0, b1);
  };
  const auto tf32 = [](float(&d)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {
    simt::mma_tf32(d, a, b0, b1);
  };
  for (const bool transposed : {false, true}) {
    test_product<16>("bf16", transposed, simt::to_bf16, bf16);
    test_product<16>("fp16", transposed, simt::to_f16, f16);
  }
  test_product<8>("tf32", false, simt::as_bits, tf32);
}

void test_numbers() {
  for (uint32_t half = 0; half < 0x10000; ++half) {
    const float x = simt::from_f16(half);
    if (x == x) expect(simt::to_f16(x) == half, "fp16 " + std::to_string(half));
  }
  expect(simt::from_f16(0x3c01) == 1 + 0x1p-10f && simt::from_f16(1) == 0x1p-24f, "from fp16");
  expect(simt::to_f16(1 + 0x1p-11f) == 0x3c00 && simt::to_f16(1 + 0x1.8p-10f) == 0x3c02 &&
             simt::to_f16(0x1.8p-24f) == 2 && simt::to_f16(65520) == 0x7c00,
         "fp16 ties go to even");
  expect(simt::to_bf16(1 + 0x1p-8f) == 0x3f80 && simt::to_bf16(1 + 0x1.8p-7f) == 0x3f82,
         "bf16 ties go to even");
  expect(simt::as_float(simt::to_tf32(1 + 0x1p-11f)) == 1 + 0x1p-10f, "tf32 ties go up");
  expect(simt::add_truncated(1, 0x1.8p-24) == 1 && simt::add_truncated(-1, -0x1.8p-24) == -1 &&
             simt::add_truncated(1, -0x1p-30) == 1 - 0x1p-24f,
         "the accumulator cuts off");
}

void test_bank_conflicts() {
  const auto passes = [](int stride) {
    simt::settings().banks.clear();
    simt::settings().trace = true;
    const std::vector<simt::Chunk> in(512);
    const std::string said = report(32, 512 * 16, [&] {
      const simt::Global<const simt::Chunk> from{in.data(), 512};
      for (int i = threadIdx.x; i < 512; i += 32)
        simt::cp_async(simt::shared_memory(), i, from, i, 16);
      simt::cp_async_commit();
      simt::cp_async_wait<0>();
      simt::barrier();
      uint32_t words[4];
      simt::ldmatrix(words, simt::shared_memory(), threadIdx.x * stride);
    });
    simt::settings().trace = false;
    expect(said.empty(), said);
    std::pair<int64_t, int64_t> result{0, 0};  // of cp.async, of ldmatrix
    for (const auto& [where, use] : simt::settings().banks)
      (where.find("ldmatrix") == std::string::npos ? result.first : result.second) +=
          use.passes;
    return result;
  };
  for (const auto& [stride, expected] : {std::pair{1, 4}, {2, 8}, {4, 16}, {8, 32}, {9, 4}}) {
    const auto [copies, reads] = passes(stride);
    expect(copies == 2 * 16 * 4, "copies of adjacent chunks need one pass for eight lanes");
    expect(reads == 2 * expected, "passes at a stride of " + std::to_string(stride) + " chunks");
  }
}

}  // namespace

int main() {
  test_pipeline();
  test_races();
  test_divergence();
  test_shuffle_and_vote();
  test_products();
  test_numbers();
  test_bank_conflicts();
  if (failures == 0) std::puts("all right");
  return failures != 0;
}
