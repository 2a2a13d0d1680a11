// W = ∂L/∂S of a tile, from its inner products, and the sums of W that are the gradients of the
// scale and of the biases. What is stored is scale_i·W, which both gradient products take.
#pragma once
#include <cmath>

#include "cpu/isa/tile.hpp"

namespace {

template <class G>
struct Weights : TileOps<G> {
  using T = TileOps<G>;
  using typename T::Affine;
  using typename T::F;
  using typename T::M;
  using typename T::Pairs;
  using typename T::V;
  using T::C;
  using T::P;
  using T::W;

  // Slices of a tile's scratch memory.
  struct Scratch {
    float *by_dot, *by_row, *loss;  // [rows][W]: Σ W·dot, Σ W, Σ softplus over every W-th column
    float *row_factor, *col_factor;
    explicit Scratch(const Tile& t) {
      const int rows = round_up(t.rows, kVector);
      by_dot = t.scratch;
      by_row = by_dot + rows * W;
      loss = by_row + rows * W;
      row_factor = loss + rows * W;
      col_factor = row_factor + rows;
    }
  };

  // Sums of W over a tile.
  struct Sums {
    const Scratch& s;
    const GradientSums to;
    Sums(const Tile& t, const Scratch& scratch, const GradientSums& sums) : s(scratch), to(sums) {
      if (to.scale) T::fill(s.by_dot, t.rows * W, 0);
      if (to.row) T::fill(s.by_row, t.rows * W, 0);
    }
    void store(const Tile& t, double scale_part) const {
      for (int i = 0; to.scale && i < t.rows; ++i)
        to.scale[i] += scale_part * V::sum(V::load(s.by_dot + i * W));
      for (int i = 0; to.row && i < t.rows; ++i) to.row[i] += V::sum(V::load(s.by_row + i * W));
    }
  };

  static void add(double* to, F x) {
    alignas(64) float terms[W];
    V::store(terms, x);
    for (int k = 0; k < W; ++k) to[k] += terms[k];
  }

  // Calls weight(S, dot, i, panel, c) for every vector of the tile; stores scale_i times the
  // result. Scale, Biases: whether the sums of their gradients may be wanted.
  template <bool Scale, bool Biases, class Weight>
  static void for_each_vector(const Tile& t, const Sums& sums, Weight&& weight) {
    for (int panel = 0; panel * P < t.cols; ++panel) {
      T::dots(t, panel);
      const Affine affine(t, panel);
      weight.start(panel);
      const float* in = t.dots + panel * T::panel_size(t);
      float* out = t.scores + panel * T::panel_size(t);
      F total[C];
      for (int c = 0; c < C; ++c) total[c] = V::zero();
      for (int i = 0; i < t.rows; ++i, in += P, out += P) {
        const F scale = V::set(t.scale[i]), add = V::set(t.row_add[i]);
        weight.row(i);
        F by_dot = V::zero(), by_row = V::zero();
        for (int c = 0; c < C; ++c) {
          const F dot = V::load(in + c * W);
          const F w = weight(affine(dot, scale, add, c), dot, i, panel, c);
          if constexpr (Scale) by_dot = V::fma(w, dot, by_dot);
          if constexpr (Biases) {
            by_row = V::add(w, by_row);
            total[c] = V::add(w, total[c]);
          }
          V::store(out + c * W, V::mul(w, scale));
        }
        if (Scale && sums.to.scale) T::update_sum(sums.s.by_dot + i * W, by_dot);
        if (Biases && sums.to.row) T::update_sum(sums.s.by_row + i * W, by_row);
      }
      if (Biases && sums.to.col)
        for (int c = 0; c < C; ++c) add(sums.to.col + panel * P + c * W, total[c]);
      // 0 in the rows up to the alignment: the products run over them
      for (int64_t i = int64_t(t.rows) * P; i < T::panel_size(t); i += W, out += W)
        V::store(out, V::zero());
    }
  }

