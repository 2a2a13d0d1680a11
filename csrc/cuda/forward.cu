// Row and column statistics in one pass over the scores, and their merge.
//
// A thread keeps the statistics of its rows, over its own columns, in registers until a row of
// tiles ends. Statistics of columns are updated after each tile, in the warp's own slot in global
// memory. No two warps write to the same place: there are no atomics, and no barrier in the
// epilogue.
#include "cuda/tile.cuh"

namespace ito::ITO_GPU {
namespace {

// Inner products become scores. Beyond a limit they are -inf like padding, so that a tile without
// positives needs no masks. Limits are loaded again for each tile: registers are scarce.
template <bool kLimited>
__device__ __forceinline__ void score(const Scores& p, Fragment& s, const Row (&rows)[kRows],
                                      const Cols& cols, int row, int col) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float limit = kLimited ? limit_of(p.row, row + r * 8) : kInf;
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const float dot = at(s, r, j);
      at(s, r, j) = fmaf(dot, rows[r].scale, cols.added[j]) + rows[r].added;
      if (kLimited && dot > limit &&
          !(p.row.ids ? rows[r].id == cols.id[j] : rows[r].partner == col_of(col, j)))
        at(s, r, j) = -kInf;
    }
  }
}
__device__ __forceinline__ void score(const Scores& p, Fragment& s, const Row (&rows)[kRows],
                                      const Cols& cols, int row, int col) {
  if (p.row.limit)
    score<true>(p, s, rows, cols, row, col);
  else
    score<false>(p, s, rows, cols, row, col);
}

static_assert(kWarpRows == kSlots && kWarpCols * 2 == kSlots);

template <bool kExact>
class Statistics {
 public:
  __device__ Statistics(const Forward& f, int row_group, int col_group)
      : p_(f.scores),
        row_slot_(f.row_slots, col_group * kSlots + place_.warp_col * 2 + place_.member / 2,
                  f.split.col_groups * kSlots, f.scores.row.length),
        col_slot_(f.col_slots, row_group * kSlots + place_.warp_row,
                  f.split.row_groups * kSlots, f.scores.col.length),
        with_rows_(bool(f.row_slots)),
        // under `triangle` the columns of a group on the diagonal are its rows
        with_cols_(f.col_slots && !(f.split.triangle && row_group == col_group)) {}

  __device__ __forceinline__ void begin(int row0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      rows_[r] = Row(p_, row0 + place_.row(r));
      lse_[r] = {};
      pos_[r] = no_positives(p_.positives);
      neg_[r] = -kInf;
    }
  }

  __device__ __forceinline__ void tile(Fragment& s, int row0, int col0) {
    const int col = col0 + place_.col();
    const Cols cols(p_.col, col);
    score(p_, s, rows_, cols, row0 + place_.row(0), col);
    Pair col_pos[2] = {no_positives(p_.positives), no_positives(p_.positives)};
    float col_neg[2] = {-kInf, -kInf};
    const bool masked = special(p_, rows_, cols, col0 + place_.first_col(), kTile / kWarpCols);
    if (masked) mask(s, col, cols, col_pos, col_neg);
    if (with_rows_) add_to_rows(s, masked);
    if (with_cols_) add_to_cols(s, masked, col, col_pos, col_neg);
  }

  __device__ __forceinline__ void end(int row0) {
    started_ = true;
    if (!with_rows_) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // two lanes share a slot, so that rows have as many slots as columns: `triangle` needs that
      lse_[r].merge({gpu::shuffle_xor(lse_[r].max, 1), gpu::shuffle_xor(lse_[r].sum, 1)});
      pos_[r] = merged(p_.positives, pos_[r],
                       {gpu::shuffle_xor(pos_[r].x, 1), gpu::shuffle_xor(pos_[r].y, 1)});
      neg_[r] = fmaxf(neg_[r], gpu::shuffle_xor(neg_[r], 1));
      const int row = row0 + place_.row(r);
      if (place_.member % 2 == 0 && row < p_.row.length) {
        row_slot_.store_pair(kMax, row, {lse_[r].max, lse_[r].sum});
        if (p_.positives != Positives::kNone) row_slot_.store_pair(kPos, row, pos_[r]);
        if (p_.hardest) row_slot_.store(kNegMax, row, neg_[r]);
      }
    }
  }

 private:
  // Adds to the positives and the largest negative. What is excluded becomes -inf in `s`.
  __device__ __forceinline__ void mask(Fragment& s, int col, const Cols& cols,
                                       Pair (&col_pos)[2], float (&col_neg)[2]) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      Pair pos = no_positives(p_.positives);
      float neg = -kInf;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float& x = at(s, r, j);
        const Kind kind = kind_of(p_, rows_[r], col_of(col, j), cols.id[j]);
        if (kind == Kind::kPositive) {
          pos_[r] = merged(p_.positives, pos_[r], {x, 1.0f});
          pos = merged(p_.positives, pos, {x, 1.0f});
        } else if (kind == Kind::kNegative) {
          neg_[r] = fmaxf(neg_[r], x);
          neg = fmaxf(neg, x);
        }
        if (kind == Kind::kExcluded || (kind == Kind::kPositive && p_.exclude_positives))
          x = -kInf;
      }
