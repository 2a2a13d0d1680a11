// The interface between the engine, which is compiled once, and the kernels, which are compiled
// once for each instruction set.
#pragma once
#include <cstdint>

#include "cpu/problem.hpp"

namespace ito::cpu {

// One tile of scores: `rows` × `cols`, the columns rounded up to whole panels. Per-row and
// per-column arrays start at the tile and may be read up to a multiple of 16 elements.
struct Tile {
  int rows = 0, cols = 0, width = 0;
  const void *a = nullptr, *b = nullptr;  // packed rows, packed columns
  float* dots = nullptr;                  // the inner products: computed, or kept from before
  bool have_dots = false;
  float* scores = nullptr;  // S, later W; may be `dots`, which is then overwritten
  void* operand = nullptr;   // W rounded for the gradient products, where they are not in fp32
  float* scratch = nullptr;  // kScratch floats per row, and per column
  const float *scale = nullptr, *row_add = nullptr, *col_add = nullptr;  // -inf at padding

  // Pairs: positive where the keys are equal; the self pair of row i is column i + self_column.
  // A tile is plain if none of this touches it: no positives in it, nothing excluded.
  bool plain = true;
  const int32_t *row_keys = nullptr, *col_keys = nullptr;
  const float* row_limit = nullptr;  // null: none
  int64_t self_column = 0;
  bool exclude_self = false, exclude_positives = false;
};

// Statistics that run over tiles. pos, aux: for "linear" the sum of the positives' scores and
// their number, for "lse" their maximum and the sum of their exponentials.
struct Running {
  float *max = nullptr, *sum = nullptr, *pos = nullptr, *aux = nullptr, *neg = nullptr;
};

struct ForwardTile {
  Positives positives = Positives::kNone;
  bool hardest = false;
  Running row, col;
};

// One side of the upstream gradient. Where nothing is allowed: factor 0, logsum +inf.
struct Side {
  const float *shift = nullptr, *logsum = nullptr, *factor = nullptr;      // null: side not wanted
  const float *pos = nullptr, *pos_factor = nullptr;  // pos for "lse"; null: no gradient
};

struct BackwardTile {
  Side row, col;
  bool lse = false;          // the kind of the positives
  // Sums over the tile, added to; null where not wanted. `scale` takes `scale_part`·Σ W·dot.
  float *scale = nullptr, *row_sum = nullptr, *col_sum = nullptr;
  float scale_part = 1;
};

struct SoftplusTile {
  const float* u = nullptr;  // null: forward only
  float* row_loss = nullptr;  // added to; null where not wanted
  float *scale = nullptr, *row_sum = nullptr, *col_sum = nullptr;
  float scale_part = 1;
};

constexpr int kScratch = 96;

struct Kernels {
  const char* name;
  const char* arithmetic;   // of the matrix products: "fp32" or "bf16"
  int element;              // bytes of a packed element
  int panel;                // columns of a panel
  int row_panel;            // rows of a panel of packed rows
  int row_align;            // a tile holds a multiple of this many rows ...
  int width_align;          // ... and packed features a multiple of this width
  int row_forms;            // packed rows come in this many forms, one after the other
  int operand_bytes;        // of Tile::operand, for each score; 0 where W is used as it is

  // Packed sizes in elements are rows·width, rounded up as above. See gemm_fma.hpp.
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
  // `rounds` of independent multiply-adds; returns how many floating-point operations they are.
  double (*peak)(int64_t rounds);
};

// One for each instruction set that was compiled. Whether the processor has it is asked elsewhere.
extern const Kernels kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16, kNeon;

}  // namespace ito::cpu
