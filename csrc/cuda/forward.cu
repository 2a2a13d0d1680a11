// Row and column statistics in one pass over the scores, their merge, and the computation again of
// what underflowed.
//
// Scores are taken relative to one number T, so that one exponential serves both sides and no
// maxima are kept. A thread keeps the sums of its columns, over its own rows, in registers until a
// column of tiles ends. Sums of rows are added after each tile to the warp's own slot in global
// memory. No two warps write to the same place, so that sums have a fixed order, and there is no
// barrier in the epilogue.
#include "cuda/tile.cuh"

namespace ito::ITO_GPU {
namespace {

constexpr float kLeast = 0x1p-80f;  // of a sum that has not underflowed

static_assert(kWarpRows == kSlots && kWarpCols * 2 == kSlots);

class Statistics {
 public:
  __device__ Statistics(const Forward& f, int row_group, int col_group)
      : p_(f.scores),
        // two lanes share a slot, so that rows have as many as columns: `triangle` needs that
        row_slot_{f.row_slots, col_group * kSlots + place_.warp_col * 2 + place_.member / 2,
                  f.split.col_groups * kSlots, f.scores.row.length},
        col_slot_{f.col_slots, row_group * kSlots + place_.warp_row,
                  f.split.row_groups * kSlots, f.scores.col.length},
        with_rows_(bool(f.row_slots)),
        // under `triangle` the columns of a group on the diagonal are its rows
        with_cols_(f.col_slots && !(f.split.triangle && row_group == col_group)),
        shift_(shift_of(p_)) {}

  __device__ __forceinline__ void begin(int col0) {
    cols_ = Cols(p_.col, col0 + place_.col(), shift_);
#pragma unroll
    for (int j = 0; j < kCols; ++j) sum_[j] = 0.0f;
  }

  __device__ __forceinline__ void tile(Fragment& s, int row0, int col0) {
    Row rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = Row(p_, row0 + place_.row(r));
    if (special(p_, rows, col0 + place_.col())) {
      mask(s, rows, row0, col0 + place_.col());
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int j = 0; j < kCols; ++j)
          at(s, r, j) = score(at(s, r, j), rows[r].scale, cols_.added[j], rows[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const float e = gpu::exp2_fast(at(s, r, j));
        sum += e;
        sum_[j] += e;
      }
      add_to_row(kSum, row0 + place_.row(r), sum);
    }
  }

  __device__ __forceinline__ void end(int col0) {
    if (!with_cols_) return;
    reduce_columns(sum_, [](float x, float y) { return x + y; });
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int col = col_of(col0 + place_.col(), 2 * place_.group + e);
      if (col < p_.col.length) col_slot_.store(kSum, col, sum_[e]);
    }
  }

 private:
  // Inner products become scores. Adds to the positives; what is left out becomes -inf.
  __device__ __forceinline__ void mask(Fragment& s, const Row (&rows)[kRows], int row0,
                                       int first) {
    const bool lse = p_.positives == Positives::kLse;
    Pair row_pos[kRows] = {};  // a sum and a number
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const Column col(p_, col_of(first, j));
      Pair pos = {};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float dot = at(s, r, j);
        float x = score(dot, rows[r].scale * col.scale, cols_.added[j], rows[r]);
        const Kind kind = kind_of(p_, dot, rows[r], col);
        if (kind == Kind::kPositive) {
          const Pair value{lse ? gpu::exp2_fast(x) : x, 1.0f};
          row_pos[r] = sum(row_pos[r], value);
          pos = sum(pos, value);
        }
        if (kind == Kind::kExcluded || (kind == Kind::kPositive && p_.exclude_positives)) x = -kInf;
        at(s, r, j) = x;
      }
      if (p_.positives == Positives::kNone) continue;
#pragma unroll
      for (int lane = 4; lane <= 16; lane *= 2)
        pos = sum(pos, {gpu::shuffle_xor(pos.x, lane), gpu::shuffle_xor(pos.y, lane)});
      if (with_cols_ && place_.group == j / 2 && col.index < p_.col.length) {
        col_slot_.add(kPos, col.index, pos.x);
        col_slot_.add(kPosCount, col.index, pos.y);
      }
    }
    if (p_.positives == Positives::kNone) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      add_to_row(kPos, row0 + place_.row(r), row_pos[r].x);
      add_to_row(kPosCount, row0 + place_.row(r), row_pos[r].y);
    }
  }

  static __device__ Pair sum(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }

  __device__ __forceinline__ void add_to_row(Field field, int row, float x) {
    x += gpu::shuffle_xor(x, 1);
    if (with_rows_ && place_.member % 2 == 0 && row < p_.row.length) row_slot_.add(field, row, x);
  }

  const Scores& p_;
  Place place_;
  Slot row_slot_, col_slot_;
  bool with_rows_, with_cols_;
  float shift_;
  Cols cols_;
  float sum_[kCols];
};

