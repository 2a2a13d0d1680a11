// From inner products to scores: scale, biases, and which pairs are positive or left out.
#pragma once
#include "cuda/problem.hpp"
#include "cuda/ptx.cuh"

namespace ito::ITO_GPU {

constexpr float kLog2e = 1.4426950408889634f;

// 0 in place of -inf, the maximum where no pair is allowed: -inf - -inf would be NaN.
__device__ __forceinline__ float finite(float x) { return x == -kInf ? 0.0f : x; }

// e^(x - shift). For fp32 features x - shift is rounded first, so that e^0 is 1. Else it is one
// FMA: its error, |x|·2^-24, is far below that of a score of half-precision features.
template <bool kExact>
__device__ __forceinline__ float exp_of(float x, float shift) {
  return gpu::exp2_fast(kExact ? (x - shift) * kLog2e : fmaf(x, kLog2e, -shift * kLog2e));
}

// log(1 + t) for t in [0, 1], relative error 3e-8: log2(1 + t) would lose the digits of small t.
__device__ __forceinline__ float log1p_unit(float t) {
  float p = fmaf(0.005232688f, t, -0.029505214f);
  p = fmaf(p, t, 0.07822591f);
  p = fmaf(p, t, -0.13663243f);
  p = fmaf(p, t, 0.19106005f);
  p = fmaf(p, t, -0.24842982f);
  p = fmaf(p, t, 0.33319098f);
  p = fmaf(p, t, -0.49999493f);
  p = fmaf(p, t, 0.99999994f);
  return p * t;
}

__device__ __forceinline__ float softplus(float s) {
  return fmaxf(s, 0.0f) + log1p_unit(gpu::exp2_fast(fabsf(s) * -kLog2e));
}

// Σ e^x as a maximum and the sum relative to it.
struct LogSum {
  float max = -kInf, sum = 0.0f;

  __device__ void merge(LogSum other) {
    const float top = fmaxf(max, other.max), shift = finite(top);
    sum = sum * exp_of<true>(max, shift) + other.sum * exp_of<true>(other.max, shift);
    max = top;
  }
};

// The positives' statistics in two numbers: Σ S and their count, or Σ e^S.
__device__ __forceinline__ Pair no_positives(Positives kind) {
  return {kind == Positives::kLse ? -kInf : 0.0f, 0.0f};
}
__device__ __forceinline__ Pair merged(Positives kind, Pair a, Pair b) {
  if (kind != Positives::kLse) return {a.x + b.x, a.y + b.y};
  LogSum sum{a.x, a.y};
  sum.merge({b.x, b.y});
  return {sum.max, sum.sum};
}

// What a row's scores need. Padding and rows beyond the end have -inf added: e^-inf is 0, so that
// plain negatives need no masks. Their ids are -1, and -2 for columns: never equal.
struct Row {
  float added = -kInf, scale = 0.0f;
  int id = -1;
  int partner = -1;  // the column of its self pair; without ids also of its positive

  Row() = default;
  __device__ Row(const Scores& p, int index) {
    if (index >= p.row.length) return;
    scale = p.scale_of == ScaleOf::kCol ? 1.0f
                                        : p.scale.load(p.scale_of == ScaleOf::kRow ? index : 0);
    const int64_t col = index + p.diagonal;
    if (col >= 0 && col < p.col.length) partner = static_cast<int>(col);
    if (p.row.ids) {
      const int given = p.row.ids.load(index);
      if (given < 0) return;
      id = given;
    }
    added = p.row.bias ? p.row.bias.load(index) : 0.0f;
  }
};

// The columns of a thread's scores. mma leaves two neighbours every 8 columns. Loaded for every
// tile: the branches are around the loops, not in them.
constexpr int kCols = 16;
__device__ __forceinline__ int col_of(int first, int j) { return first + j / 2 * 8 + j % 2; }

struct Cols {
  float added[kCols];
  int id[kCols];

  __device__ __forceinline__ Cols(const Side& side, int first) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      added[j] = col_of(first, j) < side.length ? 0.0f : -kInf;
      id[j] = -2;
    }
    if (side.bias) {
#pragma unroll
      for (int j = 0; j < kCols; ++j)
        if (col_of(first, j) < side.length) added[j] = side.bias.load(col_of(first, j));
    }
    if (side.ids) {
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const int given = col_of(first, j) < side.length ? side.ids.load(col_of(first, j)) : -1;
        id[j] = given < 0 ? -2 : given;
        added[j] = given < 0 ? -kInf : added[j];
      }
    }
  }
};

