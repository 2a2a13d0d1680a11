// W = ∂L/∂S of a tile, from its inner products, and the sums of W that gradients of the scale and
// of the biases are. What is stored is scale_i·W: both gradient products need that one.
#pragma once
#include "cpu/isa/epilogue.hpp"

namespace {

template <class G>
struct Weights : Epilogue<G> {
  using E = Epilogue<G>;
  using typename E::Affine;
  using typename E::F;
  using typename E::M;
  using typename E::Pairs;
  using typename E::V;
  using E::C;
  using E::P;
  using E::W;

  // Sums of W over rows and columns while a tile is walked.
  struct Sums {
    float *scale = nullptr, *row = nullptr;  // [rows][W]; null: no sums wanted
    float* col = nullptr;
    explicit Sums(const Tile& t, bool wanted, float* col_sum) : col(col_sum) {
      if (!wanted) return;
      scale = t.scratch;
      row = scale + (t.rows + 15) / 16 * 16 * W;
      E::fill(scale, t.rows * W, 0);
      E::fill(row, t.rows * W, 0);
    }
    void store(const Tile& t, float* to_scale, float part, float* to_row) const {
      if (!scale) return;
      for (int i = 0; i < t.rows; ++i) {
        if (to_scale) to_scale[i] += part * V::sum(V::load(scale + i * W));
        if (to_row) to_row[i] += V::sum(V::load(row + i * W));
      }
    }
  };

  // Calls weight(S, dot, i, panel, c) for every vector of the tile; stores scale_i times the result.
  template <bool Summed, class Weight>
  static void walk(const Tile& t, const Sums& sums, Weight&& weight) {
    for (int panel = 0; panel * P < t.cols; ++panel) {
      E::dots(t, panel);
      const Affine affine(t, panel);
      weight.start(panel);
      const float* in = t.dots + panel * E::panel_size(t);
      float* out = t.scores + panel * E::panel_size(t);
      F total[C];
      for (int c = 0; c < C; ++c) total[c] = V::zero();
      for (int i = 0; i < t.rows; ++i, in += P, out += P) {
        const F scale = V::set(t.scale[i]), add = V::set(t.row_add[i]);
        weight.row(i);
        F by_dot = V::zero(), by_row = V::zero();
        for (int c = 0; c < C; ++c) {
          const F dot = V::load(in + c * W);
          const F w = weight(affine(dot, scale, add, c), dot, i, panel, c);
          if constexpr (Summed) {
            by_dot = V::fma(w, dot, by_dot);
            by_row = V::add(w, by_row);
            total[c] = V::add(w, total[c]);
          }
          V::store(out + c * W, V::mul(w, scale));
        }
        if constexpr (Summed) {
          E::update_sum(sums.scale + i * W, by_dot);
          E::update_sum(sums.row + i * W, by_row);
        }
      }
      if (Summed && sums.col)
        for (int c = 0; c < C; ++c) E::update_sum(sums.col + panel * P + c * W, total[c]);
      // rows up to the alignment: nothing, so that products may run over them
      for (int64_t i = int64_t(t.rows) * P; i < E::panel_size(t); i += W, out += W)
        V::store(out, V::zero());
    }
  }

  template <class Weight>
  static void walk(const Tile& t, const Sums& sums, Weight&& weight) {
    if (sums.scale)
      walk<true>(t, sums, weight);
    else
      walk<false>(t, sums, weight);
  }

  // ---- logsumexp

  // One exponential for both sides: W = exp(S - shift)·(row_i + col_j).
  struct Shared {
    F shift, row_factor, col_factor[C];
    const float *rows, *cols;
    void start(int panel) {
      for (int c = 0; c < C; ++c) col_factor[c] = V::load(cols + panel * P + c * W);
    }
    void row(int i) { row_factor = V::set(rows[i]); }
    F operator()(F s, F, int, int, int c) const {
      return V::mul(Math<V>::exp(V::sub(s, shift)), V::add(row_factor, col_factor[c]));
    }
  };

