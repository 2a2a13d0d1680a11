// W = ∂L/∂S, from a score and the upstream gradients of its row's and column's statistics.
#pragma once
#include "cuda/tile.cuh"

namespace ito::ITO_GPU {

// upstream · softmax = factor · 2^(x - apart), where x is a score less T in base 2. `apart` is 0
// but for rows that underflowed in forward: these have a shift of their own. Beyond the end it is
// the last row's: scores are -inf there, so their exponentials are 0.
struct Factor {
  float apart = 0.0f, factor = 0.0f;

  Factor() = default;
  __device__ Factor(const Side& side, int index, float shift) {
    if (!side.factors) return;
    const Pair given = side.factors.load(min(index, side.length - 1));
    factor = given.y;
    if (given.x != shift * kLn2) apart = given.x * kLog2e - shift;  // `merge` stores that product
  }
};

__device__ __forceinline__ float sigmoid(float x) {
  return gpu::reciprocal(1.0f + gpu::exp2_fast(-x));
}

// The part of a row or column in W of its positives: alpha, or alpha · 2^(x - offset).
struct PositiveFactor {
  float alpha = 0.0f, offset = kInf;

  PositiveFactor() = default;
  __device__ PositiveFactor(const Scores& p, const Side& side, int index, float apart) {
    const int inside = min(index, side.length - 1);
    if (!side.alpha || p.positives == Positives::kNone) return;
    alpha = side.alpha.load(inside);
    if (p.positives == Positives::kLse) offset = fmaf(side.pos.load(inside), kLog2e, apart);
  }
  __device__ float weight(const Scores& p, float x) const {
    return p.positives == Positives::kLse ? alpha * gpu::exp2_fast(x - offset) : alpha;
  }
};

// A thread's part of a tile of W.
template <bool kSoftplus, int kRowCount>
class Weights {
 public:
  using Tile = float[kRowCount / 2][kCols / 2][4];

  __device__ Weights(const Scores& p, Global<const float> norm)
      : p_(p), shift_(shift_of(p)), inverse_(norm ? 1.0f / norm.load(0) : 1.0f) {}

  // Row r is `first` + 8·r.
  __device__ __forceinline__ void set_rows(int first) {
    first_row_ = first;
    rows_apart_ = false;
#pragma unroll
    for (int r = 0; r < kRowCount; ++r) {
      rows_[r] = Row(p_, first + r * 8);
      row_factors_[r] = Factor(p_.row, first + r * 8, shift_);
      rows_apart_ |= row_factors_[r].apart != 0.0f && rows_[r].added != -kInf;
    }
  }
  __device__ __forceinline__ void set_cols(int first) {
    first_col_ = first;
    cols_ = Cols(p_.col, first, shift_);
    cols_apart_ = false;
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const Factor given(p_.col, col_of(first, j), shift_);
      col_factors_[j] = given.factor;
      cols_apart_ |= given.apart != 0.0f && cols_.added[j] != -kInf;
    }
  }

  // Inner products become scale·W / norm. Before that, where there are `sums`, adds to Σ W·<a, b>
  // and Σ W of the rows and calls `sum_columns`, for which `s` is W.
  template <class SumColumns>
  __device__ __forceinline__ void weigh(Tile& s, bool sums, float (&scale_sum)[kRowCount],
                                        float (&row_sum)[kRowCount], SumColumns sum_columns) {
    const bool apart = gpu::any(rows_apart_ || cols_apart_);
    if (special(p_, rows_, first_col_) || apart) {
      any_pairs(s, apart, scale_sum, row_sum);
    } else if (sums) {
      negatives(s, scale_sum, row_sum);
    } else {
      scaled_negatives(s);
      return;
    }
    if (sums) sum_columns();
    const bool by_col = p_.scale_of == ScaleOf::kCol;
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const float col_scale = by_col ? Column(p_, col_of(first_col_, j)).scale : 1.0f;
#pragma unroll
      for (int r = 0; r < kRowCount; ++r) at(s, r, j) *= out_scale(r) * col_scale;
    }
  }

 private:
  __device__ float out_scale(int r) const { return rows_[r].scale * kLn2 * inverse_; }

  static __device__ __forceinline__ float activation(float x) {
    return kSoftplus ? sigmoid(x) : gpu::exp2_fast(x);
  }

  __device__ __forceinline__ void scaled_negatives(Tile& s) const {
#pragma unroll
    for (int r = 0; r < kRowCount; ++r) {
      const float scale = out_scale(r), factor = row_factors_[r].factor * scale;
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const float x = score(at(s, r, j), rows_[r].scale, cols_.added[j], rows_[r]);
        at(s, r, j) = activation(x) * fmaf(col_factors_[j], scale, factor);
      }
    }
  }

  __device__ __forceinline__ void negatives(Tile& s, float (&scale_sum)[kRowCount],
                                            float (&row_sum)[kRowCount]) const {
#pragma unroll
    for (int r = 0; r < kRowCount; ++r)
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const float dot = at(s, r, j);
        const float x = score(dot, rows_[r].scale, cols_.added[j], rows_[r]);
        const float w = activation(x) * (row_factors_[r].factor + col_factors_[j]);
        scale_sum[r] = fmaf(w, dot, scale_sum[r]);
        row_sum[r] += w;
        at(s, r, j) = w;
      }
  }

  __device__ __forceinline__ void any_pairs(Tile& s, bool apart, float (&scale_sum)[kRowCount],
                                            float (&row_sum)[kRowCount]) const {
    PositiveFactor row_positives[kRowCount];
#pragma unroll
    for (int r = 0; r < kRowCount; ++r)
      row_positives[r] = PositiveFactor(p_, p_.row, first_row_ + r * 8, row_factors_[r].apart);
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const Column col(p_, col_of(first_col_, j));
      const Factor col_factor(p_.col, col.index, shift_);
      const PositiveFactor col_positive(p_, p_.col, col.index, col_factor.apart);
#pragma unroll
      for (int r = 0; r < kRowCount; ++r) {
        const float dot = at(s, r, j);
        const float x = score(dot, rows_[r].scale * col.scale, cols_.added[j], rows_[r]);
        const Kind kind = kind_of(p_, dot, rows_[r], col);
        const bool positive = kind == Kind::kPositive;
        const float factor = row_factors_[r].factor + col_factor.factor;
        float w = 0.0f;
        if (kSoftplus) {
          w = positive ? -factor * sigmoid(-x) : factor * sigmoid(x);
          if (kind == Kind::kExcluded) w = 0.0f;
        } else {
          // The positives' part is added in fp32, before W is rounded: near convergence it and the
          // softmax cancel, and bf16 would keep nothing of the difference.
          if (positive) w = row_positives[r].weight(p_, x) + col_positive.weight(p_, x);
          const bool counts = kind == Kind::kNegative || (positive && !p_.exclude_positives);
          if (counts && apart)
            w += row_factors_[r].factor * gpu::exp2_fast(x - row_factors_[r].apart) +
                 col_factor.factor * gpu::exp2_fast(x - col_factor.apart);
          else if (counts)
            w = fmaf(gpu::exp2_fast(x), factor, w);
        }
        scale_sum[r] = fmaf(w, dot, scale_sum[r]);
        row_sum[r] += w;
        at(s, r, j) = w;
      }
    }
  }

  const Scores& p_;
  float shift_, inverse_;
  int first_row_, first_col_;
  bool rows_apart_, cols_apart_;
  Row rows_[kRowCount];
  Factor row_factors_[kRowCount];
  Cols cols_;
  float col_factors_[kCols];
};

}  // namespace ito::ITO_GPU
