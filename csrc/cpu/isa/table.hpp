// The table of kernels of one instruction set. Each isa_*.cpp includes this and is compiled with
// its own flags.
//
// Everything here is in an anonymous namespace, and of the standard library nothing is used that is
// not inlined. The linker keeps one copy of an inline function. If that were the one compiled for
// AVX-512, it would run on machines that lack it.
#pragma once
#include "cpu/isa/statistics.hpp"
#include "cpu/isa/weights.hpp"

namespace {

template <class G>
struct Table {
  using E = typename G::Element;
  using V = typename G::Vec;
  static constexpr int P = G::kColPanel;

  static int rows(const Tile& t) { return TileOps<G>::stride(t); }
  static int width(const Tile& t) { return TileOps<G>::packed_width(t); }
  static const E* operand(const Tile& t) {
    return static_cast<const E*>(G::kConverts ? t.operand : t.scores);
  }

  static void pack_rows(const Matrix& m, const uint8_t* skip, int64_t first, int rows, void* out) {
    G::pack_rows(m, skip, first, rows, static_cast<E*>(out));
  }
  static void pack_cols(const Matrix& m, const uint8_t* skip, int64_t panel, void* scores,
                        void* grad, int64_t grad_panel) {
    G::pack_cols(m, skip, panel, static_cast<E*>(scores), static_cast<E*>(grad), grad_panel);
  }
  static void weights(const Tile& t, const BackwardTile& b) {
    Weights<G>::logsumexp(t, b);
    if constexpr (G::kConverts) G::convert(t.scores, rows(t), t.cols, static_cast<E*>(t.operand));
  }
  static void softplus(const Tile& t, const SoftplusTile& p) {
    Weights<G>::softplus(t, p);
    if constexpr (G::kConverts)
      if (p.u) G::convert(t.scores, rows(t), t.cols, static_cast<E*>(t.operand));
  }
  static void grad_rows(const Tile& t, const void* b, int64_t b_panel, float* da, bool add) {
    const int cols = G::kConverts ? t.cols : t.real_cols;  // bf16 is multiplied in pairs and more
    G::grad_rows(operand(t), static_cast<const E*>(b), b_panel, da, rows(t), cols, width(t), add);
  }
  static void grad_cols(const Tile& t, const void* a, float* dbt, bool add) {
    G::grad_cols(operand(t), static_cast<const E*>(a), dbt, rows(t), t.cols, width(t), add,
                 t.next_dots, t.next_bytes);
  }

  // Finished gradients, from the layouts of the products to dense rows. fp32 is stored by vectors:
  // a memcpy of 32 numbers costs more.
  static float* at(const Matrix& to, int64_t row, int64_t d) {
    return static_cast<float*>(const_cast<void*>(to.data)) + row * to.width + d;
  }
  static void store_rows(const float* da, int stride, int rows, const Matrix& to, int64_t first) {
    for (int d = 0; d < to.width; d += P, da += int64_t(stride) * P) {
      const int count = to.width - d < P ? static_cast<int>(to.width) - d : P;
      const bool whole = to.dtype == ito::cpu::DType::kFloat32 && count == P;
      for (int i = 0; i < rows; ++i)
        if (whole)
          for (int c = 0; c < P; c += V::kWidth)
            V::store(at(to, first + i, d) + c, V::load(da + i * P + c));
        else
          write_row(const_cast<void*>(to.data), to.dtype, to.width, first + i, d, count,
                    da + i * P);
    }
  }
  static void store_cols(const float* dbt, const Matrix& to, int64_t panel) {
    constexpr int kChunk = 64;
    const int64_t first = panel * P, width = to.width;
    const int rows = to.rows - first < P ? static_cast<int>(to.rows - first) : P;
    if (to.dtype == ito::cpu::DType::kFloat32) {
      Transpose<V>::run(dbt, P, static_cast<int>(width), rows, at(to, first, 0), width);
      return;
    }
    alignas(64) float part[P][kChunk];
    for (int d = 0; d < width; d += kChunk, dbt += kChunk * P) {
      const int count = width - d < kChunk ? static_cast<int>(width) - d : kChunk;
      Transpose<V>::run(dbt, P, count, P, part[0], kChunk);
      for (int j = 0; j < rows; ++j)
        write_row(const_cast<void*>(to.data), to.dtype, width, first + j, d, count, part[j]);
    }
  }

  static void fold_rows(const float* da, int stride, int rows, int width, float* dbt,
                        int acc_width, bool add) {
    alignas(64) float part[P * P] = {};  // what it holds beyond the last row goes into padding
    for (int i = 0; i < rows; i += P)
      for (int d = 0; d < width; d += P) {
        const int count = width - d < P ? width - d : P;
        Transpose<V>::run(da + int64_t(d) * stride + i * P, P, rows - i < P ? rows - i : P, count,
                          part, P);
        float* to = dbt + int64_t(i) * acc_width + d * P;
        for (int k = 0; k < count * P; k += V::kWidth)
          V::store(to + k, add ? V::add(V::load(to + k), V::load(part + k)) : V::load(part + k));
      }
  }

  static constexpr ito::cpu::Kernels make(const char* name) {
    ito::cpu::Kernels k{};
    k.name = name;
    k.arithmetic = G::kArithmetic;
    k.element = sizeof(E);
    k.col_panel = P;
    k.row_panel = G::kRowPanel;
    k.row_align = G::kRowAlign;
    k.width_align = G::kDepthAlign;
    k.row_layouts = G::kConverts ? 2 : 1;
    k.operand_bytes = G::kConverts ? 2 * sizeof(E) : 0;
    k.pack_rows = pack_rows;
    k.pack_cols = pack_cols;
    k.forward = Statistics<G>::forward;
    k.weights = weights;
    k.softplus = softplus;
    k.grad_rows = grad_rows;
    k.grad_cols = grad_cols;
    k.store_rows = store_rows;
    k.store_cols = store_cols;
    k.fold_rows = fold_rows;
    k.peak = G::peak;
    return k;
  }
};

}  // namespace
