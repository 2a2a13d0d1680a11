// Matrix products in fp32 by fused multiply-add. V is one of the vec_*.hpp. The micro-kernel keeps
// R rows × C vectors of the result in registers.
//
// One micro-kernel serves all three products. In each of them the left operand can be broadcast
// from where it lies, and the right one is a contiguous panel of kColPanel = C·width columns:
//
//   scores       S[i, j]     = Σ_d A[i, d] B[j, d]   left: packed rows    right: packed columns
//   grad of A    dA[i, d]   += Σ_j W[i, j] B[j, d]   left: the tile W     right: B by panels of d
//   grad of B    dBᵀ[d, j]  += Σ_i A[i, d] W[i, j]   left: packed rows    right: the tile W
//
// Layouts ([] is the order in memory, the last one contiguous; R = kRowPanel):
//   packed rows  [i / R][d][i % R]          tile  [j / kColPanel][i][j % kColPanel]
//   columns      [j / kColPanel][d][j % kColPanel], for gradients [d / kColPanel][j][d % kColPanel]
//   dA           [d / kColPanel][i][d % kColPanel]       dBᵀ  [j / kColPanel][d][j % kColPanel]
#pragma once
#include <cstdint>

#include "cpu/isa/convert.hpp"
#include "cpu/isa/micro_kernel.hpp"
#include "cpu/isa/transpose.hpp"

namespace {

using ito::ceil_div;

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
  static constexpr bool kConverts = false;  // the products take W as it is
  static constexpr int kRowPanel = R;              // rows of a packed row panel
  static constexpr int kColPanel = C * V::kWidth;  // columns of a packed column panel
  static constexpr int kRowAlign = 1;              // rows of a tile are a multiple of this ...
  static constexpr int kDepthAlign = 1;            // ... and the packed width of features of this

  static constexpr int kChunk = 64;  // features that are packed at a time
  using Kernel = MicroKernel<Fma<V>, R, C>;
  using Ahead = typename Kernel::Ahead;

  // One column panel of a score tile. `a`: packed rows, `b`: one packed column panel.
  static void scores(const float* a, const float* b, float* s, int rows, int width) {
    // 512 features of a row panel are 28 KiB: they stay in L1 while the column panel passes
    constexpr int kDepth = 512;
    const int64_t panel = int64_t(width) * kColPanel * sizeof(float);
    Ahead ahead(b + width * kColPanel, panel, int64_t(ceil_div(rows, R)) * width);
    for (int d = 0; d < width; d += kDepth) {
      const int depth = width - d < kDepth ? width - d : kDepth;
      for (int i = 0; i < rows; i += R, ahead = ahead.after(depth))
        Kernel::template rows<1, R>(rows - i, depth, depth, a + int64_t(i) * width + d * R, 0,
                                    b + d * kColPanel, s + i * kColPanel, d > 0, ahead, Ahead(b));
    }
  }

  // dA (+)= W·B. `b`: the tile's columns, packed for gradients, in panels `b_panel` apart.
  static void grad_rows(const float* w, const float* b, int64_t b_panel, float* da, int rows,
                        int cols, int width, bool add) {
    const float* const next_tile = b + int64_t(cols) * kColPanel;
    const int64_t panel = int64_t(cols) * kColPanel * sizeof(float);
    for (int d = 0; d < width; d += kColPanel, b += b_panel, da += int64_t(rows) * kColPanel) {
      Ahead ahead(d + kColPanel < width ? b + b_panel : next_tile, panel,
                  int64_t(ceil_div(rows, R)) * cols);
      for (int i = 0; i < rows; i += R, ahead = ahead.after(cols))
        Kernel::template rows<kColPanel, 1>(rows - i, cols, kColPanel, w + i * kColPanel,
                                            int64_t(rows) * kColPanel, b, da + i * kColPanel, add,
                                            ahead, Ahead(b));
    }
  }

