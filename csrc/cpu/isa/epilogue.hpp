// What happens to a tile of inner products while it is in the cache. G is a gemm_*.hpp.
//
// A tile is G::kPanel columns wide panels, [panel][row][column]; `stride` rows apart.
#pragma once
#include <cmath>
#include <initializer_list>
#include <limits>

#include "cpu/isa/math.hpp"
#include "cpu/kernels.hpp"

namespace {

using ito::cpu::BackwardTile;
using ito::cpu::ForwardTile;
using ito::cpu::Positives;
using ito::cpu::Running;
using ito::cpu::Side;
using ito::cpu::SoftplusTile;
using ito::cpu::Tile;

constexpr float kInf = std::numeric_limits<float>::infinity();

// exp(S - shift) is shared by the row and the column sums. It is 0 below shift - 87, so a row may
// share the shift only if its own maximum is less than this much lower: what it loses is then
// below e^-47 of its largest term.
constexpr float kNear = 40;

template <class G>
struct Epilogue {
  using V = typename G::Vec;
  using F = typename V::F;
  using I = typename V::I;
  using M = typename V::M;
  static constexpr int W = V::kWidth, P = G::kPanel, C = P / W;

  static int stride(const Tile& t) {
    return (t.rows + G::kRowAlign - 1) / G::kRowAlign * G::kRowAlign;
  }
  static int packed_width(const Tile& t) {
    return (t.width + G::kDepthAlign - 1) / G::kDepthAlign * G::kDepthAlign;
  }
  static int64_t panel_size(const Tile& t) { return int64_t(stride(t)) * P; }

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