// Row sums of softplus(±S).
class SoftplusSums {
 public:
  __device__ SoftplusSums(const Forward& f, int /*row_group*/, int col_group)
      : p_(f.scores),
        slot_{f.row_slots, col_group * kWarpCols + place_.warp_col,
              f.split.col_groups * kWarpCols, f.scores.row.length} {}

  __device__ __forceinline__ void begin(int col0) {
    cols_ = Cols(p_.col, col0 + place_.col(), 0.0f);
  }

  __device__ __forceinline__ void tile(Fragment& s, int row0, int col0) {
    Row rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = Row(p_, row0 + place_.row(r));
    const bool masked = special(p_, rows, col0 + place_.col());
    if (masked) mask(s, rows, col0 + place_.col());
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kCols; ++j)
        sum += softplus(masked ? at(s, r, j)
                               : score(at(s, r, j), rows[r].scale, cols_.added[j], rows[r]));
      sum = sum_of_members(sum);
      const int row = row0 + place_.row(r);
      if (place_.member == 0 && row < p_.row.length) slot_.add(0, row, sum);
    }
  }

  __device__ __forceinline__ void end(int /*col0*/) {}

 private:
  // Inner products become scores, of positives with the other sign.
  __device__ __forceinline__ void mask(Fragment& s, const Row (&rows)[kRows], int first) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const Column col(p_, col_of(first, j));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float dot = at(s, r, j);
        const float x = score(dot, rows[r].scale * col.scale, cols_.added[j], rows[r]);
        const Kind kind = kind_of(p_, dot, rows[r], col);
        at(s, r, j) = kind == Kind::kPositive ? -x : kind == Kind::kExcluded ? -kInf : x;
      }
    }
  }

  const Scores& p_;
  Place place_;
  Slot slot_;
  Cols cols_;
};

template <class Arithmetic, class Epilogue>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ Forward p) {
  int row_group, col_group;
  const Region all{0, p.scores.row.length, 0, p.scores.col.length};
  const Region region = region_of(p.split, all, row_group, col_group);
  Epilogue epilogue(p, row_group, col_group);
  for_each_tile<Arithmetic>(p.scores, region, epilogue);
}

// x·ln 2 less its rounding `product`: what the other statistics of a row keep of its maximum.
__device__ __forceinline__ float product_rest(float x, float product) {
  return fmaf(x, kLn2, -product) - x * 1.9046543e-9f;  // kLn2 is larger than ln 2 by that
}

constexpr int kMergeThreads = 128;