  template <class Weight>
  static void for_each_vector(const Tile& t, const Sums& sums, Weight&& weight) {
    if (sums.to.row || sums.to.col)
      for_each_vector<true, true>(t, sums, weight);
    else if (sums.to.scale)
      for_each_vector<true, false>(t, sums, weight);
    else
      for_each_vector<false, false>(t, sums, weight);
  }

  // ---- logsumexp

  // An exponential for each side, exclusions and the positives' terms.
  struct General {
    const Tile& t;
    const BackwardTile& b;
    Pairs pairs;
    General(const Tile& tile, const BackwardTile& back) : t(tile), b(back), pairs(tile) {}
    void start(int panel) { pairs.start(panel); }
    void row(int) {}
    static F term(F s, F shift, F logsum, F factor) {
      return V::mul(factor, Math<V>::exp(V::sub(V::sub(s, shift), logsum)));
    }
    F operator()(F s, F dot, int i, int panel, int c) const {
      if (t.plain) return of_all(s, i, panel * P + c * W);
      return of_pairs(s, i, panel * P + c * W, pairs(i, panel, c, dot));
    }
    F of_all(F s, int i, int j) const {
      F w = V::zero();
      const BackwardSide &r = b.row, &q = b.col;
      if (r.factor) w = term(s, V::set(r.shift[i]), V::set(r.logsum[i]), V::set(r.factor[i]));
      if (q.factor)
        w = V::add(w, term(s, V::load(q.shift + j), V::load(q.logsum + j), V::load(q.factor + j)));
      return w;
    }
    F of_pairs(F s, int i, int j, const typename Pairs::Masks& masks) const {
      const BackwardSide &r = b.row, &q = b.col;
      const F w = V::select(masks.excluded, V::zero(), of_all(s, i, j));
      if (!V::any(masks.positive)) return w;
      F p = V::zero();
      if (r.pos_factor) {
        const F factor = V::set(r.pos_factor[i]);
        p = b.lse ? term(s, V::set(r.shift[i]), V::set(r.pos[i]), factor) : factor;
      }
      if (q.pos_factor) {
        const F factor = V::load(q.pos_factor + j);
        const F of_col =
            b.lse ? term(s, V::load(q.shift + j), V::load(q.pos + j), factor) : factor;
        p = V::add(p, of_col);
      }
      return V::add(w, V::select(masks.positive, p, V::zero()));
    }
  };

  // One exponential for both sides, W = exp(S - shift)·(row_factor_i + col_factor_j), but for
  // vectors with positive or excluded pairs. Paired: the tile has such pairs.
  template <bool Paired>
  struct Shared {
    const Scratch& s;
    const F shift;
    General general;
    F row_factor, col_factor[C];
    Shared(const Tile& t, const BackwardTile& b, const Scratch& scratch, float shift)
        : s(scratch), shift(V::set(shift)), general(t, b) {}
    void start(int panel) {
      general.start(panel);
      for (int c = 0; c < C; ++c) col_factor[c] = V::load(s.col_factor + panel * P + c * W);
    }
    void row(int i) { row_factor = V::set(s.row_factor[i]); }
    F operator()(F score, F dot, int i, int panel, int c) const {
      if constexpr (Paired) {
        const auto masks = general.pairs(i, panel, c, dot);
        if (V::any(V::either(masks.positive, masks.excluded)))
          return general.of_pairs(score, i, panel * P + c * W, masks);
      }
      return V::mul(Math<V>::exp(V::sub(score, shift)), V::add(row_factor, col_factor[c]));
    }
  };

