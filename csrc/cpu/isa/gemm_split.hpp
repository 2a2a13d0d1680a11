// Matrix products of fp32 on AMX, which multiplies bf16 only. Every number is the sum of three bf16,
// each the rounded rest of those before it: x = x1 + x2 + x3, exactly, since 3 × 8 bits are the 24
// of fp32. Of the nine products of a·b the six largest are computed:
//
//   a·b ≈ a1·b1 + (a1·b2 + a2·b1) + (a1·b3 + a2·b2 + a3·b1)
//
// The other three are below 2^-23 of a·b, about as much as fp32 rounds off. One instruction adds 32
// products to the result and rounds it there once, so a sum over D rounds 6·D / 32 times, not D.
//
// What differs from fp32: products of parts below 2^-126 are lost, so features or gradients below
// about 1e-30 lose digits from the last one on; and an infinite number gives NaN where fp32 may give
// an infinite one, as inf·b1 + inf·b2 is inf - inf where b2 has the other sign, inf·0 where it is 0.
//
// Layouts: every operand is made of blocks of 32 × 32 numbers, and a block of its three parts, one
// after the other. "paired" blocks are [16][32][2], pairs along the summed dimension; others [32][32]
// with the summed dimension last.
//
//   rows for scores        [i / 32][d / 32]           columns for scores     [j / 32][d / 32] paired
//   W for dA               [j / 32][i / 32]           columns for gradients  [d / 32][j / 32] paired
//   rows for gradients     [i / 32][d / 32], d first  W for dB               [j / 32][i / 32] paired
#pragma once
#include "cpu/isa/gemm_amx.hpp"

namespace {

struct GemmSplit {
  struct Element {
    uint16_t parts[3];  // what one number takes; its parts lie in three blocks
  };
  using Vec = Vec512;
  using Layouts = LayoutsBf16;
  static constexpr const char* kArithmetic = "fp32 by six bf16";
  static constexpr bool kConverts = true;
  static constexpr int kColPanel = 32, kRowPanel = 32, kRowAlign = 32, kDepthAlign = 32;

  static constexpr int kParts = 3, kBlock = 32 * 32;  // bf16 in one part of a block
  using Block = uint16_t[kParts][32][32];

  // c[32][32] (+)= a · b over `depth` blocks. Those of `a` are `a_step` blocks apart, those of `b`
  // lie side by side. From one product to the next either operand stays where it is: 14 loads feed
  // 24 multiplications, where products of bf16 need one for each.
  static inline void block(int depth, const Element* a, int64_t a_step, const Element* b, float* c,
                           bool accumulate) {
    GemmAmx::load_result(c, accumulate);
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
    for (int i = 0; i < rows; i += 32)
      block(width / 32, a + int64_t(i) * width, 1, b, s + i * kColPanel, false);
  }

  static void grad_rows(const Element* w, const Element* b, int64_t b_panel, float* da, int rows,
                        int cols, int width, bool add) {
    const GemmAmx::Tiles tiles;
    for (int d = 0; d < width; d += kColPanel, b += b_panel, da += int64_t(rows) * kColPanel)
      for (int i = 0; i < rows; i += 32)
        block(cols / 32, w + i * 32, rows / 32, b, da + i * kColPanel, add);
  }

  static void grad_cols(const Element* w, const Element* a, float* dbt, int rows, int cols,
                        int width, bool add) {
    const GemmAmx::Tiles tiles;
    w += int64_t(rows) * cols;  // the layout for dB
    a += int64_t(rows) * width;
    for (int j = 0; j < cols; j += kColPanel, w += int64_t(rows) * kColPanel)
      for (int d = 0; d < width; d += 32)
        block(rows / 32, a + d * 32, width / 32, w,
              dbt + int64_t(j) * width + d * kColPanel, add);
  }