__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Merge p) {
  const int i = blockIdx.x * kMergeThreads + threadIdx.x;
  if (i >= p.length) return;
  const int64_t field = static_cast<int64_t>(p.count) * p.length;
  float sum = 0.0f, pos = 0.0f, count = 0.0f;
  int64_t at = i;
  for (int slot = 0; slot < p.count; ++slot, at += p.length) {
    sum += p.slots.load(at + kSum * field);
    if (!p.out.pos) continue;
    pos += p.slots.load(at + kPos * field);
    count += p.slots.load(at + kPosCount * field);
  }
  const bool padded = p.ids && p.ids.load(i) < 0, empty = padded || sum == 0.0f;
  const bool lse = p.positives == Positives::kLse;
  const float shift = p.shift.load(0), least = p.biased || shift > 0.0f ? kLeast : 0.0f;
  const bool lost = sum < least || (lse && count > 0.0f && pos < least);
  p.underflowed.store(i, lost && !padded);
  // the power of two below Σ E stands for the maximum; without one, 0
  const float top = empty ? -shift : floorf(log2f(sum));
  const float max = (shift + top) * kLn2, rest = product_rest(shift + top, max);
  p.out.max.store(i, empty ? -kInf : max);
  p.out.logsum.store(i, empty ? -kInf : fmaf(log2f(sum * exp2f(-top)), kLn2, rest));
  if (p.out.pos) {
    const float number = lse ? 1.0f : count;
    p.out.pos.store(i, fmaf((lse ? log2f(pos) : pos) - number * top, kLn2, number * rest));
  }
}

// Σ e^x as a maximum and the sum relative to it.
struct LogSum {
  float max = -kInf, sum = 0.0f;

  __device__ void merge(LogSum other) {
    const float top = fmaxf(max, other.max), shift = finite(top);
    sum = sum * exp_fast(max - shift) + other.sum * exp_fast(other.max - shift);
    max = top;
  }
  __device__ LogSum of_lane(int mask) const {
    return {gpu::shuffle_xor(max, mask), gpu::shuffle_xor(sum, mask)};
  }
};

// The statistics of 128 rows with running maxima, in base e. Of the positives Σ x, with their number as `sum`,
// or the logsum.
class Running {
 public:
  __device__ Running(const Scores& p, int row0) : p_(p) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      rows_[r] = Row(p_, row0 + place_.row(r), 1.0f);
      pos_[r] = no_positives();
      neg_[r] = -kInf;
    }
  }

  __device__ __forceinline__ void begin(int col0) {
    cols_ = Cols(p_.col, col0 + place_.col(), 0.0f, 1.0f);
  }

  __device__ __forceinline__ void tile(Fragment& s, int /*row0*/, int col0) {
    const bool masked = special(p_, rows_, col0 + place_.col());
    if (masked) mask(s, col0 + place_.col());
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float top = -kInf, sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        float& x = at(s, r, j);
        if (!masked) x = score(x, rows_[r].scale, cols_.added[j], rows_[r]);
        top = fmaxf(top, x);
      }
      if (!masked) neg_[r] = fmaxf(neg_[r], top);
      const float shift = finite(top);
