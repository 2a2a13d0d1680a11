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

  // Adds a tile's Σ exp(S - shift) to (max, Σ exp(S - max)), whose maximum may grow. `own_sum`, the
  // other part of the tile's sum, is relative to that new maximum; with a shift of -inf it is all of
  // it. Where both maxima are -inf the sum is 0, or NaN if a score was NaN, which must not be lost.
  static void merge(float* max, float* sum, float* low, const float* tile_max,
                    const float* tile_sum, float shift, const float* own_sum, int n) {
    for (int i = 0; i < n; i += W) {
      const F old = V::load(max + i), top = V::max(V::load(tile_max + i), old);
      const M empty = absent(top);
      const F one = V::set(1.0f);
      const F keep = V::select(empty, one, Math<V>::exp(V::sub(old, top)));
      const F take = V::select(empty, one, Math<V>::exp(V::sub(V::set(shift), top)));
      const F mine = V::fma(V::load(tile_sum + i), take, V::load(own_sum + i));
      V::store(sum + i, V::mul(V::load(sum + i), keep));
      V::store(low + i, V::mul(V::load(low + i), keep));
      add(sum + i, low + i, mine);
      V::store(max + i, top);
    }
  }
  // sum += x, and what rounding takes from it to `low`; NaN there if the sum is infinite.
  static void add(float* sum, float* low, F x) {
    const F before = V::load(sum), after = V::add(before, x), added = V::sub(after, before);
    const F lost = V::add(V::sub(before, V::sub(after, added)), V::sub(x, added));
    V::store(low, V::add(V::load(low), lost));
    V::store(sum, after);
  }
  static void merge_max(float* max, const float* other, int n) {
    for (int i = 0; i < n; i += W) V::store(max + i, V::max(V::load(other + i), V::load(max + i)));
  }
  static void merge_sum(float* sum, const float* other, int n) {
    for (int i = 0; i < n; i += W) V::store(sum + i, V::add(V::load(other + i), V::load(sum + i)));
  }
  static void merge_sum(float* sum, float* low, const float* other, int n) {
    for (int i = 0; i < n; i += W) add(sum + i, low + i, V::load(other + i));
  }

  // A column's sum is taken in groups of so many rows: one after the other, 256 numbers of about the
  // same size lose four times as much to rounding.
  static constexpr int kGroup = 64;
  static void close_group(F (&part)[C], F (&sum)[C]) {
    for (int c = 0; c < C; ++c) {
      sum[c] = V::add(sum[c], part[c]);
      part[c] = V::zero();
    }
  }

  // ---- forward

  // Slices of a tile's scratch memory.
  struct Scratch {
    // [rows][W]: of each row the statistics of every W-th column
    float *lane_max, *lane_sum, *lane_own_sum, *lane_pos, *lane_pos_sum, *lane_neg_max;
    // of the tile's rows and columns; `sum` is relative to the tile's shift, `own_sum` to that of
    // the row or column
    struct Side {
      float *max, *sum, *own_sum, *shift, *pos, *pos_sum, *neg_max;
    } row, col;
    explicit Scratch(const Tile& t) {
      const int rows = round_up(t.rows, kVector);
      float* p = t.scratch;
      for (float** x :
           {&lane_max, &lane_sum, &lane_own_sum, &lane_pos, &lane_pos_sum, &lane_neg_max})
        *x = p, p += rows * W;
      p = slice(row, p, rows);
      slice(col, p, t.cols);
      static_assert(6 * W + 7 <= ito::cpu::kScratch, "floats for each row");
    }
    static float* slice(Side& s, float* p, int n) {
      for (float** x : {&s.max, &s.sum, &s.own_sum, &s.shift, &s.pos, &s.pos_sum, &s.neg_max})
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
      if (f.hardest) fill(s.lane_neg_max, t.rows * W, -kInf);
      fill(s.lane_pos, t.rows * W, lse ? -kInf : 0);
      fill(s.lane_pos_sum, t.rows * W, 0);
    }
    for (int panel = 0; panel * P < t.cols; ++panel) {
      T::dots(t, panel);
      if (t.plain)
        scores_plain(t, s, panel);
      else if (f.hardest)
        scores_paired<true>(t, s, panel, lse);
      else
        scores_paired<false>(t, s, panel, lse);
    }
    reduce_max(s.lane_max, t.rows, s.row.max);
    own_shift(s.row.max, f.row.max, s.row.shift, t.rows);
    own_shift(s.col.max, f.col.max, s.col.shift, t.cols);

    // One shift for the whole tile halves the exponentials.
    const float top = largest(s.row.max, t.rows);
    const bool shared = top != -kInf && near(top, s.row.max, f.row.max, t.rows) &&
                        near(top, s.col.max, f.col.max, t.cols);
    const float shift = shared ? top : -kInf;  // -inf: there is no shared sum
    if (!shared)
      exp_sums(t, s);
    else if (t.plain)
      exp_sums_shared<false>(t, s, shift);
    else
      exp_sums_shared<true>(t, s, shift);
    reduce_sum(s.lane_sum, t.rows, s.row.sum);
    reduce_sum(s.lane_own_sum, t.rows, s.row.own_sum);
    merge(f.row.max, f.row.sum, f.row.low, s.row.max, s.row.sum, shift,
          s.row.own_sum, t.rows);
    merge(f.col.max, f.col.sum, f.col.low, s.col.max, s.col.sum, shift,
          s.col.own_sum, t.cols);

    if (f.hardest) {
      if (!t.plain) reduce_max(s.lane_neg_max, t.rows, s.row.neg_max);
      merge_max(f.row.neg_max, t.plain ? s.row.max : s.row.neg_max, t.rows);
      merge_max(f.col.neg_max, t.plain ? s.col.max : s.col.neg_max, t.cols);
    }
    if (t.plain || f.positives == Positives::kNone) return;
    if (!lse) {
      reduce_sum(s.lane_pos, t.rows, s.row.pos);
      reduce_sum(s.lane_pos_sum, t.rows, s.row.pos_sum);
      merge_sum(f.row.pos, f.row.pos_low, s.row.pos, rows);
      merge_sum(f.row.pos_sum, s.row.pos_sum, rows);
      merge_sum(f.col.pos, f.col.pos_low, s.col.pos, t.cols);
      merge_sum(f.col.pos_sum, s.col.pos_sum, t.cols);
      return;
    }
    reduce_max(s.lane_pos, t.rows, s.row.pos);
    own_shift(s.row.pos, f.row.pos, s.row.shift, t.rows);
    own_shift(s.col.pos, f.col.pos, s.col.shift, t.cols);
    exp_sums_of_positives(t, s);
    reduce_sum(s.lane_pos_sum, t.rows, s.row.pos_sum);
    fill(s.row.sum, rows, 0);
    fill(s.col.sum, t.cols, 0);
    merge(f.row.pos, f.row.pos_sum, f.row.pos_low, s.row.pos, s.row.sum, -kInf,
          s.row.pos_sum, t.rows);
    merge(f.col.pos, f.col.pos_sum, f.col.pos_low, s.col.pos, s.col.sum, -kInf,
          s.col.pos_sum, t.cols);
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

  // The same where pairs are positive or excluded. -inf is stored for the excluded. Few vectors hold
  // such pairs.
  template <bool Hardest>
  static void scores_paired(const Tile& t, const Scratch& s, int panel, bool lse) {
    const Affine affine(t, panel);
    Pairs pairs(t);
    pairs.start(panel);
    const float* in = t.dots + panel * panel_size(t);
    float* out = t.scores + panel * panel_size(t);
    const F nothing = V::set(-kInf), zero = V::zero(), one = V::set(1.0f);
    F top[C], top_neg[C], pos[C], count[C], pos_sum[C];
    for (int c = 0; c < C; ++c) {
      top[c] = top_neg[c] = nothing;
      pos[c] = lse ? nothing : zero;
      count[c] = pos_sum[c] = zero;
    }
    for (int i = 0; i < t.rows; ++i, in += P, out += P) {
      if (i % kGroup == 0 && !lse) close_group(pos, pos_sum);
      const F scale = V::set(t.scale[i]), add = V::set(t.row_add[i]);
      F row = V::load(s.lane_max + i * W);
      for (int c = 0; c < C; ++c) {
        const F dot = V::load(in + c * W);
        const F x = affine(dot, scale, add, c);
        const auto masks = pairs(i, panel, c, dot);
        const F allowed = V::select(masks.excluded, nothing, x);
        V::store(out + c * W, allowed);
        row = V::max(allowed, row);
        top[c] = V::max(allowed, top[c]);
        if constexpr (Hardest) {
          const F negative = V::select(masks.positive, nothing, allowed);
          update_max(s.lane_neg_max + i * W, negative);
          top_neg[c] = V::max(negative, top_neg[c]);
        }
        if (!V::any(masks.positive)) continue;
        const F value = V::select(masks.positive, x, lse ? nothing : zero);
        if (lse) {
          pos[c] = V::max(value, pos[c]);
          update_max(s.lane_pos + i * W, value);
        } else {
          const F here = V::select(masks.positive, one, zero);
          pos[c] = V::add(value, pos[c]);
          count[c] = V::add(here, count[c]);
          update_sum(s.lane_pos + i * W, value);
          update_sum(s.lane_pos_sum + i * W, here);
        }
      }
      V::store(s.lane_max + i * W, row);
    }
    if (!lse) close_group(pos, pos_sum);
    for (int c = 0; c < C; ++c) {
      const int at = panel * P + c * W;
      V::store(s.col.max + at, top[c]);
      V::store(s.col.pos + at, lse ? pos[c] : pos_sum[c]);
      V::store(s.col.pos_sum + at, count[c]);
      if constexpr (Hardest) V::store(s.col.neg_max + at, top_neg[c]);
    }
  }

  // Σ exp(S - shift) of rows and columns with one shift for the tile. Vectors that hold positives
  // take each row's and column's own: a row whose positive dominates has Σ exp = 1 + tiny. Relative
  // to its own maximum that is exact; relative to another shift 1e-7 stays in a gradient that should
  // vanish.
  template <bool Paired>
  static void exp_sums_shared(const Tile& t, const Scratch& s, float tile_shift) {
    fill(s.lane_sum, t.rows * W, 0);
    fill(s.lane_own_sum, t.rows * W, 0);
    const F shift = V::set(tile_shift);
    Pairs pairs(t);
    for (int panel = 0; panel * P < t.cols; ++panel) {
      const float* in = t.scores + panel * panel_size(t);
      pairs.start(panel);
      F own_shift[C], total[C], own_total[C], sum[C];
      for (int c = 0; c < C; ++c) {
        own_shift[c] = V::load(s.col.shift + panel * P + c * W);
        sum[c] = total[c] = own_total[c] = V::zero();
      }
      for (int i = 0; i < t.rows; ++i, in += P) {
        if (i % kGroup == 0) close_group(total, sum);
        F row = V::zero();
        for (int c = 0; c < C; ++c) {
          const F x = V::load(in + c * W);
          if (Paired && V::any(pairs.equal_keys(i, c))) {
            const F row_shift = V::set(s.row.shift[i]);
            update_sum(s.lane_own_sum + i * W, Math<V>::exp(V::sub(x, row_shift)));
            own_total[c] = V::add(own_total[c], Math<V>::exp(V::sub(x, own_shift[c])));
            continue;
          }
          const F e = Math<V>::exp(V::sub(x, shift));
          row = V::add(row, e);
          total[c] = V::add(total[c], e);
        }
        update_sum(s.lane_sum + i * W, row);
      }
      close_group(total, sum);
      for (int c = 0; c < C; ++c) {
        V::store(s.col.sum + panel * P + c * W, sum[c]);
        V::store(s.col.own_sum + panel * P + c * W, own_total[c]);
      }
    }
  }

  // The same where every row and column takes its own shift.
  static void exp_sums(const Tile& t, const Scratch& s) {
    fill(s.lane_sum, t.rows * W, 0);
    fill(s.lane_own_sum, t.rows * W, 0);
    fill(s.col.sum, t.cols, 0);
    for (int panel = 0; panel * P < t.cols; ++panel) {
      const float* in = t.scores + panel * panel_size(t);
      F shift[C], total[C], sum[C];
      for (int c = 0; c < C; ++c) {
        shift[c] = V::load(s.col.shift + panel * P + c * W);
        sum[c] = total[c] = V::zero();
      }
      for (int i = 0; i < t.rows; ++i, in += P) {
        if (i % kGroup == 0) close_group(total, sum);
        for (int c = 0; c < C; ++c) {
          const F x = V::load(in + c * W);
          update_sum(s.lane_own_sum + i * W, Math<V>::exp(V::sub(x, V::set(s.row.shift[i]))));
          total[c] = V::add(total[c], Math<V>::exp(V::sub(x, shift[c])));
        }
      }
      close_group(total, sum);
      for (int c = 0; c < C; ++c) V::store(s.col.own_sum + panel * P + c * W, sum[c]);
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
