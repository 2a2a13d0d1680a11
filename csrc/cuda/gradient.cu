// The gradient of one side for small D. Its rows stay in registers. W stays in registers too: what
// the product for the scores leaves there is what the product for the gradient reads.
#include "cuda/weights.cuh"

namespace ito::ITO_GPU {
namespace {

constexpr int kGradientThreads = kGradientRows / 16 * 32;  // a warp for 16 rows
constexpr int kGradientCols = 4 * kCols;
constexpr int kGradientStages = 2;

// Eight rows at the same chunk lie in different banks, all 32: a row has at least 8 chunks.
template <int kWidth>
__device__ __forceinline__ int swizzled_row(int row, int chunk) {
  return row * (kWidth / 8) + (chunk ^ (row & 7));
}

// Whole feature vectors [first : first + kCount], 0 beyond their end and the side's.
template <int kWidth, int kCount>
__device__ __forceinline__ void load_rows(Shared to, const Side& side, int first, int row_bytes) {
  constexpr int kChunks = kWidth / 8;
#pragma unroll
  for (int i = 0; i < kCount * kChunks; i += kGradientThreads) {
    const int row = (i + threadIdx.x) / kChunks, chunk = (i + threadIdx.x) % kChunks;
    const int left = min(max(row_bytes - chunk * 16, 0), 16);
    const int bytes = first + row < side.length ? left : 0;
    const int64_t from = bytes ? (first + row) * side.stride + chunk : 0;
    gpu::cp_async(to, swizzled_row<kWidth>(row, chunk), side.features, from, bytes);
  }
}

template <class Arithmetic, int kWidth, bool kSoftplus>
__global__ void __launch_bounds__(kGradientThreads, 2)
    gradient_kernel(const __grid_constant__ Gradient p) {
  constexpr int kSteps = kWidth / 16;
  constexpr int kStage = kGradientCols * kWidth / 8;
  const Scores& q = p.scores;
  const int thread = threadIdx.x, lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp_row = thread / 32 * 16, row0 = blockIdx.x * kGradientRows + warp_row;
  const Shared own = gpu::shared_memory(), stages = own + kGradientRows * kWidth / 8;
  const int tiles = ceil_div(q.col.length, kGradientCols);
  const auto load = [&](int tile) {
    if (tile < tiles)
      load_rows<kWidth, kGradientCols>(stages + tile % kGradientStages * kStage, q.col,
                                       tile * kGradientCols, q.row_bytes);
    gpu::cp_async_commit();
  };
  load_rows<kWidth, kGradientRows>(own, q.row, row0 - warp_row, q.row_bytes);
  for (int tile = 0; tile < kGradientStages - 1; ++tile) load(tile);

  Weights<kSoftplus, 2> weights(q);
  weights.set_rows(row0 + group);
  const Sums sums = p.row_sums ? Sums::kAll : p.scale_sums ? Sums::kScale : Sums::kNone;
  float grad[kWidth / 8][4] = {}, scale_sum[2] = {}, row_sum[2] = {};

  for (int tile = 0; tile < tiles; ++tile) {
    gpu::cp_async_wait<kGradientStages - 2>();
    gpu::barrier();
    load(tile + kGradientStages - 1);
    const Shared stage = stages + tile % kGradientStages * kStage;

    float s[1][kCols / 2][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      gpu::ldmatrix(a, own, swizzled_row<kWidth>(warp_row + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < kCols / 2; j += 2) {
        uint32_t b[4];
        gpu::ldmatrix(b, stage,
                      swizzled_row<kWidth>(j * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        Arithmetic::multiply(s[0][j], a, b[0], b[1]);
        Arithmetic::multiply(s[0][j + 1], a, b[2], b[3]);
      }
    }

    weights.set_cols(tile * kGradientCols + member * 2);
    weights.weigh(s, sums, scale_sum, row_sum, [] {});

    // W of 16 columns, as the product left it, is the left operand of a product of depth 16.
#pragma unroll
    for (int j = 0; j < kCols / 2; j += 2) {
      const uint32_t w[4] = {Arithmetic::pack(at(s, 0, 2 * j), at(s, 0, 2 * j + 1)),
                             Arithmetic::pack(at(s, 1, 2 * j), at(s, 1, 2 * j + 1)),
                             Arithmetic::pack(at(s, 0, 2 * j + 2), at(s, 0, 2 * j + 3)),
                             Arithmetic::pack(at(s, 1, 2 * j + 2), at(s, 1, 2 * j + 3))};
#pragma unroll
      for (int d = 0; d < kWidth / 8; d += 2) {
        uint32_t b[4];
        gpu::ldmatrix_transposed(b, stage, swizzled_row<kWidth>(j * 8 + lane % 16, d + lane / 16));
        Arithmetic::multiply(grad[d], w, b[0], b[1]);
        Arithmetic::multiply(grad[d + 1], w, b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row0 + r * 8 + group;
    const float scale_total = sum_of_members(scale_sum[r]), row_total = sum_of_members(row_sum[r]);
    if (row >= q.row.length) continue;
    if (member == 0 && p.scale_sums) p.scale_sums.store(row, scale_total);
    if (member == 0 && p.row_sums) p.row_sums.store(row, row_total);
    if (!p.grad) continue;
#pragma unroll
    for (int d = 0; d < kWidth / 8; ++d) {
      const int at = d * 4 + member;
      if (at < p.stride) p.grad.store(row * p.stride + at, {grad[d][r * 2], grad[d][r * 2 + 1]});
    }
  }
}

template <class Arithmetic, int kWidth>
void start(const Gradient& p, gpu::Stream stream) {
  const int64_t blocks = ceil_div(int64_t{p.scores.row.length}, kGradientRows);
  gpu::launch("gradient_kernel",
              p.scores.softplus ? gradient_kernel<Arithmetic, kWidth, true>
                                : gradient_kernel<Arithmetic, kWidth, false>,
              blocks, kGradientThreads,
              (kGradientRows + kGradientStages * kGradientCols) * kWidth * 2, stream, p);
}

template <class Arithmetic>
void start(const Gradient& p, gpu::Stream stream) {
  if (p.scores.row_bytes <= kGradientWidth)  // 2 bytes each: at most half the width
    start<Arithmetic, kGradientWidth / 2>(p, stream);
  else
    start<Arithmetic, kGradientWidth>(p, stream);
}

}  // namespace

void gradient(const Gradient& p, gpu::Stream stream) {
  if (p.scores.arithmetic == Arithmetic::kBf16)
    start<Bf16>(p, stream);
  else
    start<F16>(p, stream);
}

}  // namespace ito::ITO_GPU