#pragma unroll
      for (int lane = 4; lane <= 16; lane *= 2) {
        pos = merged(p_.positives, pos,
                     {gpu::shuffle_xor(pos.x, lane), gpu::shuffle_xor(pos.y, lane)});
        neg = fmaxf(neg, gpu::shuffle_xor(neg, lane));
      }
      if (place_.group == j / 2) {
        col_pos[j % 2] = pos;
        col_neg[j % 2] = neg;
      }
    }
  }

  __device__ __forceinline__ void add_to_rows(Fragment& s, bool masked) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float top = -kInf;
#pragma unroll
      for (int j = 0; j < kCols; ++j) top = fmaxf(top, at(s, r, j));
      if (!masked) neg_[r] = fmaxf(neg_[r], top);
      const float larger = fmaxf(lse_[r].max, top), shift = finite(larger);
      float sum = lse_[r].sum * exp_of<true>(lse_[r].max, shift);
#pragma unroll
      for (int j = 0; j < kCols; ++j) sum += exp_of<kExact>(at(s, r, j), shift);
      lse_[r] = {larger, sum};
    }
  }

  __device__ __forceinline__ void add_to_cols(Fragment& s, bool masked, int first,
                                              const Pair (&pos)[2], const float (&neg)[2]) {
    float top[kCols], sum[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      top[j] = at(s, 0, j);
#pragma unroll
      for (int r = 1; r < kRows; ++r) top[j] = fmaxf(top[j], at(s, r, j));
    }
    reduce_columns(top, [](float x, float y) { return fmaxf(x, y); });
    const float own[2] = {top[0], top[1]};
    spread_columns(top);
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const float shift = finite(top[j]);
      sum[j] = 0.0f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[j] += exp_of<kExact>(at(s, r, j), shift);
    }
    reduce_columns(sum, [](float x, float y) { return x + y; });
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int col = col_of(first, 2 * place_.group + e);
      if (col >= p_.col.length) continue;
      LogSum lse{own[e], sum[e]};
      if (started_) {
        const Pair before = col_slot_.load_pair(kMax, col);
        lse.merge({before.x, before.y});
      }
      col_slot_.store_pair(kMax, col, {lse.max, lse.sum});
      if (p_.positives != Positives::kNone && (masked || !started_)) {
        Pair all = pos[e];
        if (started_) all = merged(p_.positives, col_slot_.load_pair(kPos, col), all);
        col_slot_.store_pair(kPos, col, all);
      }
      if (p_.hardest) {
        const float here = masked ? neg[e] : own[e];
        col_slot_.store(kNegMax, col, started_ ? fmaxf(here, col_slot_.load(kNegMax, col)) : here);
      }
    }
  }

  const Scores& p_;
  Place place_;
  Slot row_slot_, col_slot_;
  bool with_rows_, with_cols_;
  bool started_ = false;  // a row of tiles is done: the columns' slots are written
  Row rows_[kRows];
  LogSum lse_[kRows];
  Pair pos_[kRows];
  float neg_[kRows];
};

// Row sums of softplus(±S).
class SoftplusSums {
 public:
  __device__ SoftplusSums(const Forward& f, int /*row_group*/, int col_group)
      : p_(f.scores),
        slot_(f.row_slots, col_group * kWarpCols + place_.warp_col,
              f.split.col_groups * kWarpCols, f.scores.row.length) {}