  // dBᵀ (+)= Aᵀ·W. `a`: packed rows. `next_bytes` from `next` on, if not null, are fetched meanwhile.
  static void grad_cols(const float* w, const float* a, float* dbt, int rows, int cols, int width,
                        bool add, const void* next, int64_t next_bytes) {
    constexpr int kBlock = R * kColPanel;
    const int64_t blocks = int64_t(ceil_div(cols, kColPanel)) * ceil_div(width, R);
    Ahead ahead = next ? Ahead(next, next_bytes, blocks * rows) : Ahead(w);
    for (int j = 0; j < cols; j += kColPanel, w += int64_t(rows) * kColPanel)
      for (int d = 0; d < width; d += R, ahead = ahead.after(rows)) {
        float* const c = dbt + int64_t(j) * width + d * kColPanel;
        Kernel::template rows<R, 1>(width - d, rows, R, a + d * R, int64_t(width) * R, w, c, add,
                                    Ahead(c + kBlock, kBlock * sizeof(float), rows), ahead);
      }
  }

  // Features [d, d + count) of rows [row, row + rows), `ld` floats apart: where they lie, or copied
  // to `part` if they have to be converted or some of them are skipped.
  static const float* read(const Matrix& m, const uint8_t* skip, int64_t row, int rows, int64_t d,
                           int count, float* part, int64_t& ld) {
    if (m.dtype == DType::kFloat32 && !skip) {
      ld = m.stride;
      return static_cast<const float*>(m.data) + row * m.stride + d;
    }
    ld = kChunk;
    read_rows(m, skip, row, rows, rows, d, count, part, kChunk);
    return part;
  }

  // Rows [first, first + rows) of a matrix as packed rows; rows where `skip` is set become 0.
  static void pack_rows(const Matrix& m, const uint8_t* skip, int64_t first, int rows, float* out) {
    alignas(64) float part[R * kChunk];
    int64_t ld;
    for (int i = 0; i < rows; i += R)
      for (int d = 0; d < m.width; d += kChunk) {
        const int count = m.width - d < kChunk ? m.width - d : kChunk;
        const int real = rows - i < R ? rows - i : R;
        const float* in = read(m, skip, first + i, real, d, count, part, ld);
        Transpose<V>::run(in, ld, real, count, out, R, R);
        out += count * R;
      }
  }

  // Column panel `panel`, in both layouts. In that for scores rows of the matrix that do not exist
  // become 0; in that for gradients they are not read, and stay as they are. There panels are
  // `grad_panel` apart; null if it is not wanted.
  static void pack_cols(const Matrix& m, const uint8_t* skip, int64_t panel, float* scores,
                        float* grad, int64_t grad_panel) {
    alignas(64) float part[kColPanel * kChunk];
    static_assert(kChunk % kColPanel == 0, "a chunk is whole panels of d");
    const int64_t first = panel * kColPanel;
    const int real = m.rows - first < kColPanel ? static_cast<int>(m.rows - first) : kColPanel;
    int64_t ld;
    scores += first * m.width;
    for (int d = 0; d < m.width; d += kChunk) {
      const int count = m.width - d < kChunk ? m.width - d : kChunk;
      const float* in = read(m, skip, first, real, d, count, part, ld);
      Transpose<V>::run(in, ld, real, count, scores, kColPanel, kColPanel);
      scores += count * kColPanel;
      for (int k = 0; grad && k < count; k += kColPanel) {
        float* to = grad + (d + k) / kColPanel * grad_panel + first * kColPanel;
        const int used = count - k < kColPanel ? count - k : kColPanel;
        for (int j = 0; j < real; ++j, to += kColPanel) {
          const float* from = in + j * ld + k;
          if (used == kColPanel)
            for (int c = 0; c < C; ++c) V::store(to + c * V::kWidth, V::load(from + c * V::kWidth));
          else
            for (int x = 0; x < kColPanel; ++x) to[x] = x < used ? from[x] : 0.0f;
        }
      }
    }
  }

  static double peak(int64_t rounds) {
    return Kernel::peak(rounds, V::set(0.999f), V::set(0.001f));
  }
};

}  // namespace
