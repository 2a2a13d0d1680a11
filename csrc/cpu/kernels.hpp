// The interface between the engine, which is compiled once, and the kernels, which are compiled
// once for each instruction set.
#pragma once
#include <cstdint>

#include "cpu/problem.hpp"

namespace ito::cpu {

// Per-row and per-column arrays of a tile may be read and written up to a multiple of this many
// elements: the widest vector.
constexpr int kVector = 16;
// Arrays over all rows or columns have this many elements more: the last tile may hold columns up
// to a whole column panel.
constexpr int64_t kSlack = 64;

// One tile of scores, `rows` × `cols`; the columns are rounded up to whole column panels. Per-row
// and per-column arrays start at the tile.
struct Tile {
  int rows = 0, cols = 0, width = 0;      // cols: whole panels
  int real_cols = 0;                      // columns that exist
  const void *a = nullptr, *b = nullptr;  // packed rows, packed columns
  float* dots = nullptr;                  // inner products
  bool have_dots = false;                 // they are there already: the forward pass kept them
  float* scores = nullptr;   // S, later W = ∂L/∂S; may be `dots`, which is then overwritten
  void* operand = nullptr;   // W as the gradients' products take it; unused where that is fp32
  float* scratch = nullptr;  // kScratch floats for each row and for each column
  // The inner products of the tile that comes next, if they were kept: fetched in grad_cols. A null
  // pointer: there are none.
  const float* next_dots = nullptr;
  int64_t next_bytes = 0;
  const float *scale = nullptr, *row_add = nullptr, *col_add = nullptr;  // -inf at padding

  // No positives in the tile and nothing excluded: the members below are not read.
  bool plain = true;
  const int32_t *row_keys = nullptr, *col_keys = nullptr;  // equal keys: a positive pair
  const float* row_limit = nullptr;                        // null: none
  int64_t self_column = 0;  // the self pair of row i is in column i + self_column
  bool exclude_self = false, exclude_positives = false;
};

// Statistics of rows or columns while tiles are added to them. A null pointer: not wanted. `low` and
// `pos_low` are what rounding has taken from the sums: with 10⁶ equal terms, in tiles of 256, a part
// of 2.7e-5.
struct RunningStats {
  float *max = nullptr, *sum = nullptr, *low = nullptr;  // Σ exp(S - max)
  // "linear": the sum of the positives' scores, and their number. "lse": the positives' maximum,
  // and their Σ exp(S - maximum).
  float *pos = nullptr, *pos_sum = nullptr, *pos_low = nullptr;
  float* neg_max = nullptr;
};

struct ForwardTile {
  Positives positives = Positives::kNone;
  bool hardest = false;
  RunningStats row, col;
};

// One side of the backward pass: statistics, and the upstream gradients `factor` of logsum and
// `pos_factor` of pos. Where a row or column allows no pair, factor is 0 and logsum +inf.
struct BackwardSide {
  const float *shift = nullptr, *logsum = nullptr, *factor = nullptr;  // null factor: no gradient
  const float *pos = nullptr, *pos_factor = nullptr;                   // pos is read for "lse"
};

// Sums of W over a tile, added to what is there; null where not wanted. `scale` gets Σ_j W·dot. In
// fp64: of 10⁶ equal terms, in tiles of 256, the sum of the tiles in fp32 would be wrong by 2.7e-5.
struct GradientSums {
  double *scale = nullptr, *row = nullptr, *col = nullptr;
};

struct BackwardTile {
  BackwardSide row, col;
  bool lse = false;  // the kind of the positives
  GradientSums sums;
  float scale_part = 1;  // of Σ_j W·dot, what sums.scale gets
};

struct SoftplusTile {
  const float* u = nullptr;    // upstream gradient; null: forward only
  double* row_loss = nullptr;  // added to; null where not wanted
  GradientSums sums;
};

constexpr int kScratch = 112;

// Packed sizes are in elements, rows × width, each rounded up as below. Layouts: gemm_fma.hpp.
struct Kernels {
  const char* name;
  const char* arithmetic;  // of the matrix products: "fp32", "bf16" or "fp32 by six bf16"
  int element;             // bytes of a packed element
  int col_panel;           // columns of a packed column panel, and of the micro-kernel's result
  int row_panel;           // rows of a packed row panel, and of the micro-kernel's result
  int row_align;           // a tile's rows are stored up to a multiple of this ...
  int width_align;         // ... and packed features up to a multiple of this width
  int row_layouts;         // packed rows come in this many layouts, one after the other
  int operand_bytes;       // of Tile::operand, for each score; 0 where W is used as it is

  void (*pack_rows)(const Matrix&, const uint8_t* skip, int64_t first, int rows, void* out);
  void (*pack_cols)(const Matrix&, const uint8_t* skip, int64_t panel, void* scores, void* grad,
                    int64_t grad_panel);
  void (*forward)(const Tile&, const ForwardTile&);
  void (*weights)(const Tile&, const BackwardTile&);
  void (*softplus)(const Tile&, const SoftplusTile&);
  // Both gradients replace what is there or, with `add`, add to it.
  void (*grad_rows)(const Tile&, const void* b, int64_t b_panel, float* da, bool add);
  void (*grad_cols)(const Tile&, const void* a, float* dbt, bool add);
  void (*store_rows)(const float* da, int stride, int rows, const Matrix& to, int64_t first);
  void (*store_cols)(const float* dbt, const Matrix& to, int64_t panel);
  // dBᵀ (+)= dAᵀ, for a self-similarity; `acc_width` is the packed width
  void (*fold_rows)(const float* da, int stride, int rows, int width, float* dbt, int acc_width,
                    bool add);
  // Runs `rounds` of independent multiply-adds; returns how many floating-point operations they
  // are.
  double (*peak)(int64_t rounds);
};

// One for each instruction set that was compiled. isa.hpp says which the processor runs.
extern const Kernels kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16, kAmxFp32, kNeon;
extern const Kernels kEmulatedBf16, kEmulatedFp32;

}  // namespace ito::cpu
