// What the kernels are asked for. Scores are S = scale_i·<a_i, b_j> + row_bias_i + col_bias_j, the
// kinds of pairs those of ito_kernels/similarity/spec.py; absent tensors have no address.
#pragma once
#include <string>

#include "cuda/global.hpp"

namespace ito::ITO_GPU {

using gpu::Chunk;
using gpu::Global;

// bf16 and fp16; fp32 by one product of numbers rounded to tf32, or by three products of a large
// and a small part of each number, which keep fp32's accuracy.
enum class Arithmetic { kBf16, kF16, kTf32, kTf32x3 };

enum class Positives { kNone, kLinear, kLse };
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
  // Negatives with a larger <a, b> are left out. Of one side at most: forward and panels read the
  // rows', where the problem is transposed it is the columns'.
  Global<const float> limit;
  // Backward: upstream · softmax = factor · e^(S - shift) as (shift, factor); the upstream of pos,
  // and pos. For softplus the factor is the upstream gradient.
  Global<const Pair> factors;
  Global<const float> alpha, pos;
};

struct Scores {
  Arithmetic arithmetic = Arithmetic::kBf16;
  Side row, col;
  int row_bytes = 0;  // of one feature vector
  Global<const float> scale;
  ScaleOf scale_of = ScaleOf::kAll;
  Positives positives = Positives::kNone;
  bool exclude_self = false, exclude_positives = false, hardest = false;
  bool softplus = false;
  bool positives_matter = false;  // for anything
  int64_t diagonal = 0;
};

// The tiles of a region, `row_tiles` × `col_tiles` to a block, as row_groups × col_groups blocks;
// of a symmetric matrix only those with row group ≤ column group.
struct Split {
  int row_tiles = 0, col_tiles = 0, row_groups = 0, col_groups = 0;
  bool triangle = false;
};

constexpr int kTile = 128;                   // rows and columns
constexpr int kWarpRows = 4, kWarpCols = 2;  // the warps of a block that share them

// Statistics in slots, [field][slot][row or column]: kSlots for each group of the other side, so
// that nothing is written twice. Fields: max, sum, the positives' two numbers, the largest
// negative. Of softplus the row sum alone, kWarpCols slots for each group.
constexpr int kFields = 5, kSlots = 4;
struct Forward {
  Scores scores;
  Split split;
  Global<float> row_slots, col_slots;  // the same ones under `triangle`
};

// One side's slots, merged in their order.
struct Merge {
  Global<const float> slots;
  int length = 0, count = 0;
  Positives positives = Positives::kNone;
  Global<float> max, logsum, pos, neg_max;
};

struct alignas(8) TwoWords {
  uint32_t x, y;
};

// scale·W / norm for rows [first_row, last_row) and columns likewise, in the features' dtype, edge
// tiles in full; W = ∂L/∂S. Of the unrounded W the sums Σ_j W·<a, b> and Σ_j W, kWarpCols slots for
// each column group, and Σ_i W, kWarpRows for each row group. Any of them may be absent.
struct Panel {
  Scores scores;
  Split split;
  int first_row = 0, last_row = 0, first_col = 0, last_col = 0;
  Global<const float> norm;
  Global<TwoWords> panel;
  int64_t stride = 0;  // of two words
  Global<float> scale_sums, row_sums, col_sums;
};

// scale·W·B / norm for small D, (rows, stride) in fp32, and the same sums over rows.
struct Gradient {
  Scores scores;
  Global<const float> norm;
  Global<Pair> grad;
  int64_t stride = 0;  // of pairs
  Global<float> scale_sums, row_sums;
};

constexpr int kGradientRows = 64;    // of a block
constexpr int kGradientWidth = 128;  // D at most

std::string unavailable();  // why nothing can run; empty if it can
void forward(const Forward& p, gpu::Stream stream);
void merge(const Merge& p, gpu::Stream stream);
void panel(const Panel& p, gpu::Stream stream);
void gradient(const Gradient& p, gpu::Stream stream);  // bf16 and fp16

}  // namespace ito::ITO_GPU
