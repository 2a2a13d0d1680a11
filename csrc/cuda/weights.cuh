// W = ∂L/∂S, from a score and the upstream gradients of its row's and column's statistics.
#pragma once
#include "cuda/tile.cuh"

namespace ito::ITO_GPU {

__device__ __forceinline__ float sigmoid(float x) {
  return gpu::reciprocal(1.0f + gpu::exp2_fast(-x));
}

__device__ __forceinline__ Pair pair_of(Global<const Pair> pairs, const Side& side, int index,
                                        float absent = 0.0f) {
  return pairs ? pairs.load(min(index, side.length - 1)) : Pair{absent, absent};
}

// Which sums of W are wanted: none, Σ W·<a, b>, or also Σ W.
enum class Sums { kNone, kScale, kAll };

// A thread's part of a tile of W, and of scale·W where there is a scale for each row.
template <bool kSoftplus, int kRowCount>
class Weights {
 public:
  using Tile = float[kRowCount / 2][kCols / 2][4];

  __device__ Weights(const Scores& p)
      : p_(p),
        underflowed_(p.underflowed && p.underflowed.load(0)),
        unit_(underflowed_ ? 1.0f : kLog2e),
        shift_(underflowed_ ? 0.0f : shift_of(p)) {}

  // Row r is `first` + 8·r.
  __device__ __forceinline__ void set_rows(int first) {
    first_row_ = first;
#pragma unroll
    for (int r = 0; r < kRowCount; ++r) {
      rows_[r] = Row(p_, first + r * 8, unit_);
      row_weights_[r] = pair_of(p_.row.weights, p_.row, first + r * 8).x;
    }
  }
  __device__ __forceinline__ void set_cols(int first) {
    first_col_ = first;
    cols_ = Cols(p_.col, first, shift_, unit_);
#pragma unroll
    for (int j = 0; j < kCols; ++j)
      col_weights_[j] = pair_of(p_.col.weights, p_.col, col_of(first, j)).x;
  }

  // Inner products become W. Where there are `sums`, adds to Σ W·<a, b> and Σ W of the rows and
  // calls `sum_columns`, before W is scaled.
  template <class SumColumns>
  __device__ __forceinline__ void weigh(Tile& s, Sums sums, float (&scale_sum)[kRowCount],
                                        float (&row_sum)[kRowCount], SumColumns sum_columns) {
    if (!kSoftplus && underflowed_)
      with_maxima(s, scale_sum, row_sum);
    else if (special(p_, rows_, first_col_))
      any_pairs(s, scale_sum, row_sum);
    else if (sums == Sums::kAll)
      negatives<Sums::kAll>(s, scale_sum, row_sum);
    else if (sums == Sums::kScale)
      negatives<Sums::kScale>(s, scale_sum, row_sum);
    else
      negatives<Sums::kNone>(s, scale_sum, row_sum);
    if (sums != Sums::kNone) sum_columns();
    if (p_.scale_of == ScaleOf::kAll) return;
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const float col_scale = Column(p_, col_of(first_col_, j)).scale / unit_;
#pragma unroll
      for (int r = 0; r < kRowCount; ++r) at(s, r, j) *= rows_[r].scale * col_scale;
    }
  }

 private:
  static __device__ __forceinline__ float activation(float x) {
    return kSoftplus ? sigmoid(x) : gpu::exp2_fast(x);
  }

