// Tiles of inner products: global memory → cp.async → shared memory → ldmatrix → mma → registers.
//
// A block of 8 warps computes a tile of 128 × 128 scores, a warp 32 × 64 of them. One K step is 64
// bytes of each feature vector: 32 halves or 16 floats. To ldmatrix and mma 16 bytes of floats look
// like 16 bytes of halves, so all arithmetics share everything but the product itself.
#pragma once
#include "cuda/scores.cuh"

namespace ito::ITO_GPU {

using gpu::Shared;

constexpr int kThreads = 32 * kWarpRows * kWarpCols;
constexpr int kStepChunks = 4;
constexpr int kStages = 4;  // three K steps under way hide the latency, in 64 KiB of shared memory
constexpr int kStageChunks = 2 * kTile * kStepChunks;
constexpr int kTileShared = kStages * kStageChunks * 16;

// A thread's scores, as mma leaves them: r counts its rows, which are 8 apart, j its columns.
constexpr int kRows = 4;
using Fragment = float[kRows / 2][kCols / 2][4];
template <int kPairs>
__device__ __forceinline__ float& at(float (&s)[kPairs][kCols / 2][4], int r, int j) {
  return s[r / 2][j / 2][r % 2 * 2 + j % 2];
}

// Where a thread's scores are in the block's tile. The four lanes of a group share rows.
struct Place {
  int warp_row, warp_col, group, member;  // the PTX manual's groupID and threadID_in_group
  __device__ Place() {
    const int thread = threadIdx.x, warp = thread / 32;
    warp_row = warp / kWarpCols;
    warp_col = warp % kWarpCols;
    group = thread % 32 / 4;
    member = thread % 4;
  }
  __device__ int row(int r) const { return warp_row * (kTile / kWarpRows) + r * 8 + group; }
  __device__ int first_col() const { return warp_col * (kTile / kWarpCols); }  // of the warp
  __device__ int col() const { return first_col() + member * 2; }              // of the thread
};

// ---- arithmetic: a 16 × 8 product over half a K step, 32 bytes of each feature vector

struct Bf16 {
  static constexpr bool kHalf = true;
  static constexpr int kUnrolled = 2;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return gpu::pack_bf16(low, high);
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
    gpu::mma_bf16(d, a, b0, b1);
  }
};

struct F16 {
  static constexpr bool kHalf = true;
  static constexpr int kUnrolled = 2;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return gpu::pack_f16(low, high);
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
    gpu::mma_f16(d, a, b0, b1);
  }
};

__device__ __forceinline__ uint32_t large_part(uint32_t x) {
  return gpu::to_tf32(gpu::as_float(x));
}
__device__ __forceinline__ uint32_t small_part(uint32_t x) {
  return gpu::to_tf32(gpu::as_float(x) - gpu::as_float(large_part(x)));
}

struct Tf32 {
  static constexpr bool kHalf = false;
  static constexpr int kUnrolled = 2;
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
    const uint32_t large[4] = {large_part(a[0]), large_part(a[1]), large_part(a[2]),
                               large_part(a[3])};
    gpu::mma_tf32(d, large, large_part(b0), large_part(b1));
  }
};

struct Tf32x3 {
  static constexpr bool kHalf = false;
  static constexpr int kUnrolled = 1;
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
    const uint32_t large[4] = {large_part(a[0]), large_part(a[1]), large_part(a[2]),
                               large_part(a[3])};
    const uint32_t small[4] = {small_part(a[0]), small_part(a[1]), small_part(a[2]),
                               small_part(a[3])};
    // Tensor cores cut off the low bits of what they add to; over a long vector that drifts. So
    // they start from 0 each time, and the sum is rounded to nearest outside.
    float part[4] = {};
    gpu::mma_tf32(part, small, large_part(b0), large_part(b1));
    gpu::mma_tf32(part, large, small_part(b0), small_part(b1));
    gpu::mma_tf32(part, large, large_part(b0), large_part(b1));
    for (int i = 0; i < 4; ++i) d[i] += part[i];
  }
};

// ---- tiles

// The place of a chunk in a stage. Eight consecutive rows at the same chunk lie in all 32 banks.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kStepChunks + (chunk ^ (row >> 1 & 3));
}

