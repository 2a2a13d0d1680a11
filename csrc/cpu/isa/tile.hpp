// What every pass does with a tile: inner products, scores, and which pairs are positive or
// excluded. G is a gemm_*.hpp.
//
// A tile lies in memory as column panels of G::kColPanel columns, [panel][row][column], with
// `stride` rows in each panel.
#pragma once
#include "cpu/isa/math.hpp"
#include "cpu/kernels.hpp"

namespace {

using ito::kInf;
using ito::round_up;
using ito::cpu::BackwardSide;
using ito::cpu::BackwardTile;
using ito::cpu::ForwardTile;
using ito::cpu::GradientSums;
using ito::cpu::kVector;
using ito::cpu::Positives;
using ito::cpu::RunningStats;
using ito::cpu::SoftplusTile;
using ito::cpu::Tile;

// exp(S - shift) with one shift for the whole tile serves the row sums and the column sums. It is 0
// below shift - 87. A row may use the shift only if its own maximum is at most this far below it:
// then what it loses is below e^-47 of its largest term.
constexpr float kNear = 40;

template <class G>
struct TileOps {
  using V = typename G::Vec;
  using F = typename V::F;
  using I = typename V::I;
  using M = typename V::M;
  static constexpr int W = V::kWidth, P = G::kColPanel, C = P / W;  // a panel is C vectors wide

  static int stride(const Tile& t) { return round_up(t.rows, G::kRowAlign); }
  static int packed_width(const Tile& t) { return round_up(t.width, G::kDepthAlign); }
  static int64_t panel_size(const Tile& t) { return int64_t(stride(t)) * P; }

  // The inner products of a panel.
  static void dots(const Tile& t, int panel) {
    if (t.have_dots) return;
    using E = typename G::Element;
    const int width = packed_width(t);
    G::scores(static_cast<const E*>(t.a), static_cast<const E*>(t.b) + int64_t(panel) * P * width,
              t.dots + panel * panel_size(t), stride(t), width);
  }

  // S of one row of a panel, from its inner products.
  struct Affine {
    F add[C];
    Affine(const Tile& t, int panel) {
      for (int c = 0; c < C; ++c) add[c] = V::load(t.col_add + panel * P + c * W);
    }
    F operator()(F dot, F scale, F row_add, int c) const {
      return V::add(V::fma(dot, scale, row_add), add[c]);
    }
  };

  // Which pairs of a vector are positive, and which are excluded from max and logsum. An excluded
  // self pair is not positive.
  struct Pairs {
    const Tile& t;
    I keys[C];
    alignas(64) int32_t lane[W];
    explicit Pairs(const Tile& tile) : t(tile) {
      for (int i = 0; i < W; ++i) lane[i] = i;
    }
    void start(int panel) {
      for (int c = 0; c < C && !t.plain; ++c) keys[c] = V::load(t.col_keys + panel * P + c * W);
    }
    M equal_keys(int i, int c) const { return V::equal(V::set(t.row_keys[i]), keys[c]); }
    struct Masks {
      M positive, excluded;
    };
    Masks operator()(int i, int panel, int c, F dot) const {
      M positive = equal_keys(i, c);
      M excluded = V::none();
      if (t.exclude_self) {
        const int64_t at = i + t.self_column - (panel * P + c * W);
        const bool inside = at >= 0 && at < W;
        excluded = V::equal(V::set(inside ? static_cast<int32_t>(at) : -1), V::load(lane));
        positive = V::without(positive, excluded);
      }
      if (t.row_limit) {
        const M beyond = V::less(V::set(t.row_limit[i]), dot);
        excluded = V::either(excluded, V::without(beyond, positive));
      }
      if (t.exclude_positives) excluded = V::either(excluded, positive);
      return {positive, excluded};
    }
  };

  // ---- arrays over rows or columns

  static void fill(float* p, int n, float x) {
    for (int i = 0; i < n; i += W) V::store(p + i, V::set(x));
  }
  static void update_max(float* p, F x) { V::store(p, V::max(x, V::load(p))); }
  static void update_sum(float* p, F x) { V::store(p, V::add(x, V::load(p))); }
  // Lanes with a value above -inf.
  static M present(F x) { return V::less(V::set(-std::numeric_limits<float>::max()), x); }
  static M absent(F x) { return V::less(x, V::set(-std::numeric_limits<float>::max())); }
};

}  // namespace