  // The parts of 32 × 32 numbers.
  static void split(const float* x, Block& out) {
    for (int k = 0; k < kBlock; k += 32) {
      __m512 low = _mm512_loadu_ps(x + k), high = _mm512_loadu_ps(x + k + 16);
      for (int part = 0; part < kParts; ++part) {
        const __m512i rounded = LayoutsBf16::bits(_mm512_cvtne2ps_pbh(roundable(high),
                                                                      roundable(low)));
        LayoutsBf16::store(out[part][0] + k, rounded);
        low = rest(low, _mm512_castsi512_si256(rounded));
        high = rest(high, _mm512_extracti64x4_epi64(rounded, 1));
      }
    }
  }
  // Numbers that would round to infinity are cut to the largest bf16.
  static __m512 roundable(__m512 x) {
    const __m512i u = _mm512_castps_si512(x), top = _mm512_set1_epi32(0x7f7f0000);
    const __m512i above = _mm512_sub_epi32(_mm512_and_si512(u, _mm512_set1_epi32(0x7fffffff)), top);
    const __mmask16 huge = _mm512_cmplt_epu32_mask(above, _mm512_set1_epi32(0x10000));
    return _mm512_castsi512_ps(
        _mm512_mask_and_epi32(u, huge, u, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  // What `rounded` leaves of x; 0 where that is infinite or NaN.
  static __m512 rest(__m512 x, __m256i rounded) {
    const __m512 y = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
    const __mmask16 finite = Vec::less(Vec::abs(x), Vec::set(ito::kInf));
    return _mm512_maskz_sub_ps(finite, x, y);
  }

  // The parts of the 32 rows × 32 features from (row, first) on; 0 beyond row `end`, beyond the
  // width and where `skip` is set.
  static void read_block(const Matrix& m, const uint8_t* skip, int64_t row, int64_t end,
                         int64_t first, Block& out) {
    alignas(64) float x[32][32];
    const int count = m.width - first < 32 ? static_cast<int>(m.width - first) : 32;
    if (count < 32) std::memset(x, 0, sizeof x);
    read_rows(m, skip, row, end - row, 32, first, count, x[0], 32);
    split(x[0], out);
  }

  static void pack_rows(const Matrix& m, const uint8_t* skip, int64_t first, int rows,
                        Element* out) {
    alignas(64) Block parts;
    alignas(64) uint16_t pairs[kBlock];
    const int width = LayoutsBf16::padded(m.width);
    uint16_t *scores = out->parts, *grad = out[int64_t(LayoutsBf16::padded(rows)) * width].parts;
    for (int i = 0; i < rows; i += 32)
      for (int d = 0; d < width; d += 32, scores += kParts * kBlock) {
        read_block(m, skip, first + i, first + rows, d, parts);
        std::memcpy(scores, parts, sizeof parts);
        for (int part = 0; part < kParts; ++part, grad += kBlock) {
          LayoutsBf16::interleave(parts[part], pairs);
          LayoutsBf16::transpose_pairs(pairs, 16, 32, grad);
        }
      }
  }

  static void pack_cols(const Matrix& m, const uint8_t* skip, int64_t panel, Element* scores,
                        Element* grad, int64_t grad_panel) {
    alignas(64) Block parts;
    const int64_t first = panel * 32;
    const int width = LayoutsBf16::padded(m.width);
    scores += first * width;
    for (int d = 0; d < width; d += 32, scores += kBlock) {
      read_block(m, skip, first, m.rows, d, parts);
      for (int part = 0; part < kParts; ++part) {
        LayoutsBf16::transpose_pairs(parts[part][0], 32, 16, scores->parts + part * kBlock);
        if (grad)
          LayoutsBf16::interleave(parts[part], (grad + d / 32 * grad_panel + first * 32)->parts +
                                                   part * kBlock);
      }
    }
  }

  // Both layouts of W, one after the other.
  static void convert(const float* w, int rows, int cols, Element* out) {
    alignas(64) Block parts;
    const int64_t count = int64_t(rows) * cols;
    uint16_t* paired = (out + count)->parts;
    for (int64_t at = 0; at < count; at += kBlock, out += kBlock) {
      split(w + at, parts);
      std::memcpy(out->parts, parts, sizeof parts);
      for (int part = 0; part < kParts; ++part, paired += kBlock)
        LayoutsBf16::interleave(parts[part], paired);
    }
  }

  // Six multiplications of bf16 count as one of fp32.
  static double peak(int64_t rounds) { return GemmAmx::peak(rounds) / 6; }
};

}  // namespace
