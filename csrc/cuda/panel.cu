// A panel of W = ∂L/∂S in the features' dtype: the vendor's matrix product does W·B and Wᵀ·A.
#include "cuda/weights.cuh"

namespace ito::ITO_GPU {
namespace {

template <class Arithmetic, bool kSoftplus>
class Writer {
 public:
  __device__ Writer(const Panel& panel, int row_group, int col_group)
      : panel_(panel),
        row_slot_(col_group * kWarpCols + place_.warp_col),
        col_slot_(row_group * kWarpRows + place_.warp_row),
        weights_(panel.scores) {}

  __device__ __forceinline__ void begin(int col0) { weights_.set_cols(col0 + place_.col()); }

  __device__ __forceinline__ void tile(Fragment& s, int row0, int col0) {
    float scale_sum[kRows] = {}, row_sum[kRows] = {};
    weights_.set_rows(row0 + place_.row(0));
    const Sums sums = panel_.row_sums || panel_.col_sums ? Sums::kAll
                      : panel_.scale_sums                ? Sums::kScale
                                                         : Sums::kNone;
    weights_.weigh(s, sums, scale_sum, row_sum, [&] {
      store_sums(row0, scale_sum, row_sum);
      if (panel_.col_sums) sum_columns(s, col0 + place_.col());
    });
    if (panel_.panel) store(s, row0, col0);
  }

  __device__ __forceinline__ void end(int /*col0*/) {}

 private:
  __device__ __forceinline__ void store_sums(int row0, const float (&scale_sum)[kRows],
                                             const float (&row_sum)[kRows]) const {
    const int64_t first = int64_t{row_slot_} * (panel_.last_row - panel_.first_row);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float scale = sum_of_members(scale_sum[r]), sum = sum_of_members(row_sum[r]);
      const int row = row0 + place_.row(r);
      if (place_.member || row >= panel_.last_row) continue;
      if (panel_.scale_sums) panel_.scale_sums.store(first + row - panel_.first_row, scale);
      if (panel_.row_sums) panel_.row_sums.store(first + row - panel_.first_row, sum);
    }
  }

  __device__ __forceinline__ void sum_columns(Fragment& s, int first) const {
    float col_sum[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      col_sum[j] = at(s, 0, j);
#pragma unroll
      for (int r = 1; r < kRows; ++r) col_sum[j] += at(s, r, j);
    }
    reduce_columns(col_sum, [](float x, float y) { return x + y; });
    const int64_t slot = int64_t{col_slot_} * (panel_.last_col - panel_.first_col);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int col = col_of(first, 2 * place_.group + e);
      if (col < panel_.last_col)
        gpu::add(panel_.col_sums, slot + col - panel_.first_col, col_sum[e]);
    }
  }

  // Stores whole 32-byte sectors. Four lanes hold 8 columns of a row: 8 bytes each in floats, but 4
  // in halves. There two lanes exchange a word: one then has 4 of these columns, the other 4 of the
  // next 8.
  __device__ __forceinline__ void store(Fragment& s, int row0, int col0) const {
    const int64_t row = row0 - panel_.first_row, col = col0 - panel_.first_col + place_.first_col();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t from = (row + place_.row(r)) * panel_.stride;
      if constexpr (Arithmetic::kHalf) {
        const bool odd = place_.member % 2;
#pragma unroll
        for (int j = 0; j < kCols; j += 4) {
          const uint32_t first = Arithmetic::pack(at(s, r, j), at(s, r, j + 1));
          const uint32_t next = Arithmetic::pack(at(s, r, j + 2), at(s, r, j + 3));
          const uint32_t got = gpu::shuffle_xor(odd ? first : next, 1);
          const TwoWords words{odd ? got : first, odd ? next : got};
          panel_.panel.store(from + (col + j / 2 * 8) / 4 + odd * 2 + place_.member / 2, words);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kCols; j += 2)
          panel_.panel.store(from + (col + j / 2 * 8) / 2 + place_.member,
                             {gpu::as_bits(at(s, r, j)), gpu::as_bits(at(s, r, j + 1))});
      }
    }
  }

  const Panel& panel_;
  Place place_;
  int row_slot_, col_slot_;
  Weights<kSoftplus, kRows> weights_;
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
