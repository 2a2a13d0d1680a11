// Matrix products of bf16 with vdpbf16ps: dot products of pairs. Layouts: layouts_bf16.hpp; and
//
//   rows for scores  [i / 14][d / 2][i % 14][2]
#pragma once
#include "cpu/isa/layouts_bf16.hpp"
#include "cpu/isa/micro_kernel.hpp"

namespace {

struct DotBf16 {
  using Vec = Vec512;
  using Unit = uint32_t;  // a pair
  using Operand = __m512bh;
  static constexpr int kElement = sizeof(uint16_t);
  static Operand load(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Operand broadcast(uint32_t x) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(x)); }
  static __m512 multiply_add(Operand a, Operand b, __m512 c) { return _mm512_dpbf16_ps(c, a, b); }
  static __m512 multiply_add(const uint32_t* a, Operand b, __m512 c) {
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
    return c;
  }
};

struct GemmDotBf16 : LayoutsBf16 {
  static constexpr int kRowPanel = 14;
  using Kernel = MicroKernel<DotBf16, kRowPanel, 2>;
  using Ahead = Kernel::Ahead;

  static const uint32_t* pairs(const uint16_t* p) { return reinterpret_cast<const uint32_t*>(p); }

  static void scores(const uint16_t* a, const uint16_t* b, float* s, int rows, int width) {
    const int depth = width / 2;
    Ahead ahead(b + width * kColPanel, int64_t(width) * kColPanel * 2,
                int64_t(ito::ceil_div(rows, kRowPanel)) * depth);
    for (int i = 0; i < rows; i += kRowPanel, ahead = ahead.after(depth))
      Kernel::rows<1, kRowPanel>(rows - i, depth, depth, pairs(a) + int64_t(i) * depth, 0, pairs(b),
                                 s + i * kColPanel, false, ahead, Ahead(b));
  }

  static void grad_rows(const uint16_t* w, const uint16_t* b, int64_t b_panel, float* da, int rows,
                        int cols, int width, bool add) {
    const uint16_t* const next_tile = b + int64_t(cols) * kColPanel;
    for (int d = 0; d < width; d += kColPanel, b += b_panel, da += int64_t(rows) * kColPanel) {
      Ahead ahead(d + kColPanel < width ? b + b_panel : next_tile, int64_t(cols) * kColPanel * 2,
                  int64_t(ito::ceil_div(rows, kRowPanel)) * cols / 2);
      for (int i = 0; i < rows; i += kRowPanel, ahead = ahead.after(cols / 2))
        Kernel::rows<16, 1>(rows - i, cols / 2, 16, pairs(w) + i * 16, int64_t(rows) * 16, pairs(b),
                            da + i * kColPanel, add, ahead, Ahead(b));
    }
  }

  static void grad_cols(const uint16_t* w, const uint16_t* a, float* dbt, int rows, int cols,
                        int width, bool add, const void* next, int64_t next_bytes) {
    constexpr int kBlock = kRowPanel * kColPanel;
    const int64_t blocks = int64_t(cols / kColPanel) * ito::ceil_div(width, kRowPanel);
    Ahead ahead = next ? Ahead(next, next_bytes, blocks * rows / 2) : Ahead(w);
    w += int64_t(rows) * cols;  // the layout for dB
    a += score_rows(rows) * width;
    for (int j = 0; j < cols; j += kColPanel, w += int64_t(rows) * kColPanel)
      for (int d = 0; d < width; d += kRowPanel, ahead = ahead.after(rows / 2)) {
        float* const c = dbt + int64_t(j) * width + d * kColPanel;
        Kernel::rows<16, 1>(width - d, rows / 2, 16, pairs(a) + d * 16, int64_t(width) * 16,
                            pairs(w), c, add,
                            Ahead(c + kBlock, kBlock * sizeof(float), rows / 2), ahead);
      }
  }

  // The rows for scores are whole row panels; the rows for gradients follow them.
  static int64_t score_rows(int rows) { return ito::round_up(rows, kRowPanel); }

  static void pack_rows(const Matrix& m, const uint8_t* skip, int64_t first, int rows,
                        uint16_t* out) {
    alignas(64) uint16_t block[32][32];
    const int aligned = padded(rows);
    uint16_t* scores = out;
    for (int i = 0; i < score_rows(aligned); i += kRowPanel)
      for (int d = 0; d < m.width; d += 32) {
        read_block(m, skip, first + i, first + rows, d, block);
        for (int k = 0; k < 32; k += 2, scores += 2 * kRowPanel)
          for (int r = 0; r < kRowPanel; ++r) std::memcpy(scores + 2 * r, &block[r][k], 4);
      }
    pack_rows_for_gradients(m, skip, first, rows, out + score_rows(aligned) * padded(m.width));
  }

  static double peak(int64_t rounds) {
    return Kernel::peak(rounds, DotBf16::broadcast(0x3f803f80), DotBf16::broadcast(0x3a803a80));
  }
};

}  // namespace
