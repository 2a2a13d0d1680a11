// From inner products to scores: scale, biases, and which pairs are positive or left out.
#pragma once
#include "cuda/problem.hpp"
#include "cuda/ptx.cuh"

namespace ito::ITO_GPU {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// 0 in place of -inf, the maximum where no pair is allowed: -inf - -inf would be NaN.
__device__ __forceinline__ float finite(float x) { return x == -kInf ? 0.0f : x; }

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

__device__ __forceinline__ float exp_fast(float x) { return gpu::exp2_fast(x * kLog2e); }

// Of a score in base 2.
__device__ __forceinline__ float softplus(float x) {
  return fmaf(fmaxf(x, 0.0f), kLn2, log1p_unit(gpu::exp2_fast(-fabsf(x))));
}

// The shift T of all scores, in base 2.
__device__ __forceinline__ float shift_of(const Scores& p) {
  return p.shift ? p.shift.load(0) : 0.0f;
}

// What a row's scores need: in units of 1 / `unit` a score less T is <a, b>·scale + added, and what
// the column adds. One exponential for both sides takes base 2, one FMA for each score. Relative to
// a true maximum scores are in base e, so that they and the maximum have the same bits and the
// largest one differs from it by 0. Padding and rows beyond the end have -inf added: 2^-inf is 0, so that plain negatives need
// no masks. Their ids are -1, and -2 for columns: never equal.
struct Row {
  float added = -kInf, scale = 0.0f, limit = kInf;
  int id = -1;
  int partner = -1;  // the column of its self pair; without ids also of its positive

  Row() = default;
  __device__ Row(const Scores& p, int index, float unit = kLog2e) {
    if (index >= p.row.length) return;
    scale = unit;
    if (p.scale_of != ScaleOf::kCol) scale *= p.scale.load(p.scale_of == ScaleOf::kRow ? index : 0);
    const int64_t col = index + p.diagonal;
    if (col >= 0 && col < p.col.length) partner = static_cast<int>(col);
    if (p.row.limit) limit = p.row.limit.load(index);
    if (p.row.ids) {
      const int given = p.row.ids.load(index);
      if (given < 0) return;
      id = given;
    }
    added = p.row.bias ? p.row.bias.load(index) * unit : 0.0f;
  }
};

// The columns of a thread's scores. mma leaves two neighbours every 8 columns. The branches are
// around the loops, not in them.
constexpr int kCols = 16;
__device__ __forceinline__ int col_of(int first, int j) { return first + j / 2 * 8 + j % 2; }

// Padding and columns beyond the end: -2.
__device__ __forceinline__ int col_id(const Side& side, int col) {
  const int id = col < side.length ? side.ids.load(col) : -2;
  return id < 0 ? -2 : id;
}

struct Cols {
  float added[kCols];

  Cols() = default;
  __device__ __forceinline__ Cols(const Side& side, int first, float shift, float unit = kLog2e) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) added[j] = col_of(first, j) < side.length ? -shift : -kInf;
    if (side.bias) {
#pragma unroll
      for (int j = 0; j < kCols; ++j)
        if (col_of(first, j) < side.length)
          added[j] = fmaf(side.bias.load(col_of(first, j)), unit, -shift);
    }
    if (side.ids) {
#pragma unroll
      for (int j = 0; j < kCols; ++j)
        if (col_id(side, col_of(first, j)) < 0) added[j] = -kInf;
    }
  }
};

// The biases are added to one another first: the same bits where the problem is transposed.
__device__ __forceinline__ float score(float dot, float scale, float col_added, const Row& row) {
  return fmaf(dot, scale, col_added + row.added);
}

// What a column's scores need besides where they may be masked.
struct Column {
  int index, id = -2;
  float scale = 1.0f, limit = kInf;

  __device__ Column(const Scores& p, int index) : index(index) {
    const int inside = min(index, p.col.length - 1);
    if (p.col.ids) id = col_id(p.col, index);
    if (p.scale_of == ScaleOf::kCol) scale = p.scale.load(inside);
    if (p.col.limit) limit = p.col.limit.load(inside);
  }
};

enum class Kind { kNegative, kPositive, kExcluded };

__device__ __forceinline__ Kind kind_of(const Scores& p, float dot, const Row& row,
                                        const Column& col) {
  const bool itself = col.index == row.partner;
  if (itself && p.exclude_self) return Kind::kExcluded;
  if (p.row.ids ? row.id == col.id : itself) return Kind::kPositive;
  return dot > fminf(row.limit, col.limit) ? Kind::kExcluded : Kind::kNegative;
}

// Whether a warp's scores, of these rows and a thread's columns from `col`, need masks: some pair is
// positive or excluded, or may be. Most tiles do not.
template <int kRowCount>
__device__ __forceinline__ bool special(const Scores& p, const Row (&rows)[kRowCount], int col) {
  bool found = p.row.limit || p.col.limit || p.scale_of == ScaleOf::kCol;
  if (p.exclude_self || (p.positives_matter && !p.row.ids)) {
    constexpr int kWidth = 4 * kCols;  // of the warp
    const int col0 = col / kWidth * kWidth;
#pragma unroll
    for (int r = 0; r < kRowCount; ++r)
      found |= rows[r].partner >= col0 && rows[r].partner < col0 + kWidth;
  }
  if (p.positives_matter && p.row.ids) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const int id = col_id(p.col, col_of(col, j));
#pragma unroll
      for (int r = 0; r < kRowCount; ++r) found |= rows[r].id == id;
    }
  }
  return gpu::any(found);
}

// One slot of `count` of one side; see Forward. Addresses are computed anew each time: registers are
// scarce.
struct Slot {
  const Global<float>& data;
  int slot, count;
  const int& length;

  __device__ int64_t at(int f, int i) const { return int64_t{f * count + slot} * length + i; }
  __device__ float load(int f, int i) const { return data.load(at(f, i)); }
  __device__ void store(int f, int i, float x) const { data.store(at(f, i), x); }
  __device__ void add(int f, int i, float x) const { gpu::add(data, at(f, i), x); }
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

}  // namespace ito::ITO_GPU
