// Transposing while packing: out[k][r] = in[r][k].
#pragma once
#include <cstdint>

namespace {

// Rows of `in` are `in_ld` floats apart, those of `out` `out_ld`. Rows from `rows` to `wanted` are
// not read: they become 0. V is one of the vec_*.hpp; it may specialise this.
template <class V>
struct Transpose {
  static void run(const float* in, int64_t in_ld, int rows, int cols, float* out, int64_t out_ld,
                  int wanted = 0) {
    for (int k = 0; k < cols; ++k) {
      for (int r = 0; r < rows; ++r) out[k * out_ld + r] = in[r * in_ld + k];
      for (int r = rows; r < wanted; ++r) out[k * out_ld + r] = 0;
    }
  }
};

}  // namespace
