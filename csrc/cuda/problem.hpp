// What the kernels are asked for. Scores are S = scale_i·<a_i, b_j> + row_bias_i + col_bias_j.
// Which pairs are positive or excluded is written in ito_kernels/similarity/spec.py. An absent
// tensor has a null address.
#pragma once
#include <string>

#include "cuda/global.hpp"

namespace ito::ITO_GPU {

using gpu::Chunk;
using gpu::Global;
using ito::Positives;

// bf16 and fp16. fp32 by one product of numbers rounded to tf32; or by three products of a large
// and a small part of each number, which keep fp32's accuracy.
enum class Arithmetic { kBf16, kF16, kTf32, kTf32x3 };

enum class ScaleOf { kAll, kRow, kCol };

struct alignas(8) Pair {
  float x, y;
};

// One side of the matrix: its rows or its columns.
struct Side {
  Global<const Chunk> features;  // rows on 16-byte boundaries; padded ones are 0
  int64_t stride = 0;            // chunks
  int length = 0;
  Global<const float> bias;
  Global<const int32_t> ids;  // negative: padding
  // Negatives with a larger <a, b> are left out. One side has limits at most: the rows, or where
  // the problem is transposed the columns.
  Global<const float> limit;
  // Backward, as in gpu.SideWeights: factors of E = 2^x in W, of all pairs and of positives
  // ("linear": without E). Where sums have underflowed: factors of e^(S - max), and of positives
  // ("linear": alone, "lse": of e^(S - max - pos)); max and pos.
  Global<const Pair> weights, exact, shifts;
};

struct Scores {
  Arithmetic arithmetic = Arithmetic::kBf16;
  Side row, col;
  int row_bytes = 0;  // of one feature vector
  Global<const float> scale;
  ScaleOf scale_of = ScaleOf::kAll;
  // One number T, here in base 2, with S - T ≤ 60: e^(S - T) serves rows and columns. Absent for 0.
  Global<const float> shift;
  Global<const int32_t> underflowed;  // backward: whether `exact` and `shifts` are needed
  Positives positives = Positives::kNone;
  bool exclude_self = false, exclude_positives = false;
  bool softplus = false;
  bool positives_matter = false;  // something depends on which pairs are positive
  int64_t diagonal = 0;
};

// How tiles are shared out: a block computes a group of row_tiles × col_tiles tiles, and there are
// row_groups × col_groups groups. `triangle`, for a symmetric matrix: row group ≤ column group
// only.
struct Split {
  int row_tiles = 0, col_tiles = 0, row_groups = 0, col_groups = 0;
  bool triangle = false;
};

constexpr int kTile = 128;                   // rows and columns
constexpr int kWarpRows = 4, kWarpCols = 2;  // the warps of a block that share them

// The statistics of one row or column: Σ e^(S - T); over the positives Σ (S - T) in base 2, or
// Σ e^(S - T); their number.
enum Field { kSum, kPos, kPosCount, kFields };

// Partial statistics, [field][slot][row or column]. There are kSlots slots for each group of the
// other side: no two warps write to the same place. They add to what is there, which is 0. Of
// softplus there is the row sum alone, in kWarpCols slots for each column group.
constexpr int kSlots = 4;
struct Forward {
  Scores scores;
  Split split;
  Global<float> row_slots, col_slots;  // the same ones under `triangle`
};

// Statistics of one side, relative to `max`: near the logsumexp, or the true maximum.
struct SideStats {
  Global<float> max, logsum, pos, neg_max;  // neg_max: by `fallback` alone
};

// Merges one side's slots, in their order. A sum below 2^-80 may have lost terms: its row is marked
// for `fallback`. Lost terms are below 2^-126 each, so of a larger sum 2^20 of them are less than
// 2^-26. Without biases and with T = 0 nothing is lost. Padding, which has a negative id, is not
// marked.
struct Merge {
  Global<const float> slots;
  int length = 0, count = 0;
  Positives positives = Positives::kNone;
  bool biased = false;
  Global<const int32_t> ids;
  Global<const float> shift;
  SideStats out;
  Global<int32_t> underflowed;
};

// Computes the marked rows again, or without `underflowed` all of them, with their true maxima. A
// block without such a row returns at once.
struct Fallback {
  Scores scores;  // without `shift`
  Global<const int32_t> underflowed;
  Global<float> slots;  // [kFallbackFields][kSlots][row]
  SideStats out;
};
constexpr int kFallbackFields = 5;

struct alignas(8) TwoWords {
  uint32_t x, y;
};

// A panel of W = ∂L/∂S in the features' dtype, times the scale if there is one for each row: rows
// [first_row, last_row), columns [first_col, last_col). Tiles at the edges are written in full. And
// sums of W before it is scaled: Σ_j W·<a, b> and Σ_j W in kWarpCols slots for each column group,
// which is one tile wide, and Σ_i W, added to what is there, in kWarpRows slots for each row group.
// Any output may be absent.
struct Panel {
  Scores scores;
  Split split;
  int first_row = 0, last_row = 0, first_col = 0, last_col = 0;
  Global<TwoWords> panel;
  int64_t stride = 0;  // of two words
  Global<float> scale_sums, row_sums, col_sums;
};

// W·B for small D, W as in a panel, (rows, stride) in fp32; Σ_j W·<a, b> and Σ_j W of each row.
struct Gradient {
  Scores scores;
  Global<Pair> grad;
  int64_t stride = 0;  // of pairs
  Global<float> scale_sums, row_sums;
};

constexpr int kGradientRows = 64;    // of a block
constexpr int kGradientWidth = 128;  // D at most

std::string unavailable();  // why nothing can run; empty if it can
void forward(const Forward& p, gpu::Stream stream);
void merge(const Merge& p, gpu::Stream stream);
void fallback(const Fallback& p, gpu::Stream stream);
void panel(const Panel& p, gpu::Stream stream);
void gradient(const Gradient& p, gpu::Stream stream);  // bf16 and fp16

}  // namespace ito::ITO_GPU