  template <Sums kSums>
  __device__ __forceinline__ void negatives(Tile& s, float (&scale_sum)[kRowCount],
                                            float (&row_sum)[kRowCount]) const {
#pragma unroll
    for (int r = 0; r < kRowCount; ++r)
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const float dot = at(s, r, j);
        const float x = score(dot, rows_[r].scale, cols_.added[j], rows_[r]);
        const float w = activation(x) * (row_weights_[r] + col_weights_[j]);
        if (kSums != Sums::kNone) scale_sum[r] = fmaf(w, dot, scale_sum[r]);
        if (kSums == Sums::kAll) row_sum[r] += w;
        at(s, r, j) = w;
      }
  }

  // The positives' part is added in fp32, before W is rounded: near convergence it and the softmax
  // cancel, and bf16 would keep nothing of the difference.
  __device__ __forceinline__ void any_pairs(Tile& s, float (&scale_sum)[kRowCount],
                                            float (&row_sum)[kRowCount]) const {
    const bool linear = p_.positives == Positives::kLinear;
    float row_of_positive[kRowCount];
#pragma unroll
    for (int r = 0; r < kRowCount; ++r)
      row_of_positive[r] = pair_of(p_.row.weights, p_.row, first_row_ + r * 8).y;
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const Column col(p_, col_of(first_col_, j));
      const Pair col_weights = pair_of(p_.col.weights, p_.col, col.index);
#pragma unroll
      for (int r = 0; r < kRowCount; ++r) {
        const float dot = at(s, r, j);
        const float x = score(dot, rows_[r].scale * col.scale, cols_.added[j], rows_[r]);
        const Kind kind = kind_of(p_, dot, rows_[r], col);
        float factor = row_weights_[r] + col_weights.x, w = 0.0f;
        if (kSoftplus) {
          if (kind == Kind::kPositive) w = -factor * sigmoid(-x);
          if (kind == Kind::kNegative) w = factor * sigmoid(x);
        } else {
          const float of_positive = row_of_positive[r] + col_weights.y;
          if (kind == Kind::kPositive) {
            if (p_.exclude_positives) factor = 0.0f;
            if (!linear) factor += of_positive;
          }
          if (kind != Kind::kExcluded) w = factor * gpu::exp2_fast(x);
          if (kind == Kind::kPositive && linear) w += of_positive;
        }
        scale_sum[r] = fmaf(w, dot, scale_sum[r]);
        row_sum[r] += w;
        at(s, r, j) = w;
      }
    }
  }

  // The same where sums have underflowed: an exponential for each side, relative to its own maximum,
  // of scores in base e and not less T, which may be so far away that they would lose their digits. A
  // side that nothing arrives at has an infinite one: 0 times an exponential that overflows would be
  // NaN.
  __device__ __forceinline__ void with_maxima(Tile& s, float (&scale_sum)[kRowCount],
                                            float (&row_sum)[kRowCount]) const {
    const bool lse = p_.positives == Positives::kLse;
#pragma unroll
    for (int r = 0; r < kRowCount; ++r) {
      const Pair u = pair_of(p_.row.exact, p_.row, first_row_ + r * 8);
      const Pair row = pair_of(p_.row.shifts, p_.row, first_row_ + r * 8, kInf);
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const Column at_col(p_, col_of(first_col_, j));
        const Pair v = pair_of(p_.col.exact, p_.col, at_col.index);
        const Pair col = pair_of(p_.col.shifts, p_.col, at_col.index, kInf);
        const float dot = at(s, r, j);
        const float x = score(dot, rows_[r].scale * at_col.scale, cols_.added[j], rows_[r]);
        const Kind kind = kind_of(p_, dot, rows_[r], at_col);
        const bool positive = kind == Kind::kPositive;
        const float to_row = x - row.x, to_col = x - col.x;
        float w = 0.0f;
        if (kind == Kind::kNegative || (positive && !p_.exclude_positives))
          w = u.x * exp_fast(to_row) + v.x * exp_fast(to_col);
        if (positive && lse)
          w += u.y * exp_fast(to_row - row.y) + v.y * exp_fast(to_col - col.y);
        else if (positive)
          w += u.y + v.y;
        scale_sum[r] = fmaf(w, dot, scale_sum[r]);
        row_sum[r] += w;
        at(s, r, j) = w;
      }
    }
  }

  const Scores& p_;
  bool underflowed_;
  float unit_, shift_;  // of the scores: log2 e and T; 1 and 0 where sums have underflowed
  int first_row_, first_col_;
  Row rows_[kRowCount];
  float row_weights_[kRowCount];
  Cols cols_;
  float col_weights_[kCols];
};

}  // namespace ito::ITO_GPU
