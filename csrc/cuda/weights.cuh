// W = ∂L/∂S, from a score and what came back to the statistics of its row and column.
#pragma once
#include "cuda/scores.cuh"

namespace ito::ITO_GPU {

struct Weights {
  float shift = 0.0f, factor = 0.0f, alpha = 0.0f, pos = 0.0f;

  Weights() = default;
  __device__ Weights(const Side& side, int index) {
    if (index >= side.length) return;
    if (side.factors) {
      const Pair given = side.factors.load(index);
      shift = given.x;
      factor = given.y;
    }
    if (side.alpha) alpha = side.alpha.load(index);
    if (side.pos) pos = side.pos.load(index);
  }
};

// The positives' part is added in fp32, before W is rounded: near convergence it and the softmax
// cancel, and bf16 would keep nothing of the difference.
template <bool kSoftplus, bool kExact>
__device__ __forceinline__ float weight(const Scores& p, float s, Kind kind, const Weights& row,
                                        const Weights& col) {
  if (kSoftplus) {
    if (kind == Kind::kExcluded) return 0.0f;
    const float sign = kind == Kind::kPositive ? -1.0f : 1.0f;
    const float sigmoid = gpu::reciprocal(1.0f + gpu::exp2_fast(s * (sign * -kLog2e)));
    return sign * (row.factor + col.factor) * sigmoid;
  }
  const bool positive = kind == Kind::kPositive;
  float w = 0.0f;
  if (positive && p.positives == Positives::kLse) {
    if (p.row.alpha) w += row.alpha * exp_of<true>(s - row.shift, row.pos);
    if (p.col.alpha) w += col.alpha * exp_of<true>(s - col.shift, col.pos);
  }
  if (kind == Kind::kExcluded || (positive && p.exclude_positives)) s = -kInfinity;
  if (p.row.factors) w += row.factor * exp_of<kExact>(s, row.shift);
  if (p.col.factors) w += col.factor * exp_of<kExact>(s, col.shift);
  if (positive && p.positives == Positives::kLinear) w += row.alpha + col.alpha;
  return w;
}

}  // namespace ito::ITO_GPU