  // Which pairs of one vector are positive and which are allowed.
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
    struct Masks {
      M positive, excluded;  // an excluded self pair is not positive; excluded from max and logsum
    };
    Masks operator()(int i, int panel, int c, F dot) const {
      M positive = V::equal(V::set(t.row_keys[i]), keys[c]);
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

  // ---- vectors over rows or columns

  static void fill(float* p, int n, float x) {
    for (int i = 0; i < n; i += W) V::store(p + i, V::set(x));
  }
  static float largest(const float* p, int n) {
    F top = V::set(-kInf);
    for (int i = 0; i < n; i += W) top = V::max(V::load(p + i), top);
    return V::largest(top);
  }
  // Sums or maxima of `lanes`[n][W], for each row; up to a multiple of 16 rows with `rest`.
  static void reduce_sum(const float* lanes, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = V::sum(V::load(lanes + i * W));
    for (int i = n; i % 16; ++i) out[i] = 0;
  }
  static void reduce_max(const float* lanes, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = V::largest(V::load(lanes + i * W));
    for (int i = n; i % 16; ++i) out[i] = -kInf;
  }

  // (max, sum) with another pair that is relative to `shift`. Where both maxima are -inf the sum
  // is 0, or NaN if a score was NaN, which must not be lost.
  static void merge(float* max, float* sum, const float* other_max, const float* other_sum,
                    const float* shift, int n) {
    for (int i = 0; i < n; i += W) {
      const F old = V::load(max + i), top = V::max(V::load(other_max + i), old);
      const M empty = V::less(top, V::set(-std::numeric_limits<float>::max()));
      const F one = V::set(1.0f);
      const F keep = V::select(empty, one, Math<V>::exp(V::sub(old, top)));
      const F take = V::select(empty, one, Math<V>::exp(V::sub(V::load(shift + i), top)));
      V::store(sum + i, V::fma(V::load(sum + i), keep, V::mul(V::load(other_sum + i), take)));
      V::store(max + i, top);
    }
  }
  static void merge_max(float* max, const float* other, int n) {
    for (int i = 0; i < n; i += W) V::store(max + i, V::max(V::load(other + i), V::load(max + i)));
  }
  static void merge_sum(float* sum, const float* other, int n) {
    for (int i = 0; i < n; i += W) V::store(sum + i, V::add(V::load(other + i), V::load(sum + i)));
  }

  // ---- logsumexp, forward

  // Slices of a tile's scratch memory.
  struct Scratch {
    float *row_max, *row_neg, *row_pos, *row_aux, *row_sum;      // [rows][W]
    float *r_max, *r_sum, *r_shift, *r_neg, *r_pos, *r_aux;      // [rows]
    float *c_max, *c_sum, *c_shift, *c_neg, *c_pos, *c_aux;      // [cols]
    explicit Scratch(const Tile& t) {
      const int rows = (t.rows + 15) / 16 * 16, cols = t.cols;
      float* p = t.scratch;
      for (float** x : {&row_max, &row_neg, &row_pos, &row_aux, &row_sum}) *x = p, p += rows * W;
      for (float** x : {&r_max, &r_sum, &r_shift, &r_neg, &r_pos, &r_aux}) *x = p, p += rows;
      for (float** x : {&c_max, &c_sum, &c_shift, &c_neg, &c_pos, &c_aux}) *x = p, p += cols;
    }
  };

  static void forward(const Tile& t, const ForwardTile& f) {
    const Scratch s(t);
    const int rows16 = (t.rows + 15) / 16 * 16;
    fill(s.row_max, t.rows * W, -kInf);
    const bool lse = f.positives == Positives::kLse;
    if (!t.plain) {
      fill(s.row_neg, t.rows * W, -kInf);
      fill(s.row_pos, t.rows * W, lse ? -kInf : 0);
      fill(s.row_aux, t.rows * W, 0);
    }
    for (int panel = 0; panel * P < t.cols; ++panel) {
      dots(t, panel);
      if (t.plain)
        scores_plain(t, s, panel);
      else
        scores_paired(t, s, panel, lse);
    }
    reduce_max(s.row_max, t.rows, s.r_max);

    // A row that has learnt its positive has a sum of 1 + tiny: relative to its own maximum that is
    // exact, relative to another shift 1e-7 is left of a gradient that should vanish.
    const float shift = largest(s.r_max, t.rows);
    if (t.plain && near(shift, s.r_max, f.row.max, t.rows) &&
        near(shift, s.c_max, f.col.max, t.cols)) {
      const float finite = shift == -kInf ? 0 : shift;
      fill(s.r_shift, t.rows, finite);
      fill(s.c_shift, t.cols, finite);
      exp_sums<true>(t, s);
    } else {
      own_shift(s.r_max, f.row.max, s.r_shift, t.rows);
      own_shift(s.c_max, f.col.max, s.c_shift, t.cols);
      exp_sums<false>(t, s);
    }
    reduce_sum(s.row_sum, t.rows, s.r_sum);
    merge(f.row.max, f.row.sum, s.r_max, s.r_sum, s.r_shift, t.rows);
    merge(f.col.max, f.col.sum, s.c_max, s.c_sum, s.c_shift, t.cols);

    if (f.hardest) {
      if (!t.plain) reduce_max(s.row_neg, t.rows, s.r_neg);
      merge_max(f.row.neg, t.plain ? s.r_max : s.r_neg, t.rows);
      merge_max(f.col.neg, t.plain ? s.c_max : s.c_neg, t.cols);
    }
    if (t.plain || f.positives == Positives::kNone) return;
    if (!lse) {
      reduce_sum(s.row_pos, t.rows, s.r_pos);
      reduce_sum(s.row_aux, t.rows, s.r_aux);
      merge_sum(f.row.pos, s.r_pos, rows16);
      merge_sum(f.row.aux, s.r_aux, rows16);
      merge_sum(f.col.pos, s.c_pos, t.cols);
      merge_sum(f.col.aux, s.c_aux, t.cols);
      return;
    }
    reduce_max(s.row_pos, t.rows, s.r_pos);
    own_shift(s.r_pos, f.row.pos, s.r_shift, t.rows);
    own_shift(s.c_pos, f.col.pos, s.c_shift, t.cols);
    exp_sums_of_positives(t, s);
    reduce_sum(s.row_aux, t.rows, s.r_aux);
    merge(f.row.pos, f.row.aux, s.r_pos, s.r_aux, s.r_shift, t.rows);
    merge(f.col.pos, f.col.aux, s.c_pos, s.c_aux, s.c_shift, t.cols);
  }

  // Do all rows (or columns) that have a maximum, here or in an earlier tile, have it near `shift`?
  static bool near(float shift, const float* here, const float* before, int n) {
    M far = V::none();
    for (int i = 0; i < n; i += W) {
      const F top = V::max(V::load(here + i), V::load(before + i));
      const M present = V::less(V::set(-std::numeric_limits<float>::max()), top);
      far = V::either(far, V::both(present, V::less(top, V::set(shift - kNear))));
    }
    return !V::any(far);
  }
  static void own_shift(const float* here, const float* before, float* shift, int n) {
    for (int i = 0; i < n; i += W) {
      const F top = V::max(V::load(here + i), V::load(before + i));
      const M empty = V::less(top, V::set(-std::numeric_limits<float>::max()));
      V::store(shift + i, V::select(empty, V::zero(), top));
    }
  }

  // S of a panel and its maxima.
  static void scores_plain(const Tile& t, const Scratch& s, int panel) {
    const Affine affine(t, panel);
    const float* in = t.dots + panel * panel_size(t);
    float* out = t.scores + panel * panel_size(t);
    F top[C];
    for (int c = 0; c < C; ++c) top[c] = V::set(-kInf);
    for (int i = 0; i < t.rows; ++i, in += P, out += P) {
      const F scale = V::set(t.scale[i]), add = V::set(t.row_add[i]);
      F row = V::load(s.row_max + i * W);
      for (int c = 0; c < C; ++c) {
        const F x = affine(V::load(in + c * W), scale, add, c);
        V::store(out + c * W, x);
        row = V::max(x, row);
        top[c] = V::max(x, top[c]);
      }
      V::store(s.row_max + i * W, row);
    }
    for (int c = 0; c < C; ++c) V::store(s.c_max + panel * P + c * W, top[c]);
  }

  // The same with pairs that are positive or excluded: -inf is stored for the excluded.
  static void scores_paired(const Tile& t, const Scratch& s, int panel, bool lse) {
    const Affine affine(t, panel);
    Pairs pairs(t);
    pairs.start(panel);
    const float* in = t.dots + panel * panel_size(t);
    float* out = t.scores + panel * panel_size(t);
    const F nothing = V::set(-kInf), zero = V::zero(), one = V::set(1.0f);
    for (int c = 0; c < C; ++c) {
      F top = nothing, top_neg = nothing, pos = lse ? nothing : zero, count = zero;
      for (int i = 0; i < t.rows; ++i) {
        const F dot = V::load(in + i * P + c * W);
        const F x = affine(dot, V::set(t.scale[i]), V::set(t.row_add[i]), c);
        const auto masks = pairs(i, panel, c, dot);
        const F allowed = V::select(masks.excluded, nothing, x);
        const F negative = V::select(masks.positive, nothing, allowed);
        V::store(out + i * P + c * W, allowed);
        top = V::max(allowed, top);
        top_neg = V::max(negative, top_neg);
        update_max(s.row_max + i * W, allowed);
        update_max(s.row_neg + i * W, negative);
        if (!V::any(masks.positive)) continue;
        const F value = V::select(masks.positive, x, lse ? nothing : zero);
        if (lse) {
          pos = V::max(value, pos);
          update_max(s.row_pos + i * W, value);
        } else {
          const F here = V::select(masks.positive, one, zero);
          pos = V::add(value, pos);
          count = V::add(here, count);
          update_sum(s.row_pos + i * W, value);
          update_sum(s.row_aux + i * W, here);
        }
      }
      const int at = panel * P + c * W;
      V::store(s.c_max + at, top);
      V::store(s.c_neg + at, top_neg);
      V::store(s.c_pos + at, pos);
      V::store(s.c_aux + at, count);
    }
  }
  static void update_max(float* p, F x) { V::store(p, V::max(x, V::load(p))); }
  static void update_sum(float* p, F x) { V::store(p, V::add(x, V::load(p))); }

  // Σ exp(S - shift) of rows and columns; Shared: all shifts of the tile are the same.
  template <bool Shared>
  static void exp_sums(const Tile& t, const Scratch& s) {
    fill(s.row_sum, t.rows * W, 0);
    const F shared = V::set(s.r_shift[0]);
    for (int panel = 0; panel * P < t.cols; ++panel) {
      const float* in = t.scores + panel * panel_size(t);
      F shift[C], total[C];
      for (int c = 0; c < C; ++c) {
        shift[c] = V::load(s.c_shift + panel * P + c * W);
        total[c] = V::zero();
      }
      for (int i = 0; i < t.rows; ++i, in += P) {
        F row = V::load(s.row_sum + i * W);
        for (int c = 0; c < C; ++c) {
          const F x = V::load(in + c * W);
          if constexpr (Shared) {
            const F e = Math<V>::exp(V::sub(x, shared));
            row = V::add(row, e);
            total[c] = V::add(total[c], e);
          } else {
            row = V::add(row, Math<V>::exp(V::sub(x, V::set(s.r_shift[i]))));
            total[c] = V::add(total[c], Math<V>::exp(V::sub(x, shift[c])));
          }
        }
        V::store(s.row_sum + i * W, row);
      }
      for (int c = 0; c < C; ++c) V::store(s.c_sum + panel * P + c * W, total[c]);
    }
  }

  // Σ exp(S - shift) over the positives, from the inner products: S has -inf for the excluded.
  static void exp_sums_of_positives(const Tile& t, const Scratch& s) {
    fill(s.row_aux, t.rows * W, 0);
    Pairs pairs(t);
    for (int panel = 0; panel * P < t.cols; ++panel) {
      const Affine affine(t, panel);
      pairs.start(panel);
      const float* in = t.dots + panel * panel_size(t);
      for (int c = 0; c < C; ++c) {
        const int at = panel * P + c * W;
        const F shift = V::load(s.c_shift + at);
        F total = V::zero();
        for (int i = 0; i < t.rows; ++i) {
          const F dot = V::load(in + i * P + c * W);
          const M positive = pairs(i, panel, c, dot).positive;
          if (!V::any(positive)) continue;
          const F x = affine(dot, V::set(t.scale[i]), V::set(t.row_add[i]), c);
          const F nothing = V::set(-kInf);
          const F value = V::select(positive, x, nothing);
          update_sum(s.row_aux + i * W, Math<V>::exp(V::sub(value, V::set(s.r_shift[i]))));
          total = V::add(total, Math<V>::exp(V::sub(value, shift)));
        }
        V::store(s.c_aux + at, total);
      }
    }
  }
};

}  // namespace
