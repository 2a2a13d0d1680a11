// W = ∂L/∂S, from a score and the upstream gradients of its row's and column's statistics.
#pragma once
#include "cuda/scores.cuh"

namespace ito::ITO_GPU {

// upstream · softmax = factor · e^(S - shift). Beyond the end it is that of the last row or column:
// scores are -inf there, so their exponentials are 0.
struct Factor {
  float shift = 0.0f, factor = 0.0f;

  Factor() = default;
  __device__ Factor(const Side& side, int index) {
    if (!side.factors) return;
    const Pair given = side.factors.load(min(index, side.length - 1));
    shift = given.x;
    factor = given.y;
  }
};

// The positives' part of W. It is added in fp32, before W is rounded: near convergence it and the
// softmax cancel, and bf16 would keep nothing of the difference.
__device__ __forceinline__ float positive_weight(const Scores& p, float s, float row_shift,
                                                 float col_shift, int row, int col) {
  float w = 0.0f;
  const bool lse = p.positives == Positives::kLse;
  if (p.row.alpha && p.positives != Positives::kNone)
    w += p.row.alpha.load(row) * (lse ? exp_of<true>(s - row_shift, p.row.pos.load(row)) : 1.0f);
  if (p.col.alpha && p.positives != Positives::kNone)
    w += p.col.alpha.load(col) * (lse ? exp_of<true>(s - col_shift, p.col.pos.load(col)) : 1.0f);
  return w;
}

template <bool kSoftplus, bool kExact>
__device__ __forceinline__ float weight(const Scores& p, float s, Kind kind, const Factor& row,
                                        const Factor& col, int row_index, int col_index) {
  const bool positive = kind == Kind::kPositive;
  if (kSoftplus) {
    if (kind == Kind::kExcluded) return 0.0f;
    const float sign = positive ? -1.0f : 1.0f;
    const float sigmoid = gpu::reciprocal(1.0f + gpu::exp2_fast(s * (sign * -kLog2e)));
    return sign * (row.factor + col.factor) * sigmoid;
  }
  float w = 0.0f;
  if (positive) w = positive_weight(p, s, row.shift, col.shift, row_index, col_index);
  if (kind == Kind::kExcluded || (positive && p.exclude_positives)) return w;
  if (p.row.factors) w += row.factor * exp_of<kExact>(s, row.shift);
  if (p.col.factors) w += col.factor * exp_of<kExact>(s, col.shift);
  return w;
}

}  // namespace ito::ITO_GPU
