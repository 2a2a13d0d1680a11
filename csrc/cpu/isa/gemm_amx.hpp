// Matrix products of bf16 on AMX. One instruction multiplies a register tile of 16 rows × 32 bf16
// by one of 32 × 16, stored as 16 rows of pairs. Layouts: layouts_bf16.hpp; and
//
//   rows for scores  [i / 16][d / 32][i % 16][32]
#pragma once
#include "cpu/isa/layouts_bf16.hpp"

namespace {

struct GemmAmx : LayoutsBf16 {
  static constexpr int kRowPanel = 32;

  // All eight register tiles are 16 rows of 64 bytes. 0 to 3 hold a 32 × 32 block of the result, 4
  // and 5 the left operand, 6 and 7 the right one. Each operand is used twice.
  struct Tiles {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    Tiles() {
      static const Config config;
      // The intrinsics do not tell the compiler which memory they read.
      __asm__ volatile("" : : "r"(&config) : "memory");
      _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
  };

  // c[32][32] (+)= a · b over `depth` steps of 32. The two tiles of `a` are `a_tile` elements
  // apart, and `a_step` from one step to the next; those of `b` lie side by side.
  static inline void block(int depth, const uint16_t* a, int64_t a_tile, int64_t a_step,
                           const uint16_t* b, float* c, bool accumulate) {
    constexpr int kA = 64, kB = 128;  // bytes between the rows of a tile
    load_result(c, accumulate);
    for (int k = 0; k < depth; ++k, a += a_step, b += 32 * 32) {
      _tile_loadd(4, a, kA);
      _tile_loadd(6, b, kB);
      _tile_loadd(7, b + 32, kB);
      _tile_loadd(5, a + a_tile, kA);
      multiply();
    }
    store_result(c);
  }
  static inline void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  static inline void load_result(const float* c, bool accumulate) {
    if (accumulate) {
      _tile_loadd(0, c, kC);
      _tile_loadd(1, c + 16, kC);
      _tile_loadd(2, c + 16 * 32, kC);
      _tile_loadd(3, c + 16 * 32 + 16, kC);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  static inline void store_result(float* c) {
    _tile_stored(0, c, kC);
    _tile_stored(1, c + 16, kC);
    _tile_stored(2, c + 16 * 32, kC);
    _tile_stored(3, c + 16 * 32 + 16, kC);
  }
  static constexpr int kC = 128;  // bytes between the rows of the result

  static void scores(const uint16_t* a, const uint16_t* b, float* s, int rows, int width) {
    const Tiles tiles;
    for (int i = 0; i < rows; i += 32)
      block(width / 32, a + int64_t(i) * width, 16 * width, 16 * 32, b, s + i * kColPanel, false);
  }

  static void grad_rows(const uint16_t* w, const uint16_t* b, int64_t b_panel, float* da, int rows,
                        int cols, int width, bool add) {
    const Tiles tiles;
    for (int d = 0; d < width; d += kColPanel, b += b_panel, da += int64_t(rows) * kColPanel)
      for (int i = 0; i < rows; i += 32)
        block(cols / 32, w + i * 32, 16 * 32, int64_t(rows) * 32, b, da + i * kColPanel, add);
  }

  static void grad_cols(const uint16_t* w, const uint16_t* a, float* dbt, int rows, int cols,
                        int width, bool add, const void*, int64_t) {
    const Tiles tiles;
    w += int64_t(rows) * cols;  // the layout for dB
    a += int64_t(rows) * width;
    for (int j = 0; j < cols; j += kColPanel, w += int64_t(rows) * kColPanel)
      for (int d = 0; d < width; d += 32)
        block(rows / 32, a + d * 32, 16 * 32, int64_t(width) * 32, w,
              dbt + int64_t(j) * width + d * kColPanel, add);
  }

  static void pack_rows(const Matrix& m, const uint8_t* skip, int64_t first, int rows,
                        uint16_t* out) {
    alignas(64) uint16_t block[32][32];
    const int width = padded(m.width);
    for (int i = 0; i < rows; i += 32)
      for (int d = 0; d < width; d += 32) {
        read_block(m, skip, first + i, first + rows, d, block);
        for (int half = 0; half < 2; ++half)
          std::memcpy(out + int64_t(i + 16 * half) * width + d * 16, block[16 * half], 16 * 64);
      }
    pack_rows_for_gradients(m, skip, first, rows, out + int64_t(padded(rows)) * width);
  }

  static double peak(int64_t rounds) {
    const Tiles tiles;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t k = 0; k < rounds; ++k) multiply();
    return 2.0 * 4 * 16 * 16 * 32 * static_cast<double>(rounds);
  }
};

}  // namespace
