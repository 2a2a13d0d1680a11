// Matrix products in fp32 with fused multiply-add: V is one of the vec_*.hpp, R × (C·width) is the
// block of the result that stays in registers.
//
// One micro-kernel serves all three products, because in each of them the left operand can be
// broadcast from where it lies and the right one is a contiguous panel of kPanel columns:
//
//   scores       S[i, j]     = Σ_d A[i, d] B[j, d]   left: packed rows    right: packed columns
//   grad of A    dA[i, d]   += Σ_j W[i, j] B[j, d]   left: the tile W     right: B by panels of d
//   grad of B    dBᵀ[d, j]  += Σ_i A[i, d] W[i, j]   left: packed rows    right: the tile W
//
// Layouts ([] is the order in memory, the last one contiguous):
//   packed rows  [i / R][d][i % R]          tile  [j / kPanel][i][j % kPanel]
//   columns      [j / kPanel][d][j % kPanel], for gradients [d / kPanel][j][d % kPanel]
//   dA           [d / kPanel][i][d % kPanel]       dBᵀ  [j / kPanel][d][j % kPanel]
#pragma once
#include <cstdint>

#include "cpu/isa/convert.hpp"
#include "cpu/isa/micro.hpp"
#include "cpu/isa/transpose.hpp"

namespace {

template <class V>
struct Fma {
  using Vec = V;
  using Unit = float;
  using Operand = typename V::F;
  static constexpr int kElement = sizeof(float);
  static Operand load(const float* p) { return V::load(p); }
  static Operand broadcast(float x) { return V::set(x); }
  static Operand multiply_add(Operand a, Operand b, Operand c) { return V::fma(a, b, c); }
  static Operand multiply_add(const float* a, Operand b, Operand c) { return V::fma(a, b, c); }
};

template <class V, int R, int C>
struct GemmFma {
  using Vec = V;
  using Element = float;
  static constexpr const char* kArithmetic = "fp32";
  static constexpr bool kConverts = false;      // the products take W as it is
  static constexpr int kRows = R;               // rows of a packed panel
  static constexpr int kPanel = C * V::kWidth;  // columns of a panel
  static constexpr int kRowAlign = 1;           // rows of a tile are a multiple of this
  static constexpr int kDepthAlign = 1;         // so is the packed width of the features

  static constexpr int kChunk = 64;  // columns that are read at a time while packing
  using Kernel = Micro<Fma<V>, R, C>;

  // One panel of a score tile. `a`: packed rows, `b`: one packed column panel.
  static void scores(const float* a, const float* b, float* s, int rows, int width) {
    // 512 steps of a panel of rows are 28 KiB: they stay in L1 while the panel of columns passes
    constexpr int kDepth = 512;
    for (int d = 0; d < width; d += kDepth) {
      const int depth = width - d < kDepth ? width - d : kDepth;
      for (int i = 0; i < rows; i += R)
        Kernel::template rows<1, R>(rows - i, depth, depth, a + int64_t(i) * width + d * R, 0,
                   b + d * kPanel, s + i * kPanel, d > 0);
    }
  }

  // dA (+)= W·B. `b`: the block's rows of the columns' gradient form, panels `b_panel` apart.
  static void grad_rows(const float* w, const float* b, int64_t b_panel, float* da, int rows,
                        int cols, int width, bool add) {
    for (int d = 0; d < width; d += kPanel, b += b_panel, da += int64_t(rows) * kPanel)
      for (int i = 0; i < rows; i += R)
        Kernel::template rows<kPanel, 1>(rows - i, cols, kPanel, w + i * kPanel,
                        int64_t(rows) * kPanel, b, da + i * kPanel, add);
  }

  // dBᵀ (+)= Aᵀ·W. `a`: packed rows.
  static void grad_cols(const float* w, const float* a, float* dbt, int rows, int cols,
                        int width, bool add) {
    for (int j = 0; j < cols; j += kPanel, w += int64_t(rows) * kPanel)
      for (int d = 0; d < width; d += R)
        Kernel::template rows<R, 1>(width - d, rows, R, a + d * R, int64_t(width) * R, w,
                   dbt + int64_t(j) * width + d * kPanel, add);
  }

  // Columns [d, d + count) of `wanted` rows from row `row` on, `ld` floats apart: where they lie, or
  // copied to `part` if they are to be converted or are not all there.
  static const float* read(const Matrix& m, const uint8_t* skip, int64_t row, int64_t available,
                           int wanted, int64_t d, int count, float* part, int64_t& ld) {
    if (m.dtype == DType::kFloat32 && !skip && available >= wanted) {
      ld = m.stride;
      return static_cast<const float*>(m.data) + row * m.stride + d;
    }
    ld = kChunk;
    read_rows(m, skip, row, available, wanted, d, count, part, kChunk);
    return part;
  }

  // Rows [first, first + rows) of a matrix as packed rows; rows where `skip` is set become 0.
  static void pack_rows(const Matrix& m, const uint8_t* skip, int64_t first, int rows, float* out) {
    alignas(64) float part[R * kChunk];
    int64_t ld;
    for (int i = 0; i < rows; i += R)
      for (int d = 0; d < m.width; d += kChunk) {
        const int count = m.width - d < kChunk ? m.width - d : kChunk;
        const float* in = read(m, skip, first + i, rows - i, R, d, count, part, ld);
        Transpose<V>::run(in, ld, R, count, out, R);
        out += count * R;
      }
  }

  // Panel `panel` of a matrix as packed columns, in both forms; rows that do not exist become 0.
  // The panels of the gradient form are `grad_panel` apart; null if it is not wanted.
  static void pack_cols(const Matrix& m, const uint8_t* skip, int64_t panel, float* scores,
                        float* grad, int64_t grad_panel) {
    alignas(64) float part[kPanel * kChunk];
    static_assert(kChunk % kPanel == 0, "a chunk is whole panels of d");
    const int64_t first = panel * kPanel;
    int64_t ld;
    scores += first * m.width;
    for (int d = 0; d < m.width; d += kChunk) {
      const int count = m.width - d < kChunk ? m.width - d : kChunk;
      const float* in = read(m, skip, first, m.rows - first, kPanel, d, count, part, ld);
      Transpose<V>::run(in, ld, kPanel, count, scores, kPanel);
      scores += count * kPanel;
      for (int k = 0; grad && k < count; k += kPanel) {
        float* to = grad + (d + k) / kPanel * grad_panel + first * kPanel;
        const int used = count - k < kPanel ? count - k : kPanel;
        for (int j = 0; j < kPanel; ++j, to += kPanel) {
          const float* from = in + j * ld + k;
          if (used == kPanel)
            for (int c = 0; c < C; ++c) V::store(to + c * V::kWidth, V::load(from + c * V::kWidth));
          else
            for (int x = 0; x < kPanel; ++x) to[x] = x < used ? from[x] : 0.0f;
        }
      }
    }
  }

  static double peak(int64_t rounds) {
    return Kernel::peak(rounds, V::set(0.999f), V::set(0.001f));
  }
};

}  // namespace
