// A panel of scale·W, W = ∂L/∂S, in the features' dtype: the vendor's matrix product does W·B and
// Wᵀ·A with it.
#include "cuda/tile.cuh"
#include "cuda/weights.cuh"

namespace ito::ITO_GPU {
namespace {

template <class Arithmetic, bool kSoftplus>
class Writer {
 public:
  __device__ Writer(const Panel& panel, int row_group, int col_group)
      : panel_(panel),
        p_(panel.scores),
        scale_slot_(panel.scale_sums, col_group * kWarpCols + place_.warp_col, 0,
                    panel.last_row - panel.first_row),
        row_slot_(panel.row_sums, col_group * kWarpCols + place_.warp_col, 0,
                  panel.last_row - panel.first_row),
        col_slot_(panel.col_sums, row_group * kWarpRows + place_.warp_row, 0,
                  panel.last_col - panel.first_col),
        inverse_(panel.norm ? 1.0f / panel.norm.load(0) : 1.0f) {}

  __device__ __forceinline__ void begin(int row0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = row0 + place_.row(r);
      rows_[r] = Row(p_, row);
      row_factors_[r] = Factor(p_.row, row);
      scale_sum_[r] = row_sum_[r] = 0.0f;
    }
  }

  __device__ __forceinline__ void tile(Fragment& s, int row0, int col0) {
    const Cols cols(p_.col, col0 + place_.col());
    if (special(p_, rows_, cols, col0 + place_.first_col(), kTile / kWarpCols,
                bool(p_.row.limit)))
      weigh<true>(s, row0, col0 + place_.col(), cols);
    else
      weigh<false>(s, row0, col0 + place_.col(), cols);
    if (panel_.col_sums) sum_columns(s, col0 + place_.col());
    if (panel_.panel) store(s, row0, col0);
  }

  __device__ __forceinline__ void end(int row0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = row0 + place_.row(r);
      const bool mine = place_.member == 0 && row < panel_.last_row;
      const float scale_sum = sum_of_members(scale_sum_[r]), row_sum = sum_of_members(row_sum_[r]);
      if (mine && panel_.scale_sums) scale_slot_.store(0, row - panel_.first_row, scale_sum);
      if (mine && panel_.row_sums) row_slot_.store(0, row - panel_.first_row, row_sum);
    }
  }

 private:
  // Inner products become W.
  template <bool kMasked>
  __device__ __forceinline__ void weigh(Fragment& s, int row0, int first, const Cols& cols) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const int index = col_of(first, j);
      const Factor col_factor(p_.col, index);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float dot = at(s, r, j);
        const float score = fmaf(dot, rows_[r].scale, cols.added[j]) + rows_[r].added;
        Kind kind = Kind::kNegative;
        if (kMasked)
          kind = kind_of(p_, rows_[r], index, cols.id[j], dot,
                         limit_of(p_.row, row0 + place_.row(r)));
        const float w = weight<kSoftplus, !Arithmetic::kHalf>(
            p_, score, kind, row_factors_[r], col_factor, row0 + place_.row(r), index);
        scale_sum_[r] = fmaf(w, dot, scale_sum_[r]);
        row_sum_[r] += w;
        at(s, r, j) = w;
      }
    }
  }

  __device__ __forceinline__ void sum_columns(Fragment& s, int first) {
    float col_sum[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      col_sum[j] = at(s, 0, j);
#pragma unroll
      for (int r = 1; r < kRows; ++r) col_sum[j] += at(s, r, j);
    }
    reduce_columns(col_sum, [](float x, float y) { return x + y; });
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int col = col_of(first, 2 * place_.group + e);
      if (col < panel_.last_col) col_slot_.store(0, col - panel_.first_col, col_sum[e]);
    }
  }

  // Stores whole 32-byte sectors. Four lanes hold 8 columns of a row: 8 bytes each in floats, but 4
  // in halves. There two lanes exchange a word: one then has 4 of these columns, the other 4 of the
  // next 8.
  __device__ __forceinline__ void store(Fragment& s, int row0, int col0) {
    const int64_t row = row0 - panel_.first_row, col = col0 - panel_.first_col + place_.first_col();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t from = (row + place_.row(r)) * panel_.stride;
      const float scale = rows_[r].scale * inverse_;
      const auto scaled = [&](int j) { return at(s, r, j) * scale; };
      if constexpr (Arithmetic::kHalf) {
        const bool odd = place_.member % 2;
#pragma unroll
        for (int j = 0; j < kCols; j += 4) {
          const uint32_t first = Arithmetic::pack(scaled(j), scaled(j + 1));
          const uint32_t next = Arithmetic::pack(scaled(j + 2), scaled(j + 3));
          const uint32_t got = gpu::shuffle_xor(odd ? first : next, 1);
          panel_.panel.store(from + (col + j / 2 * 8) / 4 + odd * 2 + place_.member / 2,
                             odd ? TwoWords{got, next} : TwoWords{first, got});
        }
      } else {
#pragma unroll
        for (int j = 0; j < kCols; j += 2)
          panel_.panel.store(from + (col + j / 2 * 8) / 2 + place_.member,
                             {gpu::as_bits(scaled(j)), gpu::as_bits(scaled(j + 1))});
      }
    }
  }

  const Panel& panel_;
  const Scores& p_;
  Place place_;
  Slot scale_slot_, row_slot_, col_slot_;
  float inverse_;
  Row rows_[kRows];
  Factor row_factors_[kRows];
  float scale_sum_[kRows], row_sum_[kRows];
};

template <class Arithmetic, bool kSoftplus>
__global__ void __launch_bounds__(kThreads) panel_kernel(const __grid_constant__ Panel p) {
  int row_group, col_group;
  const Region all{p.first_row, p.last_row, p.first_col, p.last_col};
  const Region region = region_of(p.split, all, row_group, col_group);
  Writer<Arithmetic, kSoftplus> epilogue(p, row_group, col_group);
  for_each_tile<Arithmetic>(p.scores, region, epilogue);
}

template <class Arithmetic>
void start(const Panel& p, gpu::Stream stream) {
  const int64_t blocks = int64_t{p.split.row_groups} * p.split.col_groups;
  gpu::launch("panel_kernel",
              p.scores.softplus ? panel_kernel<Arithmetic, true> : panel_kernel<Arithmetic, false>,
              blocks, kThreads, kTileShared, stream, p);
}

}  // namespace

void panel(const Panel& p, gpu::Stream stream) {
  switch (p.scores.arithmetic) {
    case Arithmetic::kBf16: return start<Bf16>(p, stream);
    case Arithmetic::kF16: return start<F16>(p, stream);
    case Arithmetic::kTf32: return start<Tf32>(p, stream);
    case Arithmetic::kTf32x3: return start<Tf32x3>(p, stream);
  }
}

}  // namespace ito::ITO_GPU
