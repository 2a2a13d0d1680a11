// Matrix products of fp32 on AMX, which multiplies bf16 only. Every number is the sum of three
// bf16, each the rounded rest of those before it: x = x1 + x2 + x3, exactly, since 3 × 8 bits are
// the 24 of fp32. Of the nine products of a·b the six largest are computed:
//
//   a·b ≈ a1·b1 + (a1·b2 + a2·b1) + (a1·b3 + a2·b2 + a3·b1)
//
// The other three are together below 2^-23 of a·b, about as much as fp32 rounds off. One
// instruction adds 32 products to the result and rounds it there once: a sum of K terms rounds
// 6·K / 32 times.
//
// What differs from fp32: products of parts below 2^-126 are lost, so numbers below about 1e-30
// lose their last digits; and an infinite number counts as NaN, since its rest is inf - inf.
//
// Layouts: every operand is made of blocks of 32 × 32 numbers, and a block of its three parts, one
// after the other. Paired blocks are [16][32][2], with pairs along the summed dimension; others are
// [32][32], with the summed dimension last.
//
//   rows for scores        [i / 32][d / 32]  columns for scores     [j / 32][d / 32] paired
//   W for dA               [j / 32][i / 32]  columns for gradients  [d / 32][j / 32] paired
//   rows for gradients     [i / 32][d / 32]  W for dB               [j / 32][i / 32] paired
#pragma once
#include "cpu/isa/gemm_amx.hpp"

namespace {

struct GemmSplit {
  struct Element {
    uint16_t parts[3];  // what one number takes; its parts lie in three blocks
  };
  using Vec = Vec512;
  static constexpr const char* kArithmetic = "fp32 by six bf16";
  static constexpr bool kConverts = true;
  static constexpr int kColPanel = 32, kRowPanel = 32, kRowAlign = 32, kDepthAlign = 32;

  static constexpr int kParts = 3, kBlock = 32 * 32;  // bf16 in one part of a block

  // c[32][32] (+)= a · b over `depth` blocks. Those of `a` are `a_step` blocks apart, those of `b`
  // lie side by side. From one product to the next either operand stays where it is: 14 loads feed
  // 24 multiplications, where products of bf16 need one for each.
  static void block(int depth, const Element* a, int64_t a_step, const Element* b, float* c,
                    bool accumulate) {
    if (!accumulate) return block(depth, a, a_step, b, c);
    // Every sum starts at 0. One that went on from c would round 6 times for each step at the size
    // of c: for D = 4096 the error was 9 times that of dense fp32.
    alignas(64) float sum[kBlock];
    block(depth, a, a_step, b, sum);
    for (int i = 0; i < kBlock; i += Vec::kWidth)
      Vec::store(c + i, Vec::add(Vec::load(c + i), Vec::load(sum + i)));
  }
  static inline void block(int depth, const Element* a, int64_t a_step, const Element* b,
                           float* c) {
    GemmAmx::load_result(c, false);
    const uint16_t *left = a->parts, *right = b->parts;
    for (int k = 0; k < depth; ++k, left += a_step * kParts * kBlock, right += kParts * kBlock) {
      load_left(left, 3);
      load_right(right, 1);
      GemmAmx::multiply();
      load_left(left, 2);
      GemmAmx::multiply();
      load_right(right, 2);
      GemmAmx::multiply();
      load_left(left, 1);
      GemmAmx::multiply();
      load_right(right, 3);
      GemmAmx::multiply();
      load_right(right, 1);
      GemmAmx::multiply();
    }
    GemmAmx::store_result(c);
  }
  static inline void load_left(const uint16_t* block, int part) {
    const uint16_t* p = block + (part - 1) * kBlock;
    _tile_loadd(4, p, 64);
    _tile_loadd(5, p + kBlock / 2, 64);
  }
  static inline void load_right(const uint16_t* block, int part) {
    const uint16_t* p = block + (part - 1) * kBlock;
    _tile_loadd(6, p, 128);
    _tile_loadd(7, p + 32, 128);
  }

  static void scores(const Element* a, const Element* b, float* s, int rows, int width) {
    const GemmAmx::Tiles tiles;
    constexpr int kDepth = 256;
    for (int d = 0; d < width; d += kDepth) {
      const int depth = (width - d < kDepth ? width - d : kDepth) / 32;
      for (int i = 0; i < rows; i += 32)
        block(depth, a + int64_t(i) * width + d * 32, 1, b + d * 32, s + i * kColPanel, d > 0);
    }
  }

  static void grad_rows(const Element* w, const Element* b, int64_t b_panel, float* da, int rows,
                        int cols, int width, bool add) {
    const GemmAmx::Tiles tiles;
    for (int d = 0; d < width; d += kColPanel, b += b_panel, da += int64_t(rows) * kColPanel)
      for (int i = 0; i < rows; i += 32)
        block(cols / 32, w + i * 32, rows / 32, b, da + i * kColPanel, add);
  }