#pragma unroll
      for (int j = 0; j < kCols; ++j) sum += exp_fast(at(s, r, j) - shift);
      all_[r].merge({top, sum});
    }
  }
  __device__ void end(int /*col0*/) {}

  // Two lanes share a slot; then a thread merges those of a row.
  __device__ void store(const Fallback& p, int row0) {
    enum { kMax, kSum, kPos, kPosSum, kNegMax };
    const int& length = p_.row.length;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      all_[r].merge(all_[r].of_lane(1));
      merge_positive(pos_[r], pos_[r].of_lane(1));
      neg_[r] = fmaxf(neg_[r], gpu::shuffle_xor(neg_[r], 1));
      const int row = row0 + place_.row(r);
      if (place_.member % 2 || row >= length) continue;
      const Slot own{p.slots, place_.warp_col * 2 + place_.member / 2, kSlots, length};
      own.store(kMax, row, all_[r].max);
      own.store(kSum, row, all_[r].sum);
      own.store(kPos, row, pos_[r].max);
      own.store(kPosSum, row, pos_[r].sum);
      own.store(kNegMax, row, neg_[r]);
    }
    gpu::barrier();
    const int row = row0 + threadIdx.x;
    if (threadIdx.x >= kTile || row >= length || !marked(p, row)) return;
    LogSum all, pos = no_positives();
    float neg = -kInf;
    for (int i = 0; i < kSlots; ++i) {
      const Slot one{p.slots, i, kSlots, length};
      all.merge({one.load(kMax, row), one.load(kSum, row)});
      merge_positive(pos, {one.load(kPos, row), one.load(kPosSum, row)});
      neg = fmaxf(neg, one.load(kNegMax, row));
    }
    const float top = finite(all.max);
    p.out.max.store(row, all.max);
    p.out.logsum.store(row, logf(all.sum));
    if (p.out.pos)
      p.out.pos.store(row, p_.positives == Positives::kLse ? pos.max - top + logf(pos.sum)
                                                           : pos.max - pos.sum * top);
    if (p.out.neg_max) p.out.neg_max.store(row, neg);
  }

  static __device__ bool marked(const Fallback& p, int row) {
    return !p.underflowed || p.underflowed.load(row);
  }

 private:
  // Inner products become scores, what is left out -inf.
  __device__ __forceinline__ void mask(Fragment& s, int first) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const Column col(p_, col_of(first, j));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float dot = at(s, r, j);
        float x = score(dot, rows_[r].scale * col.scale, cols_.added[j], rows_[r]);
        const Kind kind = kind_of(p_, dot, rows_[r], col);
        if (kind == Kind::kPositive) merge_positive(pos_[r], {x, 1.0f});
        if (kind == Kind::kNegative) neg_[r] = fmaxf(neg_[r], x);
        if (kind == Kind::kExcluded || (kind == Kind::kPositive && p_.exclude_positives)) x = -kInf;
        at(s, r, j) = x;
      }
    }
  }

  __device__ LogSum no_positives() const {
    return {p_.positives == Positives::kLse ? -kInf : 0.0f, 0.0f};
  }
  __device__ void merge_positive(LogSum& to, LogSum from) const {
    if (p_.positives == Positives::kLse)
      to.merge(from);
    else
      to = {to.max + from.max, to.sum + from.sum};
  }

  const Scores& p_;
  Place place_;
  Cols cols_;
  Row rows_[kRows];
  LogSum all_[kRows], pos_[kRows];
  float neg_[kRows];
};

template <class Arithmetic>
__global__ void __launch_bounds__(kThreads) fallback_kernel(const __grid_constant__ Fallback p) {
  const int row0 = blockIdx.x * kTile, length = p.scores.row.length;
  bool found = false;
  for (int i = row0 + threadIdx.x % 32; i < min(row0 + kTile, length); i += 32)
    found |= Running::marked(p, i);
  if (!gpu::any(found)) return;  // every warp asks for all rows: the answer is the block's
  Running statistics(p.scores, row0);
  for_each_tile<Arithmetic>(p.scores, {row0, row0 + kTile, 0, p.scores.col.length}, statistics);
  statistics.store(p, row0);
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
    gpu::launch("logsumexp_kernel", forward_kernel<Arithmetic, Statistics>, blocks, kThreads,
                kTileShared, stream, p);
}

template <class Arithmetic>
void start(const Fallback& p, gpu::Stream stream) {
  gpu::launch("fallback_kernel", fallback_kernel<Arithmetic>,
              ceil_div(int64_t{p.scores.row.length}, kTile), kThreads, kTileShared, stream, p);
}

template <class Parameters>
void start_as(Arithmetic arithmetic, const Parameters& p, gpu::Stream stream) {
  switch (arithmetic) {
    case Arithmetic::kBf16: return start<Bf16>(p, stream);
    case Arithmetic::kF16: return start<F16>(p, stream);
    case Arithmetic::kTf32: return start<Tf32>(p, stream);
    case Arithmetic::kTf32x3: return start<Tf32x3>(p, stream);
  }
}

}  // namespace

std::string unavailable() { return gpu::unavailable(); }

void forward(const Forward& p, gpu::Stream stream) { start_as(p.scores.arithmetic, p, stream); }

void fallback(const Fallback& p, gpu::Stream stream) { start_as(p.scores.arithmetic, p, stream); }

void merge(const Merge& p, gpu::Stream stream) {
  const int64_t blocks = ceil_div(int64_t{p.length}, kMergeThreads);
  gpu::launch("merge_kernel", merge_kernel, blocks, kMergeThreads, 0, stream, p);
}

}  // namespace ito::ITO_GPU
