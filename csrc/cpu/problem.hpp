// What a caller asks of the CPU engine: raw pointers and sizes, no torch. Every field means what
// its namesake in ito_kernels/similarity/spec.py means. An absent tensor is a null pointer.
#pragma once
#include <cstdint>

#include "base.hpp"

namespace ito::cpu {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };
using ito::Positives;

// Features: the elements of a row are adjacent, rows are `stride` elements apart.
struct Matrix {
  const void* data = nullptr;
  int64_t rows = 0, width = 0, stride = 0;
  DType dtype = DType::kFloat32;
};

struct Problem {
  Matrix a, b;                   // the same matrix twice where `self`
  bool self = false;             // the gradient of `a` is then that of both sides
  const float* scale = nullptr;  // one value, or one for each row
  bool scale_per_row = false;
  const float *row_bias = nullptr, *col_bias = nullptr;
  const int64_t *row_ids = nullptr, *col_ids = nullptr;
  const float* row_limit = nullptr;
  Positives positives = Positives::kNone;
  bool exclude_self = false, exclude_positives = false;
  int64_t diagonal = 0;
  bool rows = true, cols = true, hardest = false;
};

// Statistics of one side: written by the forward pass, read by the backward pass.
struct SideStats {
  float *max = nullptr, *logsum = nullptr, *pos = nullptr, *neg_max = nullptr;
};

struct Stats {
  SideStats row, col;
};

// The upstream gradient of one side's logsum and pos.
struct SideUpstream {
  const float *logsum = nullptr, *pos = nullptr;
};

struct Upstream {
  SideUpstream row, col;
};

// Gradients, null where not wanted. a and b are dense, in the dtype of the features.
struct Grads {
  void *a = nullptr, *b = nullptr;
  float *scale = nullptr, *row_bias = nullptr, *col_bias = nullptr;
};

// The caller's memory for inner products that the forward pass keeps for the backward pass.
struct TileCache {
  void* data = nullptr;
  int64_t bytes = 0;
};

}  // namespace ito::cpu