enum class Kind { kNegative, kPositive, kExcluded };

__device__ __forceinline__ Kind kind_of(const Scores& p, const Row& row, int col, int col_id) {
  const bool itself = col == row.partner;
  if (itself && p.exclude_self) return Kind::kExcluded;
  return (p.row.ids ? row.id == col_id : itself) ? Kind::kPositive : Kind::kNegative;
}

__device__ __forceinline__ float limit_of(const Side& side, int index) {
  return side.limit ? side.limit.load(min(index, side.length - 1)) : kInf;
}

// The same for an inner product under a limit.
__device__ __forceinline__ Kind kind_of(const Scores& p, const Row& row, int col, int col_id,
                                        float dot, float limit) {
  const Kind kind = kind_of(p, row, col, col_id);
  return kind == Kind::kNegative && dot > limit ? Kind::kExcluded : kind;
}

// Whether a warp's scores, of these rows and `width` columns from `col0`, need masks: some pair is
// positive or excluded, or may be where they are `limited`. Most tiles do not.
template <int kRowCount>
__device__ __forceinline__ bool special(const Scores& p, const Row (&rows)[kRowCount],
                                        const Cols& cols, int col0, int width,
                                        bool limited = false) {
  bool found = limited;
  if (p.exclude_self || (p.positives_matter && !p.row.ids)) {
#pragma unroll
    for (int r = 0; r < kRowCount; ++r)
      found |= rows[r].partner >= col0 && rows[r].partner < col0 + width;
  }
  if (p.positives_matter && p.row.ids) {
#pragma unroll
    for (int r = 0; r < kRowCount; ++r)
#pragma unroll
      for (int j = 0; j < kCols; ++j) found |= rows[r].id == cols.id[j];
  }
  return gpu::any(found);
}

// One slot of one side; see Forward. The fields of a pair are adjacent.
struct Slot {
  Global<float> data;
  int64_t field, first;

  __device__ Slot(Global<float> data, int slot, int count, int64_t length)
      : data(data), field(count * length), first(slot * length) {}
  __device__ float load(int f, int i) const { return data.load(f * field + first + i); }
  __device__ void store(int f, int i, float x) const { data.store(f * field + first + i, x); }
  __device__ void store_pair(int f, int i, Pair x) const {
    store(f, i, x.x);
    store(f + 1, i, x.y);
  }
  __device__ Pair load_pair(int f, int i) const { return {load(f, i), load(f + 1, i)}; }
};

// The sum of the four lanes that share rows.
__device__ __forceinline__ float sum_of_members(float x) {
  x += gpu::shuffle_xor(x, 1);
  return x + gpu::shuffle_xor(x, 2);
}

// Eight lanes share 16 columns. Reduces over these lanes; lane `group` gets the results of columns
// 2·group and 2·group + 1 as v[0] and v[1], by 14 shuffles instead of 48.
template <int kHalf = 8, class Op>
__device__ __forceinline__ void reduce_columns(float (&v)[kCols], Op op) {
  const bool upper = threadIdx.x % 32 & (kHalf * 2);
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const float given = upper ? v[j] : v[j + kHalf], kept = upper ? v[j + kHalf] : v[j];
    v[j] = op(kept, gpu::shuffle_xor(given, kHalf * 2));
  }
  if constexpr (kHalf > 2) reduce_columns<kHalf / 2>(v, op);
}

// The reverse: every lane gets the results of all 16 columns.
template <int kHalf = 2>
__device__ __forceinline__ void spread_columns(float (&v)[kCols]) {
  const bool upper = threadIdx.x % 32 & (kHalf * 2);
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const float own = v[j], got = gpu::shuffle_xor(own, kHalf * 2);
    v[j] = upper ? got : own;
    v[j + kHalf] = upper ? own : got;
  }
  if constexpr (kHalf < 8) spread_columns<kHalf * 2>(v);
}

}  // namespace ito::ITO_GPU