  static void logsumexp(const Tile& t, const BackwardTile& b) {
    const Scratch s(t);
    const Sums sums(t, s, b.sums);
    const float bound = std::fmin(top(b.row, t.rows), top(b.col, t.cols));
    const float shift = bound == kInf ? 0 : bound;
    // without a maximum to shift by, exp(S) may overflow, and inf times a factor of 0 is NaN
    if (bound != kInf && near(b.row, shift, t.rows) && near(b.col, shift, t.cols)) {
      factors(b.row, shift, t.rows, s.row_factor);
      factors(b.col, shift, t.cols, s.col_factor);
      if (t.plain)
        for_each_vector(t, sums, Shared<false>(t, b, s, shift));
      else
        for_each_vector(t, sums, Shared<true>(t, b, s, shift));
    } else {
      for_each_vector(t, sums, General(t, b));
    }
    sums.store(t, b.scale_part);
  }

  // A bound on the tile's scores: the largest maximum of its rows (or columns); +inf if they have
  // none.
  static float top(const BackwardSide& side, int n) {
    if (!side.factor) return kInf;
    F top = V::set(-kInf);
    for (int i = 0; i < n; i += W) {
      const M present = V::less(V::load(side.logsum + i), V::set(kInf));
      top = V::max(V::select(present, V::load(side.shift + i), V::set(-kInf)), top);
    }
    const float x = V::largest(top);
    return x == -kInf ? kInf : x;
  }
  static bool near(const BackwardSide& side, float shift, int n) {
    if (!side.factor) return true;
    M far = V::none();
    for (int i = 0; i < n; i += W) {
      const M present = V::less(V::load(side.logsum + i), V::set(kInf));
      far = V::either(
          far, V::both(present, V::less(V::load(side.shift + i), V::set(shift - kNear))));
    }
    return !V::any(far);
  }
  // factor·exp((shift - max) - logsum): what turns exp(S - shift) into the gradient.
  static void factors(const BackwardSide& side, float shift, int n, float* out) {
    for (int i = 0; i < n; i += W) {
      F x = V::zero();
      if (side.factor)
        x = General::term(V::set(shift), V::load(side.shift + i), V::load(side.logsum + i),
                          V::load(side.factor + i));
      V::store(out + i, x);
    }
  }

  // ---- softplus

  // W = u_i σ(S), at positives -u_i σ(-S); the loss is softplus of the same signed score.
  template <bool Forward, bool Backward>
  struct Sigmoid {
    const Tile& t;
    const float* u;
    float* loss;  // [rows][W]
    Pairs pairs;
    Sigmoid(const Tile& tile, const float* u, float* loss)
        : t(tile), u(u), loss(loss), pairs(tile) {}
    void start(int panel) { pairs.start(panel); }
    void row(int) {}
    F operator()(F s, F dot, int i, int panel, int c) const {
      F weight = Backward ? V::set(u[i]) : V::zero();
      if (!t.plain) {
        const auto masks = pairs(i, panel, c, dot);
        s = V::select(masks.positive, V::negate(s), s);
        weight = V::select(masks.positive, V::negate(weight), weight);
        s = V::select(masks.excluded, V::set(-kInf), s);
      }
      const auto of = Math<V>::logistic(s);
      if constexpr (Forward) T::update_sum(loss + i * W, of.softplus);
      return Backward ? V::mul(weight, of.sigmoid) : weight;
    }
  };

  static void softplus(const Tile& t, const SoftplusTile& p) {
    const Scratch s(t);
    const Sums sums(t, s, p.u ? p.sums : GradientSums());
    if (p.row_loss) T::fill(s.loss, t.rows * W, 0);
    if (!p.u)
      for_each_vector(t, sums, Sigmoid<true, false>(t, nullptr, s.loss));
    else if (p.row_loss)
      for_each_vector(t, sums, Sigmoid<true, true>(t, p.u, s.loss));
    else
      for_each_vector(t, sums, Sigmoid<false, true>(t, p.u, nullptr));
    if (p.row_loss)
      for (int i = 0; i < t.rows; ++i) p.row_loss[i] += V::sum(V::load(s.loss + i * W));
    sums.store(t, 1);
  }
};

}  // namespace