  __device__ __forceinline__ void begin(int row0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      rows_[r] = Row(p_, row0 + place_.row(r));
      sum_[r] = 0.0f;
    }
  }

  __device__ __forceinline__ void tile(Fragment& s, int row0, int col0) {
    const int col = col0 + place_.col();
    const Cols cols(p_.col, col);
    score(p_, s, rows_, cols, row0 + place_.row(0), col);
    if (special(p_, rows_, cols, col0 + place_.first_col(), kTile / kWarpCols)) {
#pragma unroll
      for (int j = 0; j < kCols; ++j)
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float& x = at(s, r, j);
          const Kind kind = kind_of(p_, rows_[r], col_of(col, j), cols.id[j]);
          if (kind == Kind::kPositive) x = -x;
          if (kind == Kind::kExcluded) x = -kInf;
        }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < kCols; ++j) sum_[r] += softplus(at(s, r, j));
  }

  __device__ __forceinline__ void end(int row0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = sum_of_members(sum_[r]);
      const int row = row0 + place_.row(r);
      if (place_.member == 0 && row < p_.row.length) slot_.store(0, row, sum);
    }
  }

 private:
  const Scores& p_;
  Place place_;
  Slot slot_;
  Row rows_[kRows];
  float sum_[kRows];
};

template <class Arithmetic, class Epilogue>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ Forward p) {
  int row_group, col_group;
  const Region all{0, p.scores.row.length, 0, p.scores.col.length};
  const Region region = region_of(p.split, all, row_group, col_group);
  Epilogue epilogue(p, row_group, col_group);
  for_each_tile<Arithmetic>(p.scores, region, epilogue);
}

constexpr int kMergeThreads = 128;

__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Merge p) {
  const int i = blockIdx.x * kMergeThreads + threadIdx.x;
  if (i >= p.length) return;
  const int64_t field = static_cast<int64_t>(p.count) * p.length;
  LogSum lse;
  Pair pos = no_positives(p.positives);
  float neg = -kInf;
  int64_t at = i;
  for (int slot = 0; slot < p.count; ++slot, at += p.length) {
    lse.merge({p.slots.load(at + kMax * field), p.slots.load(at + kSum * field)});
    if (p.pos)
      pos = merged(p.positives, pos,
                   {p.slots.load(at + kPos * field), p.slots.load(at + kPosSum * field)});
    if (p.neg_max) neg = fmaxf(neg, p.slots.load(at + kNegMax * field));
  }
  const float shift = finite(lse.max);
  p.max.store(i, lse.max);
  p.logsum.store(i, logf(lse.sum));
  if (p.pos)
    p.pos.store(i, p.positives == Positives::kLse ? pos.x - shift + logf(pos.y)
                                                  : pos.x - pos.y * shift);
  if (p.neg_max) p.neg_max.store(i, neg);
}

template <class Arithmetic>
void start(const Forward& p, gpu::Stream stream) {
  const Split& s = p.split;
  const int64_t blocks = s.triangle ? int64_t{s.row_groups} * (s.row_groups + 1) / 2
                                    : int64_t{s.row_groups} * s.col_groups;
  if (p.scores.softplus)
    gpu::launch("softplus_kernel", forward_kernel<Arithmetic, SoftplusSums>, blocks, kThreads,
                kTileShared, stream, p);
  else
    gpu::launch("logsumexp_kernel", forward_kernel<Arithmetic, Statistics<!Arithmetic::kHalf>>,
                blocks, kThreads, kTileShared, stream, p);
}

}  // namespace

std::string unavailable() { return gpu::unavailable(); }

void forward(const Forward& p, gpu::Stream stream) {
  switch (p.scores.arithmetic) {
    case Arithmetic::kBf16: return start<Bf16>(p, stream);
    case Arithmetic::kF16: return start<F16>(p, stream);
    case Arithmetic::kTf32: return start<Tf32>(p, stream);
    case Arithmetic::kTf32x3: return start<Tf32x3>(p, stream);
  }
}

void merge(const Merge& p, gpu::Stream stream) {
  const int64_t blocks = ceil_div(int64_t{p.length}, kMergeThreads);
  gpu::launch("merge_kernel", merge_kernel, blocks, kMergeThreads, 0, stream, p);
}

}  // namespace ito::ITO_GPU
