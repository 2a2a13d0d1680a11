// Layouts of bf16 operands. The processor multiplies pairs of bf16 that are adjacent in the summed
// dimension of a product, so every operand is made of such pairs ([2] below):
//
//   columns for scores     [j / 32][d / 2][j % 32][2]
//   columns for gradients  [d / 32][j / 2][d % 32][2]
//   W for dA               [j / 32][i][j % 32]
//   W for dB               [j / 32][i / 2][j % 32][2]
//   rows for gradients     [i / 32][d][i % 32]
//
// Rows of a tile and widths are multiples of 32. W is rounded to bf16 here, after all subtractions:
// those are in fp32.
#pragma once
#include "cpu/isa/convert.hpp"
#include "cpu/isa/vec_avx512.hpp"

namespace {

struct LayoutsBf16 {
  using Vec = Vec512;
  using Element = uint16_t;
  static constexpr const char* kArithmetic = "bf16";
  static constexpr bool kConverts = true;
  static constexpr int kColPanel = 32, kRowAlign = 32, kDepthAlign = 32;

  static int padded(int64_t n) { return static_cast<int>(ito::round_up(n, 32)); }

  // The 32 rows × 32 features from (row, first) on; 0 beyond row `end`, beyond the width and where
  // `skip` is set.
  static void read_block(const Matrix& m, const uint8_t* skip, int64_t row, int64_t end,
                         int64_t first, uint16_t (*out)[32]) {
    const uint16_t* data = static_cast<const uint16_t*>(m.data);
    const int64_t count = m.width - first < 32 ? m.width - first : 32;
    for (int r = 0; r < 32; ++r) {
      const bool used = row + r < end && !(skip && skip[row + r]);
      if (!used || count < 32) std::memset(out[r], 0, sizeof out[r]);
      if (used) std::memcpy(out[r], data + (row + r) * m.stride + first, count * 2);
    }
  }

  static void pack_cols(const Matrix& m, const uint8_t* skip, int64_t panel, uint16_t* scores,
                        uint16_t* grad, int64_t grad_panel) {
    alignas(64) uint16_t block[32][32];
    const int64_t first = panel * 32;
    scores += first * padded(m.width);
    for (int d = 0; d < m.width; d += 32, scores += 32 * 32) {
      read_block(m, skip, first, m.rows, d, block);
      transpose_pairs(block[0], 32, 16, scores);
      if (grad) interleave(block, grad + d / 32 * grad_panel + first * 32);
    }
  }

  // A pair is moved as the 4 bytes of a float: out[column][row][2] of in[row][column][2].
  static void transpose_pairs(const uint16_t* in, int rows, int cols, uint16_t* out) {
    Transpose<Vec>::run(reinterpret_cast<const float*>(in), cols, rows, cols,
                        reinterpret_cast<float*>(out), rows);
  }
  // Pairs of adjacent rows: out[row / 2][column][2].
  static void interleave(const uint16_t (*in)[32], uint16_t* out) {
    const __m512i low = alternate(0), high = alternate(16);
    for (int r = 0; r < 32; r += 2, out += 64) {
      const __m512i a = _mm512_load_si512(in[r]), b = _mm512_load_si512(in[r + 1]);
      store(out, _mm512_permutex2var_epi16(a, low, b));
      store(out + 32, _mm512_permutex2var_epi16(a, high, b));
    }
  }
  // A permutation that takes one number of each of two vectors, 16 times, from number `first` on.
  static __m512i alternate(int first) {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(first + i / 2 + i % 2 * 32);
    return _mm512_load_si512(order);
  }

  // The layout "rows for gradients".
  static void pack_rows_for_gradients(const Matrix& m, const uint8_t* skip, int64_t first, int rows,
                                      uint16_t* out) {
    alignas(64) uint16_t block[32][32], pairs[16 * 64];
    for (int i = 0; i < rows; i += 32)
      for (int d = 0; d < m.width; d += 32, out += 32 * 32) {
        read_block(m, skip, first + i, first + rows, d, block);
        interleave(block, pairs);
        transpose_pairs(pairs, 16, 32, out);
      }
  }

  // Both layouts of W, one after the other.
  static void convert(const float* w, int rows, int cols, uint16_t* out) {
    const __m512i low = alternate(0), high = alternate(16);
    uint16_t* by_pair = out + int64_t(rows) * cols;
    for (int64_t at = 0; at < int64_t(rows) * cols; at += 64) {
      const float* p = w + at;  // rows i and i + 1 of a panel
      const __m512 a0 = _mm512_loadu_ps(p), a1 = _mm512_loadu_ps(p + 16);
      const __m512 b0 = _mm512_loadu_ps(p + 32), b1 = _mm512_loadu_ps(p + 48);
      const __m512i a = bits(_mm512_cvtne2ps_pbh(a1, a0)), b = bits(_mm512_cvtne2ps_pbh(b1, b0));
      store(out + at, a);
      store(out + at + 32, b);
      store(by_pair + at, _mm512_permutex2var_epi16(a, low, b));
      store(by_pair + at + 32, _mm512_permutex2var_epi16(a, high, b));
    }
  }
  static __m512i bits(__m512bh x) { return (__m512i)x; }
  static void store(uint16_t* p, __m512i x) { _mm512_storeu_si512(p, x); }
};

}  // namespace