  static void grad_cols(const Element* w, const Element* a, float* dbt, int rows, int cols,
                        int width, bool add, const void*, int64_t) {
    const GemmAmx::Tiles tiles;
    w += int64_t(rows) * cols;  // the layout for dB
    a += int64_t(rows) * width;
    for (int j = 0; j < cols; j += kColPanel, w += int64_t(rows) * kColPanel)
      for (int d = 0; d < width; d += 32)
        block(rows / 32, a + d * 32, width / 32, w,
              dbt + int64_t(j) * width + d * kColPanel, add);
  }

  // The parts of 32 × 32 numbers.
  static void split(const float* x, uint16_t* out) {
    for (int k = 0; k < kBlock; k += 32) {
      const __m512 low = _mm512_loadu_ps(x + k), high = _mm512_loadu_ps(x + k + 16);
      const __m512i first = rounded(roundable(low), roundable(high));
      const __m512 low_rest = _mm512_sub_ps(low, lower(first));
      const __m512 high_rest = _mm512_sub_ps(high, upper(first));
      const __m512i second = rounded(low_rest, high_rest);
      const __m512i third = rounded(_mm512_sub_ps(low_rest, lower(second)),
                                    _mm512_sub_ps(high_rest, upper(second)));
      LayoutsBf16::store(out + k, first);
      LayoutsBf16::store(out + kBlock + k, second);
      LayoutsBf16::store(out + 2 * kBlock + k, third);
    }
  }
  static __m512i rounded(__m512 low, __m512 high) {
    return LayoutsBf16::bits(_mm512_cvtne2ps_pbh(high, low));
  }
  static __m512 lower(__m512i bf16) { return widened(_mm512_castsi512_si256(bf16)); }
  static __m512 upper(__m512i bf16) { return widened(_mm512_extracti64x4_epi64(bf16, 1)); }
  static __m512 widened(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
  }
  // Numbers that would round to infinity are cut to the largest bf16.
  static __m512 roundable(__m512 x) {
    const __m512i u = _mm512_castps_si512(x), largest = _mm512_set1_epi32(0x7f7f0000);
    const __m512i size = _mm512_and_si512(u, _mm512_set1_epi32(0x7fffffff));
    const __mmask16 cut = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(size, largest),
                                                  _mm512_set1_epi32(0x10000));
    return _mm512_castsi512_ps(_mm512_mask_and_epi32(u, cut, u, _mm512_set1_epi32(-0x10000)));
  }

  // The parts of the 32 rows × 32 features from (row, first) on; 0 beyond row `end`, beyond the
  // width and where `skip` is set.
  static void read_block(const Matrix& m, const uint8_t* skip, int64_t row, int64_t end,
                         int64_t first, uint16_t* out) {
    alignas(64) float x[32][32];
    const int count = m.width - first < 32 ? static_cast<int>(m.width - first) : 32;
    if (count < 32) std::memset(x, 0, sizeof x);
    read_rows(m, skip, row, end - row, 32, first, count, x[0], 32);
    split(x[0], out);
  }

  static void pack_rows(const Matrix& m, const uint8_t* skip, int64_t first, int rows,
                        Element* out) {
    alignas(64) uint16_t pairs[kBlock];
    const int width = LayoutsBf16::padded(m.width);
    uint16_t *scores = out->parts, *grad = out[int64_t(LayoutsBf16::padded(rows)) * width].parts;
    for (int i = 0; i < rows; i += 32)
      for (int d = 0; d < width; d += 32) {
        read_block(m, skip, first + i, first + rows, d, scores);
        for (int part = 0; part < kParts; ++part, scores += kBlock, grad += kBlock) {
          interleave(scores, pairs);
          LayoutsBf16::transpose_pairs(pairs, 16, 32, grad);
        }
      }
  }

  static void pack_cols(const Matrix& m, const uint8_t* skip, int64_t panel, Element* scores,
                        Element* grad, int64_t grad_panel) {
    alignas(64) uint16_t parts[kParts * kBlock];
    const int64_t first = panel * 32;
    const int width = LayoutsBf16::padded(m.width);
    uint16_t* paired = scores[first * width].parts;
    for (int d = 0; d < width; d += 32) {
      read_block(m, skip, first, m.rows, d, parts);
      uint16_t* to = grad ? grad[d / 32 * grad_panel + first * 32].parts : nullptr;
      for (int part = 0; part < kParts; ++part, paired += kBlock) {
        LayoutsBf16::transpose_pairs(parts + part * kBlock, 32, 16, paired);
        if (grad) interleave(parts + part * kBlock, to + part * kBlock);
      }
    }
  }

  // Both layouts of W, one after the other.
  static void convert(const float* w, int rows, int cols, Element* out) {
    const int64_t count = int64_t(rows) * cols;
    uint16_t *plain = out->parts, *paired = out[count].parts;
    for (int64_t at = 0; at < count; at += kBlock) {
      split(w + at, plain);
      for (int part = 0; part < kParts; ++part, plain += kBlock, paired += kBlock)
        interleave(plain, paired);
    }
  }
  static void interleave(const uint16_t* block, uint16_t* out) {
    LayoutsBf16::interleave(reinterpret_cast<const uint16_t(*)[32]>(block), out);
  }

  // Six multiplications of bf16 count as one of fp32.
  static double peak(int64_t rounds) { return GemmAmx::peak(rounds) / 6; }
};

}  // namespace