// One K step of 128 feature vectors; 0 beyond the end of a vector and beyond the last one.
__device__ __forceinline__ void load_step(Shared to, const Side& side, int first, int step,
                                          int row_bytes) {
  const int chunk = threadIdx.x % kStepChunks, k = step * kStepChunks + chunk;
  const int left = min(max(row_bytes - k * 16, 0), 16);
#pragma unroll
  for (int i = 0; i < kTile; i += kThreads / kStepChunks) {
    const int row = i + threadIdx.x / kStepChunks;
    const int bytes = first + row < side.length ? left : 0;
    const int64_t from = bytes ? (first + row) * side.stride + k : 0;
    gpu::cp_async(to, swizzled(row, chunk), side.features, from, bytes);
  }
}

template <class Arithmetic>
__device__ __forceinline__ void multiply_step(Fragment& s, Shared stage, const Place& place) {
  const int lane = threadIdx.x % 32;
  const int row = place.row(0) - place.group, col = kTile + place.first_col();
#pragma unroll Arithmetic::kUnrolled
  for (int k = 0; k < kStepChunks; k += 2) {
    uint32_t a[kRows / 2][4];
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i)
      gpu::ldmatrix(a[i], stage, swizzled(row + i * 16 + lane % 16, k + lane / 16));
#pragma unroll
    for (int j = 0; j < kCols / 2; j += 2) {
      uint32_t b[4];
      gpu::ldmatrix(b, stage,
                    swizzled(col + j * 8 + lane % 8 + lane / 16 * 8, k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        Arithmetic::multiply(s[i][j], a[i], b[0], b[1]);
        Arithmetic::multiply(s[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

struct Region {
  int first_row, last_row, first_col, last_col;
};

// Computes the inner products of a region, one column of tiles after another, and gives each tile
// to `epilogue`. Meanwhile the first K steps of the next tile are under way.
template <class Arithmetic, class Epilogue>
__device__ __forceinline__ void for_each_tile(const Scores& p, const Region& region,
                                              Epilogue& epilogue) {
  const Shared memory = gpu::shared_memory();
  const Place place;
  const int steps = ceil_div(p.row_bytes, kStepChunks * 16);
  int row = region.first_row, col = region.first_col, step = 0;  // the next to load
  const auto load = [&](int stage) {
    if (col < region.last_col) {
      const Shared to = memory + stage * kStageChunks;
      load_step(to, p.row, row, step, p.row_bytes);
      load_step(to + kTile * kStepChunks, p.col, col, step, p.row_bytes);
      if (++step == steps) {
        step = 0;
        row += kTile;
        if (row >= region.last_row) {
          row = region.first_row;
          col += kTile;
        }
      }
    }
    gpu::cp_async_commit();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
  int stage = 0;
  for (int col0 = region.first_col; col0 < region.last_col; col0 += kTile) {
    epilogue.begin(col0);
    for (int row0 = region.first_row; row0 < region.last_row; row0 += kTile) {
      Fragment s = {};
      for (int i = 0; i < steps; ++i) {
        gpu::cp_async_wait<kStages - 2>();
        gpu::barrier();  // all threads may read this step, and none reads the stage before it
        load((stage + kStages - 1) % kStages);
        multiply_step<Arithmetic>(s, memory + stage * kStageChunks, place);
        stage = (stage + 1) % kStages;
      }
      epilogue.tile(s, row0, col0);
    }
    epilogue.end(col0);
  }
}

// The region of a block. Neighbouring blocks go through the same columns at the same time: these
// come from L2.
__device__ __forceinline__ Region region_of(const Split& split, const Region& all, int& row_group,
                                            int& col_group) {
  const int block = blockIdx.x;
  if (split.triangle) {
    col_group = 0;
    for (row_group = block; row_group > col_group; ++col_group) row_group -= col_group + 1;
  } else {
    row_group = block % split.row_groups;
    col_group = block / split.row_groups;
  }
  Region r;
  r.first_row = all.first_row + row_group * split.row_tiles * kTile;
  r.last_row = min(r.first_row + split.row_tiles * kTile, all.last_row);
  r.first_col = all.first_col + col_group * split.col_tiles * kTile;
  r.last_col = min(r.first_col + split.col_tiles * kTile, all.last_col);
  return r;
}

}  // namespace ito::ITO_GPU