  // Anything: an exponential for each side, exclusions and the positives' terms.
  struct General {
    const Tile& t;
    const BackwardTile& b;
    Pairs pairs;
    explicit General(const Tile& tile, const BackwardTile& back)
        : t(tile), b(back), pairs(tile) {}
    void start(int panel) { pairs.start(panel); }
    void row(int) {}
    static F term(F s, F shift, F logsum, F factor) {
      return V::mul(factor, Math<V>::exp(V::sub(V::sub(s, shift), logsum)));
    }
    F operator()(F s, F dot, int i, int panel, int c) const {
      const int j = panel * P + c * W;
      F w = V::zero();
      const Side &r = b.row, &q = b.col;
      if (r.factor) w = term(s, V::set(r.shift[i]), V::set(r.logsum[i]), V::set(r.factor[i]));
      if (q.factor)
        w = V::add(w, term(s, V::load(q.shift + j), V::load(q.logsum + j), V::load(q.factor + j)));
      if (t.plain) return w;
      const auto masks = pairs(i, panel, c, dot);
      w = V::select(masks.excluded, V::zero(), w);
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

  static void logsumexp(const Tile& t, const BackwardTile& b) {
    const Sums sums(t, b.scale || b.row_sum || b.col_sum, b.col_sum);
    float* rows = t.scratch + 2 * ((t.rows + 15) / 16 * 16) * W;
    float* cols = rows + (t.rows + 15) / 16 * 16;
    const float bound = std::fmin(top(b.row, t.rows), top(b.col, t.cols));
    const float shift = bound == kInf ? 0 : bound;
    // without a maximum to shift by, exp(S) may overflow, and inf times a factor of 0 is NaN
    if (t.plain && bound != kInf && near(b.row, shift, t.rows) && near(b.col, shift, t.cols)) {
      factors(b.row, shift, t.rows, rows);
      factors(b.col, shift, t.cols, cols);
      Shared shared;
      shared.shift = V::set(shift);
      shared.rows = rows;
      shared.cols = cols;
      walk(t, sums, shared);
    } else {
      walk(t, sums, General(t, b));
    }
    sums.store(t, b.scale, b.scale_part, b.row_sum);
  }

  // A bound on the tile's scores: the largest maximum of the rows (or columns); +inf if there is
  // none to bound them by.
  static float top(const Side& side, int n) {
    if (!side.factor) return kInf;
    F top = V::set(-kInf);
    for (int i = 0; i < n; i += W) {
      const M present = V::less(V::load(side.logsum + i), V::set(kInf));
      top = V::max(V::select(present, V::load(side.shift + i), V::set(-kInf)), top);
    }
    const float x = V::largest(top);
    return x == -kInf ? kInf : x;
  }
  static bool near(const Side& side, float shift, int n) {
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
  static void factors(const Side& side, float shift, int n, float* out) {
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
      if constexpr (Forward) E::update_sum(loss + i * W, Math<V>::softplus(s));
      return Backward ? V::mul(weight, Math<V>::sigmoid(s)) : weight;
    }
  };

  static void softplus(const Tile& t, const SoftplusTile& p) {
    const Sums sums(t, p.u && (p.scale || p.row_sum || p.col_sum), p.col_sum);
    float* loss = t.scratch + 2 * ((t.rows + 15) / 16 * 16) * W;
    if (p.row_loss) E::fill(loss, t.rows * W, 0);
    if (!p.u)
      walk(t, sums, Sigmoid<true, false>(t, nullptr, loss));
    else if (p.row_loss)
      walk(t, sums, Sigmoid<true, true>(t, p.u, loss));
    else
      walk(t, sums, Sigmoid<false, true>(t, p.u, nullptr));
    if (p.row_loss)
      for (int i = 0; i < t.rows; ++i) p.row_loss[i] += V::sum(V::load(loss + i * W));
    sums.store(t, p.scale, p.scale_part, p.row_sum);
  }
};

}  // namespace
