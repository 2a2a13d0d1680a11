// Statistics of rows and columns from a tile of inner products, while it is in the cache.
#pragma once
#include <initializer_list>

#include "cpu/isa/tile.hpp"

namespace {

template <class G>
struct Statistics : TileOps<G> {
  using T = TileOps<G>;
  using typename T::Affine;
  using typename T::F;
  using typename T::M;
  using typename T::Pairs;
  using typename T::V;
  using T::absent;
  using T::C;
  using T::fill;
  using T::P;
  using T::panel_size;
  using T::present;
  using T::update_max;
  using T::update_sum;
  using T::W;

  // ---- arrays over rows or columns

  static float largest(const float* p, int n) {
    F top = V::set(-kInf);
    for (int i = 0; i < n; i += W) top = V::max(V::load(p + i), top);
    return V::largest(top);
  }
  // Sums or maxima of lanes[n][W] over W. Beyond the last row, up to a whole vector: 0 or -inf.
  static void reduce_sum(const float* lanes, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = V::sum(V::load(lanes + i * W));
    for (int i = n; i % kVector; ++i) out[i] = 0;
  }
  static void reduce_max(const float* lanes, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = V::largest(V::load(lanes + i * W));
    for (int i = n; i % kVector; ++i) out[i] = -kInf;
  }

  // Adds another (max, Σ exp(S - shift)) to (max, Σ exp(S - max)). Where both maxima are -inf the
  // sum is 0, or NaN if a score was NaN, which must not be lost.
  static void merge(float* max, float* sum, const float* other_max, const float* other_sum,
                    const float* shift, int n) {
    for (int i = 0; i < n; i += W) {
      const F old = V::load(max + i), top = V::max(V::load(other_max + i), old);
      const M empty = absent(top);
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

  // ---- forward

  // Slices of a tile's scratch memory.
  struct Scratch {
    // [rows][W]: of each row the statistics of every W-th column
    float *lane_max, *lane_sum, *lane_pos, *lane_pos_sum, *lane_neg_max;
    // of the tile's rows and columns; sums are relative to the shift
    struct Side {
      float *max, *sum, *shift, *pos, *pos_sum, *neg_max;
    } row, col;
    explicit Scratch(const Tile& t) {
      const int rows = round_up(t.rows, kVector);
      float* p = t.scratch;
      for (float** x : {&lane_max, &lane_sum, &lane_pos, &lane_pos_sum, &lane_neg_max})
        *x = p, p += rows * W;
      p = slice(row, p, rows);
      slice(col, p, t.cols);
      static_assert(5 * W + 6 <= ito::cpu::kScratch, "floats for each row");
    }
    static float* slice(Side& s, float* p, int n) {
      for (float** x : {&s.max, &s.sum, &s.shift, &s.pos, &s.pos_sum, &s.neg_max})
        *x = p, p += n;
      return p;
    }
  };

  static void forward(const Tile& t, const ForwardTile& f) {
    const Scratch s(t);
    const int rows = round_up(t.rows, kVector);
    fill(s.lane_max, t.rows * W, -kInf);
    const bool lse = f.positives == Positives::kLse;
    if (!t.plain) {
      fill(s.lane_neg_max, t.rows * W, -kInf);
      fill(s.lane_pos, t.rows * W, lse ? -kInf : 0);
      fill(s.lane_pos_sum, t.rows * W, 0);
    }
    for (int panel = 0; panel * P < t.cols; ++panel) {
      T::dots(t, panel);
      if (t.plain)
        scores_plain(t, s, panel);
      else
        scores_paired(t, s, panel, lse);
    }
    reduce_max(s.lane_max, t.rows, s.row.max);

    // One shift for the whole tile halves the exponentials. Not where there are positives: a row
    // whose positive dominates has Σ exp = 1 + tiny. Relative to its own maximum that is exact;
    // relative to another shift 1e-7 stays in a gradient that should vanish.
    const float shift = largest(s.row.max, t.rows);
    if (t.plain && near(shift, s.row.max, f.row.max, t.rows) &&
        near(shift, s.col.max, f.col.max, t.cols)) {
      const float finite = shift == -kInf ? 0 : shift;
      fill(s.row.shift, t.rows, finite);
      fill(s.col.shift, t.cols, finite);
      exp_sums<true>(t, s);
    } else {
      own_shift(s.row.max, f.row.max, s.row.shift, t.rows);
      own_shift(s.col.max, f.col.max, s.col.shift, t.cols);
      exp_sums<false>(t, s);
    }
    reduce_sum(s.lane_sum, t.rows, s.row.sum);
    merge(f.row.max, f.row.sum, s.row.max, s.row.sum, s.row.shift, t.rows);
    merge(f.col.max, f.col.sum, s.col.max, s.col.sum, s.col.shift, t.cols);

    if (f.hardest) {
      if (!t.plain) reduce_max(s.lane_neg_max, t.rows, s.row.neg_max);
      merge_max(f.row.neg_max, t.plain ? s.row.max : s.row.neg_max, t.rows);
      merge_max(f.col.neg_max, t.plain ? s.col.max : s.col.neg_max, t.cols);
    }
    if (t.plain || f.positives == Positives::kNone) return;
    if (!lse) {
      reduce_sum(s.lane_pos, t.rows, s.row.pos);
      reduce_sum(s.lane_pos_sum, t.rows, s.row.pos_sum);
      merge_sum(f.row.pos, s.row.pos, rows);
      merge_sum(f.row.pos_sum, s.row.pos_sum, rows);
      merge_sum(f.col.pos, s.col.pos, t.cols);
      merge_sum(f.col.pos_sum, s.col.pos_sum, t.cols);
      return;
    }
    reduce_max(s.lane_pos, t.rows, s.row.pos);
    own_shift(s.row.pos, f.row.pos, s.row.shift, t.rows);
    own_shift(s.col.pos, f.col.pos, s.col.shift, t.cols);
    exp_sums_of_positives(t, s);
    reduce_sum(s.lane_pos_sum, t.rows, s.row.pos_sum);
    merge(f.row.pos, f.row.pos_sum, s.row.pos, s.row.pos_sum, s.row.shift, t.rows);
    merge(f.col.pos, f.col.pos_sum, s.col.pos, s.col.pos_sum, s.col.shift, t.cols);
  }

  // Whether every row (or column) that has a maximum, here or in an earlier tile, has it near
  // `shift`.
  static bool near(float shift, const float* here, const float* before, int n) {
    M far = V::none();
    for (int i = 0; i < n; i += W) {
      const F top = V::max(V::load(here + i), V::load(before + i));
      far = V::either(far, V::both(present(top), V::less(top, V::set(shift - kNear))));
    }
    return !V::any(far);
  }
  static void own_shift(const float* here, const float* before, float* shift, int n) {
    for (int i = 0; i < n; i += W) {
      const F top = V::max(V::load(here + i), V::load(before + i));
      V::store(shift + i, V::select(absent(top), V::zero(), top));
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
      F row = V::load(s.lane_max + i * W);
      for (int c = 0; c < C; ++c) {
        const F x = affine(V::load(in + c * W), scale, add, c);
        V::store(out + c * W, x);
        row = V::max(x, row);
        top[c] = V::max(x, top[c]);
      }
      V::store(s.lane_max + i * W, row);
    }
    for (int c = 0; c < C; ++c) V::store(s.col.max + panel * P + c * W, top[c]);
  }

  // The same where pairs are positive or excluded. -inf is stored for the excluded.
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
        update_max(s.lane_max + i * W, allowed);
        update_max(s.lane_neg_max + i * W, negative);
        if (!V::any(masks.positive)) continue;
        const F value = V::select(masks.positive, x, lse ? nothing : zero);
        if (lse) {
          pos = V::max(value, pos);
          update_max(s.lane_pos + i * W, value);
        } else {
          const F here = V::select(masks.positive, one, zero);
          pos = V::add(value, pos);
          count = V::add(here, count);
          update_sum(s.lane_pos + i * W, value);
          update_sum(s.lane_pos_sum + i * W, here);
        }
      }
      const int at = panel * P + c * W;
      V::store(s.col.max + at, top);
      V::store(s.col.neg_max + at, top_neg);
      V::store(s.col.pos + at, pos);
      V::store(s.col.pos_sum + at, count);
    }
  }

  // Σ exp(S - shift) of rows and columns. Shared: the tile has one shift.
  template <bool Shared>
  static void exp_sums(const Tile& t, const Scratch& s) {
    fill(s.lane_sum, t.rows * W, 0);
    const F shared = V::set(s.row.shift[0]);
    for (int panel = 0; panel * P < t.cols; ++panel) {
      const float* in = t.scores + panel * panel_size(t);
      F shift[C], total[C];
      for (int c = 0; c < C; ++c) {
        shift[c] = V::load(s.col.shift + panel * P + c * W);
        total[c] = V::zero();
      }
      for (int i = 0; i < t.rows; ++i, in += P) {
        F row = V::load(s.lane_sum + i * W);
        for (int c = 0; c < C; ++c) {
          const F x = V::load(in + c * W);
          if constexpr (Shared) {
            const F e = Math<V>::exp(V::sub(x, shared));
            row = V::add(row, e);
            total[c] = V::add(total[c], e);
          } else {
            row = V::add(row, Math<V>::exp(V::sub(x, V::set(s.row.shift[i]))));
            total[c] = V::add(total[c], Math<V>::exp(V::sub(x, shift[c])));
          }
        }
        V::store(s.lane_sum + i * W, row);
      }
      for (int c = 0; c < C; ++c) V::store(s.col.sum + panel * P + c * W, total[c]);
    }
  }

  // Σ exp(S - shift) over the positives, from the inner products: S is -inf where a pair is
  // excluded.
  static void exp_sums_of_positives(const Tile& t, const Scratch& s) {
    fill(s.lane_pos_sum, t.rows * W, 0);
    Pairs pairs(t);
    for (int panel = 0; panel * P < t.cols; ++panel) {
      const Affine affine(t, panel);
      pairs.start(panel);
      const float* in = t.dots + panel * panel_size(t);
      for (int c = 0; c < C; ++c) {
        const int at = panel * P + c * W;
        const F shift = V::load(s.col.shift + at);
        F total = V::zero();
        for (int i = 0; i < t.rows; ++i) {
          const F dot = V::load(in + i * P + c * W);
          const M positive = pairs(i, panel, c, dot).positive;
          if (!V::any(positive)) continue;
          const F x = affine(dot, V::set(t.scale[i]), V::set(t.row_add[i]), c);
          const F nothing = V::set(-kInf);
          const F value = V::select(positive, x, nothing);
          update_sum(s.lane_pos_sum + i * W, Math<V>::exp(V::sub(value, V::set(s.row.shift[i]))));
          total = V::add(total, Math<V>::exp(V::sub(value, shift)));
        }
        V::store(s.col.pos_sum + at, total);
      }
    }
  }
};

}  // namespace
